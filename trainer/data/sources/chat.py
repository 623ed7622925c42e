"""Records as conversations."""

from trainer.data.chat.chat_rows import parse_chat
from trainer.data.records.base import Record, RecordReader
from trainer.data.sources.base import Document
from trainer.data.sources.chat_options import ChatOptions
from trainer.data.sources.record_source import RecordSource


class ChatSource(RecordSource):
    """Makes one conversation from each record."""

    def __init__(self, reader: RecordReader, options: ChatOptions) -> None:
        super().__init__(reader, options)
        self._format, self._turns_key = options.format, options.turns_key

    def document(self, record: Record, *, domain: str, weight: float) -> Document:
        """Return the conversation of a record."""
        chat = parse_chat(record, format=self._format, turns_key=self._turns_key)
        return Document(name=record.where, domain=domain, text=chat.text, weight=weight, chat=chat)

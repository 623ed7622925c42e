"""Records as conversations."""

from trainer.data.chat.chat_rows import ChatFormat, parse_chat
from trainer.data.records.base import Record, RecordReader
from trainer.data.sources.base import Document
from trainer.data.sources.record_source import RecordRules, RecordSource


class ChatSource(RecordSource):
    """Makes one conversation from each record."""

    def __init__(
        self,
        reader: RecordReader,
        rules: RecordRules,
        *,
        format: ChatFormat | None = None,
        turns_key: str | None = None,
    ) -> None:
        super().__init__(reader, rules)
        self._format: ChatFormat | None = format
        self._turns_key = turns_key

    def document(self, record: Record) -> Document:
        """Return the conversation of a record."""
        chat = parse_chat(record, format=self._format, turns_key=self._turns_key)
        domain, weight = self.domain_and_weight(record)
        return Document(name=record.where, domain=domain, text=chat.text, weight=weight, chat=chat)

"""Conversations of a source, encoded on their way into token files; texts pass unchanged."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from trainer.config.base import Config
from trainer.data.chat.encode_rows import ChatSetting, LongerThanRow, RowEncoder
from trainer.data.records.bad_records import BadRecord, SkippedCounter
from trainer.data.sources.base import Document, Source
from trainer.data.sources.chat_options import ChatOptions
from trainer.data.tokenizers.base import Tokenizer


class DocumentEncoder:
    """Encodes the conversations among the documents of a source."""

    def __init__(self, config: Config, source: Source, *, tokenizer: Tokenizer, chat: ChatSetting | None) -> None:
        """Create the encoder; a source of conversations needs `chat`."""
        self._source, self._encoder, self._drops_long = source, None, False
        if isinstance(config, ChatOptions):
            assert chat is not None, "build_corpus gives it"
            self._encoder = RowEncoder(chat, tokenizer, learn=config.learn, truncate=config.truncate)
            self._drops_long = config.truncate == "drop"

    def usable(self, document: Document, skipped: SkippedCounter) -> Document | None:
        """Return a document with its tokens, if it is a conversation; None if it was skipped and counted.

        Raises:
            DataError: if the conversation cannot be used and such ones are not skipped.
        """
        if document.chat is None or self._encoder is None:
            return document
        try:
            encoded = self._encoder.encode(document.chat, where=document.name)
        except BadRecord as bad:
            if isinstance(bad, LongerThanRow) and self._drops_long:
                skipped.add(bad)
            else:
                self._source.skip(bad, skipped)
            return None
        return replace(document, chat=None, encoded=encoded)

    def all_usable(self, documents: Iterable[Document], skipped: SkippedCounter) -> Iterator[Document]:
        """Yield the documents that can be used, with the tokens of conversations."""
        for document in documents:
            if (usable := self.usable(document, skipped)) is not None:
                yield usable

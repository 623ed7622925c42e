"""One block of a streamed source, and how to build it from the text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.config.base import Config
from trainer.data.chat.encode_rows import ChatSetting
from trainer.data.records.bad_records import SkippedCounter, SkippedRecords
from trainer.data.sources.base import Document
from trainer.data.sources.document_options import StreamOptions
from trainer.data.token_cache.domain_files import write_document, write_sides
from trainer.data.token_cache.encode_documents import DocumentEncoder
from trainer.data.token_cache.ingest import no_documents
from trainer.data.token_cache.input_files import FileState
from trainer.data.token_cache.splits import side_by_hash
from trainer.data.token_cache.token_files import TokenFile, TokenFileInfo
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError


class Mark(Config):
    """Position in the stream: an epoch, a part of the source, and a document of that part."""

    epoch: int = 0
    part: int = 0
    document: int = 0


class BlockInfo(Config):
    """Entry of one block."""

    begin: Mark
    end: Mark
    train: TokenFileInfo
    validation: TokenFileInfo
    """Held-out text. That of block 0 is used for evaluation; that of other blocks is never used."""
    skipped: SkippedRecords = SkippedRecords()

    def content(self) -> tuple[object, ...]:
        """Return position and hashes of the block."""
        return self.begin, self.end, self.train.content(), self.validation.content()


class StreamBlock(NamedTuple):
    """A block, mapped from disk."""

    info: BlockInfo
    train: TokenFile
    validation: TokenFile


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedSource:
    """Inputs that determine the blocks, and the folder that holds them."""

    config: StreamOptions  # the source's options: the process that builds ahead opens the source itself
    files: tuple[FileState, ...]  # local files, as they were when the run started
    folder: Path
    tokenizer: Tokenizer
    held_out: float
    chat: ChatSetting | None = None  # for a source of conversations

    def build(self, begin: Mark, folder: Path) -> BlockInfo:
        """Build a block in a folder; raise DataError if the text is unusable, has changed or has no documents."""
        for file in self.files:
            if FileState.of(Path(file.path)) != file:
                raise DataError(f"{file.path}: changed since the run started; it must not change meanwhile; restart")
        end, skipped = begin, SkippedCounter()
        with write_sides(folder, "", self.tokenizer) as writers:
            for mark, document in self._documents(begin, skipped):
                write_document(writers[side_by_hash(document, self.held_out)], self.tokenizer, document)
                end = mark.model_copy(update={"document": mark.document + 1})
                if writers["train"].num_tokens >= self.config.block_tokens:
                    break
            else:  # the epoch is over
                if end == Mark(epoch=begin.epoch):
                    raise no_documents(f"{self.config.path}:", skipped.total())
                end = Mark(epoch=begin.epoch + 1)
            infos = {side: writer.info() for side, writer in writers.items()}
        return BlockInfo.model_validate({"begin": begin, "end": end, "skipped": skipped.total(), **infos})

    def _documents(self, begin: Mark, skipped: SkippedCounter) -> Iterator[tuple[Mark, Document]]:
        """Yield the documents from `begin` to the end of its epoch; count skipped records."""
        source = self.config.build()
        encoder = DocumentEncoder(self.config, source, tokenizer=self.tokenizer, chat=self.chat)
        parts = source.parts()
        for part in range(begin.part, len(parts)):
            first = begin.document if part == begin.part else 0
            for number, document in enumerate(source.usable_documents(parts[part], skipped, first=first), first):
                if (usable := encoder.usable(document, skipped)) is not None:
                    yield Mark(epoch=begin.epoch, part=part, document=number), usable

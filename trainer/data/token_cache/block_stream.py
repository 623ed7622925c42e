"""A corpus too large to ingest, block by block: some million tokens at a time become token files, and go again.

A block is a function of the text alone: the next documents that are not held out, until there are `block_tokens` tokens
or the epoch ends. So whoever needs one makes it, on any host, as often as it is needed; who knows where it begins need
not read what comes before it.

FOLDER/block-00000007/       its token files; removed once it is three blocks ago, but for those of block 0
FOLDER/block-00000007.json   what it is and where it ends, which is where the next one begins; stays
"""

import logging
import multiprocessing
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from trainer.atomic_io import replace_file
from trainer.config.base import Config
from trainer.data.records.bad_records import SkippedCounter, SkippedRows
from trainer.data.sources.base import Document
from trainer.data.sources.registry import HfStreamSourceConfig
from trainer.data.token_cache.cache import FileState, cache_error, new_name, publish, remove_remains, sole_builder
from trainer.data.token_cache.ingest import SIDES, no_documents, write_text
from trainer.data.token_cache.shards import ShardInfo, TokenFile, TokenWriter, is_intact, open_token_file
from trainer.data.token_cache.signed_records import read_record, record_text
from trainer.data.token_cache.splits import Side, is_held_out
from trainer.data.token_cache.workers import end_with_parent
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError

_log = logging.getLogger(__name__)
_KEPT_BLOCKS = 3
"""Blocks whose token files stay: the one that is read, the one before and the next."""


class Mark(Config):
    """A place in the stream: before a document of a part of the source, in an epoch."""

    epoch: int = 0
    part: int = 0
    document: int = 0


class BlockInfo(Config):
    """Record of one block."""

    begin: Mark
    end: Mark
    train: ShardInfo
    validation: ShardInfo
    """Validation part of the block. That of block 0 is evaluated on; nothing that is held out is ever learned."""
    skipped: SkippedRows = SkippedRows()
    """Rows left out of it."""

    def content(self) -> tuple[object, ...]:
        """Return where it lies and the hashes of what it holds."""
        return self.begin, self.end, self.train.content(), self.validation.content()


class StreamBlock(NamedTuple):
    """A block, mapped from disk."""

    info: BlockInfo
    train: TokenFile
    validation: TokenFile


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedSource:
    """Inputs that determine the blocks, and the folder that holds them."""

    config: HfStreamSourceConfig
    files: tuple[FileState, ...]
    """The local files, as they are when the run starts."""
    folder: Path
    tokenizer: Tokenizer
    held_out: float

    def build(self, begin: Mark, folder: Path) -> BlockInfo:
        """Read the block that begins at a place into a folder.

        Raises:
            DataError: if the text is unusable, has changed or has no documents.
        """
        for file in self.files:
            if FileState.of(Path(file.path)) != file:
                raise DataError(f"{file.path}: changed since the run started; it must stay as it is; start again")
        end, is_epoch_over, skipped = begin, True, SkippedCounter()
        with self._writer(folder, "train") as train, self._writer(folder, "validation") as validation:
            for place, document in self._documents(begin, skipped):
                writer = validation if is_held_out(document.prompt + document.text, self.held_out) else train
                write_text(writer, self.tokenizer, document.text, prompt=document.prompt)
                end = place.model_copy(update={"document": place.document + 1})
                if train.num_tokens >= self.config.block_tokens:
                    is_epoch_over = False
                    break
            infos = train.info(), validation.info()
        if end == begin == Mark(epoch=begin.epoch):
            raise no_documents(f"{self.config.path}:", skipped.total())
        if is_epoch_over:
            end = Mark(epoch=begin.epoch + 1)
        return BlockInfo(begin=begin, end=end, train=infos[0], validation=infos[1], skipped=skipped.total())

    def _documents(self, begin: Mark, skipped: SkippedCounter) -> Iterator[tuple[Mark, Document]]:
        """Yield the documents from a place to the end of its epoch; count what is left out."""
        source = self.config.build()
        parts = source.parts()
        for part in range(begin.part, len(parts)):
            first = begin.document if part == begin.part else 0
            for number, document in enumerate(source.usable(parts[part], skipped, first=first), first):
                yield Mark(epoch=begin.epoch, part=part, document=number), document

    def _writer(self, folder: Path, side: Side) -> TokenWriter:
        vocab_size, end_of_document = self.tokenizer.vocab_size, self.tokenizer.end_of_document
        return TokenWriter(folder, side, vocab_size=vocab_size, end_of_document=end_of_document)


class BlockStream:
    """The blocks of a source by number: from the disk, or made now."""

    def __init__(self, source: StreamedSource) -> None:
        self._source = source
        self._begins = {0: Mark()}
        self._ahead: BaseProcess | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return str(self._source.config.domain)

    def go_on_from(self, index: int, begin: Mark) -> None:
        """Take somebody's word for where a block begins, so that nothing before it must be read."""
        self._begins[index] = begin

    def info(self, index: int) -> BlockInfo:
        """Return what is known of a block; it is made if nobody has made it yet.

        Raises:
            DataError: if the text is unusable.
        """
        known = self._recorded(index)
        return known if known is not None else self.block(index).info

    def block(self, index: int) -> StreamBlock:
        """Return a block; it is made if it is not there, by one process for all of this host that wait for it.

        Raises:
            DataError: if the text is unusable, or not what it was, or the cache cannot be written.
            ResourceError: if the disk is full.
        """
        folder = self._folder(index)
        for is_last in (False, False, True):
            try:
                known = self._made(index)
                return StreamBlock(known, *(self._open(folder, side, getattr(known, side)) for side in SIDES))
            except FileNotFoundError:  # another run that is further on has just removed it
                if is_last:
                    raise
            except OSError as error:
                raise cache_error(str(folder.parent), error) from error
        raise AssertionError("the last attempt returns or raises")

    def read_ahead(self, index: int) -> None:
        """Begin to make a block in a process of its own, unless one is being made."""
        if self._ahead is not None and self._ahead.is_alive():
            return
        known = self._recorded(index)
        if known is not None and self._is_there(self._folder(index), known):
            return
        context = multiprocessing.get_context("spawn")
        arguments = self._source, index, self._begin(index)
        self._ahead = context.Process(target=_read_ahead, args=arguments, daemon=True)
        self._ahead.start()

    def _begin(self, index: int) -> Mark:
        """Return where a block begins; what lies between it and the last known place is read for that."""
        while index not in self._begins:
            last = max(known for known in self._begins if known < index)
            self._begins[last + 1] = self.info(last).end
        return self._begins[index]

    def _made(self, index: int) -> BlockInfo:
        """Return a block whose files are on the disk."""
        folder = self._folder(index)
        known = self._recorded(index)
        if known is None or not self._is_there(folder, known):
            begin = self._begin(index)
            with sole_builder(folder, waiting=lambda: None) as is_alone:
                if is_alone:
                    remove_remains([folder])
                known = self._recorded(index)
                if known is None or not self._is_there(folder, known):
                    if folder.exists():
                        _log.warning("%s: the token cache is damaged; reading the block again", folder)
                    known = self._make(index, begin, known)
        return known

    def _make(self, index: int, begin: Mark, known: BlockInfo | None) -> BlockInfo:
        folder = self._folder(index)
        temporary = new_name(folder)
        temporary.mkdir()
        try:
            info = self._source.build(begin, temporary)
            if known is not None and info.content() != known.content():
                raise DataError(
                    f"data.sources: {self.name}: block {index} is not what it was; a text must stay the same while it "
                    f"is learned; restore it, or remove {folder.parent} and start a new run"
                )
            publish(temporary, folder, unless=lambda: self._is_there(folder, info))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        replace_file(folder.with_suffix(".json"), record_text(info, of=_name(folder)))
        if index > _KEPT_BLOCKS:  # what is held out of block 0 is evaluated on
            shutil.rmtree(self._folder(index - _KEPT_BLOCKS), ignore_errors=True)
        return info

    def _recorded(self, index: int) -> BlockInfo | None:
        folder = self._folder(index)
        try:
            return read_record(folder.with_suffix(".json"), BlockInfo, of=_name(folder))
        except OSError:
            return None
        except ValueError:
            _log.warning("%s.json: the token cache is damaged; reading the block again", folder)
            return None

    def _is_there(self, folder: Path, info: BlockInfo) -> bool:
        vocab_size = self._source.tokenizer.vocab_size
        return all(is_intact(folder, side, getattr(info, side), vocab_size=vocab_size) for side in SIDES)

    def _open(self, folder: Path, side: Side, info: ShardInfo) -> TokenFile:
        return open_token_file(folder, side, info, vocab_size=self._source.tokenizer.vocab_size)

    def _folder(self, index: int) -> Path:
        return self._source.folder / f"block-{index:08d}"


def _name(folder: Path) -> str:
    """Return what a block is a block of, and which."""
    return f"{folder.parent.name}/{folder.name}"


def _read_ahead(source: StreamedSource, index: int, begin: Mark) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the run, and ends this with it
    threading.Thread(target=end_with_parent, daemon=True).start()
    stream = BlockStream(source)
    stream.go_on_from(index, begin)
    with suppress(DataError, OSError):  # whoever needs the block meets the same, and says so
        stream.block(index)

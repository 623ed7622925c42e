"""Streaming of a corpus too large to ingest: blocks of some million tokens, built ahead of training and then removed.

A block depends on the text alone: the next documents that are not held out, until there are `block_tokens` tokens or
the epoch ends. So any host can build it, as often as needed, and a process that knows where it begins need not read
the text before it.

FOLDER/block-00000007/       its token files; removed three blocks later, except those of block 0
FOLDER/block-00000007.json   its signed entry with the position of the next block; kept
"""

import logging
import multiprocessing
import shutil
import signal
import threading
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from trainer.atomic_io import replace_file
from trainer.data.token_cache.cache_folder import build_lock, cache_error, publish, remove_abandoned, temporary_path
from trainer.data.token_cache.domain_files import SIDES
from trainer.data.token_cache.signed_json import read_signed, signed_json
from trainer.data.token_cache.splits import Side
from trainer.data.token_cache.stream_block import BlockInfo, Mark, StreamBlock, StreamedSource
from trainer.data.token_cache.token_files import TokenFile, TokenFileInfo, is_intact, open_token_file
from trainer.data.token_cache.workers import end_with_parent
from trainer.errors import DataError

_log = logging.getLogger(__name__)
_MAX_ATTEMPTS = 3
_KEPT_BLOCKS = 3  # number of blocks whose token files are kept: the current, the previous and the next one


class BlockStream:
    """Blocks of a source by number, from the disk or built on demand."""

    def __init__(self, source: StreamedSource) -> None:
        self._source = source
        self._begins = {0: Mark()}
        self._prefetch: BaseProcess | None = None

    @property
    def name(self) -> str:
        """Domain of the stream, for messages."""
        return str(self._source.config.domain)

    def resume_at(self, index: int, begin: Mark) -> None:
        """Set where a block begins, so that the text before it need not be read."""
        self._begins[index] = begin

    def info(self, index: int) -> BlockInfo:
        """Return the entry of a block, which is built if it never was; raise DataError if the text is unusable."""
        info = self._stored_info(index)
        return info if info is not None else self.block(index).info

    def block(self, index: int) -> StreamBlock:
        """Return a block. If it is missing, one process of this host builds it and the others wait.

        Raises DataError if the text is unusable or has changed, or the cache cannot be written.
        """
        folder, attempt = self._folder(index), 0
        while True:
            try:
                info = self._ensure_built(index)
                return StreamBlock(info, *(self._open(folder, side, getattr(info, side)) for side in SIDES))
            except FileNotFoundError:  # just removed by a run that is further ahead
                attempt += 1
                if attempt == _MAX_ATTEMPTS:
                    raise
            except OSError as error:
                raise cache_error(str(folder.parent), error) from error

    def prefetch(self, index: int) -> None:
        """Start to build a block in the background, unless one is being built."""
        is_building = self._prefetch is not None and self._prefetch.is_alive()
        if is_building or self._intact_info(index) is not None:
            return
        context = multiprocessing.get_context("spawn")
        arguments = self._source, index, self._begin(index)
        self._prefetch = context.Process(target=_build_in_background, args=arguments, daemon=True)
        self._prefetch.start()

    def _begin(self, index: int) -> Mark:
        """Return where a block begins; reads the text from the last known position to there."""
        while index not in self._begins:
            last = max(block for block in self._begins if block < index)
            self._begins[last + 1] = self.info(last).end
        return self._begins[index]

    def _ensure_built(self, index: int) -> BlockInfo:
        """Return the entry of a block whose files exist."""
        if (info := self._intact_info(index)) is not None:
            return info
        folder, begin = self._folder(index), self._begin(index)
        with build_lock(folder, waiting=lambda: None) as is_alone:
            if is_alone:
                remove_abandoned([folder])
            if (info := self._intact_info(index)) is not None:  # another process has built it meanwhile
                return info
            if folder.exists():
                _log.warning("%s: the token cache is damaged; reading the block again", folder)
            return self._build(index, begin)

    def _build(self, index: int, begin: Mark) -> BlockInfo:
        folder, previous = self._folder(index), self._stored_info(index)
        temporary = temporary_path(folder)
        temporary.mkdir()
        try:
            info = self._source.build(begin, temporary)
            if previous is not None and info.content() != previous.content():
                raise DataError(
                    f"data.sources: {self.name}: block {index} is not what it was before; a text must not change "
                    f"during training; restore it, or remove {folder.parent} and start a new run"
                )
            publish(temporary, folder, unless=lambda: self._is_intact(folder, info))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        replace_file(folder.with_suffix(".json"), signed_json(info, of=f"{folder.parent.name}/{folder.name}"))
        if index > _KEPT_BLOCKS:  # block 0 is needed for evaluation
            shutil.rmtree(self._folder(index - _KEPT_BLOCKS), ignore_errors=True)
        return info

    def _stored_info(self, index: int) -> BlockInfo | None:
        folder = self._folder(index)
        try:
            return read_signed(folder.with_suffix(".json"), BlockInfo, of=f"{folder.parent.name}/{folder.name}")
        except OSError:
            return None
        except ValueError:
            _log.warning("%s.json: the token cache is damaged; reading the block again", folder)
            return None

    def _intact_info(self, index: int) -> BlockInfo | None:
        info = self._stored_info(index)
        return info if info is not None and self._is_intact(self._folder(index), info) else None

    def _is_intact(self, folder: Path, info: BlockInfo) -> bool:
        vocab_size = self._source.tokenizer.vocab_size
        return all(is_intact(folder, side, getattr(info, side), vocab_size=vocab_size) for side in SIDES)

    def _open(self, folder: Path, side: Side, info: TokenFileInfo) -> TokenFile:
        return open_token_file(folder, side, info, vocab_size=self._source.tokenizer.vocab_size)

    def _folder(self, index: int) -> Path:
        return self._source.folder / f"block-{index:08d}"


def _build_in_background(source: StreamedSource, index: int, begin: Mark) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, with which this process ends
    threading.Thread(target=end_with_parent, daemon=True).start()
    stream = BlockStream(source)
    stream.resume_at(index, begin)
    with suppress(DataError, OSError):  # the run meets the same error when it needs the block, and reports it
        stream.block(index)

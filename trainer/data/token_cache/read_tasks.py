"""Reading one part of a source: a piece of work that any process can do, and that is done once.

CACHE/NAME.parts/part-00007     what was made of a part: token files, and part.json, which was written last
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.config.base import Config
from trainer.data.config import SplitConfig
from trainer.data.records.bad_records import SkippedCounter, SkippedRows
from trainer.data.records.base import SourcePart
from trainer.data.sources.registry import SourceConfig
from trainer.data.token_cache.ingest import SIDES, DomainInfo, count_characters, ingest
from trainer.data.token_cache.join_parts import IngestedPart
from trainer.data.token_cache.shards import is_intact
from trainer.data.token_cache.signed_records import read_record, record_text
from trainer.data.tokenizers.base import Tokenizer

_UNKNOWN_BYTES = 16 << 20
"""Assumed size of a part whose size is not known."""
RESULT = "part.json"
"""Its record: what was made of it."""


class _Result(Config):
    """Result of reading a part."""

    domains: list[DomainInfo]
    skipped: SkippedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTask:
    """A part to be read into a folder."""

    source: SourceConfig
    part: SourcePart | None
    """None: the whole source by one process, which a tail cut through several documents needs."""
    split: SplitConfig
    folder: Path

    @property
    def size_bytes(self) -> int:
        """Size of the files in bytes; a guess where it is not known."""
        return (self.part.size_bytes if self.part is not None else 0) or _UNKNOWN_BYTES

    def is_done(self, tokenizer: Tokenizer) -> bool:
        """Tell whether somebody has read the part before, and what that made is still what it was."""
        try:
            domains = self.result().domains
        except (OSError, ValueError):
            return False
        return all(
            is_intact(
                self.folder,
                f"{domain.name}.{side}",
                getattr(domain, side),
                vocab_size=tokenizer.vocab_size,
                verify=True,
            )
            for domain in domains
            for side in SIDES
        )

    def result(self) -> IngestedPart:
        """Return what was made of the part."""
        result = read_record(self.folder / RESULT, _Result, of=self.folder.name)
        return IngestedPart(self.folder, result.domains, result.skipped)

    def run(self, tokenizer: Tokenizer, advance: Callable[[int], None]) -> None:
        """Read the part; `advance` is told the bytes of text that are done, after each document.

        Raises:
            DataError: if it is unusable.
            OSError: if the folder cannot be written.
        """
        if self.folder.exists():  # what a killed process left
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        source, skipped = self.source.build(), SkippedCounter()
        domains = ingest(
            source.usable(self.part, skipped),
            self.folder,
            tokenizer=tokenizer,
            split=self.split,
            advance=advance,
            lengths=count_characters(source.documents()) if self.split.kind == "tail" else None,
        )
        (self.folder / RESULT).write_text(
            record_text(_Result(domains=domains, skipped=skipped.total()), of=self.folder.name)
        )

"""Ingestion of one part of a source: a task for any process, which need not be repeated once it is done.

CACHE/NAME.parts/part-00007     the token files of a part, and part.json, which is written last
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.config.base import Config
from trainer.config.build_plugin import plugin_errors
from trainer.data.chat.encode_rows import ChatSetting
from trainer.data.records.bad_records import SkippedCounter, SkippedRecords
from trainer.data.records.base import SourcePart
from trainer.data.sources.registry import SourceConfig
from trainer.data.token_cache.domain_files import DomainInfo, is_domain_intact
from trainer.data.token_cache.encode_documents import DocumentEncoder
from trainer.data.token_cache.ingest import count_characters, ingest
from trainer.data.token_cache.signed_json import read_signed, signed_json
from trainer.data.token_cache.splits import SplitConfig
from trainer.data.tokenizers.base import Tokenizer

_ASSUMED_BYTES = 16 << 20  # size of a part of unknown size
RESULT = "part.json"  # file with the result of a task


class ReadResult(Config):
    """Domains of an ingested part, and the records that were skipped."""

    domains: list[DomainInfo]
    skipped: SkippedRecords


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTask:
    """A part to ingest, and the folder for its token files."""

    source: SourceConfig  # the source's options: each process opens the source itself
    part: SourcePart | None  # None for the whole source, which a tail split across documents needs
    split: SplitConfig
    folder: Path
    chat: ChatSetting | None = None  # for a source of conversations

    @property
    def size_bytes(self) -> int:
        """Size of the files in bytes; a guess if it is unknown."""
        return (self.part.size_bytes if self.part is not None else 0) or _ASSUMED_BYTES

    def is_done(self, tokenizer: Tokenizer) -> bool:
        """Return whether the part was ingested before and its files are intact."""
        try:
            domains = self.result().domains
        except (OSError, ValueError):
            return False
        return all(
            is_domain_intact(self.folder, domain, vocab_size=tokenizer.vocab_size, verify=True) for domain in domains
        )

    def result(self) -> ReadResult:
        """Return the result of a part; raise OSError if it cannot be read, or ValueError if it is damaged."""
        return read_signed(self.folder / RESULT, ReadResult, of=self.folder.name)

    def run(self, tokenizer: Tokenizer, advance: Callable[[int], None]) -> None:
        """Ingest the part; call `advance` with the bytes of text of each document."""
        if self.folder.exists():  # left by a killed process
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        source, skipped = self.source.build(), SkippedCounter()
        encoder = DocumentEncoder(self.source, source, tokenizer=tokenizer, chat=self.chat)
        with plugin_errors(self.source, f"data.sources: {self.source.kind}: reading it"):
            lengths = None
            if self.split.kind == "tail":
                lengths = count_characters(encoder.all_usable(source.documents(), SkippedCounter()))
            domains = ingest(
                encoder.all_usable(source.usable_documents(self.part, skipped), skipped),
                self.folder,
                tokenizer=tokenizer,
                split=self.split,
                advance=advance,
                lengths=lengths,
            )
        result = ReadResult(domains=domains, skipped=skipped.total())
        (self.folder / RESULT).write_text(signed_json(result, of=self.folder.name))

"""Records as documents: what all sources of records have in common."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.records.bad_records import BadRecord, raise_on_bad
from trainer.data.records.base import Record, RecordReader, SourcePart
from trainer.data.records.filters import FilterConfig
from trainer.data.sources.base import DOMAIN_NAME, Document, Source
from trainer.data.sources.loss_weight import loss_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRules:
    """Which records are documents, and of which domain and weight: the options of `DocumentsOptions`."""

    domain: str
    filters: Sequence[FilterConfig] = ()
    domain_key: str | None = None
    weight_key: str | None = None
    weight: float = 1.0
    skips_bad_records: bool = False


class RecordSource(Source):
    """Makes one document from each record that passes the filters."""

    rejects_copies = True
    has_on_bad_row = True

    def __init__(self, reader: RecordReader, rules: RecordRules) -> None:
        self.weight, self.skips_bad_records = rules.weight, rules.skips_bad_records
        self._reader, self._rules = reader, rules

    @abstractmethod
    def document(self, record: Record) -> Document:
        """Return the document of a record; raise BadRecord if it has none."""

    def files(self) -> list[Path]:
        """Return the local files of the reader."""
        return self._reader.files()

    def folder_notes(self) -> list[str]:
        """Return a line for each folder: which of its files are read and which are not."""
        return self._reader.folder_notes()

    def origin(self) -> str:
        """Return the addresses and versions of remote files."""
        return self._reader.origin()

    def parts(self) -> Sequence[SourcePart]:
        """Return the parts of the reader."""
        return self._reader.parts()

    def read(self, part: SourcePart) -> Iterator[Document]:
        """Yield a document for each record of a part that passes the filters."""
        return raise_on_bad(self.entries(part))

    def entries(self, part: SourcePart) -> Iterator[Document | BadRecord]:
        """Yield a document for each record of a part that passes the filters, or the record's error."""
        for record in self._reader.entries(part):
            entry = record if isinstance(record, BadRecord) else self._entry(record)
            if entry is not None:
                yield entry

    def _entry(self, record: Record) -> Document | BadRecord | None:
        """Return the document of a record; None if it does not pass the filters."""
        try:
            is_kept = all(condition.keeps(record) for condition in self._rules.filters)
            return self.document(record) if is_kept else None
        except BadRecord as bad:
            return bad

    def domain_and_weight(self, record: Record) -> tuple[str, float]:
        """Return the domain of a record and its weight in the training loss; raise BadRecord if it has none."""
        domain_key = self._rules.domain_key
        domain = self._rules.domain if domain_key is None else record.text(domain_key)
        if not DOMAIN_NAME.fullmatch(domain):
            raise BadRecord(
                f"{record.where}: domain {domain!r} is not a valid name; names are 1 to 64 letters, digits, dots, "
                "dashes and underscores; correct the record or set another domain_key",
                reason="of a domain that is no name",
            )
        weight_key = self._rules.weight_key
        return domain, 1.0 if weight_key is None else loss_weight(record, weight_key)

"""Records as documents."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.data.records.bad_records import BadRecord, raise_on_bad
from trainer.data.records.base import Record, RecordReader, SourcePart
from trainer.data.records.filters import FilterConfig
from trainer.data.records.template import Template
from trainer.data.records.text_files import NO_TEXT
from trainer.data.sources.base import DOMAIN_NAME, Document, Source
from trainer.data.sources.loss_weight import loss_weight


class TableSource(Source):
    """Makes one document from each record."""

    rejects_copies = True
    has_on_bad_row = True

    def __init__(
        self,
        reader: RecordReader,
        *,
        domain: str,
        text: str = "{text}",
        prompt: str = "",
        filters: Sequence[FilterConfig] = (),
        domain_key: str | None = None,
        weight_key: str | None = None,
        weight: float = 1.0,
        skips_bad_records: bool = False,
    ) -> None:
        """Create the source, with the options of `TableConfig`."""
        self.weight, self.skips_bad_records = weight, skips_bad_records
        self._reader, self._filters = reader, filters
        self._text_template, self._text, self._prompt = text, Template(text), Template(prompt)
        self._domain, self._domain_key, self._weight_key = domain, domain_key, weight_key

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
            is_kept = all(condition.keeps(record) for condition in self._filters)
            return self._document(record) if is_kept else None
        except BadRecord as bad:
            return bad

    def _document(self, record: Record) -> Document:
        text = self._text.render(record)
        if not text.strip():
            found = f"{record.where}: {self._text_template!r} holds no text (empty or only white space)"
            raise BadRecord(f"{found}; every record needs some; remove it", reason=NO_TEXT)
        domain = self._domain if self._domain_key is None else record.text(self._domain_key)
        if not DOMAIN_NAME.fullmatch(domain):
            raise BadRecord(
                f"{record.where}: domain {domain!r} is not a valid name; names are 1 to 64 letters, digits, dots, "
                "dashes and underscores; correct the record or set another domain_key",
                reason="of a domain that is no name",
            )
        weight = 1.0 if self._weight_key is None else loss_weight(record, self._weight_key)
        return Document(name=record.where, domain=domain, text=text, prompt=self._prompt.render(record), weight=weight)

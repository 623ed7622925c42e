"""Rows as documents."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from trainer.data.records.bad_records import BadRow, usable
from trainer.data.records.base import Row, Rows, SourcePart
from trainer.data.records.template import Template
from trainer.data.sources.base import Document, Source
from trainer.data.sources.files import NO_TEXT
from trainer.data.sources.registry import Domain, TableConfig

_DOMAIN = TypeAdapter(Domain)


class TableSource(Source):
    """Documents made from rows, each from one."""

    rejects_copies = True
    has_on_bad_row = True

    def __init__(self, rows: Rows, config: TableConfig) -> None:
        self.weight = config.weight
        self.skips_bad_rows = config.on_bad_row == "skip"
        self._rows = rows
        self._config = config
        self._text, self._prompt = Template(config.text), Template(config.prompt)
        self._known_domains: set[str] = set()

    def files(self) -> list[Path]:
        """Return the local files, in the order in which they are read.

        Raises:
            DataError: if there are none.
        """
        return self._rows.files()

    def taken(self) -> list[str]:
        """Return a line for each folder that files are taken from."""
        return self._rows.taken()

    def origin(self) -> str:
        """Return the addresses of what is not local, with their versions."""
        return self._rows.origin()

    def parts(self) -> Sequence[SourcePart]:
        """Return the parts of the rows.

        Raises:
            DataError: if what is to be read is not there.
        """
        return self._rows.parts()

    def read(self, part: SourcePart) -> Iterator[Document]:
        """Yield a document for each row of a part that passes the filters.

        Raises:
            DataError: naming file and row, if a row is unreadable or does not have what is asked of it.
        """
        return usable(self.entries(part))

    def entries(self, part: SourcePart) -> Iterator[Document | BadRow]:
        """Yield a document for each row of a part that passes the filters, or what is wrong with the row.

        Raises:
            DataError: naming the file, if it cannot be read to its end.
        """
        for row in self._rows.entries(part):
            entry = row if isinstance(row, BadRow) else self._entry(row)
            if entry is not None:
                yield entry

    def _entry(self, row: Row) -> Document | BadRow | None:
        """Return the document of a row; None if it does not pass the filters."""
        try:
            is_kept = all(condition.keeps(row) for condition in self._config.filters)
            return self._document(row) if is_kept else None
        except BadRow as bad:
            return bad

    def _document(self, row: Row) -> Document:
        text = self._text.render(row)
        if not text.strip():
            raise BadRow(
                f"{row.where}: {self._config.text!r} holds no text (empty or only white space); every row needs some; "
                "remove it",
                reason=NO_TEXT,
            )
        return Document(name=row.where, domain=self._domain(row), text=text, prompt=self._prompt.render(row))

    def _domain(self, row: Row) -> str:
        if self._config.domain_key is None:
            return self._config.domain
        domain = row.text(self._config.domain_key)
        if domain not in self._known_domains:
            try:
                _DOMAIN.validate_python(domain)
            except ValidationError as error:
                raise BadRow(
                    f"{row.where}: domain {domain!r} is no name; names are 1 to 64 letters, digits, dots, dashes and "
                    "underscores; correct the row or set another domain_key",
                    reason="of a domain that is no name",
                ) from error
            self._known_domains.add(domain)
        return domain

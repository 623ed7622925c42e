"""Rows as documents."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from trainer.data.rows.base import Part, Row, Rows
from trainer.data.rows.template import Template
from trainer.data.sources.base import Document, Source
from trainer.data.sources.registry import Domain, TableConfig
from trainer.errors import DataError

_DOMAIN = TypeAdapter(Domain)


class TableSource(Source):
    """Documents made from rows, each from one."""

    rejects_copies = True

    def __init__(self, rows: Rows, config: TableConfig) -> None:
        self.weight = config.weight
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

    def origin(self) -> str:
        """Return the addresses of what is not local, with their versions."""
        return self._rows.origin()

    def parts(self) -> Sequence[Part]:
        """Return the parts of the rows.

        Raises:
            DataError: if what is to be read is not there.
        """
        return self._rows.parts()

    def read(self, part: Part) -> Iterator[Document]:
        """Yield a document for each row of a part that passes the filters.

        Raises:
            DataError: naming file and row, if a row is unreadable or does not have what is asked of it.
        """
        for row in self._rows.read(part):
            if all(condition.keeps(row) for condition in self._config.filters):
                yield self._document(row)

    def _document(self, row: Row) -> Document:
        text = self._text.render(row)
        if not text.strip():
            raise DataError(
                f"{row.where}: {self._config.text!r} holds no text (empty or only white space); every row needs some; "
                "remove it"
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
                raise DataError(
                    f"{row.where}: domain {domain!r} is no name; names are 1 to 64 letters, digits, dots, dashes and "
                    "underscores; correct the row or set another domain_key"
                ) from error
            self._known_domains.add(domain)
        return domain

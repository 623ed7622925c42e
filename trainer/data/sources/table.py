"""Records as documents of text."""

from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import Record, RecordReader
from trainer.data.records.template import Template
from trainer.data.records.text_files import NO_TEXT
from trainer.data.sources.base import Document
from trainer.data.sources.record_source import RecordRules, RecordSource


class TableSource(RecordSource):
    """Makes one document of text from each record."""

    def __init__(self, reader: RecordReader, rules: RecordRules, *, text: str = "{text}", prompt: str = "") -> None:
        super().__init__(reader, rules)
        self._text_template, self._text, self._prompt = text, Template(text), Template(prompt)

    def document(self, record: Record) -> Document:
        """Return the text of a record."""
        text = self._text.render(record)
        if not text.strip():
            found = f"{record.where}: {self._text_template!r} holds no text (empty or only white space)"
            raise BadRecord(f"{found}; every record needs some; remove it", reason=NO_TEXT)
        domain, weight = self.domain_and_weight(record)
        return Document(name=record.where, domain=domain, text=text, prompt=self._prompt.render(record), weight=weight)

"""Record filters: conditions on columns. Imports no torch."""

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from trainer.config.base import Config, Problem
from trainer.config.nodes import shown
from trainer.config.numbers import Whole
from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import WRONG_TYPE, Record, type_name

Scalar = str | int | float | bool | None


def _check_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is not a regular expression ({error.msg} at position {error.pos})") from error
    except (RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"is not a regular expression that Python can use ({type(error).__name__})") from error
    return text


class FilterConfig(Config):
    """A filter that keeps the records for which all given conditions hold."""

    column: Annotated[str, Field(min_length=1, max_length=1000)]
    """Name of the column; a.b is key b of column a."""
    one_of: Annotated[list[Scalar], Field(min_length=1)] | None = None
    """The value is one of these."""
    none_of: Annotated[list[Scalar], Field(min_length=1)] | None = None
    """The value is none of these."""
    at_least: float | None = None
    """The number is this or greater."""
    at_most: float | None = None
    """The number is this or less."""
    min_characters: Whole | None = None
    """The string has at least this many characters."""
    max_characters: Whole | None = None
    """The string has at most this many characters."""
    matches: Annotated[str, AfterValidator(_check_pattern)] | None = None
    """This regular expression matches somewhere in the string."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a filter without conditions, or one that no record can pass."""
        given = self.model_dump(exclude={"column"}, exclude_none=True)
        if not given:
            yield Problem(
                "column", f"{shown(self.column)} has no condition; add one of one_of, none_of, at_least, matches, ..."
            )
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            yield Problem("at_least", f"{self.at_least:g} is more than at_most {self.at_most:g}: no record passes")
        low, high = self.min_characters, self.max_characters
        if low is not None and high is not None and low > high:
            yield Problem("min_characters", f"{low} is more than max_characters {high}: no record passes")

    def keeps(self, record: Record) -> bool:
        """Return whether a record passes; raise BadRecord if it has no such column, or the value is of another type."""
        value = record.value(self.column)
        if self.one_of is not None and not _is_among(value, self.one_of):
            return False
        if self.none_of is not None and _is_among(value, self.none_of):
            return False
        return self._number_fits(record, value) and self._string_fits(record)

    def _number_fits(self, record: Record, value: object) -> bool:
        if self.at_least is None and self.at_most is None:
            return True
        if not isinstance(value, int | float) or isinstance(value, bool):
            found = f"{record.where}: {self.column!r} is {type_name(value)}"
            message = f"{found}; at_least and at_most need a number; correct the record or the filter"
            raise BadRecord(message, reason=WRONG_TYPE)
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def _string_fits(self, record: Record) -> bool:
        if self.min_characters is None and self.max_characters is None and self.matches is None:
            return True
        text, low, high = record.text(self.column), self.min_characters or 0, self.max_characters
        if len(text) < low or (high is not None and len(text) > high):
            return False
        return self.matches is None or re.search(self.matches, text) is not None


def _is_among(value: object, values: list[Scalar]) -> bool:
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)

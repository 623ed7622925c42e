from typing import Any

import pytest
from pydantic import ValidationError

from trainer.data.records.base import Record
from trainer.data.records.filters import FilterConfig
from trainer.errors import DataError


def keeps(value: Any, **conditions: Any) -> bool:
    return FilterConfig(column="x", **conditions).keeps(Record("f:1", {"x": value}))


@pytest.mark.parametrize(
    ("conditions", "kept", "left_out"),
    [
        ({"one_of": ["de", "fr"]}, ["de", "fr"], ["en", "", None, 1]),
        ({"one_of": [1]}, [1, 1.0], [True, 2, "1"]),
        ({"one_of": [None]}, [None], ["", 0]),
        ({"none_of": [None, ""]}, ["x", 0], [None, ""]),
        ({"at_least": 2}, [2, 3.5], [1.9, -3]),
        ({"at_most": 2}, [2, -1], [2.1]),
        ({"at_least": 1, "at_most": 2}, [1, 1.5, 2], [0, 3]),
        ({"min_characters": 2}, ["ab", "äö"], ["", "a"]),
        ({"max_characters": 2}, ["", "ab"], ["abc"]),
        ({"matches": r"^\d+$"}, ["12"], ["12a", ""]),
        ({"one_of": ["ab", "abc"], "max_characters": 2}, ["ab"], ["abc", "x"]),
    ],
)
def test_a_record_passes_if_every_condition_holds(conditions, kept, left_out):
    assert [value for value in [*kept, *left_out] if keeps(value, **conditions)] == kept


@pytest.mark.parametrize(
    ("value", "conditions"),
    [("3", {"at_least": 1}), (True, {"at_most": 1}), (None, {"at_least": 0}), (3, {"matches": "3"})],
)
def test_a_value_of_another_type_is_an_error_and_not_left_out(value, conditions):
    with pytest.raises(DataError, match=r"^f:1: 'x' is "):
        keeps(value, **conditions)


def test_a_missing_column_is_an_error():
    with pytest.raises(DataError, match=r"^f:1: no column 'y'"):
        FilterConfig(column="y", one_of=[1]).keeps(Record("f:1", {"x": 1}))


@pytest.mark.parametrize(
    "conditions",
    [
        {},
        {"one_of": []},
        {"at_least": 2, "at_most": 1},
        {"min_characters": 3, "max_characters": 2},
        {"matches": "("},
    ],
)
def test_a_filter_without_conditions_or_that_no_record_passes_is_refused(conditions):
    with pytest.raises(ValidationError):
        FilterConfig(column="x", **conditions)

import pytest

from trainer.data.records.base import Record
from trainer.data.records.template import Template, check_template
from trainer.errors import DataError


def render(template: str, **values: object) -> str:
    return Template(check_template(template)).render(Record("f:3", values))


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("{text}", {"text": "a"}, "a"),
        ("{en} = {de}\n", {"en": "dog", "de": "Hund"}, "dog = Hund\n"),
        ("{a}{a}", {"a": "x"}, "xx"),
        ("no column", {}, "no column"),
        ("{{{a}}}", {"a": "x"}, "{x}"),
        ("{a}", {"a": "{b}"}, "{b}"),
        ("{t.en}", {"t": {"en": "dog"}}, "dog"),
        ("{t.x.y}", {"t": {"x": {"y": "z"}}}, "z"),
        ("{t.en}", {"t.en": "whole name", "t": {"en": "dog"}}, "whole name"),
        ("{n:d} {f:g} {n:g}", {"n": 3, "f": 0.5}, "3 0.5 3"),
        ("{a:g} {b:g} {c:g}", {"a": 978300760, "b": 19.999999, "c": 19.0}, "978300760 19.999999 19"),
        ("{l:bad|good}", {"l": 1}, "good"),
        ("{l:no|yes}", {"l": False}, "no"),
        ("{l:|yes}", {"l": 0}, ""),
        ("{two words}", {"two words": "x"}, "x"),
    ],
)
def test_a_record_is_rendered(template, values, text):
    assert render(template, **values) == text


@pytest.mark.parametrize(
    ("template", "values", "reason"),
    [
        (
            "{tex}",
            {"text": 1},
            "no column 'tex'; the record has text (did you mean 'text'?); correct the name or the record",
        ),
        ("{t.de}", {"t": {"en": "dog"}}, "no column 't.de'; the record has en; correct the name or the record"),
        ("{t.en}", {"t": "x"}, "no column 't.en'; the parent of 'en' is a string; correct the name or the record"),
        ("{a}", {"a": 3}, "'a' is a number; it must be a string; correct or remove the record"),
        ("{a}", {"a": None}, "'a' is null; it must be a string; correct or remove the record"),
        ("{a}", {"a": ["x"]}, "'a' is a list; it must be a string; correct or remove the record"),
        ("{a:d}", {"a": 3.5}, "'a' is 3.5; it must be a whole number; correct or remove the record"),
        ("{a:d}", {"a": "3"}, "'a' is a string; it must be a whole number; correct or remove the record"),
        ("{a:g}", {"a": None}, "'a' is null; it must be a number; correct or remove the record"),
        ("{a:x|y}", {"a": 2}, "'a' is 2; it must be a whole number from 0 to 1; correct or remove the record"),
        ("{a:x|y}", {"a": -1}, "'a' is -1; it must be a whole number from 0 to 1; correct or remove the record"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_named_with_its_record(template, values, reason):
    with pytest.raises(DataError) as error:
        render(template, **values)
    assert str(error.value) == f"f:3: {reason}"


@pytest.mark.parametrize("template", ["{", "}", "{a", "a}", "{}", "{:d}", "{a:x}", "{a{b}}"])
def test_a_template_that_makes_no_sense_is_refused(template):
    with pytest.raises(ValueError, match="has "):
        check_template(template)


def test_columns_are_listed_in_order():
    assert Template("{b} {a:d} {t.en}").columns == ["b", "a", "t.en"]

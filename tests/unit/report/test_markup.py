"""Foreign text in markup."""

import unicodedata
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from trainer.report.markup import PageTable, figure_number, foreign, quoted, spelled, spelled_token, table


@given(st.text(st.characters(), max_size=30))
def test_any_text_is_one_text_without_controls_in_an_element_and_in_an_attribute(text: str) -> None:
    parsed = ElementTree.fromstring(f'<p title="{quoted(text)}">{foreign(text)}</p>')
    shown = parsed[0].text or ""
    assert parsed.get("title") == shown
    assert len(list(parsed.iter())) == 2
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in shown)


def test_what_cannot_be_seen_is_spelled() -> None:
    assert spelled("a\tb\n\x1b[31m\x00\u202e\u200b\x85") == "a\\tb\\n\\x1b[31m\\x00\\u202e\\u200b\\x85"
    assert (
        spelled("Z\u00fcrich \u0442\u0435\u043a\u0441\u0442 \u4e2d")
        == "Z\u00fcrich \u0442\u0435\u043a\u0441\u0442 \u4e2d"
    )
    assert spelled_token("  le ") == "\u2423\u2423le\u2423"
    assert spelled_token(" ") == "\u2423"
    assert spelled_token("") == "(empty)"


def test_numbers_of_a_table_keep_all_their_digits_for_sorting() -> None:
    content = PageTable(heads=["a<b"], rows=[[0.1234567890123], [None], ["<i>"], [123456]])
    cells = list(ElementTree.fromstring(table(content).strip()).iter("td"))
    assert [cell.text for cell in cells] == ["0.12346", "-", "<i>", "123\u202f456"]
    assert [cell.get("data-value") for cell in cells] == ["0.1234567890123", None, None, "123456"]


def test_a_number_that_is_none_or_not_finite_is_named() -> None:
    assert [figure_number(value) for value in (None, float("nan"), float("inf"), 2.0, 3e-5)] == [
        "-",
        "nan",
        "inf",
        "2",
        "3e-05",
    ]

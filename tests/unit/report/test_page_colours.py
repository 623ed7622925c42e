"""Contrast of the page's colours."""

import re

import pytest

from trainer.report.page_colours import COLOURS, SERIES, Theme, contrast, read_pairs, scale_colours, seen_pairs
from trainer.report.page_style import style_sheet

THEMES: tuple[Theme, ...] = ("light", "dark")


def test_contrast_is_that_of_wcag() -> None:
    """The values are those that WCAG's own examples and its definition give."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#ffffff", "#ffffff") == 1.0
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert contrast("#ff0000", "#ffffff") == pytest.approx(4.0, abs=0.005)


@pytest.mark.parametrize("theme", THEMES)
def test_all_text_has_the_contrast_of_wcag_aa(theme: Theme) -> None:
    low = {pair: ratio for pair, ink, behind in read_pairs(theme) if (ratio := contrast(ink, behind)) < 4.5}
    assert low == {}


@pytest.mark.parametrize("theme", THEMES)
def test_all_curves_and_axes_have_the_contrast_of_wcag_aa(theme: Theme) -> None:
    low = {pair: ratio for pair, ink, behind in seen_pairs(theme) if (ratio := contrast(ink, behind)) < 3}
    assert low == {}


def test_the_style_sheet_has_no_colour_that_is_not_measured() -> None:
    known = {colour for theme in THEMES for colour in (*COLOURS[theme].values(), *SERIES[theme])}
    known |= {colour for theme in THEMES for pair in scale_colours(theme) for colour in pair}
    rules = re.sub(r"#readout\b", "", style_sheet())
    assert set(re.findall(r"#[0-9a-fA-F]{3,8}\b", rules)) == known
    assert not re.search(r"\b(rgba?|hsla?|oklch|color-mix)\(|:\s*(white|black|red|gr[ae]y|blue)\b", rules)


def test_every_rule_of_text_names_a_measured_ink() -> None:
    """Text has one of the inks of `read_pairs`, and its background is the page, a card, a chip or the scale."""
    rules = style_sheet()
    inks = set(re.findall(r"(?<!-)\bcolor: var\(--(\w+)\)", rules))
    behind = set(re.findall(r"background: var\(--(\w+)\)", rules))
    assert inks <= {"text", "quiet", "link", "alarm", "good"}
    assert behind <= {"page", "card", "chip"}

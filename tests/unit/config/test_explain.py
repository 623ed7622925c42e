"""Reports that the experiment schema cannot produce; tests/contracts/test_malformed_configs.py has the others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt

from trainer.config.base import Config, Problem
from trainer.config.loader import load
from trainer.config.nodes import Finding, SourceLocation, dotted, report, shown
from trainer.errors import ConfigError


class Apple(Config):
    kind: Literal["apple"] = "apple"
    weight_g: PositiveInt = 100


class Pear(Config):
    kind: Literal["pear"] = "pear"
    weight_g: PositiveInt = 100
    stem: bool = True


class Only(Config):
    kind: Literal["only"] = "only"
    size: int = 1


class Basket(Config):
    fruit: Annotated[Apple | Pear, Field(discriminator="kind")] | None = None
    limit: int | Literal["auto"] = "auto"
    tags: Annotated[list[Annotated[str, Field(max_length=3)]], Field(max_length=2, default_factory=list)]
    only: Only = Only()
    wide: Annotated[str, Field(pattern="^[ab]+$")] = "a"
    low: Annotated[int, Field(le=-5, multiple_of=5)] = -5

    def problems(self) -> Iterator[Problem]:
        if self.limit == 13:
            yield Problem("limit", "13 is unlucky; use 12")
            yield Problem("", "is unlucky too")
            yield Problem("fruit.weight_g", "is heavy")


class Shop(Config):
    basket: Basket = Basket()
    spare: Basket = Basket()


def error_lines(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, Shop)
    return str(caught.value).replace(str(path), "x").split("\n")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("basket: {fruit: {weight_g: 5}}", ["x:1:10: basket.fruit: needs a kind; add kind: with one of apple, pear"]),
        (
            "basket: {fruit: {kind: apple, stem: true}}",
            ["x:1:31: basket.fruit.stem: unknown key for kind: apple; it is an option of kind: pear"],
        ),
        ("basket: {fruit: pear}", ["x:1:17: basket.fruit: expected a mapping or null, got 'pear'; write {kind: pear}"]),
        ("basket: {fruit: {kind: [pear]}}", ["x:1:24: basket.fruit.kind: a list is not one of apple, pear"]),
        ("basket: {limit: atuo}", ["x:1:17: basket.limit: expected a whole number or auto, got 'atuo'"]),
        ("basket: {limit: '5'}", ["x:1:17: basket.limit: expected a whole number or auto, got '5'; remove the quotes"]),
        ("basket: {tags: [a, b, c]}", ["x:1:16: basket.tags: must have at most 2 entries, got 3"]),
        ("basket: {only: {kind: other, sise: 5}}", ["x:1:23: basket.only.kind: must be only, got 'other'"]),
        ("basket: {wide: c}", ["x:1:16: basket.wide: 'c' does not have the form ^[ab]+$"]),
        ("basket: {low: 5}", ["x:1:15: basket.low: must be at most -5, got 5"]),
        ("basket: {tags: [abcd]}", ["x:1:17: basket.tags.0: must have at most 3 characters, got 4"]),
        # A constraint that no section uses keeps pydantic's wording.
        ("basket: {low: -7}", ["x:1:15: basket.low: input should be a multiple of 5, got -7"]),
        ("baskt: {}", ["x:1:1: baskt: unknown key; did you mean basket?"]),
    ],
)
def test_each_mistake_has_its_line(tmp_path: Path, text: str, lines: list[str]) -> None:
    assert error_lines(tmp_path, text) == lines


def test_a_broken_rule_is_reported_at_its_key_or_the_nearest_existing_section(tmp_path: Path) -> None:
    assert error_lines(tmp_path, "basket: {}\nspare:\n  limit: 13\n") == [
        "x:2:1: spare: is unlucky too",
        "x:2:1: spare.fruit.weight_g: is heavy",
        "x:3:3: spare.limit: 13 is unlucky; use 12",
    ]
    assert (
        error_lines(tmp_path, "spare: {limit: 13, fruit: {kind: pear}}")[-1] == "x:1:20: spare.fruit.weight_g: is heavy"
    )


def test_an_error_in_an_aliased_value_is_reported_at_its_anchor(tmp_path: Path) -> None:
    assert error_lines(tmp_path, "basket: &b {lim: 5}\nspare: *b\n") == [
        "x:1:13: basket.lim: unknown key; did you mean limit?",
        "x:1:13: spare.lim: unknown key; did you mean limit?",
    ]


def test_a_report_follows_the_order_of_reading_with_overrides_last(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("spare: {limt: 5}")
    lines = error_lines(tmp_path, "# first\nbase: b.yaml\nbasket: {limt: 5}\n", "basket.lmit=5", "oops")
    assert [line.rpartition("/")[2].split(": ")[0] for line in lines] == [
        "x:3:10",
        "b.yaml:1:9",
        "<override 1>",
        "<override 2>",
    ]


def test_locations_sort_in_reading_order() -> None:
    findings = [
        Finding(SourceLocation(*where), (), "")
        for where in [(1, 2, 1, "b"), (0, 9, 9, "a"), (0, 9, 1, "a"), (1, 0, 0, "b")]
    ]
    assert str(report(findings)) == "a:9:1: \na:9:9: \nb: \nb:2:1: "


def test_equal_lines_are_reported_once() -> None:
    finding = Finding(SourceLocation(0, 1, 1, "a"), ("b", 0, "c d"), "wrong")
    assert str(report([finding, finding])) == "a:1:1: b.0.'c d': wrong"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        ("a\nb\x1b", r"'a\nb\x1b'"),
        ("x" * 58, f"'{'x' * 58}'"),
        ("x" * 59, f"'{'x' * 55}...'"),
        ("\x1b" * 59, "'" + r"\x1b" * 13 + r"\x1...'"),
        (10**100, "1" + "0" * 55 + "..."),
        ({"a": 1}, "a mapping"),
        ((1, 2), "a list"),
    ],
)
def test_shown_values_fit_on_one_short_line(value: object, text: str) -> None:
    assert shown(value) == text
    assert len(text) <= 60


def test_ambiguous_key_parts_are_quoted() -> None:
    assert dotted(("model", "a.b", 0, "", "moe-x")) == "model.'a.b'.0.''.moe-x"

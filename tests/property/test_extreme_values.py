"""Extreme values for every key of the schema: each makes a configuration, or lines that say what is wrong with it."""

import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schema_leaves import Leaf, leaves
from trainer.config import layers
from trainer.config.dump import dump, inline
from trainer.config.loader import load
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig

LIMIT_S = 2.0
LONGEST_LINE = 1000
LEAVES = list(leaves(ExperimentConfig))
NUMBERS = [leaf for leaf in LEAVES if leaf.accepts(int, float)]
TEXTS = [leaf for leaf in LEAVES if leaf.accepts(str)]
EXTREMES = [0, -1, 1, 2**31, 2**63 - 1, 2**64, 10**30, 1e300, -1e300, 5e-324, math.inf, math.nan, -0.0, True, False]
LONG = "x" * 5_000
HOSTILE = ["", LONG, "(" * 5_000, "{" * 5_000, f"{{x:{LONG}}}", "a{9999999999}", "\x1b[2J\x07", "a\0b", "\u202e"]


class TooSlow(Exception):
    """It took more than `LIMIT_S` of the processor."""


@contextmanager
def hard_limit() -> Iterator[None]:
    """End what takes longer, by this process's own clock: other work on the machine does not count."""

    def give_up(number: int, frame: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def written(value: Any) -> str:
    """YAML, of numbers that are not finite too."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return json.dumps(value) if isinstance(value, str) else inline(value)


def read(text: str) -> ExperimentConfig:
    """Load a configuration that is in no file: thousands of files would take longer than what is tested."""
    with mock.patch.object(layers, "_text", lambda path, locate: text), hard_limit():
        return load("x.yaml", [], ExperimentConfig)


def wrong(document: dict[str, Any], names: list[str], *, comes_back: bool = False) -> str | None:
    """Say what should not be about what becomes of a configuration; `names` are those of its extreme keys."""
    try:
        config = read("".join(f"{key}: {written(value)}\n" for key, value in document.items()))
        with hard_limit():  # what every verb does next, before torch is imported
            rate = config.schedule.build(total_steps=config.train.steps)
            assert math.isfinite(rate(0)) and math.isfinite(rate(config.train.steps - 1))
            config.model.activations(vocab_size=2**20, num_rows=config.train.global_batch_size, loss_chunk=None)

        return None if not comes_back or read(dump(config)) == config else "not itself again when it is read back"
    except ConfigError as error:
        lines = str(error).split("\n")
    except (Exception, TooSlow) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if bad := [line for line in lines if len(line) > LONGEST_LINE or not line.isprintable()]:
        return f"a line of {len(bad[0])} characters: {bad[0][:80]!r}"
    return None if any(name in line for line in lines for name in names) else f"names another key: {lines[0]}"


def values(leaf: Leaf, extremes: list[Any]) -> list[Any]:
    """Return the values to try: of a list as its entries, and many of them."""
    if not leaf.is_list:
        return extremes
    return [*([value] * 2 for value in extremes), [extremes[0]] * 300, [extremes[-1]] * 300]


def found(parts: list[Leaf], extremes: list[Any]) -> list[str]:
    """Return what is wrong with each of the values for each of the keys."""
    tried = [(leaf, value) for leaf in parts for value in values(leaf, [*extremes, *leaf.limits])]
    said = [(leaf, value, wrong(leaf.document(value, {"name": "x"}), leaf.names)) for leaf, value in tried]
    return [f"{leaf.name} = {str(value)[:40]!r}: {what}" for leaf, value, what in said if what is not None]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("part", range(4))
def test_any_number_makes_a_configuration_or_a_line_with_its_key(part: int) -> None:
    assert len(NUMBERS) > 120
    assert not (bad := found(NUMBERS[part::4], EXTREMES)), "\n".join(bad)


def test_any_text_makes_a_configuration_or_a_short_line_with_its_key() -> None:
    assert len(TEXTS) > 30
    assert not (bad := found(TEXTS, HOSTILE)), "\n".join(bad)


def laid_over(under: Any, over: Any) -> Any:
    """Put the keys of two documents together."""
    if isinstance(under, dict) and isinstance(over, dict) and under.get("kind") == over.get("kind"):
        return under | {key: laid_over(under[key], value) if key in under else value for key, value in over.items()}
    return over


@settings(max_examples=100)
@given(data=st.data())
def test_extreme_numbers_of_several_keys_do_not_add_up_to_a_failure(data: st.DataObject) -> None:
    document: dict[str, Any] = {"name": "x"}
    chosen = data.draw(st.lists(st.sampled_from(NUMBERS), min_size=2, max_size=6))
    for leaf in chosen:
        value = data.draw(st.sampled_from([*EXTREMES, *leaf.limits, *leaf.limits]), label=leaf.name)
        document = laid_over(document, leaf.document([value] if leaf.is_list else value, {"name": "x"}))
    assert wrong(document, [name for leaf in chosen for name in leaf.names], comes_back=True) is None

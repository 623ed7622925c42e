"""Tests for what experts are for, on texts where it is known."""

import numpy as np

from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.report.describe_expert import DescribedText, describe_experts
from trainer.report.measure_layer import domain_counts
from trainer.report.report_data import ExpertFindings
from trainer.report.routed_text import Choices, TextRows
from trainer.report.token_text import TokenText

ROWS, S = 40, 48


def described(text: str, choose: str) -> tuple[ExpertFindings, ...]:
    """Return the findings on 2 experts for rows of a text, where expert 1 gets the bytes that `choose` marks with x."""
    assert len(text.encode()) == len(choose) == S
    tokens = np.tile(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32), (ROWS, 1))
    rows = TextRows(
        tokens=tokens,
        document=np.zeros((ROWS, S), dtype=np.int64),
        counted=np.ones((ROWS, S), dtype=bool),
        domain=np.arange(ROWS) % 2,
        number=np.arange(ROWS),
        domains=("even", "odd"),
    )
    choices: Choices = np.tile(np.array([c == "x" for c in choose], dtype=np.int16), ROWS)[:, None]
    whole = DescribedText.of(rows, TokenText(ByteTokenizer()), vocab_size=256, num_layers=1)
    return describe_experts(whole, choices, domain_counts(choices, rows.token_domain, num_domains=2, num_experts=2))


def test_an_n_gram_is_told_if_its_last_token_does_not_tell_it() -> None:
    text = "a cat, a dog. the ox, the cow; one hen and a pig"
    choose = "".join("x" if text[: n + 1].endswith("the") else "." for n in range(S))
    ordinary, special = described(text, choose)
    assert special.ngrams and all("the".endswith(word.text) or word.text.endswith("the") for word in special.ngrams)
    assert {word.text for word in special.words} == {"e"} and special.tokens == 2 * ROWS
    assert all(excerpt.token == "e" and excerpt.before.endswith("th") for excerpt in special.excerpts)
    assert "e" not in {word.text for word in ordinary.words} and ordinary.domain_lift == (1.0, 1.0)


def test_an_n_gram_that_says_no_more_than_its_last_token_is_left_out() -> None:
    text = "xyzw abcd xyzw abcd xyzw abcd xyzw abcd xyzw abc"
    _, special = described(text, "".join("x" if c in "xyzw" else "." for c in text))
    assert {word.text for word in special.words} == set("xyzw") and special.ngrams == ()
    assert all(excerpt.token in "xyzw" for excerpt in special.excerpts)


def test_a_part_of_a_character_is_shown_as_all_of_it_and_a_dead_expert_has_nothing() -> None:
    start = "\u00fc\u00e4 \u4e2d\u6587 "
    text = start + "." * (S - len(start.encode()))
    special = described(text, "".join("x" if byte == 0x87 else "." for byte in text.encode()))[
        1
    ]  # the last of e6 96 87
    assert special.tokens == ROWS and {word.text for word in special.words} == {"\\x87"}
    assert {excerpt.token for excerpt in special.excerpts} == {"\u6587"}
    dead = described(text, "." * S)[1]
    assert (dead.tokens, dead.words, dead.ngrams, dead.excerpts, dead.rows) == (0, (), (), (), ())

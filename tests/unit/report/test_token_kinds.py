"""Tests for kinds of token: by how they are written, and by the letters before them."""

import numpy as np

from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.report.describe_expert import DescribedText, describe_experts
from trainer.report.measure_layer import domain_counts
from trainer.report.measure_words import MIN_COUNT
from trainer.report.report_data import ExpertFindings
from trainer.report.routed_text import Choices, TextRows
from trainer.report.token_kinds import KINDS, token_kinds
from trainer.report.token_text import TokenText

SIGNS = {
    "line break": "l",
    "space": "s",
    "punctuation": "p",
    "number": "n",
    "capital letter": "C",
    "beginning of a word": "b",
    "inside of a word": "i",
    "part of a character": "c",
    "special token": "e",
}


def _rows(text: bytes, *, rows: int = MIN_COUNT, end: bool = False) -> TextRows:
    """Return copies of a row that has two documents of a text's halves, and an end of document if asked for."""
    tokens = [*text, ByteTokenizer().end_of_document] if end else [*text]
    document = np.zeros((rows, len(tokens)), dtype=np.int64)
    document[:, len(text) // 2 :] = 1
    return TextRows(
        tokens=np.tile(np.array(tokens, dtype=np.int32), (rows, 1)),
        document=document,
        counted=np.ones(document.shape, dtype=bool),
        domain=np.zeros(rows, dtype=np.int64),
        number=np.arange(rows),
        domains=("all",),
    )


def _signs(rows: TextRows) -> str:
    """Return the kind of each token of the first row, as signs."""
    found = token_kinds(rows, TokenText(ByteTokenizer()))
    return "".join(SIGNS[KINDS[found.words[code][0]]] for code in found.code[: rows.tokens.shape[1]])


def test_every_kind_has_its_tokens() -> None:
    assert SIGNS.keys() == set(KINDS)
    signs = "Ci s bi s nn s b p biiii p l cc iii p bii s b s CCCC e".replace(" ", "")
    assert _signs(_rows("It is 12 o'clock,\n\u00fcber_all x\tNASA".encode(), end=True)) == signs


def test_a_word_begins_with_its_document_and_its_row() -> None:
    assert _signs(_rows(b"aabb")) == "bibi"  # the second document begins in the middle


def test_rare_kinds_are_none() -> None:
    found = token_kinds(_rows(b"a1", rows=MIN_COUNT - 1), TokenText(ByteTokenizer()))
    assert found.words == () and set(found.code.tolist()) == {0}


def test_an_expert_for_a_kind_is_told_by_it_and_one_of_chance_by_none() -> None:
    rows = _rows(b"a1b2c3d4e5f6g7h8 i9j0 kl mn op qr 12 34", rows=40)
    described = DescribedText.of(rows, TokenText(ByteTokenizer()), vocab_size=256, num_layers=2)

    def findings(second: np.ndarray) -> tuple[ExpertFindings, ...]:
        """Return the findings on two experts, of which the second gets the tokens that are marked."""
        choices: Choices = second.astype(np.int16)[:, None]
        return describe_experts(
            described, choices, domain_counts(choices, rows.token_domain, num_domains=1, num_experts=2)
        )

    others, numbers = findings(np.isin(rows.tokens.ravel(), [*b"0123456789"]))
    assert [kind.text for kind in numbers.kinds] == ["number"] and numbers.explained == 1.0
    assert "number" not in {kind.text for kind in others.kinds} and len(others.kinds) > 1
    for one in findings(np.random.default_rng(0).integers(0, 2, rows.tokens.size)):
        assert one.kinds == one.words == () and one.explained == 0.0

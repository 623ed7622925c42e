import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from trainer.data.chat.encode_rows import EncodedRow
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.records import json_lines
from trainer.data.sources.base import Document
from trainer.data.sources.registry import JsonlSourceConfig
from trainer.data.token_cache.splits import DomainSplit, is_held_out, tail_start
from trainer.data.token_cache.token_files import TokenFile


def document(text: str, prompt: str = "") -> Document:
    return Document(name="a", domain="d", text=text, prompt=prompt)


def split(texts: list[str], **options: Any) -> list[tuple[str, str]]:
    config = SplitConfig(**options)
    domain = DomainSplit(config, num_characters=sum(map(len, texts)) if config.kind == "tail" else None)
    pieces = [piece for text in texts for piece in domain.add(document(text))] + domain.finish()
    return [(piece.side, piece.document.text) for piece in pieces]


def test_the_tail_of_shakespeare_begins_where_nanogpt_splits_it():
    assert tail_start(1_115_394, 0.1) == 1_003_854


@pytest.mark.parametrize(("length", "fraction", "train"), [(10, 0.9, 1), (10, 0.7, 3), (1, 0.1, 0), (3, 1e-5, 2)])
def test_the_tail_uses_the_fraction_in_decimal(length, fraction, train):
    assert tail_start(length, fraction) == train  # int(10 * (1 - 0.9)) is 0 in floating point


def test_the_tail_is_counted_in_characters_not_bytes():
    assert split(["äöü€"], kind="tail", fraction=0.5) == [("train", "äö"), ("validation", "ü€")]


def test_a_tail_goes_through_several_documents():
    assert split(["abc", "defg", "hi"], kind="tail", fraction=0.5) == [
        ("train", "abc"),
        ("train", "d"),
        ("validation", "efg"),
        ("validation", "hi"),
    ]


@pytest.mark.parametrize(
    ("fraction", "pieces"),
    [
        (0.25, [("train", "pro", "ans"), ("validation", "", "wer")]),
        (0.75, [("train", "pr", ""), ("validation", "o", "answer")]),
    ],
)
def test_a_tail_goes_through_a_prompt_and_its_answer(fraction, pieces):
    domain = DomainSplit(SplitConfig(kind="tail", fraction=fraction), num_characters=9)
    found = domain.add(document("answer", "pro")) + domain.finish()
    assert [(piece.side, piece.document.prompt, piece.document.text) for piece in found] == pieces


@pytest.mark.parametrize(("fraction", "held_out"), [(0.1, "hi"), (0.2, "hi"), (0.3, "defghi"), (0.7, "abcdefghi")])
def test_a_tail_holds_out_the_conversation_that_the_boundary_is_in(fraction, held_out):
    encoded = EncodedRow(np.zeros(1, dtype=np.uint8), np.ones(2, dtype=np.bool_))
    domain = DomainSplit(SplitConfig(kind="tail", fraction=fraction), num_characters=9)
    found = [piece for text in ("abc", "defg", "hi") for piece in domain.add(replace(document(text), encoded=encoded))]
    assert [piece.document.text for piece in found] == ["abc", "defg", "hi"]
    assert "".join(piece.document.text for piece in found if piece.side == "validation") == held_out


def test_the_hash_covers_the_prompt():
    config = SplitConfig(kind="hash", fraction=0.5)
    for text in ("one", "two", "three", "four"):
        (whole,), (cut,) = (DomainSplit(config).add(document(*parts)) for parts in ((text,), (text[2:], text[:2])))
        assert whole.side == cut.side


def test_a_split_between_documents_leaves_no_empty_piece():
    assert split(["ab", "cd"], kind="tail", fraction=0.5) == [("train", "ab"), ("validation", "cd")]


def test_auto_takes_the_tail_of_a_single_document():
    assert split(["abcd"], fraction=0.25) == [("train", "abc"), ("validation", "d")]


def test_auto_takes_the_hash_of_several_documents():
    texts = [f"text {i}" for i in range(50)]
    assert split(texts, fraction=0.3) == split(texts, fraction=0.3, kind="hash")


def test_the_hash_split_keeps_documents_whole_and_in_order():
    texts = [f"text {i}" for i in range(50)]
    pieces = split(texts, fraction=0.3, kind="hash")
    assert [text for _, text in pieces] == texts
    assert {side for side, _ in pieces} == {"train", "validation"}


def test_equal_texts_are_on_the_same_side():
    sides = {text: side for side, text in split(["a", "b", "c", "d"], kind="hash", fraction=0.5)}
    assert all(sides[text] == side for side, text in split(["d", "a", "b", "a", "c"], kind="hash", fraction=0.5))


def test_the_hash_holds_out_about_the_fraction():
    held_out = sum(is_held_out(f"text {i}", 0.2) for i in range(2000))
    assert 340 < held_out < 460  # 400 expected, standard deviation 18


def test_a_larger_fraction_holds_out_the_same_documents_and_more():
    texts = [f"text {i}" for i in range(200)]
    assert {t for t in texts if is_held_out(t, 0.1)} < {t for t in texts if is_held_out(t, 0.3)}


def test_the_hash_is_the_same_everywhere():
    # First bytes of the SHA-256: ca 3e 2e 18 3f 25.
    assert [is_held_out(text, 0.5) for text in "abcdef"] == [False, True, True, True, True, True]


def test_a_domain_without_documents_has_no_pieces():
    assert split([]) == []


def test_a_tail_needs_the_length_of_the_text():
    with pytest.raises(ValueError, match="num_characters"):
        DomainSplit(SplitConfig(kind="tail"))


# --- where the hash leaves a side empty -------------------------------------------------------------------------------


def _corpus(texts: list[str], *, fraction: float, part_bytes: int, cache: str, **options: Any) -> Corpus:
    rows = [json.dumps({"text": text[2:], "ask": text[:2]}) + "\n" for text in texts]
    Path("rows.jsonl").write_text("".join(rows))
    source = JsonlSourceConfig(path="rows.jsonl", prompt="{ask}", domain="d")
    split = SplitConfig(fraction=fraction, **options)
    with mock.patch.object(json_lines, "_PART_BYTES", part_bytes), mock.patch.object(json_lines, "_CHUNK_BYTES", 50):
        return build_corpus(DataConfig(sources=[source], split=split, cache_dir=cache, workers=1))


def _texts(file: TokenFile) -> list[str]:
    return bytes(file.tokens[:]).decode("latin-1").split("\xff") if file.num_tokens else []


REPEATED = [f"text {i % 12}" for i in range(60)]  # the lowest hash of the 12 is at 0.104


@pytest.mark.parametrize("part_bytes", [100, 1 << 20])
@pytest.mark.parametrize(("fraction", "alone"), [(0.01, min), (0.99, max)])
def test_auto_moves_the_text_whose_hash_is_nearest_to_an_empty_side(folder, part_bytes, fraction, alone):
    assert len({is_held_out(text, fraction) for text in REPEATED}) == 1
    corpus = _corpus(REPEATED, fraction=fraction, part_bytes=part_bytes, cache="cache")
    moved = alone(REPEATED, key=lambda text: hashlib.sha256(text.encode()).digest())
    sides = _texts(corpus.train[0]), _texts(corpus.validation[0])
    few, many = sides if alone is max else reversed(sides)
    assert few == [moved] * 5
    assert many == [text for text in REPEATED if text != moved]
    assert corpus.train[0].has_prompts and corpus.validation[0].has_prompts
    assert corpus.train[0].num_bytes + corpus.validation[0].num_bytes == sum(map(len, REPEATED))
    assert corpus.remarks == (
        f"data.split: the hash at fraction {fraction} leaves one side of domain d empty; moved the text with the "
        f"nearest hash there: {len(sides[0])} documents are learned and {len(sides[1])} held out",
    )
    again = build_corpus(
        DataConfig(
            sources=[JsonlSourceConfig(path="rows.jsonl", prompt="{ask}", domain="d")],
            split=SplitConfig(fraction=fraction),
            cache_dir="cache",
        )
    )
    assert (again.fingerprint, again.remarks) == (corpus.fingerprint, corpus.remarks)


def test_an_explicit_hash_split_is_not_changed(folder, fails):
    with fails(
        "data.split: kind hash at fraction 0.01 leaves the validation side of domain d empty (documents: 60); both "
        "sides need one; use data.split.kind: tail"
    ):
        _corpus(REPEATED, fraction=0.01, part_bytes=100, cache="cache", kind="hash")


def test_copies_of_one_text_are_never_on_both_sides(folder, fails):
    with fails(
        "data.split: all 9 documents of domain d are the same text, which would be both learned and held out; add "
        "other text, or use data.split.kind: tail"
    ):
        _corpus(["text 1"] * 9, fraction=0.1, part_bytes=100, cache="cache")

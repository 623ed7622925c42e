"""Folds in the token cache: read and encoded once, whole documents with their prompts and weights, never stale."""

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from trainer.data.config import DataConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.token_cache import build_cache
from trainer.data.token_cache.token_files import TokenFile
from trainer.data.tokenizers.registry import BPETokenizerConfig
from trainer.errors import DataError

OF = 3


def corpus_of(index: int | None, *sources: dict[str, Any], **options: Any) -> Corpus:
    fold = None if index is None else {"index": index, "of": OF}
    values = {"sources": list(sources), "fold": fold, "cache_dir": "cache", "workers": 1, **options}
    return build_corpus(DataConfig.model_validate(values), seq_len=64)


def documents(file: TokenFile) -> list[tuple[bytes, tuple[bool, ...], float]]:
    found = [(file.document(index), file.weight(index)) for index in range(file.num_documents)]
    return sorted((bytes(tokens), tuple(map(bool, learned)), weight) for (tokens, learned), weight in found)


def held_out_by(folds: list[Corpus], domain: int) -> list[tuple[bytes, tuple[bool, ...], float]]:
    return sorted(document for fold in folds for document in documents(fold.validation[domain]))


def rows(folder: Path, number: int = 20) -> dict[str, Any]:
    lines = [{"q": f"{i % 7}?", "a": f"answer {i}", "w": i % 3 / 2, "of": f"d{i % 2}"} for i in range(number)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"kind": "jsonl", "path": "rows.jsonl", "text": "{a}", "prompt": "{q} ", "weight_key": "w"}


def test_text_is_encoded_once_for_all_folds_and_for_a_run_without(folder: Path) -> None:
    source = rows(folder)
    whole = corpus_of(None, source)
    everything = sorted(documents(whole.train[0]) + documents(whole.validation[0]))
    with mock.patch.object(build_cache, "run_tasks", side_effect=AssertionError("text was read again")):
        folds = [corpus_of(index, source) for index in range(OF)]
        again = [corpus_of(index, source, split={"fraction": 0.5}) for index in range(OF)]
    assert held_out_by(folds, 0) == everything
    for fold in folds:
        assert sorted(documents(fold.train[0]) + documents(fold.validation[0])) == everything
        assert fold.train[0].num_bytes + fold.validation[0].num_bytes == sum(len(tokens) for tokens, _, _ in everything)
    assert [fold.fingerprint for fold in again] == [fold.fingerprint for fold in folds], "split does not matter"
    assert len({whole.fingerprint, *(fold.fingerprint for fold in folds)}) == 1 + OF


def test_a_fold_is_opened_from_the_cache_and_built_again_when_the_text_changes(folder: Path) -> None:
    source = rows(folder)
    first = corpus_of(1, source)
    (before,) = first.folders
    with mock.patch("trainer.data.token_cache.fold_files._build", side_effect=AssertionError("built again")):
        assert corpus_of(1, source).fingerprint == first.fingerprint
    (before / "manifest.json").write_text("{}")  # damaged: built again in its place
    assert corpus_of(1, source).folders == first.folders
    rows(folder, 21)
    other = corpus_of(1, source)
    assert other.fingerprint != first.fingerprint and other.folders != first.folders
    kept = dict.fromkeys(documents(first.validation[0]))
    assert kept.keys() <= dict.fromkeys(documents(other.validation[0])).keys(), "documents keep their fold"


def test_every_domain_is_parted_and_conversations_stay_whole(folder: Path) -> None:
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "!" * (i + 1)}] for i in range(12)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source = {**rows(folder, 40), "domain_key": "of"}
    sources = [source, {"kind": "chat", "path": "chats.jsonl", "domain": "chats"}]
    folds = [corpus_of(index, *sources, packing="bfd") for index in range(OF)]
    whole = corpus_of(None, *sources, packing="bfd")
    assert whole.domains == ("d0", "d1", "chats")
    for domain in range(3):
        everything = sorted(documents(whole.train[domain]) + documents(whole.validation[domain]))
        assert held_out_by(folds, domain) == everything


def test_a_vocabulary_is_trained_without_the_held_out_fold(folder: Path) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"word{i} " * 9}) + "\n" for i in range(12)))
    source = {"kind": "jsonl", "path": "a.jsonl"}
    tokenizer = BPETokenizerConfig(vocab_size=400).model_dump()
    folds = [corpus_of(index, source, tokenizer=tokenizer) for index in range(OF)]
    assert len({fold.tokenizer.fingerprint for fold in folds}) == OF
    for fold in folds:
        held_out = fold.validation[0]
        vocabulary = {bytes(fold.tokenizer.decode([token])) for token in range(fold.tokenizer.vocab_size)}
        texts = [fold.tokenizer.decode(held_out.document(i)[0].tolist()) for i in range(held_out.num_documents)]
        assert texts and not any(text.split()[0] in vocabulary for text in texts)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a single document of some length"], "domain d is a single document, and folds part no document"),
        (["same", "same", "other"], "of 3 of domain d is empty, with 3 documents; each fold needs one"),
    ],
)
def test_too_few_documents_are_refused_whichever_fold_is_held_out(folder: Path, texts: list[str], message: str) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for index in range(OF):
        with pytest.raises(DataError, match=re.escape(message)):
            corpus_of(index, {"kind": "jsonl", "path": "a.jsonl", "domain": "d"})
    assert not list(folder.glob("cache/.*-fold-*")), "nothing half-built is left"

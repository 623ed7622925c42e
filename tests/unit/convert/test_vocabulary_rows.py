"""Tests for embedding rows under another tokenizer: each by its piece, exactly, and better than fresh ones."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.converted_runs import write_config
from tests.foreign_tokenizers import TEXT, byte_level
from tests.imported_once import shorten_sample
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.streamed import GlobalTensor
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.config.loader import load
from trainer.convert.parent_tensors import ParentTensors
from trainer.convert.vocabulary_rows import VocabularyRows, map_vocabulary
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.data.tokenizers.file import read_tokenizer
from trainer.experiment import ExperimentConfig
from trainer.library.runs import train

NAME = "model.embedding.weight"


class _Parent(ParentTensors):
    """One embedding in memory."""

    def __init__(self, rows: Tensor) -> None:
        self._rows, self.tensors, self.where = rows, {NAME: GlobalTensor(shape=tuple(rows.shape))}, "there"

    def read(self, name: str, start: int, length: int) -> Tensor:
        assert name == NAME and start >= 0 and length > 0 and start + length <= len(self._rows)
        return self._rows[start : start + length]

    def tokenizer(self) -> None: ...

    def record(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


def _file_tokenizer(folder: Path, *, extra: list[str], merges: int) -> Tokenizer:
    """Return the byte-level BPE of the tests with fewer merges, its ids reversed, and more special tokens."""
    content = byte_level()
    model = content["model"]
    words = {word for word in model["vocab"] if len(word) == 1}
    model["merges"] = model["merges"][:merges]
    words |= {"".join(merge) for merge in model["merges"]}
    model["vocab"] = {word: i for i, word in enumerate(sorted(words, reverse=True))}
    special = [token for token in content["added_tokens"] if token["special"]]
    special += [{**special[0], "content": name} for name in extra]
    content["added_tokens"] = [{**token, "id": len(words) + i} for i, token in enumerate(special)]
    content["post_processor"] = None
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return read_tokenizer(folder, end_of_document="<|end_of_text|>")


def _rows(old: Tokenizer, new: Tokenizer, *, old_rows: int = 0, new_rows: int = 0) -> tuple[Tensor, Tensor, str]:
    """Return the old rows, the new ones, and what was said."""
    there = torch.randn(max(old_rows, old.vocab_size), 5, generator=torch.Generator().manual_seed(1))
    count = max(new_rows, new.vocab_size)
    vocabulary = map_vocabulary(old, new, old_rows=len(there), new_rows=count)
    source = VocabularyRows(_Parent(there), NAME, vocabulary)
    blocks = [source.rows(start, min(7, count - start)) for start in range(0, count, 7)]
    return there, torch.cat(blocks).float(), vocabulary.note


def test_each_piece_takes_its_row_and_every_other_one_the_mean_of_those_that_it_is_made_of(tmp_path: Path) -> None:
    old = _file_tokenizer(tmp_path / "old", extra=["<|user|>"], merges=20)
    new = _file_tokenizer(tmp_path / "new", extra=["<|tool|>", "<|user|>"], merges=60)
    there, here, note = _rows(old, new)
    pieces = {old.decode([i]): i for i in reversed(range(old.vocab_size))}
    ids = {token["content"]: token["id"] for token in json.loads(old.files()["tokenizer.json"])["added_tokens"]}
    names = {token["id"]: token["content"] for token in json.loads(new.files()["tokenizer.json"])["added_tokens"]}
    kinds = dict.fromkeys(("piece", "mean", "special", "unknown"), 0)
    for i in range(new.vocab_size):
        content = new.decode([i])
        if i in names:
            kind, expected = ("special", there[ids[names[i]]]) if names[i] in ids else ("unknown", there.mean(0))
        elif content in pieces:
            kind, expected = "piece", there[pieces[content]]
        else:
            parts = [pieces[bytes([byte])] for byte in content]
            text = content.decode(errors="replace")
            parts = parts if "\ufffd" in text else old.encode(text).tolist()
            kind, expected = "mean", there[parts].double().mean(0).float()
        kinds[kind] += 1
        if kind in ("piece", "special"):
            assert torch.equal(here[i], expected), names.get(i, content)
        else:
            torch.testing.assert_close(here[i], expected, rtol=1e-6, atol=1e-7)
    assert kinds["piece"] > 256 and kinds["mean"] >= 30 and (kinds["special"], kinds["unknown"]) == (4, 1)
    counts = f"{kinds['piece']} are pieces of the old vocabulary, {kinds['mean']} are means of such pieces, "
    assert f"{counts}3 special tokens have the old ones' names, 1 are new" in note


def test_bytes_become_bytes_and_the_same_tokenizer_keeps_every_row(tmp_path: Path) -> None:
    bpe = _file_tokenizer(tmp_path / "bpe", extra=[], merges=40)
    there, here, _ = _rows(bpe, ByteTokenizer())
    singles = {bpe.decode([i]): i for i in reversed(range(bpe.vocab_size))}
    assert all(torch.equal(here[byte], there[singles[bytes([byte])]]) for byte in range(0xF8))  # others: special
    assert torch.equal(here[255], there[bpe.end_of_document]), "the end of a document stays one"
    ids = bpe.vocab_size
    there, here, note = _rows(bpe, bpe, old_rows=ids + 2, new_rows=ids + 3)
    assert note == f"{ids + 3} rows of the vocabulary instead of {ids + 2}, of which {ids} are the tokenizer's"
    assert torch.equal(here[:-1], there), "with the rows beyond the ids"
    torch.testing.assert_close(here[-1], there[: bpe.vocab_size].mean(0), rtol=1e-6, atol=1e-7)


def _tensors(run: Path) -> dict[str, Tensor]:
    checkpoints = CheckpointFolder(run / "checkpoints")
    with StoredTensors(checkpoints.of_step(0), checkpoints.manifest(0)) as tensors:
        return {name: tensors.read(name).clone() for name in checkpoints.manifest(0).tensors}


def test_a_run_under_another_tokenizer_has_rows_by_piece_and_learns_faster_than_a_fresh_one(tmp_path: Path) -> None:
    """Loss on held-out text after 50 steps, for 3 seeds."""
    shorten_sample()
    (tmp_path / "text.txt").write_text(TEXT)
    path = write_config(tmp_path, "x", None, init_std=0.02)
    small = ["schedule.peak_lr=1e-2", "eval={every: null}", "checkpoint.every=null", "metrics.log_every=50"]
    for seed in range(3):
        common = [*small, f"seed={seed}", "train.steps=50"]
        first = load(path, [*common, f"name=first{seed}", "train.steps=60"], ExperimentConfig)
        train(first)
        bpe = [*common, "data.tokenizer={kind: bpe, vocab_size: 300}"]
        losses = {}
        for name, options in {"fresh": [], "taken": [f"init_from.run={tmp_path}/runs/first{seed}"]}.items():
            config = load(path, [*bpe, f"name={name}{seed}", *options], ExperimentConfig)
            losses[name] = train(config).series("eval/loss")[1][-1]
        assert losses["taken"] < losses["fresh"], (seed, losses)

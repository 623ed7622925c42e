"""A checkpoint written block by block is the tensors bit for bit, and an engine starts from it with moments of zero."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import make_batch, make_engine, tiny_model_config
from tests.checkpoint_helpers import load, resume, save
from tests.unit.checkpoint.test_manifest import rewrite
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import check_fits
from trainer.checkpoint.find_checkpoint import find
from trainer.checkpoint.streamed import GlobalTensor, save_streamed
from trainer.checkpoint.tools.verify import verify_checkpoint
from trainer.engine.native import NativeEngine
from trainer.errors import CheckpointError

RECORD: dict[str, Any] = {"position": 0, "tokens": 0, "skipped_steps": 0, "skipped_in_a_row": 0}
RECORD |= {"data_fingerprint": None, "tokenizer_fingerprint": "byte"}


class Reader:
    """Tensors in memory, which remembers how much it was asked for at once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.most = tensors, 0

    def read(self, name: str, start: int, length: int) -> Tensor:
        block = self.tensors[name][start : start + length]
        self.most = max(self.most, block.numel() * block.element_size())
        return block


def _stream(folder: CheckpointFolder, tensors: Mapping[str, Tensor], of_experts: str = "", **options: Any) -> Reader:
    reader = Reader(tensors)
    shapes = {
        name: GlobalTensor(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            is_of_experts=bool(of_experts) and of_experts in name,
        )
        for name, tensor in tensors.items()
    }
    save_streamed(folder, shapes, reader, RECORD, **options)
    return reader


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


@pytest.mark.parametrize("file_size", [1, 40, 100, 1 << 20])
def test_tensors_are_read_back_bit_for_bit(
    folder: CheckpointFolder, file_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.checkpoint.streamed._BLOCK_BYTES", 24)
    tensors = {
        "model.a": torch.randn(5, 3),
        "model.counts": torch.arange(4),
        "model.wide": torch.randn(2, 30),
        "model.half": torch.randn(3, 2).bfloat16(),
        "model.none": torch.zeros(0, 4),
    }
    reader = _stream(folder, tensors, file_size_bytes=file_size)
    assert reader.most <= 120, "one index of the widest tensor"
    found = load(folder, 0)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype is tensors[name].dtype for name in tensors)
    sizes = [file.size_bytes for file in folder.manifest(0).files.values()]
    assert len(sizes) == {1: 14, 40: 6, 100: 4, 1 << 20: 1}[file_size]
    assert verify_checkpoint(folder, 0).findings == []


def test_a_value_that_is_not_finite_leaves_nothing(folder: CheckpointFolder) -> None:
    with pytest.raises(CheckpointError, match=r"model\.b: has values that are not finite"):
        _stream(folder, {"model.a": torch.ones(2), "model.b": torch.tensor([1.0, torch.nan])})
    assert list(folder.path.iterdir()) == []


def _weights(engine: NativeEngine) -> dict[str, Tensor]:
    return {name: part.tensor for name, part in engine.state().slices.items() if not name.startswith("optim.")}


def test_an_engine_starts_from_weights_alone(folder: CheckpointFolder, tmp_path: Path) -> None:
    """As from the checkpoint of step 0 that has its moments, which are zero."""
    config = tiny_model_config()
    source, one, two = make_engine(config, seed=1), make_engine(config, seed=2), make_engine(config, seed=3)
    _stream(folder, _weights(source), of_experts="experts.w_")
    check_fits(find(folder, 0), one.wanted())
    one.train_step([make_batch(2, 8, seed=4)], lr=0.1)  # moments that must go
    resume(one, folder, 0)
    whole = CheckpointFolder(tmp_path / "whole")
    save(whole, 0, source.state())
    resume(two, whole, 0)
    for engine in (one, two):
        for seed in range(3):
            engine.train_step([make_batch(2, 8, seed=seed)], lr=0.01)
    after = {name: part.tensor for name, part in two.state().slices.items()}
    assert one.optimizer_steps == 3
    assert all(torch.equal(part.tensor, after[name]) for name, part in one.state().slices.items())


def test_later_steps_need_their_moments(folder: CheckpointFolder) -> None:
    engine = make_engine(tiny_model_config())
    _stream(folder, _weights(engine), of_experts="experts.w_")
    rewrite(folder.of_step(0), lambda values: values.update(step=10))
    folder.of_step(0).rename(folder.of_step(10))
    with pytest.raises(CheckpointError, match=r"optim\.exp_avg\..* is missing"):
        folder.manifest(10)


def test_some_moments_are_not_enough(folder: CheckpointFolder) -> None:
    engine = make_engine(tiny_model_config())
    tensors = _weights(engine)
    some = {"optim.exp_avg.embedding.weight": torch.zeros_like(tensors["model.embedding.weight"])}
    with pytest.raises(ValueError, match=r"optim\.exp_avg\..* is missing"):
        _stream(folder, tensors | some, of_experts="experts.w_")
    assert folder.steps() == []

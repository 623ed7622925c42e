"""Defects that hashes do not show: values that are not finite, equal experts, wrong tensors in a file."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.checkpoint_helpers import save_unseen
from tests.unit.checkpoint.test_manifest import FILE, rewrite
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.manifest import StoredFile
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.checkpoint.tools import verify as module
from trainer.checkpoint.tools.verify import verify_checkpoint
from trainer.cli import main

W_IN = "blocks.0.moe.experts.w_in"
RUN = {
    "position": 8,
    "tokens": 64,
    "skipped_steps": 0,
    "skipped_in_a_row": 0,
    "data_fingerprint": "a",
    "tokenizer_fingerprint": "b",
}


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed.weight": torch.randn(5, 3, generator=generator),
        f"model.{W_IN}": torch.randn(4, 3, 2, generator=generator),
        **{f"{kind}.{W_IN}_bias": torch.zeros(4, 3) for kind in ("model", "optim.exp_avg", "optim.exp_avg_sq")},
        f"optim.exp_avg.{W_IN}": torch.zeros(4, 3, 2),
        f"optim.exp_avg_sq.{W_IN}": torch.zeros(4, 3, 2),
        "engine.previous_counts": torch.ones(1, 4, dtype=torch.int64),
        "model.empty": torch.zeros(0, 4),
    }


def _save(path: Path, tensors: dict[str, Tensor], step: int = 3, updates: int = 3) -> CheckpointFolder:
    slices = {
        name: Slice(tensor=tensor, global_shape=tuple(tensor.shape), is_of_experts=W_IN in name)
        for name, tensor in tensors.items()
    }
    folder = CheckpointFolder(path)
    save_unseen(folder, step, TrainState(slices=slices, values={"optimizer_steps": updates}), RUN)
    return folder


def test_an_intact_checkpoint_has_counts_and_no_findings(tmp_path: Path) -> None:
    found = verify_checkpoint(_save(tmp_path, _tensors()), 3)
    assert found.findings == []
    assert (found.num_tensors, found.num_experts, found.num_layers) == (9, 4, 1)
    assert found.size_bytes == (tmp_path / "step_00000003" / FILE).stat().st_size


def _equal_weights(tensors: dict[str, Tensor]) -> None:
    tensors[f"model.{W_IN}"][3] = tensors[f"model.{W_IN}"][1]


def _zero_weights(tensors: dict[str, Tensor]) -> None:
    tensors[f"model.{W_IN}"][2:] = 0


def _equal_biases(tensors: dict[str, Tensor]) -> None:
    tensors[f"model.{W_IN}_bias"][1:3] = 0.5


def _equal_moments(tensors: dict[str, Tensor]) -> None:
    tensors[f"optim.exp_avg.{W_IN}"][:2] = 0.5


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors[f"model.{W_IN}"][2, 0, 1] = torch.nan
    tensors[f"model.{W_IN}"][0, :, 0] = torch.inf


def _dense_nan(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed.weight"][4, 2] = -torch.inf


def _negative(tensors: dict[str, Tensor]) -> None:
    tensors[f"optim.exp_avg_sq.{W_IN}"][1, 0, 0] = -1e-9


CONTENTS = {
    "equal weights": (_equal_weights, f"model.{W_IN}: experts 1 and 3 of 4 are equal to the last bit"),
    "zero weights": (_zero_weights, f"model.{W_IN}: experts 2 and 3 of 4 are equal to the last bit"),
    "equal biases": (_equal_biases, f"model.{W_IN}_bias: experts 1 and 2 of 4 are equal to the last bit"),
    "equal moments": (_equal_moments, f"optim.exp_avg.{W_IN}: experts 0 and 1 of 4 are equal to the last bit"),
    "not finite": (_nan, f"model.{W_IN}: 4 values are not finite, in experts 0 and 2 of 4"),
    "not finite, dense": (_dense_nan, "model.embed.weight: 1 values are not finite"),
    "negative": (_negative, f"optim.exp_avg_sq.{W_IN}: 1 values are negative, in expert 1 of 4"),
}


@pytest.mark.parametrize(("spoil", "finding"), CONTENTS.values(), ids=CONTENTS.keys())
def test_invalid_values_are_named(tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], finding: str) -> None:
    tensors = _tensors()
    spoil(tensors)
    assert verify_checkpoint(_save(tmp_path, tensors), 3).findings == [f"{tmp_path}/step_00000003: {finding}"]


def test_more_updates_than_steps_are_reported(tmp_path: Path) -> None:
    (finding,) = verify_checkpoint(_save(tmp_path, _tensors(), updates=4), 3).findings
    assert finding.endswith("step_00000003: values.optimizer_steps is 4; of 3 steps it is 0 to 3")


def test_an_incomplete_record_of_the_run_is_reported(tmp_path: Path) -> None:
    folder = _save(tmp_path, _tensors())
    rewrite(folder.of_step(3), lambda values: values["run"].update(position=-1, data_fingerprint=None))
    assert [finding.partition(": ")[2] for finding in verify_checkpoint(folder, 3).findings] == [
        "run.position is -1; it is a number of at least 0",
        "run.data_fingerprint is null; it is text",
    ]


def _lie(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write other tensors into a file and update its size and hash in the manifest."""
    data = safetensors.torch.save(tensors)
    (folder / FILE).write_bytes(data)
    stated = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, lambda values: values["files"].update({FILE: stated}))


LIES = {
    "shape": ({"model.embed.weight": torch.ones(3, 5)}, r"model\.embed\.weight is \[3, 5\] F32 in it, and \[5, 3\]"),
    "dtype": (
        {"model.embed.weight": torch.ones(5, 3, dtype=torch.int32)},
        r"is \[5, 3\] I32 in it, and \[5, 3\] float",
    ),
    "name": ({"model.other": torch.ones(5, 3)}, r"has 'model\.other', which manifest\.json does not list there"),
}


@pytest.mark.parametrize(("change", "finding"), LIES.values(), ids=LIES.keys())
def test_a_file_with_other_tensors_is_named(tmp_path: Path, change: dict[str, Tensor], finding: str) -> None:
    folder = _save(tmp_path, _tensors())
    _lie(folder.of_step(3), {**_tensors(), **change})
    findings = verify_checkpoint(folder, 3).findings
    assert len(findings) == 1 and finding.replace("\\", "") in findings[0]


def test_a_tensor_that_its_file_lacks_is_named(tmp_path: Path) -> None:
    folder = _save(tmp_path, _tensors())
    _lie(folder.of_step(3), {**{n: t for n, t in _tensors().items() if "embed" not in n}, "pad": torch.ones(99)})
    assert sorted("embed" in finding for finding in verify_checkpoint(folder, 3).findings) == [False, True]


def test_damaged_files_are_named_and_their_tensors_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoint.tensor_files.FILE_SIZE_BYTES", 100)
    tensors = _tensors()
    _nan(tensors)
    folder = _save(tmp_path, tensors)
    first = folder.of_step(3) / FILE
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    findings = verify_checkpoint(folder, 3).findings
    assert len(findings) == 2 and "its SHA-256" in findings[0] and "not finite" in findings[1]


def test_an_unlisted_file_is_named(tmp_path: Path) -> None:
    folder = _save(tmp_path, _tensors())
    (folder.of_step(3) / "model.pt").write_bytes(b"\x80\x04.")
    assert "'model.pt' is not a file of this checkpoint; nothing reads it" in verify_checkpoint(folder, 3).findings[0]


def test_a_damaged_manifest_is_the_only_finding(tmp_path: Path) -> None:
    folder = _save(tmp_path, _tensors())
    (folder.of_step(3) / "manifest.json").write_text("{")
    assert len(verify_checkpoint(folder, 3).findings) == 1


def test_a_large_tensor_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read = StoredTensors.read

    def note(tensors: StoredTensors, name: str, start: int = 0, length: int | None = None) -> Tensor:
        block = read(tensors, name, start, length)
        sizes.append(block.numel() * block.element_size())
        return block

    monkeypatch.setattr(StoredTensors, "read", note)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 25)
    assert verify_checkpoint(_save(tmp_path, _tensors()), 3).findings == []
    assert max(sizes) <= 32 and sum(sizes) == sum(t.numel() * t.element_size() for t in _tensors().values())


def test_a_checkpoint_that_a_run_removes_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path)
    folder = _save(run.checkpoints, _tensors(), step=3)
    _save(run.checkpoints, _tensors(), step=6)
    check_file = module.check_file

    def remove_next(path: Path, name: str, stored: StoredFile) -> None:
        check_file(path, name, stored)
        if folder.of_step(3).exists():
            folder.remove(3)

    monkeypatch.setattr(module, "check_file", remove_next)
    with pytest.raises(SystemExit, match="0"):
        main(["checkpoint", "verify", str(tmp_path), "--json"])
    assert [record["step"] for record in json.loads(capsys.readouterr().out)] == [6]
    _save(run.checkpoints, _tensors(), step=3)
    with pytest.raises(SystemExit, match="4"):
        main(["checkpoint", "verify", str(tmp_path), "--step", "3"])
    assert "has no checkpoint of step 3" in capsys.readouterr().err

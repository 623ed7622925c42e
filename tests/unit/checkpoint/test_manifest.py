"""Manifests from untrusted sources are refused in one line, before a file is opened."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_helpers import save
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.manifest_file import manifest_text, read_manifest
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.errors import CheckpointError

FILE = "tensors-00000-00000.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = TrainState(slices={"model.a": Slice.whole(torch.ones(4, 2))}, values={"optimizer_steps": 1})
    return save(tmp_path, 1, state, {"position": 8}).path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest's content and update its hash."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    del values["manifest_sha256"]
    change(values)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**values, "manifest_sha256": digest}))


def _slices(*parts: tuple[str, int, int]) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        slices = [{"file": file, "start": start, "length": length} for file, start, length in parts]
        values["tensors"]["model.a"]["slices"] = slices

    return change


def _tensor(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["tensors"]["model.a"].update(fields)


UNSOUND = {
    "missing": (_slices((FILE, 0, 3)), r"indices 3 to 3 of 4 are missing"),
    "twice": (_slices((FILE, 0, 3), (FILE, 2, 2)), r"indices 2 to 2 are there twice"),
    "two parts of one file": (_slices((FILE, 0, 2), (FILE, 2, 2)), r"2 parts are in tensors.* can hold one"),
    "unlisted": (_slices(("other.safetensors", 0, 4)), r"other\.safetensors is not among the files"),
    "traversal": (_slices(("../../x.safetensors", 0, 4)), r"slices.0.file: String should match"),
    "more than the file has": (_tensor(shape=[4, 1000]), r"has \d+ bytes for 16000 of tensors"),
    "no memory for it": (_tensor(shape=[0, 1 << 50, 1 << 50], slices=[]), r"is too large"),
    "beyond 64 bits": (_tensor(shape=[1 << 63]), r"less than or equal to"),
    "many dimensions": (_tensor(shape=[1] * 1000), r"at most 16 items"),
    "a truth for a number": (_tensor(shape=[True, 2]), r"shape.0: Input should be a valid integer"),
    "text for a number": (lambda v: v.update(step="1"), r"step: Input should be a valid integer"),
    "another dtype": (_tensor(dtype="complex64"), r"dtype: Input should be"),
    "a hash that is none": (lambda v: v["files"][FILE].update(sha256="0"), r"sha256: String should match"),
}


@pytest.mark.parametrize(("change", "message"), UNSOUND.values(), ids=UNSOUND.keys())
def test_a_manifest_without_whole_tensors_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=rf"manifest\.json: is invalid: .*{message}") as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


TEXTS = {
    "a key twice": ('{"format": 2, "format": 2}', "a key is given twice"),
    "no number": ('{"format": NaN}', "NaN is not a number"),
    "a flood": ("[" + "{}," * 2_100_000 + "{}]", "bytes are more than a manifest has"),
    "depth": ("[" * 100_000, "RecursionError"),
    "another format": ('{"format": 3, "manifest_sha256": ""}', "its hash does not match"),
    "no object": ("[]", "TypeError"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS.keys())
def test_text_that_is_not_a_manifest_is_damaged(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


def test_a_name_with_control_characters_is_not_printed(folder: Path) -> None:
    rewrite(folder, lambda values: values["tensors"].update({"a\n\x1b[2J" + "x" * 10_000: {"dtype": "int8"}}))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_a_manifest_too_large_to_be_read_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest: Manifest = read_manifest(folder)
    monkeypatch.setattr("trainer.checkpoint.manifest_file._MAX_VALUES", 10)
    with pytest.raises(CheckpointError, match=r"step 1 not saved: its manifest has \d+ bytes, too many to be read"):
        manifest_text(manifest)


def test_a_manifest_with_another_hash_is_damaged(folder: Path) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"step": 2}))
    with pytest.raises(CheckpointError, match="its hash does not match its content"):
        read_manifest(folder)


def test_a_file_has_to_hold_all_of_its_tensors_together(folder: Path) -> None:
    """Although each tensor alone would fit into the file."""

    def change(values: dict[str, Any]) -> None:
        values["files"][FILE]["size_bytes"] = 40
        values["tensors"]["model.b"] = values["tensors"]["model.a"]

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="has 40 bytes for 64 of tensors"):
        read_manifest(folder)


def test_averages_stand_in_for_all_learning_weights_or_for_none(tmp_path: Path) -> None:
    parts = {f"{kind}.a": torch.full((2,), float(n)) for n, kind in enumerate(("model", "ema", "optim.exp_avg"))}
    parts |= {"model.frozen": torch.zeros(2), "optim.exp_avg_sq.a": torch.zeros(2)}
    folder = CheckpointFolder(tmp_path)
    save(folder, 1, TrainState(slices={name: Slice.whole(t) for name, t in parts.items()}))
    found = folder.check(1)
    averaged = found.averaged()
    assert averaged is not None and averaged.tensors.keys() == parts.keys() - {"ema.a"}
    assert averaged.model_dump()["tensors"]["model.a"] == found.model_dump()["tensors"]["ema.a"]
    with StoredTensors(folder.of_step(1), averaged) as tensors:
        assert tensors.read("model.a").tolist() == [1.0, 1.0] and tensors.read("model.frozen").tolist() == [0.0, 0.0]
    parts |= {f"{kind}.b": torch.zeros(2) for kind in ("model", "optim.exp_avg", "optim.exp_avg_sq")}
    save(folder, 2, TrainState(slices={name: Slice.whole(t) for name, t in parts.items()}))
    assert folder.check(2).averaged() is None, "b has none"
    assert averaged.averaged() is None, "it has no averages beside them"


def test_a_manifest_cannot_say_that_a_tensor_is_another(folder: Path) -> None:
    rewrite(folder, _tensor(_kept_as="model.b"))
    assert read_manifest(folder).tensors["model.a"].kept_as("model.a") == "model.a"

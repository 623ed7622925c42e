"""Run the `checkpoint` subcommands on a trained run."""

import contextlib
import hashlib
import importlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.checkpoint_helpers import load
from tests.end_to_end.test_cli import CONFIG, _environment, refused, run
from tests.unit.checkpoint.test_manifest import rewrite
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.cli import main
from trainer.optim.registry import WarmupCosineConfig

STEPS = (5, 10, 15, 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    result = run(folder, "train", "tiny.yaml", "checkpoint.every=5", "checkpoint.keep=4", "eval.every=null")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def workplace(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def checkpoint(workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a subcommand of `checkpoint`."""
    return turnout(workplace, "checkpoint", *arguments)


def turnout(workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has torch: most of a process of its own would be spent importing it."""
    output, error = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(workplace),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(error),
        pytest.raises(SystemExit) as end,
    ):
        main(arguments)
    assert isinstance(end.value.code, int)
    return subprocess.CompletedProcess(arguments, end.value.code, output.getvalue(), error.getvalue())


def _checkpoint(workplace: Path, step: int) -> Path:
    return workplace / f"runs/tiny/checkpoints/step_{step:08d}"


def _damage(workplace: Path, step: int) -> None:
    file = next(_checkpoint(workplace, step).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)


def _spoil(workplace: Path, step: int) -> None:
    """Make a weight NaN, and the hashes right, as a run of an older version did that had diverged."""
    folder = _checkpoint(workplace, step)
    file = next(folder.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    data = safetensors.torch.save(tensors)
    file.write_bytes(data)
    stated = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, lambda values: values["files"].update({file.name: stated}))


def _steps(workplace: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted((workplace / "runs/tiny/checkpoints").glob("step_*"))]


def test_list_has_a_line_for_each_and_reads_all_bytes_only_where_asked(workplace: Path) -> None:
    _damage(workplace, 20)
    result = checkpoint(workplace, "list", "runs/tiny")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [f"step_{step:08d}" for step in STEPS]
    assert all(" 0.6 MB " in line and "1 rank, ep 1, replicate" in line and line.endswith("complete") for line in lines)
    full = checkpoint(workplace, "list", "tiny.yaml", "--full").stdout.splitlines()
    assert all(line.endswith("intact") for line in full[:3]) and "its SHA-256" in full[3]
    records = json.loads(checkpoint(workplace, "list", "runs/tiny", "--full", "--json").stdout)
    assert [record["wrong"] is None for record in records] == [True, True, True, False]
    assert records[0]["layout"] == {"world_size": 1, "ep_size": 1, "data": "replicate", "engine": "native"}


@pytest.mark.nightly
def test_list_and_prune_never_import_torch(workplace: Path) -> None:
    code = (
        "import sys\nfrom trainer.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    for arguments in (("list", "runs/tiny"), ("list", "runs/tiny", "--full"), ("prune", "runs/tiny")):
        command = [sys.executable, "-c", code, "checkpoint", *arguments]
        result = subprocess.run(command, cwd=workplace, env=_environment(), capture_output=True, text=True, timeout=60)
        assert result.stdout.splitlines()[-1] == "0 False", result.stderr


def test_verify_says_intact_or_what_is_wrong(workplace: Path) -> None:
    result = checkpoint(workplace, "verify", "runs/tiny")
    assert result.returncode == 0, result.stdout
    intact = [
        f"runs/tiny/checkpoints/step_{step:08d}: intact: 54 tensors, 4 experts in 2 layers, 0.6 MB" for step in STEPS
    ]
    assert result.stdout.splitlines() == intact[::-1]
    _damage(workplace, 10)
    result = checkpoint(workplace, "verify", "runs/tiny", "--json")
    assert result.returncode == 4
    assert {record["step"]: len(record["findings"]) for record in json.loads(result.stdout)} == {
        5: 0,
        10: 1,
        15: 0,
        20: 0,
    }
    assert checkpoint(workplace, "verify", "runs/tiny", "--step", "15").returncode == 0
    refused(checkpoint(workplace, "verify", "runs/tiny", "--step", "7"), 4, r"no checkpoint of step 7; it has 5, 10")


def test_prune_says_what_it_does_and_keeps_what_is_damaged(workplace: Path) -> None:
    _damage(workplace, 20)
    (workplace / "runs/tiny/checkpoints/.tmp-step_00000025").mkdir()
    dry = checkpoint(workplace, "prune", "runs/tiny", "--keep", "2", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "would remove runs/tiny/checkpoints/step_00000005" in dry.stdout and _steps(workplace) == [*STEPS]
    result = checkpoint(workplace, "prune", "runs/tiny", "--keep", "2")
    first, leftover, kept, last = result.stdout.splitlines()
    assert first == "removed runs/tiny/checkpoints/step_00000005"
    assert leftover == "removed runs/tiny/checkpoints/.tmp-step_00000025, left by a killed run"
    assert kept.startswith("kept runs/tiny/checkpoints/step_00000020/") and kept.endswith("--damaged removes it")
    assert last == "2 intact: step_00000010, step_00000015"
    assert _steps(workplace) == [10, 15, 20]
    result = checkpoint(workplace, "prune", "tiny.yaml", "--keep", "1", "--keep-every", "10", "--damaged")
    assert result.returncode == 0 and _steps(workplace) == [10, 15]
    assert load(workplace / "runs/tiny/checkpoints", 15)
    for option in ("--keep", "--keep-every"):
        result = checkpoint(workplace, "prune", "runs/tiny", option, "0")
        refused(result, 2, rf"argument {option}: must be a whole number of at least 1, got '0'")


def test_prune_never_works_beside_a_run_and_never_removes_the_last_of_a_run(workplace: Path) -> None:
    folder = RunFolder(workplace / "runs/tiny")
    folder.lock()
    refused(checkpoint(workplace, "prune", "runs/tiny"), 2, r"runs/tiny: .* process \d+ is training into it")
    del folder
    for step in STEPS:
        _damage(workplace, step)
    refused(
        checkpoint(workplace, "prune", "runs/tiny", "--damaged"),
        4,
        r"none of 4 checkpoints is intact; nothing is",
    )
    assert _steps(workplace) == [*STEPS]


LOAD = """\
import sys, torch, torch.distributed.checkpoint as dcp
names = dcp.FileSystemReader(sys.argv[1]).read_metadata().state_dict_metadata
state = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in names.items()}
dcp.load(state, checkpoint_id=sys.argv[1], no_dist=True)
torch.save(state, sys.argv[2])
"""


def test_an_export_is_loaded_by_dcp_in_another_process_and_equal(workplace: Path) -> None:
    result = checkpoint(workplace, "export-dcp", "runs/tiny", "out", "--step", "10")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "out: 54 tensors of step 10, 0.6 MB, read back equal bit for bit" in result.stdout
    assert "DCP files are pickles and have no hashes" in result.stdout
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, "out", "loaded.pt"], cwd=workplace, env=_environment(), check=True
    )
    loaded = torch.load(workplace / "loaded.pt", weights_only=True)
    source = load(workplace / "runs/tiny/checkpoints", 10)
    numbers = {name: int(loaded.pop(name)) for name in ("step", "position", "optimizer_steps")}
    assert numbers == {"step": 10, "position": 80, "optimizer_steps": 10}
    assert loaded.keys() == source.keys()
    for name, tensor in source.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    refused(checkpoint(workplace, "export-dcp", "runs/tiny", "out"), 2, r"^out: exists; name a folder")


def test_an_export_that_is_killed_leaves_no_folder_of_its_name(workplace: Path) -> None:
    code = (
        "import os, signal, sys, torch.distributed.checkpoint as dcp\nfrom trainer.cli import main\n"
        "dcp.load = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(['checkpoint', 'export-dcp', 'runs/tiny', 'out'])"
    )
    before = {path.name for path in workplace.iterdir()}
    result = subprocess.run([sys.executable, "-c", code], cwd=workplace, env=_environment(), timeout=60)
    assert result.returncode == -signal.SIGKILL
    (left,) = {path.name for path in workplace.iterdir()} - before
    assert left.startswith(".export-"), "written whole, and still without its name"


def test_what_is_no_run_is_one_line(workplace: Path) -> None:
    (workplace / "empty").mkdir()
    for verb in ("list", "verify", "export-dcp"):
        out = ["out"] if verb == "export-dcp" else []
        refused(checkpoint(workplace, verb, "empty", *out), 4, r"empty/checkpoints: has no checkpoint; train first")
        refused(checkpoint(workplace, verb, "nowhere.yaml", *out), 2, r"nowhere\.yaml: no such file")
    refused(checkpoint(workplace, "prune", "empty"), 4, r"empty: has no config\.yaml, so it is not a run folder")
    refused(checkpoint(workplace, "prune", "tiny.yaml", "name=none"), 4, r"runs/none: is not a run folder")
    refused(checkpoint(workplace, "list", "runs/tiny", "name=x"), 2, r"is a folder, and overrides need a config")
    assert not (workplace / "runs/none").exists() and not (workplace / "out").exists()


def test_weights_that_are_not_finite_are_a_line_to_every_verb(workplace: Path) -> None:
    """Of a checkpoint that an older version saved as intact."""
    _spoil(workplace, 20)
    what = r"step_00000020: model\.norm\.weight is not finite: the run had diverged when it was saved"
    for verb in (["eval"], ["generate", "--max-tokens", "3"]):
        result = turnout(workplace, verb[0], "runs/tiny", *verb[1:])
        assert result.returncode == 0 and re.search(f"{what}; using step 15 instead", _joined(result.stderr))
        refused(
            turnout(workplace, verb[0], "runs/tiny", *verb[1:], "--step", "20"), 4, f"{what}; use the checkpoint of"
        )
    assert re.search(what, checkpoint(workplace, "list", "runs/tiny", "--full").stdout)
    assert checkpoint(workplace, "prune", "runs/tiny", "--keep", "1").stdout.endswith("1 intact: step_00000015\n")
    _spoil(workplace, 15)
    refused(turnout(workplace, "eval", "runs/tiny"), 4, f"{what}.*no other checkpoint is left")
    assert _steps(workplace) == [15, 20]


def _joined(text: str) -> str:
    """Return a warning that was folded as one line."""
    return re.sub(r"\n +", " ", text)


def test_a_run_that_diverges_ends_with_6_and_a_line(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights in a save; in the last screen, what is computed with weights that are only just finite."""
    options = ["checkpoint.every=1", "eval.every=null", "schedule.warmup_steps=0"]
    far = ["name=far", "train.steps=2", "schedule.peak_lr=1000", "optim.weight_decay=1e6"]  # weights of 1e16
    line = r"runs/far/checkpoints/step_00000002: token 0: .* logits are not finite"
    refused(turnout(workplace, "train", "tiny.yaml", *options, *far), 6, f"^{line}")
    refused(turnout(workplace, "generate", "runs/far"), 6, rf"{line}.*; use the checkpoint of another")

    monkeypatch.setattr(WarmupCosineConfig, "build", lambda *_, **__: lambda _: 1e38)  # no config's values do it
    line = r"^step 1: model\.embedding\.weight is not finite \(and \d+ more tensors\); nothing of it is saved"
    refused(turnout(workplace, "train", "tiny.yaml", *options, "name=gone", "train.steps=3"), 6, line)
    assert not (workplace / "runs/gone/checkpoints").exists()


PLACES = {
    "as it is listed": "trainer.checkpoint.checkpoint_folder.read_manifest",
    "as it is hashed": "trainer.checkpoint.find_checkpoint.check_file",
    "as its numbers are looked at": "trainer.checkpoint.find_checkpoint.check_finite_values",
    "while the model is made": "trainer.training.load_trained.build_parallel_model",
    "as its tensors are read": "trainer.checkpoint.tensor_files.open_tensors",
}


@pytest.mark.parametrize("place", PLACES)
def test_where_a_run_removes_the_newest_meanwhile_the_next_one_is_taken(
    workplace: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(workplace / "runs/tiny/checkpoints")
    module, _, name = PLACES[place].rpartition(".")
    act = getattr(importlib.import_module(module), name)

    def remove_first(*arguments: Any, **options: Any) -> Any:
        if 20 in folder.steps():
            folder.remove(20)
        return act(*arguments, **options)

    monkeypatch.setattr(f"{module}.{name}", remove_first)
    said = r"step_00000020: was removed while it was read, by a run that trains; using step 15 instead"
    result = turnout(workplace, "generate", "runs/tiny", "--prompt", "It", "--max-tokens", "3", "--seed", "1")
    assert result.returncode == 0 and re.search(said, _joined(result.stderr)), result.stderr
    again = turnout(workplace, "generate", "runs/tiny", "--prompt", "It", "--max-tokens", "3", "--seed", "1")
    assert (again.stdout, again.stderr) == (result.stdout, "")
    folder.of_step(15).rename(folder.of_step(20))
    refused(
        turnout(workplace, "eval", "runs/tiny", "--step", "20"), 4, r"step_00000020: (was removed while|is damaged)"
    )

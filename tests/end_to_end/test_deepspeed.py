"""Use the DeepSpeed engine as a user does: with torchrun, DeepSpeed's launcher, and in the middle of a native run."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest

from tests import imported_once
from tests.end_to_end import tiny
from tests.end_to_end.tiny import environment, make_workplace, run, run_ranks, torchrun

assert_same = partial(tiny.assert_same, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a config, a text and a finished native run, `alone`."""
    folder = make_workplace(tmp_path_factory.mktemp("deepspeed"), dtype="float32")
    run(folder, "train", "tiny.yaml", "name=alone")
    return folder


def test_torchrun_trains_the_same_under_deepspeed(workplace: Path) -> None:
    options = ["engine.kind=deepspeed", "engine.zero_stage=2", "parallel.ep_size=2"]
    result = torchrun(workplace, 2, "train", "tiny.yaml", "name=two", *options)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert_same(workplace, "two")
    assert "OVERFLOW" not in said and "Traceback" not in said and "DeepSpeed, ZeRO 2" in said
    assert "[INFO]" not in said, "DeepSpeed says nothing unless it is asked to"


def test_a_native_run_goes_on_under_deepspeed_in_one_process_and_is_evaluated(workplace: Path) -> None:
    run_ranks(workplace, 2, "train", "tiny.yaml", "name=switch", "train.steps=4", "parallel.ep_size=2")
    options = ["name=switch", "engine.kind=deepspeed", "engine.offload_optimizer=cpu"]
    assert "engine native -> deepspeed" in run(workplace, "train", "tiny.yaml", *options)
    record = json.loads(run(workplace, "eval", "runs/switch", "--json"))
    last = json.loads((workplace / "runs/switch/metrics.jsonl").read_text().splitlines()[-1])
    assert record["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)


@pytest.mark.nightly
def test_deepspeeds_own_launcher_starts_it(workplace: Path) -> None:
    deepspeed = Path(sysconfig.get_path("scripts")) / "deepspeed"
    variables = {"DS_ACCELERATOR": "cpu", "PATH": f"{deepspeed.parent}:{os.environ['PATH']}"}
    with socket.socket() as free:  # DeepSpeed's launcher does not look for one
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--num_accelerators", "2", "--master_port", port, "--module", "trainer"]
    arguments = ["train", "tiny.yaml", "name=launcher", "engine.kind=deepspeed", "parallel.ep_size=2"]
    result = subprocess.run(
        [deepspeed, *options, *arguments],
        cwd=workplace,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same(workplace, "launcher")


LOADED = """
import sys
from trainer.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    found = sorted(name for name in sys.modules if name.split(".")[0] == "deepspeed")
    sys.exit(f"loaded {found[:3]}" if found or end.code else 0)
"""


@pytest.mark.parametrize(
    "arguments", [["train", "tiny.yaml", "name=lazy", "train.steps=3"], ["config", "show", "tiny.yaml"]]
)
def test_nothing_of_deepspeed_is_loaded_for_another_engine(workplace: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-c", LOADED, *arguments]
    result = subprocess.run(command, cwd=workplace, env=environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr


BROKEN = """
import sys
from trainer.cli import main
sys.modules["deepspeed.ops"] = None
main()
"""


def test_a_deepspeed_that_does_not_import_is_answered_in_a_line(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "without.py").write_text(BROKEN)
    script = str(tmp_path / "without.py")
    result = imported_once.run([script, "train", "tiny.yaml", "name=none", "engine.kind=deepspeed"], cwd=workplace)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("engine.kind: deepspeed: ") and line.endswith("; pip install deepspeed, or use native")


def test_a_kernel_that_cannot_be_compiled_is_answered_in_a_line(workplace: Path, tmp_path: Path) -> None:
    options = ["engine.kind=deepspeed", "engine.offload_optimizer=cpu", "engine.adam=deepspeed"]
    variables = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    result = imported_once.run(
        ["-m", "trainer", "train", "tiny.yaml", "name=none", *options], cwd=workplace, environment=variables
    )
    assert result.returncode == 2, result.stderr
    assert "engine.adam: DeepSpeed's cpu_adam cannot be built: " in result.stderr and "; use torch" in result.stderr
    assert "Traceback" not in result.stderr

"""Tests for what `init_from` refuses: one line, the right exit code, and nothing left."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.converted_runs import MOE, make_run, write_config
from tests.foreign_models import change_json, make_foreign, save_foreign
from trainer.checkpoint.init_from import InitFromConfig
from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.manifest_file import manifest_text, read_manifest
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.init_from_parent import find_first_weights
from trainer.commands.resolve import run_folder_of
from trainer.config.loader import load
from trainer.convert.match_tensors import match_tensors
from trainer.errors import ConfigError, TurnoutError
from trainer.experiment import ExperimentConfig

SECTIONS = {
    "{}": "nothing is named; name exactly one of run, checkpoint and hf",
    "{step: 3}": "step: 3, and no run is named",
    "{run: a, hf: b}": "run and hf are given; name exactly one",
    "{checkpoint: a, step: 3}": "step: 3, and no run is named",
    "{hf: a, parts: weights+optimizer}": "a published model has no optimizer state; use weights",
    "{run: a, parts: all}": "init_from.parts",
    "{run: a, exclude: [routr]}": "routr is not a role of weights; did you mean router?",
    "{run: a, exclude: [head, head]}": "'head' is named twice; name it once",
    "{run: a, exclude: ['../x']}": "init_from.exclude",
    "{run: a, rename: {'blocks.0': 'blocks.*'}}": "blocks.0: blocks.* has more * than it",
    "{run: a, step: -1}": "init_from.step",
    "{folder: a}": "init_from",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_makes_no_sense_is_refused_with_its_line(section: str, tmp_path: Path) -> None:
    with pytest.raises(TurnoutError) as error:
        load(write_config(tmp_path, "x", MOE), [f"init_from={section}"], ExperimentConfig)
    assert SECTIONS[section] in str(error.value) and error.value.exit_code == 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs `experts`, `dense` and `bare`, which has no checkpoint, and a published model `theirs`."""
    folder = tmp_path_factory.mktemp("parents")
    make_run(folder, "experts", MOE)
    make_run(folder, "dense", None)
    (folder / "runs" / "bare" / "checkpoints").mkdir(parents=True)
    (folder / "runs" / "no_run").mkdir()
    save_foreign(folder / "theirs", make_foreign("mixtral"))
    return folder


def _damage(home: Path) -> None:
    file = next((home / "runs/experts/checkpoints/step_00000000").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def _change_record(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def changed(home: Path) -> None:
        path = home / "runs/experts/checkpoints/step_00000000"
        manifest = read_manifest(path)
        change(manifest.run)
        (path / MANIFEST).write_bytes(manifest_text(manifest))

    return changed


def _nothing(home: Path) -> None: ...


MIXTRAL = ["model.num_heads=4", "model.num_kv_heads=2", "model.attention.head_dim=4"]
STEP = "runs/experts/checkpoints/step_00000000"
RUN, DENSE = "run: runs/experts", ["model.moe=null"]
CASES: dict[str, tuple[str, list[str], Callable[[Path], Any], int, str]] = {
    "no such run": ("run: runs/gone", [], _nothing, 4, "init_from.run: runs/gone: no such folder"),
    "no run": ("run: runs/no_run", [], _nothing, 4, "has no folder of checkpoints, so it is no run to start from"),
    "a run before its first save": ("run: runs/bare", [], _nothing, 4, "has no checkpoint; train first"),
    "a checkpoint as a run": (f"run: {STEP}", [], _nothing, 4, "name it by init_from.checkpoint"),
    "no such step": ("run: runs/experts, step: 7", [], _nothing, 4, "has no checkpoint of step 7; it has 0"),
    "no such checkpoint": ("checkpoint: runs/gone/step_00000001", [], _nothing, 4, "no such folder; name a checkpoint"),
    "a run as a checkpoint": ("checkpoint: runs/experts", [], _nothing, 4, "is not named step_N, as checkpoints are"),
    "the run itself": ("run: runs/x", [], lambda home: (home / "runs/x").mkdir(), 2, "is this run itself"),
    "a damaged file": (RUN, [], _damage, 4, "tensors-00000-00000.safetensors"),
    "a damaged manifest": (
        *(f"checkpoint: {STEP}", [], lambda home: (home / STEP / "manifest.json").write_text("{")),
        *(4, "manifest"),
    ),
    "a config of another version": (
        *(RUN, [], _change_record(lambda run: run["config"].update(later=1)), 4),
        "this version cannot read the config in its manifest",
    ),
    "a record that is not complete": (
        *(RUN, [], _change_record(lambda run: run.pop("position")), 4),
        "run.position is null; it is a number of at least 0",
    ),
    "no published folder": ("hf: gone", [], _nothing, 3, "gone: is not a folder"),
    "a folder that is no model": ("hf: runs/experts", [], _nothing, 3, "config.json: no such file"),
    "an unknown family": (
        *("hf: theirs", [], lambda home: change_json(home / "theirs/config.json", model_type="other"), 3, "other"),
    ),
    "weights are missing": (
        *("hf: theirs", MIXTRAL, lambda home: (home / "theirs/model.safetensors").unlink(), 4),
        "there are no weights in it",
    ),
    "a dense run": ("run: runs/dense", [], _nothing, 2, "experts are made of it by `turnout upcycle`"),
    "a dense layer, by tensor": (
        *("run: runs/dense, exclude: [head]", [], _nothing, 2),
        "has no blocks.0.ffn.router.gate.weight; its layer is dense there: make experts of it by `turnout upcycle`",
    ),
    "experts for a dense run": (RUN, DENSE, _nothing, 2, "made dense by `turnout surgery to-dense`"),
    "another width": (RUN, ["model.d_model=32"], _nothing, 2, "model.d_model is 32, and runs/experts has 16"),
    "another width, in parts": (
        *(f"{RUN}, exclude: [head]", ["model.d_model=32"], _nothing, 2, "use model.d_model: 16"),
    ),
    "other experts": (RUN, ["model.moe.d_ff=20"], _nothing, 2, "model.moe.d_ff is 20, and runs/experts has 12; use 12"),
    "other experts, by tensor": (
        *(f"{RUN}, exclude: [head]", ["model.moe.d_ff=20"], _nothing, 2),
        "blocks.0.ffn.experts.w_in is [4, 40, 16] in this model and [4, 24, 16] in runs/experts; make them equal",
    ),
    "other heads": (RUN, ["model.num_heads=4"], _nothing, 2, "model.num_heads is 4, and runs/experts has 2; use 2"),
    "other heads, in parts": (f"{RUN}, exclude: [head]", ["model.num_heads=4"], _nothing, 2, "model.num_heads is 4"),
    "more layers": (RUN, ["model.num_layers=3"], _nothing, 2, "or say which tensors by rename or exclude"),
    "more layers, by tensor": (
        *(f"{RUN}, exclude: [head]", ["model.num_layers=3"], _nothing, 2),
        "runs/experts has no blocks.2.attention_norm.weight; start it from initial values by init_from.exclude",
    ),
    "fewer layers": (
        *(f"{RUN}, exclude: [head]", ["model.num_layers=1"], _nothing, 2),
        "this model has no place for it; leave it out by init_from.exclude: [blocks.1.",
    ),
    "exclude matches nothing": (f"{RUN}, exclude: [blocks.9]", [], _nothing, 2, "blocks.9 matches no tensor"),
    "rename matches nothing": (f"{RUN}, rename: {{a.*: b.*}}", [], _nothing, 2, "a.* matches no tensor of runs"),
    "rename onto another": (
        *(f"{RUN}, rename: {{blocks.0.*: blocks.1.*}}", [], _nothing, 2),
        "would both be blocks.1.attention_norm.weight; exclude one, or rename both",
    ),
    "another router": (
        *(RUN, ["model.moe.router={kind: cosine}"], _nothing, 2),
        "has no blocks.0.ffn.router.",
    ),
    "tied now": (f"{RUN}, exclude: [router]", ["model.tie_embeddings=true"], _nothing, 2, "exclude: [head.weight]"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_parent_that_cannot_be_one_is_refused_before_anything_is_written(
    case: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, overrides, prepare, code, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    prepare(tmp_path)
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    options = [f"init_from={{{section}}}", "runs_dir=runs", "name=x", *overrides]
    config = load(write_config(tmp_path, "x", MOE), options, ExperimentConfig)
    with pytest.raises(TurnoutError) as error:
        first = find_first_weights(config, run_folder_of(config))
        assert first is not None
        first.verify(warn=print)
    said = str(error.value)
    assert message in said and "\n" not in said and error.value.exit_code == code, said
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before


def test_adapters_that_count_otherwise_are_told_of(home: Path, tmp_path: Path) -> None:
    """Under another factor the same adapters are another model."""
    parent = make_run(tmp_path, "adapted", MOE, lora={"rank": 2, "alpha": 8.0})
    told: dict[str, list[str]] = {}
    for lora in ("{rank: 2, alpha: 8}", "{rank: 2, alpha: 2}", "{rank: 2, alpha: 8, use_rslora: true}"):
        options = [f"init_from.run={parent}", f"model.lora={lora}", "name=x"]
        config = load(write_config(tmp_path, "x", MOE), options, ExperimentConfig)
        first = find_first_weights(config, run_folder_of(config))
        assert first is not None
        told[lora] = []
        first.verify(warn=told[lora].append)
    same, smaller, of_root = told.values()
    assert same == []
    assert len(smaller) == 1 and "use_rslora) is 1, and the adapters of" in smaller[0] and "with 4" in smaller[0]
    assert len(of_root) == 1 and "is 5.65685, and the adapters of" in of_root[0]


def test_a_run_that_is_being_trained_is_refused_unless_its_step_is_named(home: Path, tmp_path: Path) -> None:
    parent = RunFolder(home / "runs" / "experts")
    path = write_config(tmp_path, "x", MOE)
    parent.lock()
    try:
        config = load(path, [f"init_from.run={parent.path}"], ExperimentConfig)
        with pytest.raises(TurnoutError, match="its newest checkpoint is not its last") as error:
            find_first_weights(config, run_folder_of(config))
        assert error.value.exit_code == 2
        named = load(path, [f"init_from={{run: {parent.path}, step: 0}}"], ExperimentConfig)
        assert find_first_weights(named, run_folder_of(named)) is not None
    finally:
        assert parent._lock is not None
        parent._lock.close()


def test_a_refusal_needs_no_torch(home: Path) -> None:
    """`train` and `launch` compare the two models as they read the config."""
    arguments = [str(write_config(home, "x", MOE)), f"init_from.run={home}/runs/experts", "model.d_model=32", "name=y"]
    code = "import sys; from trainer.cli import parse_command_line\nfor command in ('train', 'launch'):\n"
    code += f"    options = parse_command_line([command, *{arguments!r}])\n    try: options.command(options)\n"
    code += "    except Exception as error: print(error, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()
    assert [line.endswith("use model.d_model: 16 False") for line in said] == [True, True], done.stdout + done.stderr
    assert not (home / "runs" / "y").exists()


def test_adapters_that_would_be_lost_are_named_with_what_keeps_them() -> None:
    init, theirs = InitFromConfig(run="runs/a"), ["attention.qkv.weight", "attention.qkv.lora_a"]
    with pytest.raises(ConfigError, match="or merge it first: turnout surgery merge-lora"):
        match_tensors(init, theirs, theirs[:1], born_here=(), where="runs/a")
    found = match_tensors(init, theirs[:1], theirs, born_here=theirs[1:], where="runs/a")
    assert found == {"attention.qkv.weight": "attention.qkv.weight", "attention.qkv.lora_a": None}

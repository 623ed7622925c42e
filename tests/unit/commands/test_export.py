"""The command `export`: one line and the right exit code for bad input, and nothing half-written."""

import contextlib
import io
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.exported_runs import make_run
from trainer.checkpoint.run_folder import RunFolder
from trainer.cli import main
from trainer.config.dump import dump
from trainer.convert import hf_export, shard_writer
from trainer.data.tokenizers.byte import ByteTokenizer

SIZES = {"num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24, "seq_len": 16}
MODEL = {**SIZES, "moe": {"num_experts": 4, "d_ff": 12}}
Usage = namedtuple("Usage", ["free"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_run(folder, MODEL)
    return folder


@pytest.fixture
def workplace(made: Path, tmp_path: Path) -> Path:
    """A copy, in `copy`: what else a command leaves there shows."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def turnout(*arguments: str | Path) -> tuple[int, str, str]:
    """Run a command in this process; return its code and what it printed."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code, output.getvalue(), error.getvalue()


def refused(workplace: Path, code: int, message: str, *options: str, out: str = "out", run: str = "runs/x") -> None:
    """Export, and expect one line, a code and an unchanged folder."""
    before = sorted(path.name for path in workplace.iterdir())
    found, printed, said = turnout("export", workplace / run, workplace / out, *options)
    assert (found, printed) == (code, "") and len(said.splitlines()) == 1, said
    assert message in said
    assert sorted(path.name for path in workplace.iterdir()) == before


def test_an_export_says_what_it_wrote_and_what_was_compared(workplace: Path) -> None:
    code, printed, said = turnout("export", workplace / "runs/x", workplace / "out", "--dtype", "bfloat16")
    assert (code, said) == (0, "")
    first, second = printed.splitlines()
    assert f"{workplace / 'out'}: step 0 as mixtral, 0.01M parameters in bfloat16, 1 file, 0.0 MB" == first
    assert second.startswith("gate logits: loaded by transformers, 41 tensors equal ours, logits of 128 tokens of held")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--target", "gemma"], 2, "argument --target: invalid choice: 'gemma' (choose from 'auto', 'mixtral'"),
        (
            ["--target", "qwen3_moe"],
            2,
            "--target: qwen3_moe cannot express this model: model.qk_norm: false: qwen3_moe",
        ),
        (["--shard-size", "5"], 2, "argument --shard-size: must be a size such as 500MB or 5GB, got '5'"),
        (["--shard-size", "0GB"], 2, "argument --shard-size: must be a size"),
        (["--gate", "none"], 2, "argument --gate: invalid choice: 'none'"),
        (["--dtype", "float16"], 2, "argument --dtype: invalid choice: 'float16'"),
        (["--step", "7"], 4, "has no checkpoint of step 7; it has 0"),
        (["model.d_model=32"], 2, "was written with model.d_model 16, the config has 32"),
    ],
)
def test_a_wrong_option_is_one_line(workplace: Path, options: list[str], code: int, message: str) -> None:
    refused(workplace, code, message, *options)


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_an_existing_target_is_kept(workplace: Path, taken: str) -> None:
    (workplace / "out").mkdir() if taken == "folder" else (workplace / "out").write_text("mine")
    refused(workplace, 2, "out: exists; name a folder that does not")
    assert (workplace / "out").is_dir() or (workplace / "out").read_text() == "mine"


def test_a_folder_without_parent_is_refused(workplace: Path) -> None:
    refused(workplace, 2, "a/b: is not a folder; create it first", out="a/b/c")


def test_what_is_no_run_or_has_no_checkpoint_is_refused(workplace: Path) -> None:
    (workplace / "other").mkdir()
    refused(workplace, 4, "has no config.yaml, so it is not a run folder; train first", run="other")
    shutil.rmtree(workplace / "runs/x/checkpoints")
    refused(workplace, 4, "has no checkpoint; train first")


def test_a_damaged_checkpoint_is_refused(workplace: Path) -> None:
    file = next((workplace / "runs/x/checkpoints/step_00000000").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(workplace, 4, "is damaged")


def test_a_run_that_cannot_be_exported_says_why(tmp_path: Path) -> None:
    config, run, _ = make_run(tmp_path, {**SIZES, "moe": None, "activation": "gelu"})
    refused(tmp_path, 2, "--target: auto: no family can express this model; the nearest is llama: model.activation")
    refused(tmp_path, 2, "--target: mixtral cannot express this model: model.moe: null", "--target", "mixtral")
    assert dump(config) == run.config.read_text()


def test_adapters_are_written_alone_or_merged(tmp_path: Path) -> None:
    make_run(tmp_path, {**MODEL, "lora": {"rank": 2}})
    code, printed, said = turnout("export", tmp_path / "runs/x", tmp_path / "out", "--adapter", "--base", "mine")
    assert (code, said) == (0, "")
    assert printed == (
        f"{tmp_path / 'out'}: step 0 as adapters of mixtral for peft, 0.00M parameters in float32; load them on the "
        "model that the run began with\n"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    refused(tmp_path, 2, "out: exists", "--adapter")
    code, printed, _ = turnout("export", tmp_path / "runs/x", tmp_path / "merged")
    assert code == 0 and "as mixtral" in printed and "41 tensors equal ours" in printed


def test_adapters_of_a_run_without_any_are_refused(workplace: Path) -> None:
    refused(workplace, 2, "--adapter: the run has no adapters (model.lora: null); leave the option out", "--adapter")
    refused(workplace, 2, "--base: names the model that adapters are of; use it with --adapter", "--base", "mine")


def test_a_tokenizer_without_a_file_is_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "files", lambda _: {})
    refused(workplace, 2, "data.tokenizer: ByteTokenizer has no tokenizer.json, which transformers reads")


def test_too_little_disk_or_memory_is_said_before_anything_is_written(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_export, "_COPIES", 1e15)
    refused(workplace, 7, "--gate logits: the model is loaded twice, in")
    monkeypatch.setattr(hf_export.shutil, "disk_usage", lambda _: Usage(free=10))
    refused(workplace, 7, "out: needs 58.2 kB, and 10 B is free", "--gate", "tensors")


def test_without_transformers_nothing_is_exported(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.commands.export.is_installed", lambda _: False)
    refused(workplace, 2, "needs transformers, which is not installed; pip install 'turnout[hf]'")


def _full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def _wrong_tensors(write: Callable[..., None]) -> Callable[..., None]:
    def write_wrong(path: Path, model: Any, links: Any) -> None:
        write(path, model, links)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return write_wrong


@pytest.mark.parametrize("gate", ["logits", "tensors"])
def test_nothing_is_left_of_an_export_that_the_gate_refuses(
    workplace: Path, gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "_write_shard", _wrong_tensors(shard_writer._write_shard))
    refused(workplace, 4, "is not the tensor of the checkpoint; this is a fault of the export", "--gate", gate)


def test_nothing_is_left_on_a_full_disk(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "_write_shard", _full_disk)
    refused(workplace, 7, "out: not written: No space left on device; free space or name another folder")


def test_the_target_of_the_config_is_used(workplace: Path) -> None:
    run = RunFolder(workplace / "runs/x")
    run.config.write_text(run.config.read_text().replace("target: null", "target: mixtral"))
    assert turnout("export", run.path, workplace / "out")[0] == 0

"""`train RUN --branch NAME`: what is wrong is refused in one line, before anything starts."""

from pathlib import Path

import pytest

from tests.converted_runs import MOE, make_run
from trainer import cli
from trainer.checkpoint.branch import Branch
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands import branch_run
from trainer.environment import is_restarted
from trainer.errors import ConfigError


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("branches")
    make_run(folder, "base", None)
    (folder / "runs/bare").mkdir()
    (folder / "runs/bare/config.yaml").write_bytes((folder / "runs/base/config.yaml").read_bytes())
    (folder / "runs/no_run").mkdir()
    make_run(folder, "recorded", MOE, overrides=[RECORD])
    return folder


RECORD = "metrics.routing_record={path: experts}"
CASES = [
    (["runs/base", "--branch", "a/b"], 2, "--branch 'a/b': is not the name of a run; use letters, digits, "),
    (["runs/base", "--branch", ".."], 2, "--branch '..': is not the name of a run"),
    (["runs/base", "--branch", ""], 2, "--branch '': is not the name of a run"),
    (["runs/base", "--branch", "base"], 2, "base: exists; choose another name"),
    (["runs/base", "--branch", "bare"], 2, "bare: exists; choose another name"),
    (["runs/base", "--branch", "new", "--step", "7"], 4, "checkpoints: has no checkpoint of step 7; it has 0"),
    (["runs/base", "--step", "0"], 2, "--step 0: says which checkpoint a --branch starts from; "),
    (["runs/base", "--branch", "new", "name=other"], 2, "name=other: --branch names the new run"),
    (["runs/base", "--branch", "new", "runs_dir=elsewhere"], 2, "runs_dir=elsewhere: --branch names the new run"),
    (["runs/base", "--branch", "new", "init_from.run=runs/base"], 2, "init_from.run=runs/base: --branch takes weights"),
    (["runs/base", "--branch", "new", "model.d_model=32"], 2, "was written with model.d_model 16, the config has 32"),
    (
        ["runs/base", "--branch", "new", "data.changed=restart", "data.tokenizer={kind: bpe, vocab_size: 300}"],
        2,
        "was written with data.tokenizer.kind byte, the config has bpe",
    ),
    (["runs/base", "--branch", "new", "data.changed=again"], 2, "data.changed: "),
    (
        ["runs/recorded", "--branch", "new"],
        2,
        "runs/recorded; name another folder, or set metrics.routing_record.path=null",
    ),
    (["runs/bare", "--branch", "new"], 4, "checkpoints: has no checkpoint; train first"),
    (["runs/no_run", "--branch", "new"], 4, "no_run: has no config.yaml, so it is not a run folder; train first"),
    (["runs/nothing", "--branch", "new"], 2, "runs/nothing: no such file, and no such run folder"),
    (["runs/base/checkpoints/step_00000000", "--branch", "new"], 4, "is a checkpoint of a run; name the run and its"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), CASES)
@pytest.mark.parametrize("command", ["train", "launch"])
def test_it_is_refused_and_nothing_is_written(
    workplace: Path,
    command: str,
    arguments: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    with pytest.raises(SystemExit) as end:
        cli.main([command, *arguments])
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (code, 1) and message in said
    assert sorted(path.name for path in (workplace / "runs").iterdir()) == ["bare", "base", "no_run", "recorded"]


def test_another_machine_waits_until_the_first_has_made_the_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch, final = (
        Branch(parent=RunFolder(workplace / "runs/base"), step=None, name="new", config=""),
        tmp_path / "new",
    )
    monkeypatch.setattr("time.sleep", lambda _: branch.make(final))
    (workplace / "runs/base/run_id").write_text("0123456789abcdef\n")
    branch_run.wait_until_made(branch, final)
    monkeypatch.setattr(branch_run, "_PATIENCE_S", -1.0)
    with pytest.raises(ConfigError, match=r"nowhere: has not been made by the first machine within -1 s; start the"):
        branch_run.wait_until_made(branch, tmp_path / "nowhere")


@pytest.mark.parametrize(("count", "expected"), [("", False), ("0", False), ("2", True), ("x", False)])
def test_only_a_later_attempt_of_torchrun_may_find_the_branch_made(
    count: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert is_restarted() == expected

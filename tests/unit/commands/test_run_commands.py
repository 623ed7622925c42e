"""Tests for the commands that read runs: what they print, refuse and survive."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from tests.run_folders import dead_pid, make_run, write_status
from trainer.cli import main


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs: finished, killed below a folder of its own, and never started."""
    monkeypatch.chdir(tmp_path)
    write_status(make_run(tmp_path / "runs/b", losses=[3.0, 2.0], eval_loss=2.5), 0, 1, state="ended", exit_code=0)
    write_status(make_run(tmp_path / "runs/sweep/a", "train.steps=10", losses=[3.0, 1.0]), 0, dead_pid())
    make_run(tmp_path / "runs/c")
    return tmp_path / "runs"


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    assert exit_.value.code == code, err
    return err if code else out


def test_status_shows_what_needs_a_look_and_counts_the_rest(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "status").splitlines()
    assert lines[0] == "runs/sweep/a: killed, step 5 of 10 (50.0%)"
    assert lines[1] == "  50 tokens/s, 2 s a step, loss 1.000"
    assert lines[-2] == "  its processes are gone without an end; python -m trainer train runs/sweep/a continues it"
    assert lines[-1] == "1 finished, 1 not started; --all shows them"
    assert said(capsys, "status", "--all").count("\nruns/") == 2
    assert said(capsys, "status", "runs/b").startswith("runs/b: finished, step 5")
    records = json.loads(said(capsys, "status", "--json"))
    assert [(r["run"], r["state"]) for r in records] == [
        ("runs/b", "finished"),
        ("runs/c", "not started"),
        ("runs/sweep/a", "killed"),
    ]


def test_runs_are_a_table_that_is_sorted_with_unknown_values_last(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def order(key: str) -> list[str]:
        return [line.split()[0] for line in said(capsys, "runs", f"--sort={key}").splitlines()[1:]]

    assert order("run") == ["runs/b", "runs/c", "runs/sweep/a"]
    assert order("loss") == ["runs/sweep/a", "runs/b", "runs/c"]
    assert order("-loss") == ["runs/b", "runs/sweep/a", "runs/c"]
    row = said(capsys, "runs", "runs/b").splitlines()[1]
    assert row.split() == ["runs/b", "finished", *row.split()[2:3], "200", "2.000", "2.500", "1.250", "4s"]
    [record] = json.loads(said(capsys, "runs", "runs/b", "--json"))
    assert (record["eval_loss"], record["train_s"], record["tokens"], record["parent"]) == (2.5, 4.0, 200, None)
    (runs / "c/metrics.jsonl").write_text('{"step": 1, "tokens": 1e300, "loss": 1e100}\n')
    assert said(capsys, "runs", "runs/c").splitlines()[1].split()[4:6] == ["-", "1.000e+100"]
    assert said(capsys, "runs", "--sort", "los", code=2).endswith("did you mean loss?\n")


@pytest.mark.parametrize("command", ["status", "runs"])
def test_thousands_of_runs_fit_into_memory(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What many runs need is near what one of them does: no log is kept."""
    for number in range(20):
        run = make_run(tmp_path / f"runs/r{number}")
        lines = (json.dumps({"step": n, "loss": 1.0, "text": "x" * 1000}) for n in range(100))
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    said(capsys, command, str(tmp_path / "runs/r0"))  # modules are imported
    peaks = []
    for folder in ("runs/r0", "runs"):
        tracemalloc.start()
        said(capsys, command, str(tmp_path / folder))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3 * peaks[0], peaks


@pytest.mark.parametrize("command", ["status", "runs"])
def test_what_is_no_folder_of_runs_is_refused_in_one_line(
    runs: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere: no such folder" in said(capsys, command, "nowhere", code=2)
    assert "config.yaml: is not a folder" in said(capsys, command, "runs/b/config.yaml", code=2)
    assert "is inside a run; name the run: " in said(capsys, command, "runs/b/status", code=4)
    (runs / "empty").mkdir()
    assert said(capsys, command, "runs/empty") == "no run in runs/empty\n"


def test_foreign_text_does_not_steer_the_terminal(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(runs / "d").rename(runs / "d\x1b[31m")
    write_status(run, 0, 1, state="ended", exit_code=1, error="\x1b[2J" + "x" * 10_000, host="h\x07")
    (run / "origin.json").write_text('{"parent": {"id": "\x1b]0;x", "step": 1}}')
    for command in ("status", "runs"):
        out = said(capsys, command)
        assert not any(c in out for c in "\x1b\x07") and "d\ufffd[31m" in out
        assert max(map(len, out.splitlines())) < 600


def test_the_commands_import_no_torch(runs: Path) -> None:
    code = (
        "import sys; from trainer.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    for command in ("status", "runs"):
        done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

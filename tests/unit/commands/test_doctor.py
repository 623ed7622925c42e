"""The command `doctor`: exit codes, JSON, and what it needs."""

import json
from pathlib import Path

import pytest

from tests.run_folders import make_run
from trainer.cli import parse_command_line
from trainer.doctor.cluster.cluster_work import Workload
from trainer.doctor.host_facts import HostFacts
from trainer.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a machine without faults: a full disk of the real one would be found too."""
    monkeypatch.setattr("trainer.commands.doctor.read_host", lambda *arguments, **keywords: HostFacts(cores=2))


def doctor(*arguments: str) -> int:
    options = parse_command_line(["doctor", *arguments])
    return options.command(options)


def test_a_sound_config_has_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("smoke", "--static", "parallel.device=cpu") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("checks: nothing found")


def test_a_severe_finding_has_exit_code_1_and_a_warning_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("smoke", "--static", "parallel.device=cpu", "model.moe.balance.coef=0") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "severe: no_balance" and lines[-1].endswith("1 severe, 0 warnings")
    assert doctor("smoke", "--static", "parallel.device=cpu", "train.grad_clip=null") == 0
    assert "warning: no_clipping" in capsys.readouterr().out


def test_json_is_one_object_with_all_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("smoke", "--static", "--json", "train.grad_clip=null", "parallel.device=cpu") == 0
    found = json.loads(capsys.readouterr().out)
    [finding] = found["findings"]
    assert finding.keys() == {"check", "severity", "found", "why", "source", "remedy"}
    assert finding["check"] in found["checks"] and found["notes"] == []


def test_a_run_is_examined_by_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs/sick", losses=[3.0])
    (run / "alarms.jsonl").write_text(json.dumps({"alarm": "plateau", "state": "rings", "message": "flat"}) + "\n")
    assert doctor(str(run), "--static") == 1
    said = capsys.readouterr().out
    assert "alarm plateau: flat" in said and "without --static every byte of them is" in said
    with pytest.raises(CheckpointError, match=r"runs: has no config.yaml, so it is not a run folder; train first"):
        doctor(str(tmp_path / "runs"), "--static")


def test_a_step_that_cannot_be_taken_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("moe_1b") == 0
    said = capsys.readouterr().out
    assert "note: no step was taken: corpus/**/*.jsonl.gz" in said and "small copy" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "doctor: name a config or a run folder, or use --cluster"),
        (["smoke", "--links", "links.json"], "--links: is written by --cluster; add it"),
    ],
)
def test_what_is_missing_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        doctor(*arguments)


def test_one_rank_is_measured_and_its_links_are_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Workload(
        width=64, copied=1 << 16, sizes=[1 << 10], link=1 << 10, burst_s=0.0, tiny_layers=(1, 2), budget_s=0.0
    )
    monkeypatch.setattr(Workload, "of", lambda device: tiny)
    assert doctor("smoke", "parallel.device=cpu", "--cluster", "--json", "--links", str(tmp_path / "links.json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cluster"] == json.loads((tmp_path / "links.json").read_text())
    assert found["cluster"]["ranks"] == 1 and found["cluster"]["links"] == [] and found["notes"]

"""The command `plan`, and `train --dry-run`."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_training import config_of_text
from trainer.checkpoint.run_folder import RunFolder
from trainer.cli import parse_command_line
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError, ResourceError
from trainer.experiment import ExperimentConfig
from trainer.training.routing_recorder import facts_of
from trainer.training.setup import build_run
from trainer.training.trace_run import TraceOptions, record_trace
from trainer.what_if.prediction import expert_loads
from trainer.what_if.traced_passes import Trace

TINY = [
    *("model.num_layers=1", "model.d_model=32", "model.num_heads=2", "model.seq_len=16", "model.moe.d_ff=16"),
    *(
        "train.global_batch_size=4",
        "--micro-batch",
        "2",
        "--engine",
        "native",
        "--recompute",
        "none",
        "--seconds",
        "1e6",
    ),
]


def plan(*arguments: str) -> int:
    options = parse_command_line(["plan", "configs/quickstart.yaml", *arguments])
    return options.command(options)


def test_layouts_are_ranked_and_the_first_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "planned.yaml"
    assert plan(*TINY, "--world-size", "2", "--gpu", "CPU", "--write", str(target)) == 0
    said = capsys.readouterr().out
    assert "quickstart on 2 cpu, 2 in a machine" in said and "of a model, not measured" in said
    rows = [line for line in said.splitlines() if line.startswith((" 1.", " 2."))]
    assert len(rows) == 2
    config = load(target, [], ExperimentConfig)
    assert config.parallel.micro_batch_size == 2 and config.model.d_model == 32
    assert f"turnout launch {target} --nproc 2" in said
    with pytest.raises(ConfigError, match="exists; name a new file"):
        plan(*TINY, "--world-size", "2", "--gpu", "cpu", "--write", str(target))


def test_what_has_no_room_is_refused_with_the_nearest_option(capsys: pytest.CaptureFixture[str]) -> None:
    few = [*TINY, "--world-size", "2", "--gpu", "cpu"]
    plan(*few, "--json", "--top", "2")
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["layouts"]
    peaks = sorted(one["peak_bytes"] for one in found)
    assert all(one["fits"] for one in found) and len(peaks) == 2
    with pytest.raises(ResourceError, match=r"does not fit on 2 cpu.* kB too much \(ep_size .*; use more ranks"):
        plan(*few, "--memory", str(0.9 * peaks[0] / 1e9))
    with pytest.raises(ResourceError, match=r"weights, gradients and moments alone need .* at ep_size 1, shard all"):
        plan(*few, "--memory", "1e-6")


def test_the_load_of_a_trace_is_that_of_the_busiest_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of_text(tmp_path, "model.init_std=1.0", "model.moe.router={kind: top_k, top_k: 2}")  # skewed
    folder = RunFolder(tmp_path / "runs" / "tiny")
    run = build_run(config, folder, Console(12, file=io.StringIO()), Mesh.of_one(), torch.device("cpu"))
    facts = facts_of(run.config, run.corpus.tokenizer, origin="eval", step=0, domains=run.corpus.domains)
    trace = tmp_path / "trace"
    record_trace(run.config, run.engine, run.corpus, facts, trace, TraceOptions(max_tokens=320))

    def flops(*load: str) -> float:
        few = "--world-size 2 --gpu cpu --ep-size 2 --micro-batch 3 --engine native --recompute none --top 1 --json"
        own = ["plan", str(tmp_path / "tiny.yaml"), "model.moe.router={kind: top_k, top_k: 2}", *few.split(), *load]
        options = parse_command_line(own)
        assert options.command(options) == 0
        return json.loads(capsys.readouterr().out)["layouts"][0]["flops"]

    shares = expert_loads(Trace(trace)).sum(0).double()
    busiest = 2 * float(shares.view(2, 2).sum(1).max() / shares.sum())  # times the mean of two ranks
    even, more = flops("--imbalance", "1"), flops("--imbalance", "1.5")
    assert busiest > 1.1
    assert flops("--trace", str(trace)) == pytest.approx(even + (more - even) / 0.5 * (busiest - 1), rel=0.01)
    with pytest.raises(ConfigError, match="has 4 experts, and the config has 8; trace a run of this number"):
        plan("--world-size", "2", "--gpu", "cpu", "--trace", str(trace))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--world-size 1048576 --gpu H100", "a plan is made for at most 16384 ranks"),
        ("--world-size 12 --gpu H100", "12 ranks do not fill machines of 8; use 8 or 16, or say by --nodes"),
        ("--world-size 12 --gpu H100 --nodes 5", "5 does not divide --world-size 12; use one of 1, 2, 3, 4, 6, 12"),
        ("--world-size 2 --gpu H100 --recompute all", "--recompute: 'all' is not known; use none, norms_and_acti"),
        ("--world-size 2 --gpu H100 --ep-size 3", "no layout has these choices on 2 ranks"),
        ("--world-size 2 --gpu H100 --trace x --imbalance 2", "give one of --imbalance and --trace"),
    ],
)
def test_wrong_requests_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*arguments.split())


def test_links_of_one_rank_are_refused_for_several(tmp_path: Path) -> None:
    alone = {"schema": 1, "ranks": 1, "matmul_flops_per_s": 1e11, "memory_bytes_per_s": 1e10}
    (tmp_path / "links.json").write_text(json.dumps(alone))
    with pytest.raises(ConfigError, match="was measured on one rank, without links; measure two or more"):
        plan("--world-size", "2", "--gpu", "cpu", "--links", str(tmp_path / "links.json"))


def test_the_ids_of_a_tokenizer_that_is_not_read_are_asked_for() -> None:
    text = "data.tokenizer={kind: file, path: absent.json}"
    with pytest.raises(ConfigError, match=r"known once its file is read; set model.vocab_size"):
        plan(text, "--world-size", "2", "--gpu", "H100")


def test_a_dry_run_takes_a_step_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [one for one in TINY if "=" in one]
    config = Path("configs/quickstart.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    options = parse_command_line(["train", str(config), *overrides, "--dry-run"])
    assert options.command(options) == 0
    said = capsys.readouterr().out
    assert "dry run of quickstart: rank 0 of 1, engine native" in said and " of tensors, in the " in said
    assert list(tmp_path.iterdir()) == []

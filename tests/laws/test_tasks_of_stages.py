"""Law: a run whose layers are on several ranks logs the tasks, and shows the sample, of one process."""

import io
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from tests.tiny_training import config_of_text
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.distributed.signals import StopRequest
from trainer.status import StatusFile
from trainer.training.generate_text import sample_held_out
from trainer.training.loop import fit
from trainer.training.setup import build_run

ROWS = [{"prompt": f"{n} times {n % 3} is", "answer": f" {n * (n % 3)}", "wrong": f" {n + 1}"} for n in range(7)]
TASK = (
    "{{kind: choice, name: pick, prompt: '{{prompt}}', choices: ['{{answer}}', '{{wrong}}'], answer: answer, "
    "rows: {{kind: jsonl, path: {0}}}}}, "
    "{{kind: generation, name: add, prompt: '{{prompt}}', references: ['{{answer}}'], max_new_tokens: 3, "
    "metrics: [exact_match], rows: {{kind: jsonl, path: {0}}}}}"
)


def run_on_a_rank(folder: str, name: str, overrides: tuple[str, ...]) -> tuple[str, str]:
    """Train a run on this rank, with tasks on the way; return prompt and text of its sample."""
    place = Path(folder)
    options = [f"name={name}", f"eval.tasks=[{TASK.format(place / 'rows.jsonl')}]", "train.dtype=float64"]
    config = config_of_text(place, *options, "train.steps=4", "model.num_layers=4", "eval.every=2", *overrides)
    own, files = config.parallel, RunFolder(Path(config.runs_dir) / name)
    mesh = mesh_here(ep_size=own.ep_size, pp_size=own.pp_size, pp_schedule=own.pp_schedule)
    with StopRequest() as stop, closing(Console(config.train.steps, file=io.StringIO())) as console:
        run = build_run(config, files, console, mesh, torch.device("cpu"))
        fit(run, stop, StatusFile(files.status, rank=mesh.layout.rank))
        sample = sample_held_out(run)
        run.saver.close()
        run.engine.close()
    return sample.prompt, sample.text


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, ("parallel.pp_size=2",)),
        (4, ("parallel.pp_size=2", "parallel.ep_size=2", "parallel.pp_schedule=zbv", "parallel.data=shard")),
    ],
    ids=str,
)
def test_tasks_and_sample_are_those_of_one_process(
    ranks: Ranks, tmp_path: Path, world_size: int, overrides: tuple[str, ...]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    [sample] = ranks.run(1, run_on_a_rank, str(tmp_path), "alone", ())
    together = ranks.run(
        world_size, run_on_a_rank, str(tmp_path), "stages", (*overrides, "parallel.micro_batch_size=1")
    )
    (alone, expected), (stages, found) = (_evaluations(tmp_path / "runs" / name) for name in ("alone", "stages"))
    assert stages == alone and found.keys() == expected.keys()
    assert {name.split("/")[1] for _, name in expected} > {"pick", "add"} and len(alone) == 2  # at steps 2 and 4
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key
    assert set(together) == {sample} and all(sample)


def _evaluations(run: Path) -> tuple[list[str], dict[tuple[int, str], float]]:
    """Return the generated texts of a run, and the numbers of its evaluations by step and name."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    texts = [path.read_text() for path in sorted(run.rglob("*.jsonl")) if "predictions" in str(path)]
    return texts, {
        (r["step"], k): v for r in records for k, v in r.items() if k.startswith("eval/") and "time" not in k
    }

"""The training run under test: short, with every kind of state that a resume could lose; and its expected outcome."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos.rank_forker import Attempt, Prepare, RankForker
from tests.checkpoint_helpers import digest, whole
from tests.ignore_clock import without_clock
from tests.imported_once import shorten_sample
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.find_checkpoint import find
from trainer.data.batches.row_order import DomainRows
from trainer.data.batches.stream import TrainStream
from trainer.data.batches.wrapped_rows import WrappedRows
from trainer.errors import CheckpointError

CONFIG = """\
name: chaos
model:
  num_layers: 2
  d_model: 16
  num_heads: 2
  seq_len: 16
  moe:
    num_experts: 5
    d_ff: 16
    num_shared_experts: 1
    router: {kind: bias_balanced, jitter: 0.2, bias_update_rate: 0.01}
    capacity: {factor: 1.5, min: 1}
    balance: {coef: 0.01, counts: previous_step}
data:
  sources: [{kind: text, path: prose.txt, domain: prose}, {kind: text, path: numbers.txt, domain: numbers}]
schedule: {kind: warmup_cosine, peak_lr: 3e-3, warmup_steps: 5}
train: {steps: 30, global_batch_size: 7}
eval: {every: 10, max_tokens_per_domain: 128}
checkpoint: {every: 5, keep: 2, retry_s: 2}
parallel: {micro_batch_size: 2, timeout_s: 12}
metrics: {log_every: 1}
"""
STEPS, ROWS = 30, 7
LONGEST_S = 120.0
"""An attempt on a busy machine; longer is a hang."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A working directory with one training run."""

    folder: Path
    world_size: int = 2
    ep_size: int = 2
    overrides: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "runs/chaos"

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The run's checkpoints."""
        return CheckpointFolder(self.run / "checkpoints")

    def prepare(self, like: "Workload | None" = None) -> "Workload":
        """Create the folder; copy the token cache of another workload if given."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        (self.folder / "chaos.yaml").write_text(CONFIG)
        # Short enough that every run begins a new epoch.
        (self.folder / "prose.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 14)
        (self.folder / "numbers.txt").write_text(" ".join(str(n * n) for n in range(200)))
        if like is not None:
            shutil.copytree(like.folder / ".cache", self.folder / ".cache")
        return self

    def start(
        self, forker: RankForker, *, planted: str = "", prepare: Prepare | None = None, **options: Any
    ) -> Attempt:
        """Start or resume the run."""
        arguments = ["train", "chaos.yaml", f"parallel.ep_size={self.ep_size}", *self.overrides]
        watched = lambda: observe(prepare)  # noqa: E731 - a fork needs no pickling
        return forker.start(
            self.folder, arguments, world_size=self.world_size, planted=planted, prepare=watched, **options
        )

    def finish(self, forker: RankForker, *, prepare: Prepare | None = None) -> list[str]:
        """Resume the run to its end without faults; return the errors found."""
        attempt = self.start(forker, prepare=prepare)
        codes, said = attempt.settle(seconds=LONGEST_S), attempt.said()
        is_well = set(codes) == {0} and "Traceback" not in said
        return [] if is_well else [f"did not finish as it should: {codes}: {said[-2000:]}"]


def observe(prepare: Prepare | None) -> None:
    """Record the rows that each rank reads and shorten the final sample; then call `prepare`."""
    cut = TrainStream.micro_batches

    def micro_batches(stream: TrainStream, first_slot: int, **options: Any) -> Any:
        batches = cut(stream, first_slot, **options)
        slots = [int(s) for batch in batches for s in batch.sample_id[:, 0] if s >= 0]
        if slots:
            visits = zip(*(part.tolist() for part in stream.mixture.locate(slots)), strict=True)
            windows = [window(stream.domain_rows[domain], domain, visit) for domain, visit in visits]
            with Path(f"rows.{os.environ['RANK']}").open("a") as file:
                file.write(json.dumps(dict(zip(slots, windows, strict=True))) + "\n")
        return batches

    TrainStream.micro_batches = micro_batches  # type: ignore[method-assign]
    shorten_sample()
    if prepare is not None:
        prepare()


def window(rows: DomainRows, domain: int, visit: int) -> str:
    """Return a name of the window of a visit: domain, epoch, position."""
    assert isinstance(rows, WrappedRows), "the run has windows"
    return f"{domain}:{visit // rows.num_rows}:{rows.starts(np.array([visit]))[0]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Results of a run that must not depend on interruptions."""

    metrics: list[str]
    """Records, times left out."""
    routing: str
    rows: dict[int, str]
    """Which window of the text every row was: domain, epoch, position."""
    tensors: dict[str, str]
    """SHA-256 of every tensor of the last checkpoint."""
    state: dict[str, Any]
    """Position and counters; the best checkpoint, if one is kept."""


def outcome(workload: Workload) -> Outcome:
    """Read the results of a finished run."""
    checkpoints = workload.checkpoints
    found = find(checkpoints, checkpoints.resolve_step(None))
    records = (json.loads(line) for line in (workload.run / "metrics.jsonl").read_text().splitlines())
    rows: dict[int, str] = {}
    for slot, window in _rows(workload):
        if rows.setdefault(slot, window) != window:
            rows[slot] = f"{rows[slot]} and {window}"
    return Outcome(
        metrics=[json.dumps(without_clock(record)) for record in records],
        routing=(workload.run / "routing.jsonl").read_text(),
        rows=rows,
        tensors={name: digest(tensor) for name, tensor in whole(found).items()},
        state={
            **{"step": found.step, "values": found.manifest.values, "position": found.run["position"]},
            **_best(checkpoints, found.run.get("best")),
        },
    )


def _best(checkpoints: CheckpointFolder, best: Any) -> dict[str, Any]:
    """Return the best checkpoint by the last one's record, the steps that are there, and a hash of the best."""
    if best is None:
        return {}
    tensors = whole(find(checkpoints, best["step"]))
    hashed = {name: digest(tensor) for name, tensor in tensors.items()}
    return {"best": best, "steps": checkpoints.steps(), "tensors of the best": hashed}


def differences(workload: Workload, expected: Outcome) -> list[str]:
    """Return the differences of a finished run from an undisturbed one, and its leftovers."""
    try:
        mine = outcome(workload)
    except (CheckpointError, OSError, ValueError) as error:
        return [f"cannot be read: {error}"]
    wrong = [
        f"{name} differ: {_first_difference(here, there)}"
        for name in ("metrics", "routing", "rows", "tensors", "state")
        if (here := getattr(mine, name)) != (there := getattr(expected, name))
    ]
    left = [p.name for p in (workload.run / "checkpoints").iterdir() if not re.fullmatch(r"step_\d{8}", p.name)]
    if left:
        wrong.append(f"left behind: {left}")
    return wrong


def damage(workload: Workload) -> list[str]:
    """Return the violations visible after an attempt, whatever happened to it."""
    wrong, checkpoints = [], workload.checkpoints
    for step in checkpoints.steps():
        try:
            checkpoints.check(step)
        except CheckpointError as error:
            wrong.append(f"has the name of a checkpoint: {error}")
    said = [path.read_text(errors="replace") for path in workload.folder.glob("out.*")]
    newest = max(checkpoints.steps(), default=0)
    reported = {int(n) for text in said for n in re.findall(r"saved runs/chaos/checkpoints/step_(\d+)", text)}
    wrong += [f"step {step} was reported as saved and is not there" for step in reported if step > newest]
    if any("Traceback" in text for text in said):
        wrong.append("a traceback")
    return wrong


def resumed_at(workload: Workload) -> int:
    """Return the step that the last attempt resumed from; 0 for the beginning."""
    found = re.search(r"resuming from \S+step_(\d+)", (workload.folder / "out.0").read_text(errors="replace"))
    return int(found[1]) if found else 0


def _rows(workload: Workload) -> Iterator[tuple[int, str]]:
    for path in workload.folder.glob("rows.*"):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the rank was killed while writing
                continue
            yield from ((int(slot), window) for slot, window in record.items())


def _first_difference(mine: Any, expected: Any) -> str:
    if isinstance(mine, dict):
        keys = [k for k in {**mine, **expected} if mine.get(k) != expected.get(k)]
        return f"{len(keys)} entries, first {keys[0]}: {mine.get(keys[0])} and not {expected.get(keys[0])}"
    mine, expected = (x.splitlines() if isinstance(x, str) else x for x in (mine, expected))
    for number, (a, b) in enumerate(zip(mine, expected, strict=False)):
        if a != b:
            return f"line {number + 1}: {a:.200} and not {b:.200}"
    return f"{len(mine)} lines and not {len(expected)}"

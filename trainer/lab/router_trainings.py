"""Train routers one after the other on the same text for the same number of tokens.

Each training is a run of its own, `python -m trainer train`, in a folder that a repeated command finds again: finished
trainings are not repeated, interrupted ones are resumed. Imports no torch.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_folder import RunFolder
from trainer.config.dump import changed_values, dump, inline, short
from trainer.config.loader import load
from trainer.errors import PREEMPTED, ConfigError, ResourceError, StopRequested, TurnoutError
from trainer.experiment import ExperimentConfig
from trainer.lab.router_configs import MIXTURE_OF_DEPTHS, router_config
from trainer.moe.config import MoEConfig
from trainer.moe.layer_options import BalanceConfig

_MIN_RECORDS = 50  # least number of records in metrics.jsonl, if a training has that many steps
_SECTIONS = ("runs_dir", "prepare", "parallel", "engine", "checkpoint", "metrics", "profile")
_NOT_LEARNED: Mapping[str, Any] = {**dict.fromkeys(_SECTIONS, True), "train": {"stop_after"}}
"""Keys and sections that do not affect what is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One router to train, with one seed."""

    router: str
    config: ExperimentConfig

    @property
    def folder(self) -> RunFolder:
        """Its run folder."""
        return RunFolder(Path(self.config.runs_dir) / self.config.name)


def plan_trainings(
    path: Path, overrides: Sequence[str], kinds: Sequence[str], *, budget: int | None, seeds: int, out: Path
) -> list[Training]:
    """Return all trainings of `kinds` of routers, seed by seed, with their configs validated.

    Each has `budget` training tokens, rounded to whole steps (None: the config's steps); `seeds` is the number of
    seeds, from the config's own upwards, and `out` the folder of all runs.

    Raises:
        ConfigError: if the config has no router to replace or does not support one of the kinds, or if a run in `out`
            was trained with another config.
    """
    base = load(path, overrides, ExperimentConfig)
    tokens_per_step = base.train.global_batch_size * base.model.seq_len
    steps = base.train.steps if budget is None else round(budget / tokens_per_step)
    if steps < 1:
        raise ConfigError(f"--budget: {budget} is less than half a step; a step has {tokens_per_step} tokens")
    moe = base.model.moe
    if moe is None or moe.num_experts < 2:
        what = "model.moe: null" if moe is None else f"model.moe.num_experts: {moe.num_experts}"
        raise ConfigError(f"{path}: {what} leaves a router nothing to choose between; use two experts or more")
    changes = [
        *overrides,
        f"runs_dir={inline(str(out))}",
        f"train.steps={steps}",
        f"metrics.log_every={max(1, min(base.metrics.log_every, steps // _MIN_RECORDS))}",
        "parallel.ep_size=1",
    ]
    load(path, changes, ExperimentConfig)  # report errors that do not depend on the router once
    changes_of: dict[str, list[str]] = {}
    errors: list[str] = []
    for kind in kinds:
        try:
            router_changes = list(_router_changes(kind, moe))
            load(path, [*changes, *router_changes], ExperimentConfig)
            changes_of[kind] = router_changes
        except ConfigError as error:
            errors += [line if line.startswith(f"{kind}.") else f"{kind}: {line}" for line in str(error).splitlines()]
    if errors:
        others = f"; or compare the others: --only {','.join(changes_of)}" if changes_of else ""
        raise ConfigError("\n".join(errors) + others)
    trainings = []
    for seed in range(base.seed, base.seed + seeds):
        for kind in kinds:
            every = [*changes, *changes_of[kind], f"name={kind}-seed{seed}", f"seed={seed}"]
            config = load(path, every, ExperimentConfig)
            training = Training(router=kind, config=config)
            check_trained_alike(training.folder, config, advice="use another --out")
            trainings.append(training)
    return trainings


def _router_changes(kind: str, moe: MoEConfig) -> Iterator[str]:
    """Yield overrides that replace the config's router; its own kind keeps its options."""
    if kind == moe.router.kind:
        return
    factor = moe.capacity.factor
    router = router_config(
        kind,
        num_experts=moe.num_experts,
        top_k=min(moe.num_experts, getattr(moe.router, "top_k", 2)),  # null experts allow more
        # A larger capacity means fewer drops for the others, but more experts per token under expert choice.
        capacity_factor=1.0 if factor is None or kind == "expert_choice" else factor,
        top_k_choices=getattr(moe.router, "top_k_choices", None),
    )
    yield f"model.moe.router={inline(router.model_dump())}"
    if router.is_self_balancing:
        yield "model.moe.balance.coef=0"
    elif moe.router.is_self_balancing and moe.balance.coef == 0:  # this one needs a balance loss
        yield f"model.moe.balance.coef={BalanceConfig().coef}"
    if factor is not None and not router.has_fixed_k:  # the router limits its experts itself
        yield "model.moe.capacity.factor=null"
        yield "model.moe.capacity.renormalize_after_drop=false"
    if kind == MIXTURE_OF_DEPTHS:  # as many weights as all experts together, for k / E of all tokens
        yield "model.moe.num_experts=1"
        yield f"model.moe.d_ff={moe.num_experts * moe.d_ff}"


def check_trained_alike(folder: RunFolder, config: ExperimentConfig, *, advice: str) -> None:
    """Reject a run folder that was trained with another config, so that only like is compared with like.

    Raises:
        ConfigError: with the first key that differs, and what to do.
    """
    if not folder.config.is_file():
        return
    trained = load(folder.config, [], ExperimentConfig).model_dump(exclude=dict(_NOT_LEARNED))
    changes = changed_values(trained, config.model_dump(exclude=dict(_NOT_LEARNED)))
    if changes:
        change = changes[0]
        raise ConfigError(
            f"{folder.path}: was trained with {change.key} {short(change.old)}, and the config has "
            f"{short(change.new)}; {advice}"
        )


def run_training(training: Training) -> Path:
    """Train to the end in a subprocess; return its log file.

    Raises:
        StopRequested: if the training was asked to stop; it has saved a checkpoint.
        TurnoutError: if it failed, with its exit code.
    """
    path = training.folder.path
    config, log = path.with_name(f"{path.name}.yaml"), path.with_name(f"{path.name}.log")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(dump(training.config))
        with log.open("wb") as output:
            command = [sys.executable, "-m", "trainer", "train", str(config)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    except OSError as error:
        raise ResourceError(f"{path.parent}: cannot be written: {error.strerror}; set another --out") from None
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal sent it to both processes; the training is saving
        process.wait()
        raise
    if code == PREEMPTED:
        raise StopRequested(f"{path}: stopped and saved; repeat the command to resume")
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        error = TurnoutError(f"{training.router}: training exited with code {code} ({log}): {lines[-1]}")
        error.exit_code = code if code > 0 else TurnoutError.exit_code
        raise error
    return log

"""Trains one router after the other on the same text for the same number of tokens.

Every training is a run of its own, `python -m trainer train`, in a folder that a repeated command finds again: what is
finished is not trained again, what was broken off goes on. Imports no torch.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.run_folder import RunFolder
from trainer.config.dump import changed_values, dump, inline, short
from trainer.config.loader import load
from trainer.errors import PREEMPTED, ConfigError, ResourceError, StopRequested, TurnoutError
from trainer.experiment import ExperimentConfig
from trainer.lab.router_kinds import ALONE, router_config
from trainer.moe.config import BalanceConfig, MoEConfig

_LOGGED = 50
"""Lines of metrics.jsonl that a training has at least, if it has as many steps."""
_OF_WHERE = {"runs_dir", "prepare", "parallel", "engine", "checkpoint", "metrics", "profile"}
"""Sections that change nothing of what is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One router to train, with one seed."""

    router: str
    config: ExperimentConfig

    @property
    def folder(self) -> RunFolder:
        """Run folder."""
        return RunFolder(Path(self.config.runs_dir) / self.config.name)


def plan(
    path: Path,
    overrides: Sequence[str],
    kinds: Sequence[str],
    *,
    budget: int | None,
    seeds: int,
    out: Path,
) -> list[Training]:
    """Return every training, seed by seed, each checked.

    Args:
        path: of the experiment file.
        overrides: of it.
        kinds: of routers.
        budget: tokens to train each one on, in whole steps; None: as many as the config says.
        seeds: how many, from the config's seed on.
        out: folder of all runs.

    Raises:
        ConfigError: if the config has no routers to replace, does not go with one of these, or a run in `out` is of
            another config.
    """
    base = load(path, overrides, ExperimentConfig)
    tokens_of_a_step = base.train.global_batch_size * base.model.seq_len
    steps = base.train.steps if budget is None else round(budget / tokens_of_a_step)
    if steps < 1:
        raise ConfigError(f"--budget: {budget} is less than half a step; a step has {tokens_of_a_step} tokens")
    moe = base.model.moe
    if moe is None or moe.num_experts < 2:
        what = "model.moe: null" if moe is None else f"model.moe.num_experts: {moe.num_experts}"
        raise ConfigError(f"{path}: {what} leaves a router nothing to choose between; use two experts or more")
    changes = [
        *overrides,
        f"runs_dir={inline(str(out))}",
        f"train.steps={steps}",
        f"metrics.log_every={max(1, min(base.metrics.log_every, steps // _LOGGED))}",
        "parallel.ep_size=1",
    ]
    load(path, changes, ExperimentConfig)  # what is wrong without any router is said once
    own = _suitable(kinds, moe, lambda more: load(path, [*changes, *more], ExperimentConfig))
    trainings = []
    for seed in range(base.seed, base.seed + seeds):
        for kind in kinds:
            named = [f"name={kind}-seed{seed}", f"seed={seed}"]
            training = Training(router=kind, config=load(path, [*changes, *own[kind], *named], ExperimentConfig))
            _check_unchanged(training)
            trainings.append(training)
    return trainings


def _suitable(kinds: Sequence[str], moe: MoEConfig, check: Callable[[list[str]], object]) -> dict[str, list[str]]:
    """Return the overrides of every kind.

    Raises:
        ConfigError: if the rest of the config does not go with some of them, with all that it does go with.
    """
    own: dict[str, list[str]] = {}
    said: list[str] = []
    for kind in kinds:
        try:
            changes = list(_router_changes(kind, moe))
            check(changes)
            own[kind] = changes
        except ConfigError as error:
            said += [line if line.startswith(f"{kind}.") else f"{kind}: {line}" for line in str(error).splitlines()]
    if said:
        others = f"; or compare the others: --only {','.join(own)}" if own else ""
        raise ConfigError("\n".join(said) + others)
    return own


def _router_changes(kind: str, moe: MoEConfig) -> Iterator[str]:
    """Yield overrides that put a router in the place of the config's own, which keeps its options."""
    if kind == moe.router.kind:
        return
    factor = moe.capacity.factor
    top_k = min(moe.num_experts, getattr(moe.router, "top_k", 2))  # null experts allow more
    # More room lets the others do without drops; under expert choice it is more experts for a token.
    room = 1.0 if factor is None or kind == "expert_choice" else factor
    router = router_config(
        kind,
        num_experts=moe.num_experts,
        top_k=top_k,
        room=room,
        top_k_choices=getattr(moe.router, "top_k_choices", None),
    )
    yield f"model.moe.router={inline(router.model_dump())}"
    if router.is_self_balancing:
        yield "model.moe.balance.coef=0"
    elif moe.router.is_self_balancing and moe.balance.coef == 0:  # which this one would be nothing without
        yield f"model.moe.balance.coef={BalanceConfig().coef}"
    if factor is not None and not router.has_fixed_k:  # room is the router's own business then
        yield "model.moe.capacity.factor=null"
        yield "model.moe.capacity.renormalize_after_drop=false"
    if kind == ALONE:  # as many weights as all experts, for the share k / E of all tokens
        yield "model.moe.num_experts=1"
        yield f"model.moe.d_ff={moe.num_experts * moe.d_ff}"


def _check_unchanged(training: Training) -> None:
    """Refuse a folder whose run is of another config: its numbers would be compared with those of this one."""
    folder = training.folder
    if not folder.config.is_file():
        return
    kept = load(folder.config, [], ExperimentConfig).model_dump(exclude=_OF_WHERE)
    changes = changed_values(kept, training.config.model_dump(exclude=_OF_WHERE))
    if changes:
        change = changes[0]
        raise ConfigError(
            f"{folder.path}: was trained with {change.key} {short(change.old)}, and the config has "
            f"{short(change.new)}; use another --out"
        )


def train(training: Training) -> Path:
    """Train to the end, in a process of its own; return the file that has all it said.

    Raises:
        Stopped: if it was asked to stop; it has saved what it learned.
        TurnoutError: if it failed, with its exit code.
    """
    path = training.folder.path
    config, log = path.with_name(f"{path.name}.yaml"), path.with_name(f"{path.name}.log")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(dump(training.config))
        with log.open("wb") as said:
            command = [sys.executable, "-m", "trainer", "train", str(config)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
    except OSError as error:
        raise ResourceError(f"{path.parent}: cannot be written: {error.strerror}; set another --out") from None
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to both, and the run is saving
        process.wait()
        raise
    if code == PREEMPTED:
        raise StopRequested(f"{path}: stopped and saved; repeat the command to go on")
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        error = TurnoutError(f"{training.router}: its training ended with code {code} ({log}): {lines[-1]}")
        error.exit_code = code if code > 0 else TurnoutError.exit_code
        raise error
    return log

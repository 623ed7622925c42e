"""Checks of a run by what its folder records. Import no torch."""

import math
import statistics
from collections.abc import Iterator

from trainer.console import formatting
from trainer.doctor.finding import Sign
from trainer.doctor.recorded.run_evidence import RunCheck, RunEvidence

_MOST_SKIPPED, _MOST_SPIKES = 0.01, 0.01
_MOST_DROPPED = 0.05
_SLOW = 1.25
_FEWEST_LINES = 5
_OVERFITS = 0.02
_MOST_DATA = 0.2
_ALWAYS_CLIPPED = 0.9
_FAILURE_H = 50_700.0
"""Hours of one GPU between two interruptions: 16,384 GPUs over 54 days had 419 (arXiv 2407.21783)."""
_RARE = 3.0
"""Interval of saves over the best one from which it is worth a word."""
_MOST_LOST_H = 1.0


def _ringing(run: RunEvidence) -> Iterator[Sign]:
    for alarm in run.alarms:
        yield Sign(
            f"alarm {alarm['alarm']}: {alarm.get('message', '')}", str(alarm.get("advice") or "see alarms.jsonl")
        )


def _skipped(run: RunEvidence) -> Iterator[Sign]:
    skipped, steps = run.newest("skipped_steps"), max(1, run.log.last_step)
    if skipped:
        yield Sign(
            f"{skipped:.0f} of {steps} steps were skipped: loss or gradient not finite, or a spike",
            "lower schedule.peak_lr, or raise model.moe.z_loss_coef; the log names the weights",
            "severe" if skipped > _MOST_SKIPPED * steps else None,
        )


def _spikes(run: RunEvidence) -> Iterator[Sign]:
    spikes, steps = run.newest("loss_spikes"), max(1, run.log.last_step)
    if spikes > max(3, _MOST_SPIKES * steps):
        yield Sign(
            f"{spikes:.0f} losses in {steps} steps were far above those before",
            "lower schedule.peak_lr, use optim.betas=[0.9, 0.95], or train.spikes.skip=true",
        )


def _dropped(run: RunEvidence) -> Iterator[Sign]:
    rates = run.values("drop_rate")[-_FEWEST_LINES:]
    if rates and statistics.median(rates) > _MOST_DROPPED:
        yield Sign(
            f"{statistics.median(rates):.1%} of the assignments are dropped at the end of the log",
            "raise model.moe.capacity.factor or balance.coef, or use factor: null; `turnout what-if` predicts drops",
        )


def _failed(run: RunEvidence) -> Iterator[Sign]:
    progress = run.progress
    if progress.state in ("failed", "killed", "damaged"):
        yield Sign(
            f"the run is {progress.state} at step {progress.step} of {progress.steps or '?'}"
            + (f" with exit code {progress.exit_code}: {progress.error}" if progress.error else ""),
            "docs/operations.md has every exit code; the same command goes on from the last checkpoint",
        )
    for trouble in progress.troubled:
        yield Sign(trouble, "look at its host; `turnout status` follows it")


def _damaged_log(run: RunEvidence) -> Iterator[Sign]:
    for note in run.progress.notes:
        yield Sign(note, "look at the disk; the run is not affected, its record is")


def _versions(run: RunEvidence) -> Iterator[Sign]:
    for name, (then, now) in run.versions.items():
        yield Sign(f"{name}: the run has {then}, here is {now}", "continue with what it was trained with")


def _damaged_checkpoints(run: RunEvidence) -> Iterator[Sign]:
    for step, findings in run.damaged.items():
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        yield Sign(
            f"checkpoint of step {step}: {findings[0]}{more}",
            "turnout checkpoint prune RUN --damaged; an older one is taken; test memory and disk of the host",
        )


def _slow_rank(run: RunEvidence) -> Iterator[Sign]:
    lines = [record for record in run.log.records if "slowest_rank" in record][-_FEWEST_LINES:]
    ranks = {record["slowest_rank"] for record in lines}
    ratios = [record.get("slowest_rank_ratio") or 0.0 for record in lines]
    if len(lines) == _FEWEST_LINES and len(ranks) == 1 and min(ratios) >= _SLOW:
        yield Sign(
            f"rank {ranks.pop()} is slowest in the last {len(lines)} logged steps, {statistics.median(ratios):.2f} "
            "times the median rank",
            "run `turnout doctor --cluster` on these machines",
        )


def _data_waits(run: RunEvidence) -> Iterator[Sign]:
    lines = [record for record in run.log.records if record.get("step_s") and "time/data" in record]
    shares = [record["time/data"] / record["step_s"] for record in lines[-_FEWEST_LINES:]]
    if len(shares) == _FEWEST_LINES and statistics.median(shares) > _MOST_DATA:
        yield Sign(
            f"{statistics.median(shares):.0%} of a step waits for data",
            "put data.cache_dir on a local disk; use an ingested source in place of a stream",
        )


def _overfitting(run: RunEvidence) -> Iterator[Sign]:
    losses = run.values("eval/loss")
    if len(losses) >= _FEWEST_LINES and losses[-1] > (1 + _OVERFITS) * min(losses):
        best = losses.index(min(losses))
        yield Sign(
            f"eval/loss is {losses[-1]:.4f}, and was {losses[best]:.4f} at evaluation {best + 1} of {len(losses)}",
            "stop there (train.early_stopping, checkpoint.best=eval/loss), or take more text",
        )


def _always_clipped(run: RunEvidence) -> Iterator[Sign]:
    clip, norms = run.config.train.grad_clip, run.values("grad_norm")
    late = norms[len(norms) // 2 :]
    if clip is None or len(late) < 2 * _FEWEST_LINES:
        return
    share = sum(norm > clip for norm in late) / len(late)
    if share > _ALWAYS_CLIPPED and statistics.median(late) > 10 * clip:
        yield Sign(
            f"{share:.0%} of the logged gradients were clipped, the median norm is {statistics.median(late):.3g} and "
            f"train.grad_clip {clip:g}",
            "lower model.init_std or the auxiliary losses, or raise train.grad_clip",
        )


def _rare_saves(run: RunEvidence) -> Iterator[Sign]:
    seconds, every = run.values("step_s")[-10:], run.config.checkpoint.every
    steps = run.config.train.steps
    if not seconds or not run.config.train.steps:
        return
    step_s = statistics.median(seconds)
    interval = (steps if every is None else min(every, steps)) * step_s / 3600
    mean_time = _FAILURE_H / run.world_size
    best = math.sqrt(2 * mean_time * max(step_s, 1.0) / 3600)  # Young 1974, if saving holds training up for a step
    if interval > max(_MOST_LOST_H, _RARE * best):
        yield Sign(
            f"checkpoint.every: {every} steps are {formatting.duration(3600 * interval)}; {run.world_size} GPUs fail "
            f"once in {formatting.duration(3600 * mean_time)} by a published rate",
            f"use checkpoint.every={max(1, round(3600 * max(best, 0.1) / step_s))}: every "
            f"{formatting.duration(3600 * max(best, 0.1))}",
        )


RUN_CHECKS: tuple[RunCheck, ...] = (
    RunCheck(
        name="alarms_ring",
        severity="severe",
        find=_ringing,
        why="what rang has not ended: docs/alarms.md says what it leads to",
        source="arXiv 1701.06538; NVIDIA/Megatron-LM#2398",
    ),
    RunCheck(
        name="skipped_steps",
        severity="warning",
        find=_skipped,
        why="their tokens were not learned, and more may follow",
        source="NVIDIA/Megatron-LM#3460",
    ),
    RunCheck(
        name="loss_spikes",
        severity="warning",
        find=_spikes,
        why="a spike costs hundreds of steps, and one day the loss does not come back",
        source="arXiv 2204.02311, section 5.1; NVIDIA/Megatron-LM#1582",
    ),
    RunCheck(
        name="drops",
        severity="warning",
        find=_dropped,
        why="these tokens had no expert",
        source="arXiv 2101.03961",
    ),
    RunCheck(
        name="failed_run",
        severity="severe",
        find=_failed,
        why="it does not train any more",
        source="arXiv 2407.21783, section 3.3.4",
    ),
    RunCheck(
        name="damaged_record",
        severity="warning",
        find=_damaged_log,
        why="lines that are lost are in no curve",
        source="facebookresearch/metaseq#53",
    ),
    RunCheck(
        name="other_versions",
        severity="warning",
        find=_versions,
        why="what is learned may change with the kernels and rules of another version",
        source="huggingface/transformers#43362",
    ),
    RunCheck(
        name="damaged_checkpoints",
        severity="severe",
        find=_damaged_checkpoints,
        why="it cannot be resumed, and the next may be damaged too",
        source="bghira/SimpleTuner#2613; laekov/fastmoe#4",
    ),
    RunCheck(
        name="always_slowest",
        severity="warning",
        find=_slow_rank,
        why="all ranks wait for it in every step",
        source="arXiv 2407.21783, section 3.3.4",
    ),
    RunCheck(
        name="waits_for_data",
        severity="warning",
        find=_data_waits,
        why="GPUs are idle",
        source="pytorch/pytorch#20037",
    ),
    RunCheck(
        name="held_out_loss_rises",
        severity="warning",
        find=_overfitting,
        why="the text is learned by heart",
        source="arXiv 2305.16264",
    ),
    RunCheck(
        name="always_clipped",
        severity="warning",
        find=_always_clipped,
        why="every step has the size of the clip: the learning rate is not what it says",
        source="arXiv 2204.02311",
    ),
    RunCheck(
        name="rare_saves",
        severity="warning",
        find=_rare_saves,
        why="a failure costs what was trained since the last checkpoint",
        source="arXiv 2407.21783, table 5; doi 10.1145/361147.361115",
    ),
)

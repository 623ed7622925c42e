"""Checks of what one real step has measured: kernel, gradients, update, causality. Import no torch."""

import math
from collections.abc import Iterator

from trainer.doctor.finding import Sign
from trainer.doctor.step.layer_checks import LAYER_CHECKS
from trainer.doctor.step.step_evidence import StepCheck, StepEvidence, few_names

_NORM_ERROR = 1e-3
_WORSE_THAN_UNIFORM = 1.5
_REPORT = "this is a fault of the program or a plug-in; compare with the plain parts (`turnout prove`), and report it"


def _wrong_kernel(step: StepEvidence) -> Iterator[Sign]:
    for fault in step.kernel_faults:
        yield Sign(fault, "use another parallel.experts_kernel or dispatcher; see parallel.kernel_canary")


def _norm(step: StepEvidence) -> Iterator[Sign]:
    norms = list(step.grad_norms)
    if len(set(norms)) > 1:
        shown = [f"rank {rank} {norm:.9g}" for rank, norm in enumerate(norms)]
        yield Sign(f"the gradient norm differs between ranks: {few_names(shown)}", f"reduce it over all; {_REPORT}")
        return
    whole = step.whole_norm
    if norms and whole is not None and math.isfinite(norms[0]) and abs(norms[0] - whole) > _NORM_ERROR * whole:
        yield Sign(
            f"the gradient norm is {norms[0]:.6g}, that of all weights together {whole:.6g}",
            f"count every weight once, experts of all ranks among them; {_REPORT}",
        )


def _not_finite(step: StepEvidence) -> Iterator[Sign]:
    if step.not_finite is not None:
        yield Sign(step.not_finite, "lower model.init_std or schedule.peak_lr; look at the first layer that is named")


def _stuck_weights(step: StepEvidence) -> Iterator[Sign]:
    if step.unchanged:
        yield Sign(f"weights have a gradient and the step did not change them: {few_names(step.unchanged)}", _REPORT)
    if step.without_gradient:
        yield Sign(
            f"weights learn and got no gradient: {few_names(step.without_gradient)}",
            "connect them to the loss, or list them in train.freeze",
        )
    if step.changed_frozen:
        yield Sign(f"frozen weights were changed: {few_names(step.changed_frozen)}", _REPORT)


def _decayed_vectors(step: StepEvidence) -> Iterator[Sign]:
    if step.decayed_vectors:
        yield Sign(
            f"weight decay pulls vectors to 0: {few_names(step.decayed_vectors)}",
            "let the optimizer decay its group `decayed` only",
        )


def _leaks(step: StepEvidence) -> Iterator[Sign]:
    for when, change in step.later_tokens_change.items():
        if change > step.tolerance:
            yield Sign(
                f"in {when} other tokens later in the row change earlier logits by {change:.1%}, and the model says "
                "that it is causal",
                "let the router declare its causality (Router.causal); look at routing, capacity and masks",
            )


def _batch_dependent(step: StepEvidence) -> Iterator[Sign]:
    change = step.other_rows_change
    if change is not None and change > step.tolerance:
        yield Sign(
            f"in evaluation a row's logits change by {change:.1%} if other rows are not in the batch",
            "evaluate without a capacity, or with scope: sequence",
        )


def _initial_loss(step: StepEvidence) -> Iterator[Sign]:
    uniform = math.log(max(2, step.text.vocab_rows))
    if not step.is_trained and step.loss > _WORSE_THAN_UNIFORM * uniform:
        yield Sign(
            f"the first loss is {step.loss:.2f}; a uniform guess among {step.text.vocab_rows} ids has {uniform:.2f}",
            "lower model.init_std",
        )


def _unrepeatable(step: StepEvidence) -> Iterator[Sign]:
    if step.repeated is False:
        yield Sign(
            "the same step, computed twice, has another loss or gradient norm",
            "use parallel.deterministic=true to compare runs bit by bit",
        )


STEP_CHECKS: tuple[StepCheck, ...] = (
    *LAYER_CHECKS,
    StepCheck(
        name="wrong_kernel",
        severity="severe",
        find=_wrong_kernel,
        why="the loss looks right, and what is learned is not",
        source="ROCm/mori#675; deepspeedai/DeepSpeed#8261; marin-community/marin#8793",
    ),
    StepCheck(
        name="gradient_norm",
        severity="severe",
        find=_norm,
        why="ranks clip differently and drift apart, or experts are clipped by a norm without them",
        source="deepspeedai/DeepSpeed#8475; NVIDIA/Megatron-LM#5916",
    ),
    StepCheck(
        name="not_finite",
        severity="severe",
        find=_not_finite,
        why="no step can be taken",
        source="huggingface/transformers#48205",
    ),
    StepCheck(
        name="stuck_weights",
        severity="severe",
        find=_stuck_weights,
        why="a part of the model does not learn although the loss falls",
        source="NVIDIA/Megatron-LM#6228; NVIDIA/Megatron-LM#5956",
    ),
    StepCheck(
        name="decayed_vectors",
        severity="warning",
        find=_decayed_vectors,
        why="scales of norms and biases are pulled to 0 whatever the text says",
        source="ServiceNow/Fast-LLM#545; google-research/bert#289",
    ),
    StepCheck(
        name="later_tokens",
        severity="severe",
        find=_leaks,
        why="the loss is that of a model that sees what it predicts; generated text is worse than it says",
        source="arXiv 2408.15664; arXiv 2202.09368",
    ),
    StepCheck(
        name="batch_dependent_evaluation",
        severity="severe",
        find=_batch_dependent,
        why="held-out loss changes with the batch size, and so do answers",
        source="microsoft/Tutel#230; NVIDIA/Megatron-LM#4871",
    ),
    StepCheck(
        name="initial_loss",
        severity="warning",
        find=_initial_loss,
        why="the first steps only unlearn the initial values",
        source="arXiv 2309.14322",
    ),
    StepCheck(
        name="unrepeatable_step",
        severity="warning",
        find=_unrepeatable,
        why="two runs of one config part, and a bisection finds nothing",
        source="huggingface/transformers#43362; pytorch/torchtitan#1974",
    ),
)

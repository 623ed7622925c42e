"""Checks of what one real step has measured. Import no torch."""

import math
from collections.abc import Iterator, Sequence

from trainer.doctor.finding import Sign
from trainer.doctor.step.step_evidence import LayerEvidence, StepCheck, StepEvidence
from trainer.metrics.alarms.config import AlarmsConfig

_LEAST_SHARE = AlarmsConfig().router_gradient or 1e-6
_LEAST_SPREAD = 1e-6
_NORM_ERROR = 1e-3
_MOST_SHOWN = 4
_PROBABILITY_ERROR = 1e-3
_WORSE_THAN_UNIFORM = 1.5
_REPORT = "this is a fault of the program or a plug-in; compare with the plain parts (`turnout prove`), and report it"


def _names(names: Sequence[object]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return f"{', '.join(map(str, names[:_MOST_SHOWN]))}{more}"


def _dead_router(step: StepEvidence) -> Iterator[Sign]:
    for layer in step.layers:
        if not layer.learns or layer.lm_gradient is None or not layer.lm_gradient_all:
            continue
        if layer.lm_gradient <= _LEAST_SHARE * layer.lm_gradient_all:
            yield Sign(
                f"layer {layer.layer}: the cross-entropy has a gradient of {layer.lm_gradient:.1e} by the router's "
                f"weights, and of {layer.lm_gradient_all:.1e} by the layer's",
                "let the output depend on the scores: normalize: false with one expert per token; no detach and no "
                "integer op between scores and combine weights",
            )


def _constant_logits(step: StepEvidence) -> Iterator[Sign]:
    for layer in step.layers:
        if layer.learns and layer.logit_spread is not None and layer.logit_spread <= _LEAST_SPREAD:
            yield Sign(
                f"layer {layer.layer}: the router gives all tokens the same logits (spread {layer.logit_spread:.1e})",
                "give its gate random initial weights (model.init_std), and check what it is fed",
            )


def _router_precision(step: StepEvidence) -> Iterator[Sign]:
    for layer in step.layers:
        if layer.logit_dtype not in (None, "float32", "float64"):
            yield Sign(f"layer {layer.layer}: router logits are {layer.logit_dtype}", "compute them in float32")


def _padding_counted(step: StepEvidence) -> Iterator[Sign]:
    for layer in step.layers:
        expected, counted = layer.expected_assignments, layer.counted_assignments
        if expected is not None and counted != expected:
            yield Sign(
                f"layer {layer.layer}: {counted} assignments counted for {layer.num_valid} tokens besides padding, "
                f"which have {expected}",
                f"count tokens by RoutingContext.valid; {_REPORT}",
            )
        probability = layer.counted_probability
        if probability is not None and abs(probability - layer.num_valid) > _PROBABILITY_ERROR * layer.num_valid:
            yield Sign(
                f"layer {layer.layer}: probabilities of {layer.num_valid} tokens besides padding sum to "
                f"{probability:.1f}",
                "return probabilities that sum to 1, and count tokens by RoutingContext.valid",
            )


def _imbalanced(layer: LayerEvidence) -> bool:
    return len(set(layer.counts)) > 1


def _bias_direction(step: StepEvidence) -> Iterator[Sign]:
    for layer in step.layers:
        if layer.bias_moves is None or not _imbalanced(layer):
            continue
        mean = sum(layer.counts) / len(layer.counts)
        pull = sum(move * (mean - count) for move, count in zip(layer.bias_moves, layer.counts, strict=True))
        where = f"layer {layer.layer}: loads {_names(layer.counts)} of mean {mean:.1f}"
        if not any(layer.bias_moves):
            yield Sign(f"{where}, and the selection bias did not move", "set model.moe.router.bias_update_rate=0.001")
        elif pull < 0:
            yield Sign(
                f"{where}, and the bias of busy experts rises: it drives the load apart",
                "add the rate times sign(mean load - load)",
            )


def _bias_without_effect(step: StepEvidence) -> Iterator[Sign]:
    for layer in step.layers:
        if layer.bias_selects is False:
            yield Sign(
                f"layer {layer.layer}: a selection bias of 10 brings an expert no more tokens",
                "add the bias to the scores that top-k sees",
            )


def _identical_experts(step: StepEvidence) -> Iterator[Sign]:
    for layer in step.layers:
        if layer.identical_pairs:
            pairs = [f"{a} = {b}" for a, b in layer.identical_pairs]
            yield Sign(
                f"layer {layer.layer}: experts have the same weights: {_names(pairs)}",
                "give each its own seed; after upcycling add noise (turnout upcycle --noise 0.1)",
                "warning" if step.is_trained else None,
            )


def _silent_experts(step: StepEvidence) -> Iterator[Sign]:
    for layer in step.layers:
        if layer.silent_experts:
            yield Sign(
                f"layer {layer.layer}: experts {_names(layer.silent_experts)} have tokens and no gradient", _REPORT
            )
        if layer.unfed_gradients:
            yield Sign(
                f"layer {layer.layer}: experts {_names(layer.unfed_gradients)} have no token and a gradient",
                "use another parallel.experts_kernel, such as loop",
            )


def _wrong_kernel(step: StepEvidence) -> Iterator[Sign]:
    for fault in step.kernel_faults:
        yield Sign(fault, "use another parallel.experts_kernel or dispatcher; see parallel.kernel_canary")


def _norm(step: StepEvidence) -> Iterator[Sign]:
    norms = list(step.grad_norms)
    if len(set(norms)) > 1:
        shown = [f"rank {rank} {norm:.9g}" for rank, norm in enumerate(norms)]
        yield Sign(f"the gradient norm differs between ranks: {_names(shown)}", f"reduce it over all ranks; {_REPORT}")
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
        yield Sign(f"weights have a gradient and the step did not change them: {_names(step.unchanged)}", _REPORT)
    if step.without_gradient:
        yield Sign(
            f"weights learn and got no gradient: {_names(step.without_gradient)}",
            "connect them to the loss, or list them in train.freeze",
        )
    if step.changed_frozen:
        yield Sign(f"frozen weights were changed: {_names(step.changed_frozen)}", _REPORT)


def _decayed_vectors(step: StepEvidence) -> Iterator[Sign]:
    if step.decayed_vectors:
        yield Sign(
            f"weight decay pulls vectors to 0: {_names(step.decayed_vectors)}",
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
    StepCheck(
        name="dead_router",
        severity="severe",
        find=_dead_router,
        why="the router never learns which expert helps; auxiliary losses alone make it uniform",
        source="jingyaogong/minimind#858; NVIDIA-NeMo/Automodel#2995; huggingface/transformers#48687",
    ),
    StepCheck(
        name="constant_logits",
        severity="severe",
        find=_constant_logits,
        why="all tokens go to the same experts, and ties are broken by number",
        source="pytorch/torchtitan#3600; arXiv 2202.08906",
    ),
    StepCheck(
        name="router_precision",
        severity="severe",
        find=_router_precision,
        why="bfloat16 has 8 bits: close experts tie, and 5 % of the tokens get others",
        source="sgl-project/sglang#33764; marin-community/marin#4234",
    ),
    StepCheck(
        name="padding_counted",
        severity="severe",
        find=_padding_counted,
        why="losses and biases balance padding in place of tokens",
        source="NVIDIA/Megatron-LM#1984; NVIDIA/Megatron-LM#6114; huggingface/transformers#28505",
    ),
    StepCheck(
        name="bias_direction",
        severity="severe",
        find=_bias_direction,
        why="the selection bias does not balance the load, or drives it apart",
        source="NVIDIA/Megatron-LM#7081; pytorch/torchtitan#3686",
    ),
    StepCheck(
        name="bias_without_effect",
        severity="severe",
        find=_bias_without_effect,
        why="nothing balances the load, although the bias moves",
        source="arXiv 2408.15664; deepseek-ai/DeepSeek-V3#761",
    ),
    StepCheck(
        name="identical_experts",
        severity="severe",
        find=_identical_experts,
        why="equal experts get equal gradients, and a router cannot prefer one",
        source="arXiv 2502.19261; huggingface/transformers#42306",
    ),
    StepCheck(
        name="expert_gradients",
        severity="severe",
        find=_silent_experts,
        why="experts never train, or learn from memory that nobody wrote",
        source="NVIDIA/Megatron-LM#5956; pytorch/pytorch#172439",
    ),
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

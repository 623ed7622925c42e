"""Checks of what one real step has measured of the MoE layers. Import no torch."""

from collections.abc import Iterator

from trainer.doctor.finding import Sign
from trainer.doctor.step.step_evidence import LayerEvidence, StepCheck, StepEvidence, few_names
from trainer.metrics.alarms.config import AlarmsConfig

_LEAST_SHARE = AlarmsConfig().router_gradient or 1e-6
_LEAST_SPREAD = 1e-6
_PROBABILITY_ERROR = 1e-3
_REPORT = "this is a fault of the program or a plug-in; compare with the plain parts (`turnout prove`), and report it"


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
        where = f"layer {layer.layer}: loads {few_names(layer.counts)} of mean {mean:.1f}"
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
                f"layer {layer.layer}: experts have the same weights: {few_names(pairs)}",
                "give each its own seed; after upcycling add noise (turnout upcycle --noise 0.1)",
                "warning" if step.is_trained else None,
            )


def _silent_experts(step: StepEvidence) -> Iterator[Sign]:
    for layer in step.layers:
        if layer.silent_experts:
            yield Sign(
                f"layer {layer.layer}: experts {few_names(layer.silent_experts)} have tokens and no gradient", _REPORT
            )
        if layer.unfed_gradients:
            yield Sign(
                f"layer {layer.layer}: experts {few_names(layer.unfed_gradients)} have no token and a gradient",
                "use another parallel.experts_kernel, such as loop",
            )


LAYER_CHECKS: tuple[StepCheck, ...] = (
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
)

"""Checks of the losses and biases that balance the experts. Import no torch."""

from collections.abc import Iterator

from trainer.doctor.finding import Sign
from trainer.doctor.static.config_on_host import ConfigCheck, ConfigOnHost
from trainer.moe.config import MoEConfig

_LEAST_COEF, _MOST_COEF = 1e-5, 0.1
_MOST_Z = 0.05
_MOST_SEQUENCE_COEF = 0.01
_FASTEST_BIAS = 0.01
_SHORTEST_TRAVEL = 0.01
"""Least distance that a selection bias must be able to move in a run; scores are at most 1 apart."""
_COUNTED = {"micro_batch": "of a micro-batch alone", "running": "of the micro-batches so far"}


def _learns(subject: ConfigOnHost) -> MoEConfig | None:
    """Return the MoE section if its router learns whom to choose."""
    moe = subject.config.model.moe
    is_choice = moe is not None and moe.router.has_probs and not moe.router.is_always_even(moe.num_experts)
    return moe if is_choice and "router" not in subject.config.train.freeze else None


def _no_balance(subject: ConfigOnHost) -> Iterator[Sign]:
    moe = _learns(subject)
    if moe is None or moe.router.is_self_balancing:
        return
    balancing = {"balance", "device_balance", "importance", "load"}
    if not balancing & {term.name for term in moe.aux_losses.terms()}:
        yield Sign(
            f"model.moe: {moe.router.kind} over {moe.num_experts} experts, and nothing balances their load: "
            "balance.coef is 0, and there is no selection bias",
            "set model.moe.balance.coef=0.01, or model.moe.router.kind=bias_balanced",
        )


def _inert_bias(subject: ConfigOnHost) -> Iterator[Sign]:
    moe = subject.config.model.moe
    rate = getattr(moe.router, "bias_update_rate", None) if moe is not None else None
    if moe is None or rate is None:
        return
    steps = subject.config.train.steps
    if rate == 0 and moe.router.kind == "bias_balanced":
        yield Sign(
            "model.moe.router.bias_update_rate: 0, so the selection bias stays 0",
            "use 0.001, or kind: top_k with balance.coef=0.01",
        )
    elif 0 < rate * steps < _SHORTEST_TRAVEL:
        yield Sign(
            f"model.moe.router.bias_update_rate: {rate:g}, so in {steps} steps the bias moves by {rate * steps:.1g} at "
            "most, while scores differ by up to 1",
            f"use at least {_SHORTEST_TRAVEL / steps:.1g}, or a balance loss",
        )


def _fast_bias(subject: ConfigOnHost) -> Iterator[Sign]:
    rate = getattr(getattr(subject.config.model.moe, "router", None), "bias_update_rate", 0.0)
    if rate > _FASTEST_BIAS:
        yield Sign(f"model.moe.router.bias_update_rate: {rate:g} a step", "use 0.001, up to 0.01 in short runs")


def _layout_balance(subject: ConfigOnHost) -> Iterator[Sign]:
    moe = _learns(subject)
    for term in moe.aux_losses.terms() if moe is not None else ():
        if moe is not None and term.coef and not term.is_layout_invariant:
            yield Sign(
                f"model.moe.balance: the {term.name} loss counts tokens {_COUNTED[term.scope]}, so ranks and "
                "micro-batch size change what is learned (`prove` labels it)",
                "use model.moe.balance={scope: global_batch, counts: exact}, or counts: previous_step",
            )


def _sequence_balance(subject: ConfigOnHost) -> Iterator[Sign]:
    moe = _learns(subject)
    if moe is not None and moe.balance.scope == "sequence" and moe.balance.coef >= _MOST_SEQUENCE_COEF:
        yield Sign(
            f"model.moe.balance: scope sequence with coef {moe.balance.coef:g}: every single text must use all experts",
            "use scope: global_batch, or coef: 0.0001",
        )


def _coefficient(subject: ConfigOnHost) -> Iterator[Sign]:
    moe = _learns(subject)
    if moe is None or moe.balance.coef == 0:
        return
    layers = len(subject.config.model.moe_layers)
    scale = {"hf": moe.experts_per_token, "megatron": layers}.get(moe.balance.convention, 1)
    coef = moe.balance.coef * scale
    if not _LEAST_COEF <= coef <= _MOST_COEF:
        how = "" if scale == 1 else f", {coef:g} in Switch's convention"
        yield Sign(
            f"model.moe.balance.coef: {moe.balance.coef:g}{how}; published models have {_LEAST_COEF:g} to "
            f"{_MOST_COEF:g}",
            f"use {0.01 / scale:.1g}",
        )


def _z_coefficient(subject: ConfigOnHost) -> Iterator[Sign]:
    moe = _learns(subject)
    if moe is not None and moe.z_loss_coef > _MOST_Z:
        yield Sign(f"model.moe.z_loss_coef: {moe.z_loss_coef:g}; published models have at most 0.01", "use 0.001")


def _no_z_loss(subject: ConfigOnHost) -> Iterator[Sign]:
    moe = _learns(subject)
    if moe is None or moe.z_loss_coef or subject.config.train.dtype != "bfloat16":
        return
    if getattr(moe.router, "score", None) == "softmax":
        yield Sign(
            "model.moe.z_loss_coef: 0 with a softmax router in bfloat16: nothing keeps its logits small",
            "use 0.001",
        )


BALANCE_CHECKS: tuple[ConfigCheck, ...] = (
    ConfigCheck(
        name="no_balance",
        severity="severe",
        find=_no_balance,
        why="few experts get all tokens, improve, and get more: the others are never trained",
        source="arXiv 1701.06538; NVIDIA-NeMo/Automodel#1408",
    ),
    ConfigCheck(
        name="inert_bias",
        severity="severe",
        find=_inert_bias,
        why="the bias never changes which expert is selected, so the load is not balanced",
        source="arXiv 2408.15664; PrimeIntellect-ai/prime-rl#2953",
    ),
    ConfigCheck(
        name="fast_bias",
        severity="warning",
        find=_fast_bias,
        why="the bias overshoots: all tokens move to the same experts, and back in the next step",
        source="arXiv 2408.15664",
    ),
    ConfigCheck(
        name="layout_balance",
        severity="warning",
        find=_layout_balance,
        why="a run on other ranks learns something else, and small batches forbid experts to specialise",
        source="arXiv 2501.11873; pytorch/torchtitan#4772",
    ),
    ConfigCheck(
        name="sequence_balance",
        severity="warning",
        find=_sequence_balance,
        why="experts cannot specialise on domains",
        source="arXiv 2412.19437; arXiv 2501.11873",
    ),
    ConfigCheck(
        name="balance_coefficient",
        severity="warning",
        find=_coefficient,
        why="too weak and experts die; too strong and balance is learned in place of language",
        source="arXiv 2101.03961; verl-project/verl#4103",
    ),
    ConfigCheck(
        name="z_coefficient",
        severity="warning",
        find=_z_coefficient,
        why="routers stay undecided: every token is almost alike to them",
        source="arXiv 2202.08906",
    ),
    ConfigCheck(
        name="no_z_loss",
        severity="warning",
        find=_no_z_loss,
        why="router logits grow until the softmax is certain of everything and rounding decides",
        source="arXiv 2202.08906",
    ),
)

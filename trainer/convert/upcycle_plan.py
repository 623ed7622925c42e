"""Plan of `upcycle` for a dense model, decided from the two configs. Imports no torch.

A dense feed-forward network is a sum over its hidden units, so slices of it add up to it. With granularity G an expert
is one of G slices, and the router's rows are the same for the G experts of a copy (a virtual group), which are then
chosen together. With combine weights that sum to W, k experts give W / G times the dense output, and shared experts
that are c whole copies add c times; the factor a that `scale` spreads makes the sum 1.

# E experts, F d_ff of an expert, k experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trainer.config.dump import changed_keys, short
from trainer.errors import ConfigError
from trainer.models.config import ModelConfig
from trainer.moe.config import MoEConfig

_MAY_DIFFER = ("seq_len", "document_mask", "init_std", "vocab_z_loss_coef")
"""Keys of `model` beside `moe` that do not change what its weights compute for a document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleOptions:
    """Options of `upcycle`."""

    noise: float = 0.0
    """Standard deviation of Gaussian noise on the experts, in those of each of their matrices."""
    drop_fraction: float = 0.0
    """Fraction of each expert's hidden units that starts anew (drop-upcycling)."""
    router_std: float | None = None
    """Standard deviation of the router's weights; None: `model.init_std`."""
    shared: Literal["copies", "slices"] = "copies"
    """Shared experts are copies of the dense network, or its first slice, which the others then lack."""
    scale: Literal["output", "all"] = "output"
    """The matrices that the factor a is spread over: the last one, which is exact, or evenly over all (2410.07524)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcyclePlan:
    """Shape of an upcycling, the same in each MoE layer."""

    granularity: int
    """G: experts that together are the dense network, or what shared experts leave of it."""
    routed_units: tuple[int, int]
    """First and last + 1 of the hidden units that the experts share out."""
    shared_units: int
    """Hidden units of the shared experts: those of the dense network from the first one, again and again."""
    factor: float
    """a: factor on the outputs of the experts."""
    shared_factor: float
    """Factor on the output of the shared experts."""
    options: UpcycleOptions
    reasons: tuple[str, ...]
    """Reasons why the new model differs from the dense one by definition; none: it does not."""


def plan_upcycle(dense: ModelConfig, model: ModelConfig, options: UpcycleOptions) -> UpcyclePlan:
    """Return the plan that makes `model` of a dense one.

    Raises:
        ConfigError: if it cannot be made of it, with the key to change.
    """
    if dense.moe is not None:
        raise ConfigError(
            f"model.moe: the run to upcycle has {dense.moe.num_experts} experts already; name a dense one"
        )
    if dense.lora is not None:
        raise ConfigError(
            "model.lora: the run to upcycle has adapters; merge them into its weights first, by surgery merge-lora"
        )
    if model.lora is not None:
        raise ConfigError(
            "model.lora: upcycling makes whole experts; leave it out, and put adapters on the new run by init_from"
        )
    moe = model.moe
    if moe is None:
        raise ConfigError("model.moe: is null in the new config, and upcycling makes experts; give it a moe section")
    _check_rest(dense, model)
    shared = moe.shared_width
    split = shared if options.shared == "slices" else 0
    rest = dense.d_ff - split
    if rest <= 0 or rest % moe.d_ff:
        of = f"d_ff {dense.d_ff} of the dense model" + (f" less {split} of the shared experts" if split else "")
        raise ConfigError(f"model.moe.d_ff: {moe.d_ff} does not divide {of}; use {rest} over a whole number")
    G = rest // moe.d_ff
    if moe.num_experts % G:
        raise ConfigError(
            f"model.moe.num_experts: {moe.num_experts} is no multiple of {G}, the experts of width {moe.d_ff} that "
            f"make one dense network; use a multiple of {G}"
        )
    weight_sum = _weight_sum(moe)
    copies = 0.0 if split else shared / dense.d_ff
    factor = G / (weight_sum if split else weight_sum + G * copies)
    gate = 2.0 if moe.shared_gate else 1.0  # a gate whose weights are 0 multiplies by a half
    return UpcyclePlan(
        granularity=G,
        routed_units=(split, dense.d_ff),
        shared_units=shared,
        factor=factor,
        shared_factor=gate if split else gate * factor,
        options=options,
        reasons=tuple(_reasons(moe, options, G, copies, factor)),
    )


def _check_rest(dense: ModelConfig, model: ModelConfig) -> None:
    """Refuse another shape or function outside of the experts, by key."""
    has_dense_layers = len(model.moe_layers) < model.num_layers
    free = {"moe", *_MAY_DIFFER, *(() if has_dense_layers else ("d_ff",))}
    for change in changed_keys(dense, model):
        if change.key.partition(".")[0] not in free:
            was, now = short(change.old), short(change.new)
            raise ConfigError(f"model.{change.key}: is {now}, and {was} in the dense run; use the same")


def _weight_sum(moe: MoEConfig) -> float:
    """Return the sum of a token's combine weights, or what it is near to with the small logits of a new router."""
    router, nulls = moe.router, moe.router.num_null_experts
    real = moe.num_experts / (moe.num_experts + nulls)
    if router.weight_sum is not None:
        return router.weight_sum * real
    top_k, score = moe.experts_per_token, getattr(router, "score", "softmax")
    each = 0.5 if score == "sigmoid" else 1 / (moe.num_experts + nulls)
    return top_k * each * getattr(router, "scale", 1.0)


def _reasons(moe: MoEConfig, options: UpcycleOptions, G: int, copies: float, factor: float) -> Iterator[str]:
    """Yield the reasons why the output changes, as clauses."""
    router = moe.router
    if options.noise:
        yield f"noise {options.noise:g} is added to the experts"
    if options.drop_fraction:
        yield f"{options.drop_fraction:g} of each expert's hidden units start anew"
    if router.weight_sum is None:
        yield f"the combine weights of {router.kind} do not add up to a constant (normalize: true makes them)"
    if router.num_null_experts:
        yield f"a token may choose null_experts ({router.num_null_experts}), which compute nothing"
    if G > 1 and not (router.has_fixed_k and moe.experts_per_token % G == 0):
        yield f"{moe.experts_per_token:g} experts per token are no multiple of {G}, the experts of one dense network"
    if G > 1 and not router.learns_weights:
        yield f"{router.kind} does not choose the {G} experts of one dense network together"
    if copies % 1:
        yield f"the shared experts are {copies:g} of the dense network, no whole copies (--shared slices divides it)"
    if options.scale == "all" and factor != 1:
        yield f"the factor {factor:g} is spread over all matrices, and the activation is not linear"

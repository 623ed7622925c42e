"""Convert balance coefficients of other trainers. Imports no torch.

Every trainer multiplies its coefficient by some form of E * sum_e f_e P_e. Ours (`turnout`) is the mean over MoE
layers, with f over all k choices, and 1 when balanced; `CONVENTIONS` lists how the others differ. Constant factors are
converted exactly. Differences that no coefficient can make up for are reported as warnings.

Not converted: the ranks and micro-batches over which others average (this depends on their layout), and whether they
count dropped assignments or padding.

# E experts, k experts per token, L MoE layers, W processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trainer.errors import ConfigError
from trainer.moe.config import MoEConfig
from trainer.moe.routers.config.options import EvenOptions
from trainer.moe.routers.config.token_choice import BiasBalancedRouterConfig, GroupLimitedRouterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """Balance loss of another trainer, by its differences from ours."""

    layers: Literal["mean", "sum", "over_all", "pooled"]
    """Reduction over MoE layers: mean; sum; sum over the number of all layers, dense ones included; or counts and
    probabilities are averaged over layers before they are multiplied."""
    divides_by_k: bool = True
    """f sums to 1 over experts; otherwise to k, which is then the balanced value."""
    counts: Literal["all", "first", "first_of_two"] = "all"
    """Choices counted in f: all of a token; its first; or its first if k is 2, else all."""
    counts_best_scores: bool = False
    """f counts the k best scores, regardless of selection bias and expert groups."""
    falls_with_world: bool = False
    """The loss has (E / W)^2 for E^2: it counts the experts of one process."""
    scope: Literal["micro_batch", "sequence", "any"] = "micro_batch"
    """Tokens over which the load is counted; any: `balance.scope`."""

    def counts_at(self, top_k: int) -> str:
        """Return whether all of k choices are counted, or the first only."""
        counts_first = top_k > 1 if self.counts == "first" else top_k == 2 and self.counts == "first_of_two"
        return "first" if counts_first else "all"


# Each with the place where the loss and its coefficient are defined.
CONVENTIONS = {
    # trainer/moe/losses.py, with balance.convention canonical, then gshard_first_choice
    "turnout": Convention(layers="mean", scope="any"),
    "gshard_first_choice": Convention(layers="mean", counts="first", scope="any"),
    # Hugging Face transformers, models/mixtral/modeling_mixtral.py: load_balancing_loss_func; router_aux_loss_coef
    "transformers": Convention(layers="pooled", divides_by_k=False, counts_best_scores=True),
    # Megatron-LM, core/transformer/moe/moe_utils.py: switch_load_balancing_loss_func, whose gradient every layer adds;
    # moe_aux_loss_coeff of load balancing type aux_loss
    "megatron": Convention(layers="sum", counts_best_scores=True),
    # DeepSpeed, moe/sharded_moe.py: top1gating, top2gating, topkgating; summed over layers and times moe_loss_coeff in
    # Megatron-DeepSpeed's pretrain_gpt.py
    "deepspeed": Convention(layers="sum", counts="first_of_two"),
    # Tutel, impls/losses.py: gshard_loss; summed over layers and times aux_loss_weight in Swin-MoE's
    # models/swin_transformer_moe.py
    "tutel": Convention(layers="sum", counts="first"),
    # MegaBlocks, layers/moe.py: batched_load_balancing_loss; moe_loss_weight
    "megablocks": Convention(layers="over_all"),
    # OLMo-core, nn/moe/loss.py: MoELoadBalancingLoss, nn/moe/moe.py: scale_loss_by_num_layers (on by default);
    # lb_loss_weight, granularity local_batch
    "olmo-core": Convention(layers="over_all"),
    # FastMoE, gates/gshard_gate.py: GShardGate, megatron/balance.py: patch_forward_step; balance_loss_weight
    "fastmoe": Convention(layers="mean", counts="first", falls_with_world=True),
    # DeepSeek-V3 (arXiv 2412.19437), eqs. 17 to 20: alpha of the sequence-wise loss, which every layer has
    "deepseek-v3": Convention(layers="sum", counts_best_scores=True, scope="sequence"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedModel:
    """Properties of a model and its run that the conversion depends on."""

    moe: MoEConfig
    num_layers: int  # all of them, dense ones included
    num_moe_layers: int  # L
    world_size: int | None = None  # W, of the run the coefficient comes from

    @property
    def top_k(self) -> int:
        """Experts per token, k.

        Raises:
            ConfigError: if the router has no fixed k, or no balance loss.
        """
        router = self.moe.router
        if isinstance(router, EvenOptions):
            raise ConfigError(f"model.moe.router: {router.kind} has no probabilities, so there is no balance loss")
        if router.has_fixed_k and not router.has_static_flops:
            raise ConfigError(
                "model.moe.router.top_k_choices: k changes from step to step, and coefficients of other trainers "
                "are for a fixed k; convert with a config that leaves it out"
            )
        if not router.has_fixed_k:
            raise ConfigError(
                f"model.moe.router: {router.kind} does not give every token top_k experts, and coefficients of other "
                "trainers are for a fixed k; use a router that does, such as top_k"
            )
        return int(getattr(router, "top_k"))  # noqa: B009 - of every router with a fixed k


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedCoef:
    """A coefficient converted to another convention."""

    coef: float
    balance: dict[str, float | str]
    """Equivalent `model.moe.balance` mapping, for `turnout` as the target."""
    warnings: tuple[str, ...]
    """Reasons why the loss is not exactly the same; empty if it is."""


def convert(coef: float, *, source: str, target: str, model: RoutedModel) -> ConvertedCoef:
    """Convert a coefficient from one of CONVENTIONS to another.

    Raises:
        ConfigError: if a convention does not apply to the model.
    """
    if model.world_size is not None and not any(CONVENTIONS[name].falls_with_world for name in (source, target)):
        raise ConfigError("--world-size: only fastmoe's coefficient depends on it; remove it")
    converted = coef * factor(source, model) / factor(target, model)
    balance = _balance(converted, source, target, model)
    return ConvertedCoef(coef=converted, balance=balance, warnings=tuple(_differences(source, target, model, balance)))


def factor(name: str, model: RoutedModel) -> float:
    """Return the factor that converts a coefficient of a convention to ours."""
    convention, top_k = CONVENTIONS[name], model.top_k
    value = 1.0 if convention.divides_by_k else float(top_k)
    if convention.layers == "sum":
        value *= model.num_moe_layers
    elif convention.layers == "over_all":
        value *= model.num_moe_layers / model.num_layers
    if convention.falls_with_world:
        world_size, num_experts = model.world_size, model.moe.num_experts
        if world_size is None:
            raise ConfigError(
                f"--world-size: {name} needs it, since its loss is proportional to 1 / W^2; give the number of "
                "processes its experts were distributed over"
            )
        if world_size < 1 or num_experts % world_size:
            raise ConfigError(
                f"--world-size: {num_experts} experts cannot be distributed evenly over {world_size} processes"
            )
        value /= world_size**2
    return value


def _balance(coef: float, source: str, target: str, model: RoutedModel) -> dict[str, float | str]:
    """Return the `balance` mapping, with the source's way of counting where we have it."""
    balance: dict[str, float | str] = {"coef": coef}
    counts_first = CONVENTIONS[source].counts_at(model.top_k) == "first" or target == "gshard_first_choice"
    if counts_first and model.moe.router.ranks_choices and not model.moe.router.num_null_experts:
        balance["convention"] = "gshard_first_choice"
    if CONVENTIONS[source].scope == "sequence":
        balance["scope"] = "sequence"
    return balance


def _differences(source: str, target: str, model: RoutedModel, balance: dict[str, float | str]) -> Iterator[str]:
    """Yield the differences that no factor can make up for."""
    a, b, top_k = CONVENTIONS[source], CONVENTIONS[target], model.top_k
    counts = {name: CONVENTIONS[name].counts_at(top_k) for name in (source, target)}
    if len(set(counts.values())) > 1:
        first, every = sorted(counts, key=lambda name: counts[name], reverse=True)
        is_matched = target == "turnout" and "convention" in balance
        note = f"; the convention above counts like {source}" if is_matched else ""
        yield f"{first} counts first choices only, {every} all {top_k}: equal only when balanced{note}"
    if (a.layers == "pooled") != (b.layers == "pooled") and model.num_moe_layers > 1:
        pooled = source if a.layers == "pooled" else target
        yield (
            f"{pooled} pools its {model.num_moe_layers} MoE layers, so that one can offset another: equal only where "
            "all layers have the same load"
        )
    if a.scope != b.scope and "sequence" in (a.scope, b.scope) and "any" not in (a.scope, b.scope):
        per_sequence = source if a.scope == "sequence" else target
        yield f"{per_sequence} counts within each sequence, which is stricter than over a micro-batch"
    has_bias_or_groups = isinstance(model.moe.router, BiasBalancedRouterConfig | GroupLimitedRouterConfig)
    if a.counts_best_scores != b.counts_best_scores and has_bias_or_groups:
        best = source if a.counts_best_scores else target
        yield f"{best} counts the {top_k} best scores, without selection bias and groups, not the actual choices"
    if model.moe.router.num_null_experts:
        yield "null experts count as experts here; other trainers have none"

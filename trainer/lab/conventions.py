"""Convert balance coefficients of other trainers. Imports no torch.

Every trainer multiplies its coefficient by some form of E * sum_e f_e P_e. Ours (`turnout`) is the mean over MoE
layers, with f over all k choices, and 1 when balanced; the table says how the others differ. What differs by a factor
is converted exactly. What differs otherwise no coefficient makes equal: then a warning says what it is.

Not converted: over which ranks and micro-batches others average (theirs depends on the layout), and what they count
after drops or with padding.

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
    """Difference between a trainer's loss and ours."""

    source: str
    """Source, where the loss takes its coefficient."""
    layers: Literal["mean", "sum", "over_all", "pooled"]
    """MoE layers are averaged; summed; summed and divided by the number of all layers, dense ones too; or counts and
    probabilities are averaged over layers before they are multiplied."""
    divides_by_k: bool = True
    """f is a share of all choices; else it adds up to k, which is then the balanced value."""
    counts: Literal["all", "first", "first_of_two"] = "all"
    """f is of all choices of a token; of its first; of its first if there are two, else of all."""
    counts_best_scores: bool = False
    """f is of the k best scores, whatever a selection bias or groups of experts make of them."""
    falls_with_world: bool = False
    """E^2 in the loss is (E / W)^2: it counts the experts of one process."""
    scope: Literal["micro_batch", "sequence", "any"] = "micro_batch"
    """Over which tokens the load is counted; any: as `balance.scope` says."""

    def counts_at(self, top_k: int) -> str:
        """Return which of k choices are counted."""
        if top_k == 1 or (self.counts == "first_of_two" and top_k != 2):
            return "all"
        return "all" if self.counts == "all" else "first"


CONVENTIONS = {
    "turnout": Convention(
        source="trainer/moe/losses.py, with balance.convention canonical", layers="mean", scope="any"
    ),
    "gshard_first_choice": Convention(
        source="trainer/moe/losses.py, with balance.convention gshard_first_choice",
        layers="mean",
        counts="first",
        scope="any",
    ),
    "transformers": Convention(
        source="Hugging Face transformers, models/mixtral/modeling_mixtral.py: load_balancing_loss_func; "
        "router_aux_loss_coef",
        layers="pooled",
        divides_by_k=False,
        counts_best_scores=True,
    ),
    "megatron": Convention(
        source="Megatron-LM, core/transformer/moe/moe_utils.py: switch_load_balancing_loss_func, whose gradient every "
        "layer adds; moe_aux_loss_coeff of load balancing type aux_loss",
        layers="sum",
        counts_best_scores=True,
    ),
    "deepspeed": Convention(
        source="DeepSpeed, moe/sharded_moe.py: top1gating, top2gating, topkgating; summed over layers and times "
        "moe_loss_coeff in Megatron-DeepSpeed's pretrain_gpt.py",
        layers="sum",
        counts="first_of_two",
    ),
    "tutel": Convention(
        source="Tutel, impls/losses.py: gshard_loss; summed over layers and times aux_loss_weight in Swin-MoE's "
        "models/swin_transformer_moe.py",
        layers="sum",
        counts="first",
    ),
    "megablocks": Convention(
        source="MegaBlocks, layers/moe.py: batched_load_balancing_loss; moe_loss_weight", layers="over_all"
    ),
    "olmo-core": Convention(
        source="OLMo-core, nn/moe/loss.py: MoELoadBalancingLoss, nn/moe/moe.py: scale_loss_by_num_layers (on by "
        "default); lb_loss_weight, granularity local_batch",
        layers="over_all",
    ),
    "fastmoe": Convention(
        source="FastMoE, gates/gshard_gate.py: GShardGate, megatron/balance.py: patch_forward_step; "
        "balance_loss_weight",
        layers="mean",
        counts="first",
        falls_with_world=True,
    ),
    "deepseek-v3": Convention(
        source="DeepSeek-V3 (arXiv 2412.19437), eqs. 17 to 20: alpha of the sequence-wise loss, which every layer has",
        layers="sum",
        counts_best_scores=True,
        scope="sequence",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """Properties of a model and its run that conversions depend on."""

    moe: MoEConfig
    num_layers: int
    """All layers, dense ones too."""
    num_moe_layers: int
    """L."""
    world_size: int | None = None
    """W, of the run that the coefficient is of."""

    @property
    def top_k(self) -> int:
        """Experts per token, k.

        Raises:
            ConfigError: if the router has none, or no loss.
        """
        router = self.moe.router
        if isinstance(router, EvenOptions):
            raise ConfigError(f"model.moe.router: {router.kind} has no probabilities, so there is no balance loss")
        if router.has_fixed_k and not router.has_static_flops:
            raise ConfigError(
                "model.moe.router.top_k_choices: every step has another k, which coefficients of other trainers are "
                "about; convert with a config that leaves it out"
            )
        if not router.has_fixed_k:
            raise ConfigError(
                f"model.moe.router: {router.kind} does not give every token top_k experts, which coefficients of other "
                "trainers are about; use a router that does, such as top_k"
            )
        return int(getattr(router, "top_k"))  # noqa: B009 - of every router with a fixed k


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A coefficient in another convention."""

    coef: float
    balance: dict[str, float | str]
    """The `model.moe.balance` mapping that means this; of use where the target is ours."""
    warnings: tuple[str, ...]
    """Reasons why it is not exactly the same loss; none: it is."""


def convert(coef: float, *, source: str, target: str, model: Routed) -> Converted:
    """Return what a coefficient of one convention is in another one.

    Args:
        coef: not negative.
        source: a name in CONVENTIONS.
        target: the same.
        model: what is trained.

    Raises:
        ConfigError: if a convention does not fit the model.
    """
    if model.world_size is not None and not any(CONVENTIONS[name].falls_with_world for name in (source, target)):
        raise ConfigError("--world-size: only fastmoe's coefficient depends on it; remove it")
    converted = coef * factor(source, model) / factor(target, model)
    balance = _balance(converted, source, target, model)
    return Converted(coef=converted, balance=balance, warnings=tuple(_differences(source, target, model, balance)))


def factor(name: str, model: Routed) -> float:
    """Return what a coefficient of a convention is multiplied by to mean the same in ours.

    Raises:
        ConfigError: if the convention does not fit the model.
    """
    convention, top_k = CONVENTIONS[name], model.top_k
    value = 1.0 if convention.divides_by_k else float(top_k)
    if convention.layers == "sum":
        value *= model.num_moe_layers
    elif convention.layers == "over_all":
        value *= model.num_moe_layers / model.num_layers
    if convention.falls_with_world:
        value /= _world_size(name, model) ** 2
    return value


def _world_size(name: str, model: Routed) -> int:
    """Return W, over which the experts must spread evenly."""
    world_size, num_experts = model.world_size, model.moe.num_experts
    if world_size is None:
        raise ConfigError(
            f"--world-size: {name} needs it, since its loss falls as 1 / W^2; give the number of processes that its "
            "experts were spread over"
        )
    if world_size < 1 or num_experts % world_size:
        raise ConfigError(f"--world-size: {num_experts} experts cannot spread evenly over {world_size} processes")
    return world_size


def _balance(coef: float, source: str, target: str, model: Routed) -> dict[str, float | str]:
    """Return the mapping to write: ours can count as the source does."""
    found: dict[str, float | str] = {"coef": coef}
    counts_first = CONVENTIONS[source].counts_at(model.top_k) == "first" or target == "gshard_first_choice"
    if counts_first and model.moe.router.ranks_choices and not model.moe.router.num_null_experts:
        found["convention"] = "gshard_first_choice"
    if CONVENTIONS[source].scope == "sequence":
        found["scope"] = "sequence"
    return found


def _differences(source: str, target: str, model: Routed, balance: dict[str, float | str]) -> Iterator[str]:
    """Say what no factor makes good."""
    a, b, top_k = CONVENTIONS[source], CONVENTIONS[target], model.top_k
    counts = {name: CONVENTIONS[name].counts_at(top_k) for name in (source, target)}
    if len(set(counts.values())) > 1:
        first, every = sorted(counts, key=lambda name: counts[name], reverse=True)
        can = (
            f"; the convention above counts as {source} does" if target == "turnout" and "convention" in balance else ""
        )
        yield f"{first} counts first choices only, {every} all {top_k}: equal when balanced, and not otherwise{can}"
    if (a.layers == "pooled") != (b.layers == "pooled") and model.num_moe_layers > 1:
        pooled = source if a.layers == "pooled" else target
        yield (
            f"{pooled} pools its {model.num_moe_layers} MoE layers, so that one makes up for another: equal where "
            "layers are loaded alike, and not otherwise"
        )
    if a.scope != b.scope and "sequence" in (a.scope, b.scope) and "any" not in (a.scope, b.scope):
        within = source if a.scope == "sequence" else target
        yield f"{within} counts within each sequence, which is stricter than over a micro-batch"
    if a.counts_best_scores != b.counts_best_scores and _chooses_by_more_than_scores(model.moe):
        best = source if a.counts_best_scores else target
        yield f"{best} counts the {top_k} best scores, without selection bias and groups, and not where tokens go"
    if model.moe.router.num_null_experts:
        yield "null experts count as experts here, and other trainers have none"


def _chooses_by_more_than_scores(moe: MoEConfig) -> bool:
    return isinstance(moe.router, BiasBalancedRouterConfig | GroupLimitedRouterConfig)

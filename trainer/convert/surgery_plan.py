"""Operations of `surgery`: what each changes in the config. Imports no torch.

Every layer keeps the same number of experts, and a router with groups keeps as many in each group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trainer.errors import ConfigError
from trainer.models.config import ModelConfig
from trainer.moe.config import MoEConfig

Named = Mapping[int | None, Sequence[int]]
"""Experts by MoE layer; the key None is for all layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneExperts:
    """Remove the experts that a text uses least, or named ones, with their router rows."""

    verb: ClassVar[str] = "prune"
    keep: int | None = None
    """Experts to keep; None: all but the named ones."""
    named: Named = field(default_factory=dict)

    def overrides(self, model: ModelConfig) -> list[str]:
        """Return the keys that change, as overrides."""
        moe = _experts_of(model, "prune")
        if self.named:
            return [_num_experts(moe, moe.num_experts - _check_named(model, self.named))]
        return [_num_experts(moe, _checked_keep(moe, self.keep))]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeExperts:
    """Average the experts whose outputs on a text are most alike, after aligning their hidden units."""

    verb: ClassVar[str] = "merge"
    keep: int
    refit: bool = True
    """Fit the last matrix of a merged expert to what its group computed on the text."""

    def overrides(self, model: ModelConfig) -> list[str]:
        """Return the keys that change, as overrides."""
        moe = _experts_of(model, "merge")
        return [_num_experts(moe, _checked_keep(moe, self.keep))]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitExperts:
    """Replace every expert by two that are chosen together, or only named ones by two copies."""

    verb: ClassVar[str] = "split"
    halves: bool = False
    """Each of the two has half of the hidden units, so that a token costs what it did."""
    named: Named = field(default_factory=dict)

    def overrides(self, model: ModelConfig) -> list[str]:
        """Return the keys that change, as overrides."""
        moe = _experts_of(model, "split")
        if self.named:
            if self.halves:
                raise ConfigError("surgery split: --halves is for all experts; leave out --experts")
            return [_num_experts(moe, moe.num_experts + _check_named(model, self.named))]
        return [
            _num_experts(moe, 2 * moe.num_experts),
            *_twice_as_many(moe),
            *(_half_units(moe) if self.halves else ()),
        ]

    def factor(self, moe: MoEConfig) -> float:
        """Return the factor on the outputs of the two, so that they add up to the expert that they replace."""
        if self.named:
            return 1.0
        is_summed_twice = not moe.router.weight_sum and getattr(moe.router, "score", "softmax") == "sigmoid"
        return (0.5 if is_summed_twice else 1.0) * (2.0 if self.halves else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddExperts:
    """Add copies of the experts that a text uses most, or of named ones, with noise on weights and router rows."""

    verb: ClassVar[str] = "add"
    count: int | None = None
    noise: float = 0.1
    """Standard deviation of the noise, in those of each matrix."""
    named: Named = field(default_factory=dict)

    def overrides(self, model: ModelConfig) -> list[str]:
        """Return the keys that change, as overrides."""
        moe = _experts_of(model, "add")
        count = _check_named(model, self.named) if self.named else self.count or 0
        if not self.named and count > moe.num_experts:
            raise ConfigError(f"--count: {count} is more than the {moe.num_experts} experts to copy; use at most those")
        return [_num_experts(moe, moe.num_experts + count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToDense:
    """Make each MoE layer one dense network: the shared experts, then the experts with the largest combine weights.

    The output of each is multiplied by a number: that with which their sum is nearest to the layer's output on a text
    (least squares), or the mean of its combine weight.
    """

    verb: ClassVar[str] = "to-dense"
    d_ff: int | None = None
    """Width of the dense network; None: that of the experts that a token visits."""
    fit: Literal["least_squares", "mean_weight"] = "least_squares"

    def overrides(self, model: ModelConfig) -> list[str]:
        """Return the keys that change, as overrides."""
        return ["model.moe=null", f"model.d_ff={self.width(model)}"]

    def width(self, model: ModelConfig) -> int:
        """Return the width of the dense network."""
        moe = _experts_of(model, "to-dense")
        has_dense_layers, shared = len(model.moe_layers) < model.num_layers, moe.shared_width
        usual = shared + max(1, round(moe.experts_per_token)) * moe.d_ff
        width = self.d_ff or (model.d_ff if has_dense_layers else usual)
        if has_dense_layers and width != model.d_ff:
            raise ConfigError(
                f"--d-ff: {width} is not the d_ff {model.d_ff} of the layers that are dense already; use it"
            )
        most = shared + moe.num_experts * moe.d_ff
        if (width - shared) % moe.d_ff or not shared < width <= most:
            raise ConfigError(
                f"{'model.d_ff' if has_dense_layers else '--d-ff'}: {width} is not {shared} of the shared experts plus "
                f"1 to {moe.num_experts} times {moe.d_ff} of an expert; {usual} is"
            )
        if moe.expert_bias:
            raise ConfigError(
                "surgery to-dense: experts with biases (moe.expert_bias) cannot be expressed as dense layers"
            )
        if moe.shared_gate:
            raise ConfigError(
                "surgery to-dense: a gate on shared experts (moe.shared_gate) cannot be expressed as dense"
            )
        return width


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageRuns:
    """Average the weights of several checkpoints of one model."""

    verb: ClassVar[str] = "average"
    weights: Sequence[float] = ()
    """Weight of each checkpoint; empty: all the same."""
    ema: float | None = None
    """Decay of an exponential moving average over the steps, from the first to the last."""

    def overrides(self, model: ModelConfig) -> list[str]:
        """Return no keys: the model stays the same."""
        _refuse_adapters(model, "average")
        return []

    def shares(self, count: int) -> list[float]:
        """Return the share of each of `count` checkpoints; they add up to 1."""
        if self.ema is not None:
            return [(1 - self.ema if i else 1.0) * self.ema ** (count - 1 - i) for i in range(count)]
        if self.weights and len(self.weights) != count:
            raise ConfigError(f"--weights: {len(self.weights)} weights for {count} checkpoints; give one for each")
        given = list(self.weights) or [1.0] * count
        return [weight / sum(given) for weight in given]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeAdapters:
    """Add each adapter to its weight: W becomes W + s B A, and everything learns."""

    verb: ClassVar[str] = "merge-lora"

    def overrides(self, model: ModelConfig) -> list[str]:
        """Return the keys that change, as overrides."""
        if model.lora is None:
            raise ConfigError("surgery merge-lora: the run has no adapters (model.lora: null); name another one")
        return ["model.lora=null"]


Surgery = PruneExperts | MergeExperts | SplitExperts | AddExperts | ToDense | AverageRuns | MergeAdapters


def _refuse_adapters(model: ModelConfig, verb: str) -> None:
    if model.lora is not None:
        raise ConfigError(
            f"surgery {verb}: the run has adapters (model.lora); merge them into its weights first, by "
            "surgery merge-lora RUN NAME"
        )


def _experts_of(model: ModelConfig, verb: str) -> MoEConfig:
    _refuse_adapters(model, verb)
    if model.moe is None:
        raise ConfigError(f"surgery {verb}: the run is dense, and has no experts; name another one")
    return model.moe


def num_groups(moe: MoEConfig) -> int:
    """Return the number of groups of consecutive experts that the router distinguishes."""
    return getattr(moe.router, "groups", 1)


def _num_experts(moe: MoEConfig, count: int) -> str:
    groups = num_groups(moe)
    if count % groups:
        raise ConfigError(f"surgery: {count} experts do not divide into the router's {groups} groups; use a multiple")
    return f"model.moe.num_experts={count}"


def _checked_keep(moe: MoEConfig, keep: int | None) -> int:
    most = moe.num_experts - 1
    if keep is None or not 1 <= keep <= most:
        raise ConfigError(f"--keep: {keep} of {moe.num_experts} experts; use 1 to {most}")
    return keep


def _check_named(model: ModelConfig, named: Named) -> int:
    """Return the number of named experts of a layer, which must be the same in all."""
    moe = _experts_of(model, "of experts")
    counts = {}
    for layer in model.moe_layers:
        experts = experts_of_layer(named, layer)
        for expert in experts:
            if not 0 <= expert < moe.num_experts:
                raise ConfigError(f"--experts: {expert} is not an expert; use 0 to {moe.num_experts - 1}")
        if len(set(experts)) < len(experts):
            raise ConfigError(f"--experts: names an expert of layer {layer} twice; name each once")
        size = moe.num_experts // num_groups(moe)
        if len({sum(e // size == group for e in experts) for group in range(num_groups(moe))}) > 1:
            raise ConfigError(f"--experts: {experts} are not as many of each of the router's groups of {size} experts")
        counts[layer] = len(experts)
    for layer in named:
        if layer is not None and layer not in counts:
            raise ConfigError(f"--experts: layer {layer} has no experts; those are {', '.join(map(str, counts))}")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} of layer {layer}" for layer, count in counts.items())
        raise ConfigError(f"--experts: names {listed}; every layer keeps the same number, so name as many of each")
    return next(iter(counts.values()))


def experts_of_layer(named: Named, layer: int) -> list[int]:
    """Return the named experts of a layer."""
    return list(named.get(layer, named.get(None, ())))


def _twice_as_many(moe: MoEConfig) -> Iterator[str]:
    """Yield overrides that double what counts experts in the router."""
    router = moe.router
    if hasattr(router, "top_k"):
        yield f"model.moe.router.top_k={2 * router.top_k}"
    for k in getattr(router, "top_k_choices", None) or ():
        raise ConfigError(f"surgery split: top_k_choices ({k}, ...) would have to be doubled too; set it to null first")
    if moe.router.num_null_experts:
        yield f"model.moe.router.null_experts={2 * moe.router.num_null_experts}"


def _half_units(moe: MoEConfig) -> Iterator[str]:
    if moe.d_ff % 2:
        raise ConfigError(f"--halves: moe.d_ff {moe.d_ff} is odd and has no halves; leave the option out")
    yield f"model.moe.d_ff={moe.d_ff // 2}"
    if moe.num_shared_experts and moe.shared_d_ff is None:
        yield f"model.moe.num_shared_experts={2 * moe.num_shared_experts}"

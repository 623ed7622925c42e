"""Layouts of a config on a number of ranks, by cheap arithmetic: which are possible, and which to try first.

What is here only orders and excludes; memory and bytes come from fake steps. Imports no torch.

# D d_model, S tokens in a row, L layers, k experts per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from pydantic import ValidationError

from trainer.experiment import ExperimentConfig
from trainer.plan.gpus import Gpu

Engine = Literal["native", "deepspeed"]
_AGAIN: Final = {"none": 1.0, "norms_and_activations": 1.02, "experts": 1.2, "block": 1.33}
"""Estimated work of a step that computes these again."""
RECOMPUTES: Final = tuple(_AGAIN)
ENGINES: Final = ("native", "deepspeed")
_BYTES: Final = {"float64": 8, "float32": 4, "bfloat16": 4}
"""Bytes of a weight, by the dtype of products."""
_LOW: Final = {"float64": 8, "float32": 4, "bfloat16": 2}
"""Bytes of a gathered weight."""
_OPERATIONS: Final = 400
"""Operations of a layer in a micro-batch, forward and backward, roughly."""


class Cluster(NamedTuple):
    """Ranks of a run and their machines."""

    world_size: int
    per_node: int
    gpu: Gpu
    usable: int
    """Bytes for tensors on each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayout:
    """One choice of everything under `parallel` and `engine` that a plan varies."""

    ep_size: int = 1
    data: Literal["replicate", "shard"] = "replicate"
    shard_size: int | None = None
    shard_keeps: str = "gradients"
    engine: Engine = "native"
    zero_stage: int = 1
    recompute: str = "none"
    micro_batch_size: int = 1
    hierarchical: bool = False
    """Rows go over nodes in two hops."""

    def applied(self, config: ExperimentConfig) -> ExperimentConfig | None:
        """Return a config with this layout; None if the rules between its sections do not allow it."""
        values = config.model_dump()
        own = values["parallel"]
        for key in ("ep_size", "data", "shard_size", "shard_keeps", "recompute", "micro_batch_size"):
            own[key] = getattr(self, key)
        if self.hierarchical:
            own["dispatcher"] = {"kind": "hierarchical"}
        if self.engine == "native":
            values["engine"] = {"kind": "native"}
        else:
            given = values["engine"] if values["engine"]["kind"] == "deepspeed" else {}
            values["engine"] = {**given, "kind": "deepspeed", "zero_stage": self.zero_stage}
        try:
            return ExperimentConfig.model_validate(values)
        except ValidationError:
            return None

    @property
    def sharding(self) -> str:
        """How weights and moments are shared, in a few words."""
        if self.engine == "deepspeed":
            return f"ZeRO {self.zero_stage}"
        if self.data == "replicate":
            return "replicate"
        over = "all" if self.shard_size is None else f"{self.shard_size}"
        return f"shard {over}, {self.shard_keeps}"

    @property
    def family(self) -> tuple[int, str, bool]:
        """Values that layouts share which differ only in micro-batches and recomputation."""
        return self.ep_size, self.sharding, self.hierarchical

    def contains(self, other: "PlannedLayout") -> bool:
        """Return whether this layout surely needs at least the memory of another one."""
        more = self.recompute in (other.recompute, "none") or other.recompute == "block"
        return self.family == other.family and more and self.micro_batch_size >= other.micro_batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Choices that a plan varies; None: whatever is possible."""

    ep_sizes: Sequence[int] | None = None
    micro_batch_sizes: Sequence[int] | None = None
    recomputes: Sequence[str] = RECOMPUTES
    engines: Sequence[str] = ENGINES


def layouts_of(config: ExperimentConfig, cluster: Cluster, choices: Choices) -> Iterator[PlannedLayout]:
    """Yield every layout of the choices that the ranks, the experts and the rows of a step allow."""
    rows = -(-config.train.global_batch_size // cluster.world_size)
    sizes = choices.micro_batch_sizes or [size for size in (1 << power for power in range(20)) if size <= rows]
    is_default = config.parallel.dispatcher.kind == "all_to_all"
    for ep_size in _ep_sizes(config, cluster, choices):
        spans = 1 < cluster.per_node < ep_size and ep_size % cluster.per_node == 0
        for hops in (False, True) if spans and is_default else (False,):
            for one in _shardings(config, cluster, choices, ep_size):
                for recompute in choices.recomputes:
                    if recompute == "experts" and config.model.moe is None:
                        continue
                    for size in sizes:
                        yield PlannedLayout(
                            ep_size=ep_size,
                            hierarchical=hops,
                            recompute=recompute,
                            micro_batch_size=size,
                            data=one.data,
                            shard_size=one.shard_size,
                            shard_keeps=one.shard_keeps,
                            engine=one.engine,
                            zero_stage=one.zero_stage,
                        )


def _ep_sizes(config: ExperimentConfig, cluster: Cluster, choices: Choices) -> list[int]:
    moe = config.model.moe
    if moe is None:
        return [1]
    return [
        size
        for size in range(1, min(cluster.world_size, moe.num_experts) + 1)
        if cluster.world_size % size == 0
        and moe.num_experts % size == 0
        and (choices.ep_sizes is None or size in choices.ep_sizes)
    ]


def _shardings(config: ExperimentConfig, cluster: Cluster, choices: Choices, ep_size: int) -> Iterator[PlannedLayout]:
    world = cluster.world_size
    if "native" in choices.engines:
        yield PlannedLayout()
        groups = {None: world, cluster.per_node: cluster.per_node}
        for given, size in groups.items() if world > 1 else ():
            fits = world % size == 0 and (size % ep_size == 0 or ep_size % size == 0)
            if fits and size > 1 and (given is None or size < world):
                for keeps in ("weights", "gradients", "nothing"):
                    yield PlannedLayout(data="shard", shard_size=given, shard_keeps=keeps)
    may_deepspeed = config.optim.kind == "adamw" and config.train.dtype != "float64"
    if "deepspeed" in choices.engines and may_deepspeed:
        for stage in (1, 2):
            yield PlannedLayout(engine="deepspeed", zero_stage=stage)


def least_state_bytes(config: ExperimentConfig, layout: PlannedLayout, world_size: int, num_ids: int) -> int:
    """Return the bytes of weights, gradients and moments that a rank holds at once, at least.

    Sharding may keep whole weights until their last use, and whole gradients between micro-batches: see `accumulate`.
    """
    own, expert = config.model.weights(vocab_size=num_ids)
    moe = config.model.moe
    experts = 0 if moe is None else expert * moe.num_experts // layout.ep_size
    size, frozen = _BYTES[config.train.dtype], bool(config.train.freeze) or config.model.lora is not None
    if frozen:  # at least the weights
        shards = 1 if layout.data == "replicate" else layout.shard_size or world_size
        return size * (own + experts) // shards
    if layout.engine == "deepspeed":  # weights, and the share of weights and moments of which this rank is the owner
        copies = world_size // layout.ep_size
        return size * (own + experts) + size * 3 * (own // world_size + experts // copies)
    if layout.data == "replicate":
        return 4 * size * (own + experts)
    shards = layout.shard_size or world_size
    shared = own // shards + experts // max(1, shards // layout.ep_size)
    rows = -(-config.train.global_batch_size // world_size)
    whole = _LOW[config.train.dtype] if layout.shard_keeps == "weights" else 0
    if rows > layout.micro_batch_size and layout.shard_keeps != "nothing":
        whole += size
    return max(4 * size * shared, 3 * size * shared + whole * (own + experts))


def least_row_bytes(config: ExperimentConfig, layout: PlannedLayout) -> int:
    """Return the bytes that a row of a micro-batch keeps for its backward pass, at least.

    These are inputs of blocks, and rows that arrived for experts, which are never sent twice; unless whole blocks are
    computed again also the residual stream after attention, queries, keys, values and outputs of attention; and H of
    the experts, unless these are.
    """
    model, moe = config.model, config.model.moe
    size, low = _BYTES[config.train.dtype], _LOW[config.train.dtype]
    of_layer, of_experts = model.d_model * size, 0.0
    if moe is not None and layout.ep_size > 1 and config.parallel.dispatcher.kind in ("all_to_all", "hierarchical"):
        of_experts += moe.experts_per_token * model.d_model * low
    if layout.recompute != "block":
        of_layer *= 2
        if model.attention.latent is None:
            of_layer += 2 * (model.num_heads + (model.num_kv_heads or model.num_heads)) * model.head_dim * low
        if moe is not None and layout.recompute != "experts":
            of_experts += moe.experts_per_token * moe.d_ff * (1 if model.activation == "gelu" else 2) * low
    tokens = model.seq_len // config.parallel.row_size
    return int(tokens * (model.num_layers * of_layer + len(model.moe_layers) * of_experts))


def estimated_seconds(config: ExperimentConfig, layout: PlannedLayout, cluster: Cluster, num_ids: int) -> float:
    """Return a rough time of a step, to order what is tried: computation, rows to experts, gradients and weights."""
    model, gpu, reached = config.model, cluster.gpu, cluster.gpu.reached
    dense, expert = model.weights(vocab_size=num_ids)
    moe, low = model.moe, 2 if config.train.dtype == "bfloat16" else 4
    k = 0.0 if moe is None else moe.experts_per_token
    rows = -(-config.train.global_batch_size // cluster.world_size)
    tokens, micro_batches = rows * model.seq_len, -(-rows // layout.micro_batch_size)
    flops = tokens * (6 * (dense + k * expert) + 6 * model.num_layers * model.seq_len * model.d_model)
    computation = flops * _AGAIN[layout.recompute] / (gpu.flops[config.train.dtype] * reached.products)
    started = _OPERATIONS * model.num_layers * micro_batches * reached.operation_s

    def link(size: int) -> float:
        return (gpu.inside if size <= cluster.per_node else gpu.between) * reached.links

    ep = layout.ep_size
    exchanged = 4 * k * tokens * model.d_model * low * len(model.moe_layers) * (1 - 1 / ep) / link(ep)
    if ep > cluster.per_node:
        exchanged *= 1 - 1 / (ep // cluster.per_node) + 0.1
    local = 0 if moe is None else expert * moe.num_experts // ep
    copies = cluster.world_size // ep
    shards = 1 if layout.data == "replicate" else layout.shard_size or cluster.world_size
    sums = 8 * (dense / link(cluster.world_size) + (local / link(cluster.world_size) if copies > 1 else 0))
    if layout.engine == "deepspeed":
        sums *= 1.5
    elif shards > 1:
        times = {"nothing": 2 * micro_batches, "gradients": 1 + micro_batches, "weights": 1}[layout.shard_keeps]
        reduced = micro_batches if layout.shard_keeps == "nothing" else 1
        inside = dense / link(shards) + (local / link(shards) if shards > ep else 0)
        sums = (times * low + 4 * reduced) * inside + (8 / shards) * (dense + local) / link(cluster.world_size)
    worked = max(computation, started) if reached.starts_ahead else computation + started
    return worked + exchanged + sums - min(sums, worked) * reached.overlap

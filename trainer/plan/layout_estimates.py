"""Estimates of a layout by cheap arithmetic: the memory that it surely needs, and about how long its step takes.

What is here only orders and excludes; memory and bytes come from fake steps. Imports no torch.

# D d_model, S tokens in a row, L layers, k experts per token.
"""

from dataclasses import dataclass
from typing import Final

from trainer.experiment import ExperimentConfig
from trainer.parallel.pipeline_stages import PipelineStages
from trainer.plan.kept_passes import kept_layers
from trainer.plan.layouts import Cluster, PlannedLayout

_AGAIN: Final = {"none": 1.0, "norms_and_activations": 1.02, "experts": 1.2, "block": 1.33}
"""Estimated work of a step that computes these again."""
WEIGHT_BYTES: Final = {"float64": 8, "float32": 4, "bfloat16": 4}
"""Bytes of a weight, by the dtype of products."""
GATHERED_BYTES: Final = {"float64": 8, "float32": 4, "bfloat16": 2}
"""Bytes of a gathered weight."""
_OPERATIONS: Final = 400
"""Operations of a layer in a micro-batch, forward and backward, roughly."""


def least_state_bytes(config: ExperimentConfig, layout: PlannedLayout, world_size: int, num_ids: int) -> int:
    """Return the bytes of weights, gradients and moments that a rank holds at once, at least.

    Sharding may keep whole weights until their last use, and whole gradients between micro-batches: see `accumulate`.
    """
    own, expert = (number // layout.pp_size for number in config.model.weights(vocab_size=num_ids))
    rows, moe = layout.rows(config, world_size), config.model.moe
    world_size //= layout.pp_size  # a stage has at least the mean of all
    experts = 0 if moe is None else expert * moe.num_experts // layout.ep_size
    size, frozen = WEIGHT_BYTES[config.train.dtype], bool(config.train.freeze) or config.model.lora is not None
    if frozen:  # at least the weights
        shards = 1 if layout.data == "replicate" else layout.shard_size or world_size
        return size * (own + experts) // shards
    if (
        layout.engine == "deepspeed"
    ):  # weights and gradients, and the weights and moments of which this rank is the owner
        copies = world_size // layout.ep_size
        return 2 * size * (own + experts) + size * 3 * (own // world_size + experts // copies)
    if layout.data == "replicate":
        return 4 * size * (own + experts)
    shards = layout.shard_size or world_size
    shared = own // shards + experts // max(1, shards // layout.ep_size)
    whole = GATHERED_BYTES[config.train.dtype] if layout.shard_keeps == "weights" else 0
    if rows > layout.micro_batch_size and layout.shard_keeps != "nothing":
        whole += size
    return max(4 * size * shared, 3 * size * shared + whole * (own + experts))


def least_row_bytes(config: ExperimentConfig, layout: PlannedLayout) -> int:
    """Return the bytes that a row of a micro-batch keeps for its backward pass, at least, of all layers.

    These are inputs of blocks, and rows that arrived for experts, which are never sent twice; unless whole blocks are
    computed again also the residual stream after attention, queries, keys, values and outputs of attention; and H of
    the experts, unless these are.
    """
    model, moe = config.model, config.model.moe
    size, low = WEIGHT_BYTES[config.train.dtype], GATHERED_BYTES[config.train.dtype]
    of_layer, of_experts = model.d_model * size, 0.0
    if moe is not None and layout.ep_size > 1 and config.parallel.dispatcher.kind in ("all_to_all", "hierarchical"):
        of_experts += moe.experts_per_token * model.d_model * low
    if layout.recompute != "block":
        of_layer *= 2
        if model.attention.latent is None:
            of_layer += 2 * (model.num_heads + (model.num_kv_heads or model.num_heads)) * model.head_dim * low
        if moe is not None and layout.recompute != "experts":
            of_experts += moe.experts_per_token * moe.d_ff * (1 if model.activation == "gelu" else 2) * low
    tokens = model.seq_len // layout.cp_size
    return int(tokens * (model.num_layers * of_layer + len(model.moe_layers) * of_experts))


def kept_share(config: ExperimentConfig, layout: PlannedLayout, world_size: int, stages: PipelineStages) -> float:
    """Return the layers that the fullest rank of a pipeline keeps passes of, over those of the model."""
    number = layout.passes(config, world_size)
    kept = (kept_layers(layout.pp_schedule, stages, rank, number) for rank in range(stages.num_ranks))
    # The last pass of an odd number of micro-batches may be all that a rank keeps.
    return max(kept) * (layout.at_once(config) if number > 1 else 1) / config.model.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatedTime:
    """Rough seconds of the parts of a step, to order what is tried."""

    flops: float
    """Time of products."""
    streamed: float
    """Time of reading weights and adding to gradients, for each micro-batch."""
    started: float
    """Time of starting operations."""
    starts_ahead: bool
    exchanged: float
    sums: float
    overlap: float
    idle: float

    def slowness(self, computation: float) -> float:
        """Return how many times as long as its products a computation takes that was modelled from a measurement."""
        rest = self.streamed if self.starts_ahead else self.streamed + self.started
        return max(1.0, (computation - rest) / self.flops)

    def total(self, slowness: float = 1.0) -> float:
        """Return the seconds of a step whose computation takes so many times as long as its products."""
        computation = self.flops * slowness + self.streamed
        worked = max(computation, self.started) if self.starts_ahead else computation + self.started
        waited = (worked + self.exchanged) * self.idle
        return worked + self.exchanged + waited + self.sums - min(self.sums, worked) * self.overlap


def estimated_time(
    config: ExperimentConfig,
    layout: PlannedLayout,
    cluster: Cluster,
    num_ids: int,
    *,
    imbalance: float = 1.0,
    largest_share: float = 1.0,
) -> EstimatedTime:
    """Return a rough time of a step: computation, messages, gradients and weights.

    The busiest rank of experts has `imbalance` times the mean rows, and that of a pipeline `largest_share` times the
    mean layers.
    """
    model, gpu, reached, moe = config.model, cluster.gpu, cluster.gpu.reached, config.model.moe
    dense, expert = (number / layout.pp_size for number in model.weights(vocab_size=num_ids))
    low, k = 2 if config.train.dtype == "bfloat16" else 4, 0.0 if moe is None else moe.experts_per_token
    num_ranks = cluster.world_size // layout.pp_size
    rows, number = layout.rows(config, cluster.world_size), layout.micro_batches(config, cluster.world_size)
    tokens, layers = rows * model.seq_len / layout.cp_size, model.num_layers / layout.pp_size
    busiest = imbalance if layout.ep_size > 1 else 1.0
    flops = tokens * (6 * (dense + busiest * k * expert) + 6 * layers * model.seq_len * model.d_model)
    computation = flops * _AGAIN[layout.recompute] / (gpu.flops[config.train.dtype] * reached.products)
    started = _OPERATIONS * layers * number * reached.operation_s

    def link(size: int) -> float:
        return (gpu.inside if size <= cluster.per_node else gpu.between) * reached.links

    ep = layout.ep_size
    moe_layers = len(model.moe_layers) / layout.pp_size
    exchanged = 4 * k * tokens * model.d_model * low * moe_layers * (1 - 1 / ep) / link(ep)
    if ep > cluster.per_node:
        exchanged *= 1 - 1 / (ep // cluster.per_node) + 0.1
    exchanged += _shared_bytes(config, layout) * tokens * layers * low / link(layout.cp_size)
    if layout.pp_size > 1:
        exchanged += 2 * layout.stages_per_rank * tokens * model.d_model * low / link(cluster.world_size)
    local = 0 if moe is None else expert * moe.num_experts // ep
    copies = num_ranks // ep
    shards = 1 if layout.data == "replicate" else layout.shard_size or num_ranks
    sums = 8 * (dense / link(num_ranks) + (local / link(num_ranks) if copies > 1 else 0))
    if layout.engine == "deepspeed":  # the second stage reduces gradients after each micro-batch
        sums *= 1.5 if layout.zero_stage == 1 else (1 + number) / 2
    elif shards > 1:
        times = {"nothing": 2 * number, "gradients": 1 + number, "weights": 1}[layout.shard_keeps]
        reduced = number if layout.shard_keeps == "nothing" else 1
        inside = dense / link(shards) + (local / link(shards) if shards > ep else 0)
        sums = (times * low + 4 * reduced) * inside + (8 / shards) * (dense + local) / link(num_ranks)
    size = WEIGHT_BYTES[config.train.dtype]
    return EstimatedTime(
        flops=computation * largest_share,
        streamed=largest_share * number * (dense + local) * (low + size) / (gpu.bandwidth * reached.memory),
        started=started,
        starts_ahead=reached.starts_ahead,
        exchanged=exchanged,
        sums=sums,
        overlap=reached.overlap,
        idle=layout.idle(layout.passes(config, cluster.world_size)),
    )


def _shared_bytes(config: ExperimentConfig, layout: PlannedLayout) -> float:
    """Return the values that a token of a shared row sends in each layer, forward and backward."""
    model, size = config.model, layout.cp_size
    if size == 1:
        return 0.0
    keys = 2 * (model.num_kv_heads or model.num_heads) * model.head_dim
    if layout.cp == "ring":
        return keys * (2 * size - 1)
    return 2 * (keys + 2 * model.num_heads * model.head_dim) * (1 - 1 / size)

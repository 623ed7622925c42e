"""Layouts of a proof: ranks, expert parallelism, dispatchers, micro-batches, engines. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.deepspeed.passthrough import free_options
from trainer.engine.registry import NativeEngineConfig
from trainer.experiment import ExperimentConfig
from trainer.models.config import Recompute, ShardKeeps
from trainer.models.parameter_patterns import in_fewer_layers
from trainer.moe.dispatch.registry import LocalDispatcherConfig, WireOptions

MAX_RANKS = 4
ENGINES = ("native", "deepspeed")
_COARSE_KERNELS = ("mxfp8",)
"""Kernels that round rows together, so that what is learned depends on which rows are in a micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layout."""

    world_size: int = 1
    ep_size: int = 1
    placement: Literal["contiguous", "round_robin"] = "contiguous"
    moves_to: Literal["contiguous", "round_robin"] | None = None
    """Placement with which the run goes on after the first step, from a checkpoint; None: it goes on as it is."""
    replicas: int = 0
    """Copies of other ranks' experts on each rank."""
    dispatcher: str = "all_to_all"
    chunks: int = 1
    row_budget: float | None = None
    """Size of receive buffers, as a multiple of an even share of the rows; None: by the rows of each step."""
    data: Literal["replicate", "shard"] = "replicate"
    shard_size: int | None = None
    shard_keeps: ShardKeeps = "gradients"
    deterministic: bool = False
    ranks_per_node: int = MAX_RANKS
    """If smaller than the number of ranks, simulates several nodes on this machine."""
    zero_stage: int | None = None
    """ZeRO stage of the DeepSpeed engine; None for the native one."""
    micro_batch_size: int
    loss_chunk: int | None = None
    """Tokens whose logits exist at once; None: those of a micro-batch."""
    recompute: Recompute = "none"
    replays: bool = False
    """Replay the experts that a first training under the same layout has chosen."""

    @property
    def name(self) -> str:
        """Name of the layout in the table."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks, ep {self.ep_size}"
        how = "" if self.ep_size == 1 else f", {self.dispatcher}"
        how += f" in {self.chunks} chunks" if self.chunks > 1 else ""
        how += f" of {self.row_budget:g} shares" if self.row_budget is not None else ""
        how += f", {self.placement}" if self.placement != "contiguous" else ""
        how += f" then {self.moves_to}" if self.moves_to is not None else ""
        how += f", {self.replicas} copies each" if self.replicas else ""
        sharding = ", shard" if self.data == "shard" else ""
        sharding += f" by {self.shard_size}" if self.shard_size is not None else ""
        sharding += f" keeping {self.shard_keeps}" if self.shard_keeps != "gradients" else ""
        engine = "" if self.zero_stage is None else f", ZeRO {self.zero_stage}"
        engine += ", deterministic" if self.deterministic else ""
        loss = "" if self.loss_chunk is None else f", loss by {self.loss_chunk}"
        again = "" if self.recompute == "none" else f", recompute {self.recompute}"
        again += ", replayed" if self.replays else ""
        return f"{ranks}{how}{sharding}{engine}, rows by {self.micro_batch_size}{loss}{again}"

    @property
    def engine(self) -> str:
        """Engine of the layout."""
        return "native" if self.zero_stage is None else "deepspeed"


def reference(config: ExperimentConfig) -> Case:
    """Return the layout that all others are compared with: one process, one micro-batch."""
    return Case(micro_batch_size=config.train.global_batch_size)


def all_cases(config: ExperimentConfig, engines: Sequence[str] | None = None) -> list[Case]:
    """Return every layout that the config allows, up to four ranks, DeepSpeed's with both stages.

    Without `engines`, only the config's own engine, and its ZeRO stage, are included.
    """
    stages: Sequence[int] = (1, 2)
    if engines is None:
        engines = [config.engine.kind]
        stages = [config.engine.zero_stage] if isinstance(config.engine, DeepSpeedEngineConfig) else ()
    cases = _native_cases(config)
    found = cases if "native" in engines else []
    if "deepspeed" in engines:
        # Dispatchers and engines are independent: one dispatcher is enough.
        usual = ("all_to_all", 1, None, "replicate")
        plain = [case for case in cases if (case.dispatcher, case.chunks, case.row_budget, case.data) == usual]
        plain.insert(0, reference(config))
        found = found + [replace(case, zero_stage=stage) for stage in stages for case in plain]
    return found


def _native_cases(config: ExperimentConfig) -> list[Case]:
    rows, moe, dispatcher = config.train.global_batch_size, config.model.moe, config.parallel.dispatcher
    num_experts = 1 if moe is None else moe.num_experts
    # Halves and single rows; equal for two rows, and none for one row, which is the reference.
    sizes = [size for size in dict.fromkeys((-(-rows // 2), 1)) if size < rows]
    some = config.model.seq_len // 2 + 1  # tokens: chunks of the loss that do not end with rows
    cases = [
        Case(micro_batch_size=size, loss_chunk=some, recompute="norms_and_activations")
        if size == 1
        else Case(micro_batch_size=size, recompute="experts")
        for size in sizes
    ]
    for world_size in range(2, MAX_RANKS + 1):
        share = -(-rows // world_size)
        for ep_size in range(1, min(world_size, num_experts) + 1):
            if world_size % ep_size:
                continue
            degrees = {"world_size": world_size, "ep_size": ep_size}
            half = Case(**degrees, micro_batch_size=-(-share // 2), loss_chunk=some, recompute="block")
            cases.append(Case(**degrees, micro_batch_size=share))
            if share > 1:
                cases.append(half)
            cases += [replace(half, **sharding) for sharding in _shardings(degrees)]
            if ep_size == 1:
                continue
            kinds = ["all_gather", "deduplicated_all_to_all"]
            if moe is not None and moe.capacity.factor is not None:
                kinds.append("padded_all_to_all")
            if not isinstance(dispatcher, WireOptions | LocalDispatcherConfig):
                kinds.append(dispatcher.kind)  # a plug-in
            cases += [Case(**degrees, dispatcher=kind, micro_batch_size=share) for kind in kinds]
            if num_experts > ep_size:
                moved = Case(**degrees, placement="round_robin", moves_to="contiguous", micro_batch_size=share)
                cases += [moved, Case(**degrees, replicas=1, micro_batch_size=share)]
            if num_experts // ep_size > 1:
                cases.append(Case(**degrees, chunks=2, micro_batch_size=share, recompute="block"))
            if moe is not None and moe.router.has_fixed_k and ep_size == world_size:
                # Steps taken again, or buffers that always suffice.
                budget = float(ep_size) if ep_size == MAX_RANKS else 1.0
                cases.append(Case(**degrees, row_budget=budget, micro_batch_size=share))
            if ep_size == 4:
                cases.append(Case(**degrees, dispatcher="hierarchical", ranks_per_node=2, micro_batch_size=share))
    if config.train.routing_replay is not None or config.metrics.routing_record is not None:
        cases += [replace(case, replays=True) for case in cases if case.data == "replicate" and case.chunks == 1]
    return cases


def _shardings(degrees: dict[str, int]) -> list[dict[str, Any]]:
    """Return the ways to shard over these ranks: over all, in groups of two, and what stays whole in a step."""
    found: list[dict[str, Any]] = [{"data": "shard"}]
    if degrees["world_size"] == MAX_RANKS:
        found += [{"data": "shard", "shard_size": 2, "shard_keeps": keeps} for keeps in ("gradients", "nothing")]
    if degrees == {"world_size": 2, "ep_size": 1}:
        found.append({"data": "shard", "shard_keeps": "nothing"})
        found.append({"data": "shard", "shard_keeps": "weights", "deterministic": True})
    return found


def apply_case(config: ExperimentConfig, case: Case) -> ExperimentConfig:
    """Return the config with another layout."""
    current, kernel = config.parallel.dispatcher, config.parallel.experts_kernel
    dispatcher = current.model_dump() if current.kind == case.dispatcher else {"kind": case.dispatcher}
    if case.chunks > 1 or "chunks" in dispatcher:
        dispatcher["chunks"] = case.chunks
    if case.row_budget is not None or "row_budget" in dispatcher:
        dispatcher["row_budget"] = case.row_budget
    parallel = {
        **config.parallel.model_dump(),
        "ep_size": case.ep_size,
        "placement": case.placement,
        "replicas": case.replicas,
        "micro_batch_size": case.micro_batch_size,
        "dispatcher": dispatcher,
        "data": case.data,
        "loss_chunk": case.loss_chunk,
        "recompute": case.recompute,
        "shard_size": case.shard_size,
        "shard_keeps": case.shard_keeps,
        "deterministic": case.deterministic,
        "experts_kernel": _proved_kernel(kernel),
        "device": "cpu",
        "compile": False,
    }
    engine = NativeEngineConfig().model_dump()
    if case.zero_stage is not None:
        options = config.engine if isinstance(config.engine, DeepSpeedEngineConfig) else DeepSpeedEngineConfig()
        engine = options.model_dump() | {"zero_stage": case.zero_stage}
    return ExperimentConfig.model_validate({**config.model_dump(), "parallel": parallel, "engine": engine})


def in_dtype(config: ExperimentConfig, dtype: str) -> ExperimentConfig:
    """Return the config with a proof's dtype, device and kernel; the config's own may not have the dtype."""
    values = config.model_dump()
    values["train"]["dtype"] = dtype
    values["parallel"] |= {"device": "cpu", "experts_kernel": _proved_kernel(config.parallel.experts_kernel)}
    return ExperimentConfig.model_validate(values)


def _proved_kernel(kernel: str) -> str:
    """Return the experts kernel of a proof: `auto` for the project's own, which are equal up to rounding."""
    return kernel if ":" in kernel or kernel in _COARSE_KERNELS else "auto"


def without_repeated_options(config: ExperimentConfig) -> ExperimentConfig:
    """Drop keys of `deepspeed_config` that repeat other sections, which a proof changes.

    Also drop the bucket size: in some layouts ranks hold different numbers of experts.
    """
    if not isinstance(config.engine, DeepSpeedEngineConfig):
        return config
    raw = free_options(config.engine.deepspeed_config)
    raw.get("zero_optimization", {}).pop("reduce_bucket_size", None)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed_config": raw})})


def labels(config: ExperimentConfig) -> list[str]:
    """Return the settings that are not layout-invariant by definition: their differences do not fail a proof."""
    moe = config.model.moe
    if moe is None:
        return []
    found = []
    dispatcher = config.parallel.dispatcher
    rounds_rows = isinstance(dispatcher, WireOptions) and dispatcher.wire == "bfloat16"
    if rounds_rows and config.train.dtype != "bfloat16":  # under bfloat16 the rows are bfloat16 anyway
        found.append("parallel.dispatcher.wire: bfloat16")
    if config.parallel.experts_kernel in _COARSE_KERNELS:
        found.append(f"parallel.experts_kernel: {config.parallel.experts_kernel}")
    if moe.capacity.scope == "rank" and moe.can_drop:
        found.append("model.moe.capacity.scope: rank")
    variant = [term for term in moe.aux_losses.terms() if not term.is_layout_invariant]
    if variant:
        key = "scope: micro_batch" if variant[0].scope == "micro_batch" else "counts: running"
        losses = " and ".join(f"{term.name}_loss" for term in variant)
        found.append(f"model.moe.balance.{key} ({losses})")
    return found


def _small_heads(attention: dict[str, Any], default: int) -> dict[str, Any]:
    """Return a dumped attention section with narrow heads, of which about the same share is rotated."""
    head_dim, latent = attention["head_dim"], attention["latent"]
    if latent is not None:  # widths that differ
        most = dict(q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
        latent = latent | {key: min(latent[key], width) for key, width in most.items() if latent[key] is not None}
    small = default if head_dim is None else min(head_dim, 16)
    fraction, rotated = attention["rotary_fraction"], max(2, int(small * attention["rotary_fraction"]) // 2 * 2)
    return attention | {
        "head_dim": None if head_dim is None else small,
        "latent": latent,
        "rotary_fraction": fraction if fraction == 1 else min(1.0, (rotated + 0.5) / small),  # the half is not counted
    }


def _small_window(attention: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return a dumped attention section whose window is narrower than a small row, in a layer of each kind."""
    kinds = [kind for kind in ("sliding", "full") if kind in attention["window_pattern"]]
    window = attention["window"] and min(attention["window"], 8)
    return attention | {"window": window, "window_pattern": kinds[:num_layers]}


def _few_layers(moe_layers: Sequence[int]) -> tuple[int, list[int]]:
    """Return how many layers remain, and which are MoE: the first two that are, and the one before each."""
    kept = sorted({layer for moe in moe_layers[:2] for layer in (moe - 1, moe) if layer >= 0})
    return len(kept), [number for number, layer in enumerate(kept) if layer in moe_layers]


def shrink(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with a small model and batch, and unchanged routing."""
    values = config.model_dump()
    model, moe = values["model"], values["model"]["moe"]
    d_model, heads = min(model["d_model"], 64), min(model["num_heads"], 4)
    kv_heads = model["num_kv_heads"]
    model |= {
        "num_layers": min(model["num_layers"], 2 if moe is None else moe["first_dense_layers"] + 2 * moe["every"]),
        "d_model": d_model,
        "num_heads": heads,
        "attention": _small_heads(model["attention"], d_model // heads),
        "num_kv_heads": None if kv_heads is None else max(1, heads * kv_heads // model["num_heads"]),
        "d_ff": min(model["d_ff"], 64),
        # A conversation that fits into a row must still do so.
        "seq_len": model["seq_len"] if config.data.has_chats else min(model["seq_len"], 32),
        "init_std": 0.1,
    }
    if moe is not None:
        moe["d_ff"] = min(moe["d_ff"], 32)
        moe["shared_d_ff"] = None if moe["shared_d_ff"] is None else min(moe["shared_d_ff"], 48)
        if moe["layers"] is not None:
            model["num_layers"], moe["layers"] = _few_layers(moe["layers"])
    model["attention"] = _small_window(model["attention"], model["num_layers"])
    if isinstance(again := values["parallel"]["recompute"], dict):
        again["every"] = min(again["every"], model["num_layers"])
    train, small = values["train"], partial(in_fewer_layers, before=config.model.num_layers, after=model["num_layers"])
    train["global_batch_size"] = min(train["global_batch_size"], 7)  # not divisible by any number of ranks
    train["freeze"] = [small(entry) for entry in train["freeze"]]
    train["lr_scale"] = {small(entry): factor for entry, factor in train["lr_scale"].items()}
    return ExperimentConfig.model_validate(values)

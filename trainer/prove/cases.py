"""Which layouts a proof runs: numbers of ranks, experts over ranks, dispatchers, micro-batches. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from trainer.experiment import ExperimentConfig
from trainer.moe.dispatch.registry import ExchangeOptions

MOST_RANKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layout."""

    world_size: int = 1
    ep_size: int = 1
    dispatcher: str = "all_to_all"
    chunks: int = 1
    data: Literal["replicate", "shard"] = "replicate"
    ranks_per_node: int = MOST_RANKS
    """Below the number of ranks, nodes are pretended on this machine."""
    micro_batch_size: int

    @property
    def name(self) -> str:
        """What the table calls it."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks, ep {self.ep_size}"
        how = "" if self.ep_size == 1 else f", {self.dispatcher}"
        how += f" in {self.chunks} chunks" if self.chunks > 1 else ""
        cut = ", shard" if self.data == "shard" else ""
        return f"{ranks}{how}{cut}, rows by {self.micro_batch_size}"


def reference(config: ExperimentConfig) -> Case:
    """Return what all others are compared with: one process, one micro-batch."""
    return Case(micro_batch_size=config.train.global_batch_size)


def all_cases(config: ExperimentConfig) -> list[Case]:
    """Return every layout that the config allows, up to four ranks."""
    rows, moe = config.train.global_batch_size, config.model.moe
    num_experts = 1 if moe is None else moe.num_experts
    pieces = max(1, -(-rows // 2))
    cases = [Case(micro_batch_size=pieces), Case(micro_batch_size=1)] if rows > 1 else []
    for world_size in range(2, MOST_RANKS + 1):
        share = -(-rows // world_size)
        for ep_size in range(1, min(world_size, num_experts) + 1):
            if world_size % ep_size:
                continue
            here = {"world_size": world_size, "ep_size": ep_size}
            cases.append(Case(**here, micro_batch_size=share))
            if share > 1:
                cases.append(Case(**here, micro_batch_size=-(-share // 2)))
            cases.append(Case(**here, data="shard", micro_batch_size=-(-share // 2)))
            if ep_size == 1:
                continue
            kinds = ["all_gather"]
            if moe is not None and moe.capacity.factor is not None:
                kinds.append("padded_all_to_all")
            cases += [Case(**here, dispatcher=kind, micro_batch_size=share) for kind in kinds]
            if num_experts // ep_size > 1:
                cases.append(Case(**here, chunks=2, micro_batch_size=share))
            if ep_size == 4:
                cases.append(Case(**here, dispatcher="hierarchical", ranks_per_node=2, micro_batch_size=share))
    return cases


def as_config(config: ExperimentConfig, case: Case) -> ExperimentConfig:
    """Return the config under another layout."""
    mine = config.parallel.dispatcher
    dispatcher = mine.model_dump() if mine.kind == case.dispatcher else {"kind": case.dispatcher}
    parallel = {
        **config.parallel.model_dump(),
        "ep_size": case.ep_size,
        "micro_batch_size": case.micro_batch_size,
        "dispatcher": dispatcher | {"chunks": case.chunks},
        "data": case.data,
        "experts_kernel": "auto",
        "device": "cpu",
        "compile": False,
    }
    return ExperimentConfig.model_validate({**config.model_dump(), "parallel": parallel})


def labels(config: ExperimentConfig) -> list[str]:
    """Return the settings that are not layout-invariant by definition; such a config differs, and does not fail."""
    moe = config.model.moe
    if moe is None:
        return []
    found = []
    if isinstance(config.parallel.dispatcher, ExchangeOptions) and config.parallel.dispatcher.wire == "bfloat16":
        found.append("parallel.dispatcher.wire: bfloat16")
    if moe.capacity.factor is not None and moe.capacity.scope == "rank":
        found.append("model.moe.capacity.scope: rank")
    if moe.balance.coef > 0 and moe.balance.scope == "micro_batch":
        found.append("model.moe.balance.scope: micro_batch")
    if moe.balance.coef > 0 and moe.balance.counts == "running":
        found.append("model.moe.balance.counts: running")
    return found


def small(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with a small model and batch, and everything that decides about routing as it is."""
    values = config.model_dump()
    model, moe = values["model"], values["model"]["moe"]
    heads = min(model["num_heads"], 4)
    kv_heads = model["num_kv_heads"]
    model |= {
        "num_layers": min(model["num_layers"], 2 if moe is None else moe["first_dense_layers"] + 2 * moe["every"]),
        "d_model": min(model["d_model"], 64),
        "num_heads": heads,
        "num_kv_heads": None if kv_heads is None else max(1, heads * kv_heads // model["num_heads"]),
        "d_ff": min(model["d_ff"], 64),
        "seq_len": min(model["seq_len"], 32),
        "init_std": 0.1,
    }
    if moe is not None:
        moe["d_ff"] = min(moe["d_ff"], 32)
    values["train"]["global_batch_size"] = min(values["train"]["global_batch_size"], 7)  # no number of ranks divides it
    return ExperimentConfig.model_validate(values)

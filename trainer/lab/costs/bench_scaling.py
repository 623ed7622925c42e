"""Measure optimizer steps over local ranks: one process of n threads against n ranks of one, beside DeepSpeed's MoE."""

from collections.abc import Iterator
from typing import Any

from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.registry import NativeEngineConfig
from trainer.experiment import ExperimentConfig
from trainer.lab.costs.bench_step import Planned, compete, step_settings, step_title, with_parallel
from trainer.lab.costs.cost_options import CostOptions, moe_of
from trainer.lab.costs.cost_report import report_costs
from trainer.lab.costs.deepspeed_peer import build_deepspeed_step, why_not_deepspeed
from trainer.lab.costs.step_entries import build_our_step, build_step_apart
from trainer.lab.costs.teams import TeamPlan


def bench_scaling(config: ExperimentConfig, options: CostOptions, *, num_ranks: int, with_peers: bool) -> int:
    """Time one process with as many threads as ranks, against the ranks with one thread each; return the exit code."""
    num_experts = moe_of(config).num_experts
    plans = [
        Planned(name, "own", num_experts, plan) for name, plan in _over_ranks(config, num_ranks, with_peers=with_peers)
    ]
    settings = {**step_settings(config), "ranks": num_ranks}
    case = compete(plans, options, title=f"{num_ranks} ranks, {step_title(config)}", settings=settings)
    return report_costs("scaling", [case], options=options.record(), device="cpu", json_path=options.json_path)


def _over_ranks(config: ExperimentConfig, num_ranks: int, *, with_peers: bool) -> Iterator[tuple[str, TeamPlan | str]]:
    alone = with_parallel(config, ep_size=1)
    together = with_parallel(config, ep_size=num_ranks)
    ranks: dict[str, Any] = {"num_ranks": num_ranks, "threads": 1, "ep_size": num_ranks, "ranks_per_node": num_ranks}
    yield (
        f"turnout, one process of {num_ranks} threads",
        TeamPlan(build=build_our_step, arguments=(alone,), threads=num_ranks),
    )
    yield f"turnout, {num_ranks} ranks", TeamPlan(build=build_our_step, arguments=(together,), **ranks)
    overlapped = TeamPlan(build=build_our_step, arguments=(with_parallel(together, overlap="micro_batches"),), **ranks)
    rows = config.train.global_batch_size // num_ranks
    has_pairs = rows > config.parallel.micro_batch_size and isinstance(config.engine, NativeEngineConfig)
    why = "a rank has one micro-batch in a step (parallel.micro_batch_size), or the engine is not the native one"
    yield f"turnout, {num_ranks} ranks, overlapped micro-batches", overlapped if has_pairs else why
    # As many rows and assignments for each process: the least that ranks could take on this machine.
    is_enough = moe_of(config).num_experts // num_ranks >= moe_of(config).experts_per_token
    apart = TeamPlan(build=build_step_apart, arguments=(alone,), **ranks)
    reason = f"{num_ranks} ranks have fewer experts each than a token needs"
    yield f"turnout, {num_ranks} processes that exchange nothing", apart if is_enough else reason
    if not with_peers:
        return
    reason = why_not_deepspeed(config)
    for stage in (1, 2):
        engine = together.model_copy(update={"engine": DeepSpeedEngineConfig(zero_stage=stage)})
        plan = TeamPlan(build=build_our_step, arguments=(engine,), **ranks)
        yield f"turnout, DeepSpeed engine, ZeRO {stage}", reason or plan
    yield "DeepSpeed's own MoE, ZeRO 1", reason or TeamPlan(build=build_deepspeed_step, arguments=(together,), **ranks)

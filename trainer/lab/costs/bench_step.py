"""Measure whole optimizer steps in one process, beside the dense twin and Hugging Face's Mixtral."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from trainer.distributed.runtime import start
from trainer.experiment import ExperimentConfig
from trainer.lab.costs.contest import Contender, measure
from trainer.lab.costs.cost_options import CostOptions, Routing, moe_of, shape_of_config
from trainer.lab.costs.cost_report import CostCase, report_costs
from trainer.lab.costs.step_entries import build_mixtral_step, build_our_step, dense_twin, logits_for
from trainer.lab.costs.teams import Team, TeamPlan, started
from trainer.lab.costs.traces import read_traces
from trainer.lab.costs.transformers_peer import why_not, why_not_mixtral


def bench_step(configs: Sequence[ExperimentConfig], options: CostOptions, *, threads: int | None) -> int:
    """Time and weigh a step of each config, one process for each entry; print, write and return the exit code.

    Configs of the same dtype take turns, so that numbers of experts can be compared.
    """
    options = replace(options, device=start(options.device).type)
    threads = threads or len(os.sched_getaffinity(0))
    experts = [moe_of(config).num_experts for config in configs]
    traces = read_traces(options.traced, experts=experts, seed=options.seed)
    cases = []
    for dtype in dict.fromkeys(config.train.dtype for config in configs):
        alike = [config for config in configs if config.train.dtype == dtype]
        plans = [
            Planned(name, str(routing), moe_of(config).num_experts, plan)
            for config in alike
            for routing in options.routings
            for name, plan in _steps(config, routing, traces.get(routing, ()), options, threads)
        ]
        cases.append(compete(plans, options, title=step_title(alike[0]), settings=step_settings(alike[0])))
    return report_costs("step", cases, options=options.record(), device=options.device, json_path=options.json_path)


def _steps(
    config: ExperimentConfig, routing: Routing, traced: tuple[Tensor, ...], options: CostOptions, threads: int
) -> Iterator[tuple[str, TeamPlan | str]]:
    """Yield each contender's plan, or the reason that it has none, with its name."""
    given = logits_for(config, routing.kind, options.seed, traced)
    more: dict[str, Any] = {"threads": threads, "device": options.device}
    yield "turnout", TeamPlan(build=build_our_step, arguments=(config, given), **more)
    if config.parallel.compile:
        plain = with_parallel(config, compile=False)
        yield "turnout, not compiled", TeamPlan(build=build_our_step, arguments=(plain, given), **more)
    if routing == options.routings[0]:
        yield "dense twin", TeamPlan(build=build_our_step, arguments=(dense_twin(config),), **more)
    (shape,) = shape_of_config(config, [config.train.dtype])
    for name in options.peers:
        reason = why_not_mixtral(config) or why_not(name, shape)
        yield f"hf {name}", reason or TeamPlan(build=build_mixtral_step, arguments=(config, name, given), **more)


class Planned(NamedTuple):
    """A contender whose processes are not started yet."""

    name: str
    routing: str
    num_experts: int
    plan: TeamPlan | str
    """The reason if it cannot run."""


def compete(plans: Sequence[Planned], options: CostOptions, *, title: str, settings: dict[str, Any]) -> CostCase:
    """Start the processes of all plans, and let them take turns."""
    with started({str(n): one.plan for n, one in enumerate(plans) if isinstance(one.plan, TeamPlan)}) as teams:
        contenders = []
        for number, (name, routing, num_experts, plan) in enumerate(plans):
            team = plan if isinstance(plan, str) else teams[str(number)]
            runner = team.runner("step") if isinstance(team, Team) else team
            contenders.append(Contender(name=name, routing=routing, num_experts=num_experts, runner=runner))
        return CostCase(title=title, settings=settings, entries=measure(contenders, rounds=options.rounds))


def with_parallel(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    """Return the config with changes in its layout."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})


def step_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return what the steps of a comparison share, as JSON values."""
    model, moe = config.model, moe_of(config)
    return {
        "config": config.name,
        "dtype": config.train.dtype,
        "layers": model.num_layers,
        "d_model": model.d_model,
        "d_ff": moe.d_ff,
        "top_k": moe.experts_per_token,
        "tokens": config.train.global_batch_size * model.seq_len,
    }


def step_title(config: ExperimentConfig) -> str:
    """Return one line about a step."""
    facts = step_settings(config)
    return f"a step of {facts['config']}, {facts['tokens']} tokens, {facts['dtype']}"

"""Measure one MoE layer over several ranks: what each dispatcher sends, and what each kernel and dispatcher keeps."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from trainer.distributed.runtime import start
from trainer.lab.costs.bench_layer import layer_case
from trainer.lab.costs.contest import Contender, measure
from trainer.lab.costs.cost_options import CostOptions, LayerShape, Routing, by_dtype
from trainer.lab.costs.cost_report import CostCase, report_costs
from trainer.lab.costs.dispatch_entries import build_dispatch_entries
from trainer.lab.costs.teams import Team, TeamPlan, started
from trainer.lab.costs.traces import read_traces


def bench_dispatch(
    shapes: Sequence[LayerShape],
    options: CostOptions,
    *,
    ranks: Sequence[int],
    dispatchers: Sequence[str],
    kernel: str,
) -> int:
    """Time every dispatcher over each number of ranks of one thread, and count what is sent; return the exit code."""
    traces = read_traces(options.traced, experts=[shape.num_experts for shape in shapes], seed=options.seed)
    cases = [_over_ranks(shape, options, size, dispatchers, kernel, traces) for shape in shapes for size in ranks]
    settings = {**options.record(), "ranks": list(ranks), "dispatchers": list(dispatchers), "kernel": kernel}
    return report_costs("dispatch", cases, options=settings, device="cpu", json_path=options.json_path)


def bench_memory(
    shapes: Sequence[LayerShape],
    options: CostOptions,
    *,
    kernels: Sequence[str],
    num_ranks: int,
    dispatchers: Sequence[str],
) -> int:
    """Weigh the layer by each kernel in one process, and by each dispatcher over ranks; return the exit code.

    `options` has no rounds: nothing is timed.
    """
    options = replace(options, device=start(options.device).type)
    traces = read_traces(options.traced, experts=[shape.num_experts for shape in shapes], seed=options.seed)
    cases = [layer_case(alike, options, kernels, is_compiled=False, traces=traces) for alike in by_dtype(shapes)]
    if dispatchers:
        cases += [_over_ranks(shape, options, num_ranks, dispatchers, kernels[0], traces) for shape in shapes]
    settings = {**options.record(), "kernels": list(kernels), "ranks": num_ranks, "dispatchers": list(dispatchers)}
    return report_costs("memory", cases, options=settings, device=options.device, json_path=options.json_path)


def _over_ranks(
    shape: LayerShape,
    options: CostOptions,
    num_ranks: int,
    dispatchers: Sequence[str],
    kernel: str,
    traces: dict[Routing, tuple[Tensor, ...]],
) -> CostCase:
    """Measure the dispatchers over one number of ranks, which share the experts and have the shape's tokens each."""
    plans = {
        str(routing): TeamPlan(
            build=build_dispatch_entries,
            arguments=(shape, routing, traces.get(routing, ()), kernel, tuple(dispatchers), options.seed),
            num_ranks=num_ranks,
            threads=1,
            ep_size=num_ranks,
            ranks_per_node=num_ranks // 2 if num_ranks >= 4 and num_ranks % 2 == 0 else num_ranks,
        )
        for routing in options.routings
    }
    with started(plans) as teams:
        contenders = [
            Contender(
                name=f"turnout, {kind}",
                routing=routing,
                num_experts=shape.num_experts,
                runner=team.runner(kind) if isinstance(team, Team) else team,
            )
            for routing, team in teams.items()
            for kind in dispatchers
        ]
        entries = measure(contenders, rounds=options.rounds)
    title = f"{num_ranks} ranks with {shape.num_experts // num_ranks} experts and {shape.title}"
    settings = {**shape.record(), "ranks": num_ranks}
    return CostCase(title=title, settings=settings, entries=entries)

"""Plan a config: measure layouts, show them, and write the config of the fastest."""

import gc
import json
import logging
import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.atomic_io import replace_file
from trainer.config.dump import dump
from trainer.errors import ConfigError, ResourceError
from trainer.experiment import ExperimentConfig
from trainer.plan.fake_step import num_ids_of
from trainer.plan.find_layouts import Effort, Plan, find_layouts
from trainer.plan.layouts import Choices, Cluster, PlannedLayout
from trainer.plan.links import Links
from trainer.plan.measure_layout import measure_layout
from trainer.plan.measured_rank import Ranks
from trainer.plan.plan_table import no_layout, plan_lines, plan_record
from trainer.plan.step_cost import StepCost
from trainer.terminal import print_safe
from trainer.what_if.prediction import expert_loads
from trainer.what_if.traced_passes import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Request of a user for a plan."""

    config: ExperimentConfig
    cluster: Cluster
    choices: Choices
    links: Links | None = None
    imbalance: float = 1.0
    trace: Path | None = None
    wanted: int = 6
    seconds: float = 17.0


def plan_config(request: PlanRequest, *, write: Path | None = None, as_json: bool = False) -> int:
    """Find layouts, print them and return the exit code; write the config of the fastest to a new file.

    Raises:
        ConfigError: if no layout is possible, or sizes are not known.
        ResourceError: if none fits, with what is missing and the nearest option.
    """
    config, cluster = request.config, request.cluster
    _be_quiet()
    found = found_layouts(request)
    if found.num_possible == 0:
        raise ConfigError(
            f"{config.name}: no layout has these choices on {cluster.world_size} ranks; --ep-size must divide the "
            "ranks and the experts, and --micro-batch must not exceed the rows of a rank"
        )
    if not found.fitting:
        raise ResourceError(no_layout(config, cluster, found))
    if as_json:
        print(json.dumps(plan_record(config, cluster, found)))
    else:
        for line in plan_lines(config, cluster, found, assumed=_assumed(request)):
            print_safe(line)
    if write is not None:
        best = found.fitting[0].layout
        replace_file(write, planned_file(request, best, write))
        if not as_json:
            print_safe(f"{write} has the first one; start it by: {start_line(cluster, write)}")
    return 0


def found_layouts(request: PlanRequest) -> Plan:
    """Return the layouts that were measured."""
    cluster = request.cluster
    ranks = Ranks(
        world_size=cluster.world_size,
        per_node=cluster.per_node,
        device="cpu" if cluster.gpu.name == "cpu" else "cuda",
        imbalance=request.imbalance,
        shares=_shares(request),
    )

    effort = Effort(wanted=request.wanted, seconds=request.seconds)
    ids = num_ids_of(request.config)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.plan.measure_layout"])
    with ProcessPoolExecutor(2, context, initializer=_prepare_worker) as pool:
        pool.submit(gc.collect)  # they start while layouts are listed

        def measure(config: ExperimentConfig) -> StepCost:
            return measure_layout(config, ranks, pool=pool)

        return find_layouts(
            request.config,
            cluster,
            request.choices,
            measure,
            num_ids=ids,
            links=request.links,
            effort=effort,
            imbalance=request.imbalance,
        )


def _shares(request: PlanRequest) -> Sequence[float]:
    """Return the shares (E,) of the experts in a trace, over all layers; none without a trace."""
    if request.trace is None:
        return ()
    loads, moe = expert_loads(Trace(request.trace)), request.config.model.moe
    if moe is None or loads.shape[1] != moe.num_experts:
        experts = 0 if moe is None else moe.num_experts
        raise ConfigError(
            f"--trace: {request.trace} has {loads.shape[1]} experts, and the config has {experts}; trace a run of this "
            "number of experts, or give --imbalance"
        )
    return loads.sum(0).tolist()


def _assumed(request: PlanRequest) -> str:
    if request.config.model.moe is None:
        return "the model is dense"
    if request.trace is not None:
        return f"experts have the load of {request.trace}, in every layer alike"
    return f"the busiest rank of experts has {request.imbalance:g} times the mean rows"


def start_line(cluster: Cluster, path: Path) -> str:
    """Return the command that starts a config on the planned machines."""
    nodes = cluster.world_size // cluster.per_node
    if cluster.gpu.name == "cpu":
        return f"turnout launch {path} --nproc {cluster.world_size}"
    return f"sbatch --nodes {nodes} --gpus-per-node {cluster.per_node} scripts/slurm.sh {path}"


def planned_file(request: PlanRequest, layout: PlannedLayout, path: Path) -> str:
    """Return the text of a config with a layout, which says how to start it."""
    cluster, config = request.cluster, layout.applied(request.config)
    assert config is not None, "it was measured"
    head = f"# Planned for {cluster.world_size} {cluster.gpu.name}, {cluster.per_node} in a machine:\n"
    return f"{head}#   {start_line(cluster, path)}\n{dump(config)}"


def _prepare_worker() -> None:
    """Let one of two processes use one core: with threads for its small integers each waits for the other's."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is never freed, and steps collect often
    _be_quiet()


def _be_quiet() -> None:
    """Leave out what torch and DeepSpeed say about fake tensors."""
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

"""The model of a step's time."""

from dataclasses import replace

import pytest

from trainer.plan.gpus import Gpu, Reached
from trainer.plan.links import Links
from trainer.plan.step_cost import Quantity, StepCost
from trainer.plan.step_time import step_time

IDEAL = Reached(products=1, memory=1, links=1, overlap=0.5, operation_s=0, inside_s=0, between_s=0, message_s=0)
GPU = Gpu(
    name="test", memory=1, flops={"float32": 100.0}, bandwidth=10.0, inside=4.0, between=1.0, source="", reached=IDEAL
)
NEAR, FAR = (0, 1), (0, 1, 2, 3)


def cost(**totals: float) -> StepCost:
    known = {
        "flops": Quantity("flops", "products float32"),
        "moved": Quantity("moved", "products float32"),
        "others": Quantity("moved", "others float32"),
        "started": Quantity("operations", "others float32"),
    }
    return StepCost(
        weights=0, resident=0, peaks={("forward", None): 1}, totals={known[k]: v for k, v in totals.items()}
    )


def sent(name: str, ranks: tuple[int, ...], size: float) -> dict[Quantity, float]:
    return {
        Quantity("calls", name, ranks): 1,
        Quantity("bytes", name, ranks): size,
        Quantity("messages", name, ranks): len(ranks) - 1,
    }


def test_a_host_that_computes_itself_adds_up_both_times() -> None:
    slow = replace(GPU, reached=replace(IDEAL, operation_s=0.5))
    alone = replace(slow, reached=replace(slow.reached, starts_ahead=False))
    work = cost(flops=500, moved=10, others=20, started=4)
    assert step_time(work, slow, ranks_per_node=2).total == 5 + 2
    assert step_time(work, alone, ranks_per_node=2).total == 5 + 2 + 4 * 0.5


def test_the_host_has_work_around_each_gather_and_reduction_of_shards() -> None:
    slow = replace(GPU, reached=replace(IDEAL, operation_s=0.5, shard_call_s=3.0))
    work = replace(cost(), totals={**cost(started=4).totals, Quantity("shard_calls", "fsdp"): 2})
    assert step_time(work, slow, ranks_per_node=2).total == 4 * 0.5 + 2 * 3


def test_products_take_the_longer_of_computing_and_reading() -> None:
    assert step_time(cost(flops=500, moved=10), GPU, ranks_per_node=2).total == 5
    assert step_time(cost(flops=500, moved=80), GPU, ranks_per_node=2).total == 8
    assert step_time(cost(flops=500, moved=10, others=20), GPU, ranks_per_node=2).total == 7
    slow = replace(GPU, reached=replace(IDEAL, operation_s=1.0))
    assert step_time(cost(others=20, started=9), slow, ranks_per_node=2).total == 9


def test_rows_are_waited_for_and_weights_hide_behind_computation() -> None:
    worked = cost(flops=500, moved=10)
    rows = replace(worked, totals={**worked.totals, **sent("alltoall_base", NEAR, 8)})
    assert step_time(rows, GPU, ranks_per_node=2).total == 5 + 2
    weights = replace(worked, totals={**worked.totals, **sent("allreduce", NEAR, 8)})
    assert step_time(weights, GPU, ranks_per_node=2).total == 5 + 2 - 1


def test_messages_between_machines_pass_the_slower_links() -> None:
    rows = replace(cost(), totals=sent("alltoall_base", FAR, 12))
    assert step_time(rows, GPU, ranks_per_node=4).exchanged == 3
    assert step_time(rows, GPU, ranks_per_node=2).exchanged == pytest.approx(8)  # two of three others are far
    ring = replace(cost(), totals=sent("allreduce", FAR, 12))
    assert step_time(ring, GPU, ranks_per_node=2).weights == 12


def test_measured_links_are_read_by_the_tensor_of_a_rank() -> None:
    links = Links(ranks=2, all_reduce=[(8, 3.0)], all_to_all=[(8, 2.0)], flops=1, bandwidth=1)
    rows = replace(cost(), totals=sent("alltoall_base", NEAR, 8))  # half of 16 bytes stay here
    assert step_time(rows, GPU, ranks_per_node=2, links=links).exchanged == 4
    ring = replace(cost(), totals=sent("allreduce", NEAR, 16))
    assert step_time(ring, GPU, ranks_per_node=2, links=links).weights == 6
    gathered = replace(cost(), totals=sent("allgather_base", NEAR, 8))
    assert step_time(gathered, GPU, ranks_per_node=2, links=links).weights == 3
    more = replace(links, all_gather=[(8, 5.0)], reduce_scatter=[(8, 7.0)])
    assert step_time(gathered, GPU, ranks_per_node=2, links=more).weights == 10  # 16 bytes are gathered
    busy = replace(more, beside={"all_gather": [(8, 6.0)]})
    assert step_time(gathered, GPU, ranks_per_node=2, links=busy).weights == 12
    reduced = replace(cost(), totals=sent("reduce_scatter_base", NEAR, 4))
    assert step_time(reduced, GPU, ranks_per_node=2, links=more).weights == 7

"""Rows through symmetric memory, on its double: bits of `all_to_all`, budgets, waits, memory, and what is refused."""

from typing import Any

import pytest
import torch
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from tests.contracts import test_dispatchers
from tests.doubles.symmetric_memory import doubled
from tests.laws import test_overlap
from tests.laws.test_expert_parallel import MODELS
from tests.ranks import Ranks, mesh_here
from tests.step_waits import Layout, StepWaits, count
from trainer.distributed.symmetric_rows import SymmetricRows
from trainer.errors import ConfigError
from trainer.moe.dispatch.exchanging import Wire
from trainer.moe.dispatch.registry import AllToAllDispatcherConfig, SymmetricMemoryDispatcherConfig
from trainer.moe.dispatch.row_budget import RowBudget
from trainer.moe.routing import RoutingDecision

CONFIG = SymmetricMemoryDispatcherConfig()


def both(shape: tuple[int, int, int], case: str, wire: Wire) -> list[str]:
    """Return what differs in any bit from `all_to_all`, outputs and gradients."""
    of_experts = shape[1:]
    configs = (config(wire=wire) for config in (AllToAllDispatcherConfig, SymmetricMemoryDispatcherConfig))
    with doubled():
        plain, ours = (test_dispatchers.on_a_rank(config, case, *of_experts, None) for config in configs)
    return [name for name in plain if not torch.equal(plain[name], ours[name])]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("wire", ["compute", "bfloat16"])
def test_results_have_the_bits_of_all_to_all(ranks: Ranks, wire: Wire) -> None:
    for shape in ((2, 4, 2), (3, 8, 2), (4, 6, 2)):
        for case in ("random", "all to one expert", "a varying number of experts"):
            assert ranks.run(shape[0], both, shape, case, wire) == [[]] * shape[0]


def budgeted(budget: float | None, moe: dict[str, Any], others: dict[str, Any]) -> tuple[float, int]:
    """Return the largest difference of what is learned from what `all_to_all` learns, and the steps taken again."""
    own = {"dispatcher": {"kind": "symmetric_memory", "row_budget": budget}, **others}
    found = []
    with doubled():
        for options in ({}, own):
            engine = test_overlap._engine({"ep_size": 2}, options, {"moe": moe})
            found.append((test_overlap._train(engine, 2, is_packed=False), engine.repeated_steps))
    (plain, _), (ours, repeated) = found
    apart = [float((ours[1][name] - plain[1][name]).abs().max()) for name in ours[1]]
    return max(*apart, float((ours[0] - plain[0]).abs().max())), repeated


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("budget", "moe", "others", "is_repeated"),
    [
        (1.0, MODELS["dropless"], {}, True),
        (2.0, MODELS["dropless"], {"recompute": "block"}, False),
        (1.5, MODELS["dropless"], {"overlap": "micro_batches"}, None),
        (2.0, MODELS["bias_balanced, jitter, capacity"], {}, False),
    ],
    ids=str,
)
def test_a_row_budget_learns_the_same(
    ranks: Ranks, budget: float, moe: dict[str, Any], others: dict[str, Any], is_repeated: bool | None
) -> None:
    for largest, repeated in ranks.run(4, budgeted, budget, moe, others):
        assert largest < 1e-9
        assert is_repeated is None or (repeated == test_overlap.STEPS if is_repeated else repeated == 0)


def crowded(budget: float) -> tuple[float, int]:
    """Return the largest output if all rows go to one expert, and the overflow."""
    config = CONFIG.model_copy(update={"row_budget": budget})
    mesh, decision = mesh_here(ep_size=4), test_dispatchers._decision(0, "all to one expert", 4, 1, None)
    with doubled():
        dispatcher = config.build(mesh, 4)
        assert isinstance(dispatcher, RowBudget)
        with dispatcher.static_sizes():
            y = dispatcher.forward(torch.ones(8, 16), decision, lambda x, *_, **__: x)
        assert dispatcher.overflow is not None
        return float(y.abs().max()), int(dispatcher.overflow)


def test_nobody_sends_what_has_no_place(ranks: Ranks) -> None:
    assert ranks.run(4, crowded, 1.0) == [(0.0, 24)] * 4
    assert ranks.run(4, crowded, 4.0) == [(1.0, 0)] * 4


def waits(budget: float | None) -> StepWaits:
    with doubled():
        return count({}, Layout(dispatcher="symmetric_memory", row_budget=budget, ranks=2))


def test_sizes_are_awaited_once_in_a_layer_and_never_with_a_budget(ranks: Ranks) -> None:
    exact, static = ranks.run(2, waits, None)[0], ranks.run(2, waits, 2.0)[0]
    mine = [
        [wait for wait in found.waits if "symmetric" in wait.place or "exchanging" in wait.place]
        for found in (exact, static)
    ]
    assert [len(found) for found in mine] == [2, 0]  # of two layers
    assert static.per_layer == 0 and static.copies == 0


def growing() -> list[int]:
    """Exchange ever more rows through memory that is too small for them; return how large it became."""
    group, sizes = mesh_here(ep_size=2).ep, []
    with doubled():
        memory = SymmetricRows(group)
        for number, rows in enumerate((1, 5, 3, 200, 7)):
            x = torch.arange(rows, dtype=torch.float64)[:, None] + 1000 * group.index + number / 8
            to = torch.tensor([rows - rows // 3, rows // 3])
            here = [rows - rows // 3, rows // 3][group.index]
            arriving = memory.start([x], to, 2 * here + 1, 2 * rows + 1)
            arriving.wait()
            (found,) = arriving.tensors
            first = torch.arange(here, dtype=torch.float64) + (rows - rows // 3 if group.index else 0)
            expected = torch.cat([first, first + 1000, torch.zeros(1)]) + number / 8
            expected[-1] = 0
            assert torch.equal(found[:, 0], expected)
            sizes.append(memory._num_bytes)
    return sizes


def test_memory_grows_with_the_rows(ranks: Ranks) -> None:
    for small, more, same, large, kept in ranks.run(2, growing):
        assert small <= more == same < large == kept


def refusals() -> list[str]:
    mesh = mesh_here(ep_size=2)
    weight = torch.ones(3, 1)
    decision = RoutingDecision.from_top_k(
        torch.zeros(3, 1, dtype=torch.int64), weight, num_experts=4, valid=torch.ones(3, dtype=torch.bool)
    )
    said = []

    def note() -> None:
        with pytest.raises(ConfigError) as caught:
            CONFIG.build(mesh, 4).begin(torch.zeros(3, 16), decision)
        said.append(str(caught.value))

    note()  # this build of torch has none
    with doubled(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(symm_mem, "set_backend", _no_heap)
        note()
        patch.setattr("trainer.moe.dispatch.symmetric_memory.MOST_RANKS", 1)
        note()
    return said


def _no_heap(name: str) -> None:
    raise RuntimeError("nvshmem_init failed\nand more")


def test_what_is_missing_is_named(ranks: Ranks) -> None:
    for none, broken, many in ranks.run(2, refusals):
        assert "symmetric_memory needs NVSHMEM, and torch" in none and "use all_to_all instead" in none
        assert "symmetric memory does not start here: RuntimeError: nvshmem_init failed; use all_to_all" in broken
        assert "between at most 1 ranks, and parallel.ep_size is 2; use a smaller ep_size" in many


def misuse() -> int:
    """Return how many wrong calls the double has refused."""
    group, refused = mesh_here(ep_size=2).ep, 0
    with doubled():
        memory = SymmetricRows(group)
        to = torch.tensor([1, 1])
        arriving = memory.start([torch.ones(2, 3)], to, 2, 2)
        assert arriving.tensors[0].isnan().all()
        arriving.wait()
        assert not arriving.tensors[0].isnan().any()
        with pytest.raises(IndexError):
            arriving.wait()
        buffers = memory._sets[1 - memory._turn]
        rows = buffers.sent.view(-1, 16), buffers.received.view(-1, 16)
        wrong: list[tuple[Tensor, ...]] = [
            (*rows, buffers.splits.int(), buffers.arrived),
            (rows[0].clone(), rows[1], buffers.splits, buffers.arrived),
            (rows[0], rows[1].view(-1, 8), buffers.splits, buffers.arrived),
            (*rows, buffers.splits.fill_(1 << 20), buffers.arrived),
        ]
        for tensors in wrong:
            with pytest.raises(AssertionError):
                torch.ops.symm_mem.all_to_all_vdev_2d(*tensors, group.handle.group_name)
            refused += 1
        with pytest.raises(AssertionError):
            memory.start([torch.ones(2, 3)], to, 2, 2)
            memory._turn = 1 - memory._turn  # as if there were one set of buffers only
            memory.start([torch.ones(2, 3)], to, 2, 2)
    return refused + 1


def test_the_double_refuses_what_the_operator_cannot_do(ranks: Ranks) -> None:
    """Control: the tests above would fail by these."""
    assert ranks.run(2, misuse) == [5, 5]

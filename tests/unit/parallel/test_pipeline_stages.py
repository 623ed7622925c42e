"""Layers of stages, and the ranks that have them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import make_model, tiny_model_config
from trainer.distributed.rank_layout import Degrees, ScheduleName
from trainer.errors import ConfigError
from trainer.models.flops import model_size
from trainer.parallel.pipeline_stages import (
    SCHEDULES,
    check_micro_batches,
    even_stages,
    layer_flops,
    pipeline_stages,
)


@given(costs=st.lists(st.integers(1, 20), min_size=1, max_size=8), data=st.data(), last=st.integers(0, 30))
def test_no_other_cut_has_a_cheaper_costliest_stage(costs: list[int], data: st.DataObject, last: int) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    stages = even_stages(costs, num_stages, last=last)
    assert [layer for stage in stages for layer in stage] == list(range(len(costs)))

    def costliest(ends: list[int]) -> int:
        parts = itertools.pairwise([0, *ends, len(costs)])
        return max(sum(costs[a:b]) + (last if b == len(costs) else 0) for a, b in parts)

    cuts = map(list, itertools.combinations(range(1, len(costs)), num_stages - 1))
    assert costliest([stage.stop for stage in stages[:-1]]) == min(map(costliest, cuts))


def test_flops_of_layers_are_those_of_the_model() -> None:
    config = tiny_model_config({"num_shared_experts": 1, "first_dense_layers": 1}, num_layers=3)
    size = model_size(make_model(config, vocab_size=32))
    assert sum(layer_flops(config)) + 2 * 32 * config.d_model == size.forward_flops_per_token


def test_the_stage_with_the_head_has_fewer_layers() -> None:
    config = tiny_model_config(num_layers=8)
    degrees = Degrees(pp_size=2)
    small, large = (pipeline_stages(config, vocab_size, degrees).layers for vocab_size in (8, 2000))
    assert [len(part) for part in small] == [4, 4] and len(large[1]) < 4


def test_a_rank_has_stages_in_a_loop_or_there_and_back() -> None:
    config = tiny_model_config(num_layers=8)
    loop = pipeline_stages(config, 8, Degrees(pp_size=2, pp_schedule="interleaved_1f1b", pp_layers=(1, 2, 3, 2)))
    assert (loop.layers_of(0), loop.layers_of(1)) == ([0, 3, 4, 5], [1, 2, 6, 7])
    there_and_back = pipeline_stages(config, 8, Degrees(pp_size=2, pp_schedule="zbv", pp_layers=(1, 2, 3, 2)))
    assert (there_and_back.layers_of(0), there_and_back.layers_of(1)) == ([0, 6, 7], [1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (Degrees(pp_size=4), r"4 stages need as many MoE layers, and the model has 3"),
        (Degrees(pp_size=2, pp_layers=(2, 3)), r"2 stages with 5 layers, where 2 with 4 \(model.num_layers\)"),
        (Degrees(pp_size=2, pp_layers=(1, 3)), r"stage 0 has no MoE layer"),
    ],
)
def test_stages_that_do_not_fit_are_refused(degrees: Degrees, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline_stages(tiny_model_config({"first_dense_layers": 1}, num_layers=4), 8, degrees)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_accepted_torch_can_order(name: ScheduleName) -> None:
    """Numbers of micro-batches from 1 to 9 over 2 and 3 ranks: refused here or possible there."""
    from torch.distributed import pipelining

    kind = getattr(pipelining, SCHEDULES[name].torch_name)
    for size, number in itertools.product((2, 3), range(1, 10)):
        try:
            check_micro_batches(Degrees(pp_size=size, pp_schedule=name), number)
        except ConfigError:
            is_accepted = False
        else:
            is_accepted = True
        assert is_accepted == _torch_orders(kind, SCHEDULES[name].stages_per_rank, size, number), (size, number)


@pytest.mark.parametrize("name", SCHEDULES)
def test_pairs_count_as_one_pass(name: ScheduleName) -> None:
    """Up to 9 pairs that overlap, the last one whole or not, are accepted exactly if as many micro-batches are."""
    degrees = Degrees(pp_size=2, pp_schedule=name)

    def is_accepted(number: int, at_once: int) -> bool:
        try:
            check_micro_batches(degrees, number, at_once=at_once)
        except ConfigError:
            return False
        return True

    for number in range(1, 10):
        for of_pairs in (2 * number - 1, 2 * number):
            assert is_accepted(of_pairs, 2) == is_accepted(number, 1), number


def test_too_few_pairs_are_named() -> None:
    needed = r"1f1b over 3 groups of ranks needs 3 pairs of micro-batches \(parallel\.overlap\) in a step, .* has 2; "
    with pytest.raises(ConfigError, match=needed):
        check_micro_batches(Degrees(pp_size=3), 4, at_once=2)


class _FakeStage:
    def __init__(self, index: int, size: int, per_rank: int) -> None:
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, size * per_rank, size, 0
        self.submod = None


def _torch_orders(kind: type, per_rank: int, size: int, number: int) -> bool:
    stages = [_FakeStage(index * size, size, per_rank) for index in range(per_rank)]
    try:
        kind(stages[0] if per_rank == 1 else stages, number, loss_fn=lambda output, target: output)
    except ValueError:
        return False
    return True

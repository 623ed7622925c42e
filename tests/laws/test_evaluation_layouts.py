"""Law: the number of ranks and the placement of experts do not change scores and generated texts."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.builders import make_engine, make_packed_batch, rows_of, tiny_model_config
from tests.ranks import Ranks
from trainer.data.batches.row_parts import own_part
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import build_mesh
from trainer.distributed.rank_layout import Layout, even_slice
from trainer.engine.base import EvalSums
from trainer.evaluation.context import EvalContext
from trainer.evaluation.routing_gap import RoutingGap, routing_gap
from trainer.evaluation.scoring import Question, score
from trainer.evaluation.tasks.batch_generation import generate_batched
from trainer.models.sampling import SamplingOptions
from trainer.parallel.config import ParallelConfig

LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "2 ranks share rows": (2, 2, {"cp_size": 2}),
    "2 ranks share heads": (2, 2, {"tp_size": 2}),
    "4 ranks, two of which share heads": (4, 2, {"tp_size": 2, "data": "shard"}),
    "4 ranks share heads, and two a head of keys": (4, 2, {"tp_size": 4}),
    "2 ranks, ep 2": (2, 2, {}),
    "3 ranks, ep 3, uneven experts": (3, 3, {}),
    "4 ranks, ep 2, cut": (4, 2, {"data": "shard"}),
    "2 ranks, ep 1": (2, 1, {}),
    "2 stages": (2, 1, {"pp_size": 2}),
    "2 stages, there and back, of 2 ranks with experts, sharded": (
        4,
        2,
        {"pp_size": 2, "pp_schedule": "zbv", "data": "shard"},
    ),
    "2 stages on each of 2 ranks that share heads": (
        4,
        2,
        {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "tp_size": 2},
    ),
}
WRITING = {"greedy": SamplingOptions(temperature=0.0), "drawn": SamplingOptions(temperature=0.7, top_p=0.9)}


def _questions(count: int) -> list[Question]:
    draw = random.Random(count)

    def text(longest: int) -> list[int]:
        return [draw.randrange(32) for _ in range(draw.randint(1, longest))]

    return [Question(prompt=text(12), completions=[text(5) for _ in range(1 + i % 4)]) for i in range(count)]


def score_and_generate(
    layout: Layout, parallel: dict[str, Any], num_questions: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Return scores and texts, computed in small passes."""
    mesh = build_mesh(layout, FlightRecorder())
    config = tiny_model_config({"num_experts": 8, "first_dense_layers": 1}, seq_len=20, num_layers=5)
    engine = make_engine(config, dtype=dtype, mesh=mesh, parallel=ParallelConfig.model_validate(parallel))
    context = EvalContext(engine=engine, world=mesh.world, tp=mesh.tp, pp=mesh.pp, tokens_per_pass=40)
    questions = _questions(num_questions)
    prompts = [question.prompt for question in questions]
    texts = {
        name: generate_batched(context, prompts, max_new_tokens=9, stop_token=7, sampling=options)
        for name, options in WRITING.items()
    }
    return {"scores": score(context, questions), "texts": texts}


def on_a_rank(
    ep_size: int, parallel: dict[str, Any], num_questions: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Run `score_and_generate` on one of several ranks."""
    sizes = {key: parallel[key] for key in ("cp_size", "tp_size", "pp_size", "pp_schedule") if key in parallel}
    layout = Layout(world_size=dist.get_world_size(), rank=dist.get_rank(), ep_size=ep_size, **sizes)
    return score_and_generate(layout, parallel, num_questions, dtype)


def evaluate_rows(layout: Layout, parallel: dict[str, Any]) -> tuple[list[EvalSums], RoutingGap | None]:
    """Return sums over four rows, dropless and with the capacity of training, and the gap of the routing of two."""
    mesh, moe = build_mesh(layout, FlightRecorder()), {"num_experts": 4, "capacity": {"factor": 1.0, "min": 1}}
    config, section = tiny_model_config(moe, seq_len=16, document_mask=True), ParallelConfig.model_validate(parallel)
    engine = make_engine(config, dtype=torch.float64, mesh=mesh, parallel=section)
    rows = make_packed_batch(4, 16, seed=3)
    here = own_part(rows_of(rows, *even_slice(4, layout.data_size, layout.data_rank)), layout)
    sums = [engine.eval_loss(here, dropless=dropless) for dropless in (True, False)]
    assert config.moe is not None
    return sums, routing_gap(engine, [rows_of(rows, 0, 2)], config.moe, seed=1, world=mesh.world)


def evaluate_on_a_rank(parallel: dict[str, Any]) -> tuple[list[EvalSums], RoutingGap | None]:
    """Run `evaluate_rows` on one of several ranks."""
    sizes = {"ep_size": parallel.get("ep_size", 1), "cp_size": parallel.get("cp_size", 1)}
    sizes["tp_size"] = parallel.get("tp_size", 1)
    return evaluate_rows(Layout(world_size=dist.get_world_size(), rank=dist.get_rank(), **sizes), parallel)


@pytest.mark.parametrize(
    "parallel",
    [
        {"cp_size": 2, "ep_size": 4},
        {"cp_size": 4, "cp": "ring"},
        {"tp_size": 2, "ep_size": 4},
        {"tp_size": 2, "cp_size": 2, "cp": "ring"},
    ],
    ids=str,
)
def test_ranks_that_share_rows_evaluate_the_same(ranks: Ranks, parallel: dict[str, Any]) -> None:
    alone, gap = evaluate_rows(Layout(), {})
    for found, its_gap in ranks.run(4, evaluate_on_a_rank, parallel):
        for one, other in zip(found, alone, strict=True):
            assert one.target_tokens == other.target_tokens and abs(one.loss_sum - other.loss_sum) < 1e-9
            assert one.routing is not None and other.routing is not None
            assert torch.equal(one.routing.counts, other.routing.counts)
            assert torch.equal(one.routing.dropped, other.routing.dropped)
        assert found[1].routing.dropped.sum() > 0 and its_gap is not None and gap is not None
        assert its_gap.record() == pytest.approx(gap.record(), abs=1e-9)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("num_questions", [1, 13])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_many_ranks_score_and_generate_the_same_as_one_process(
    ranks: Ranks, layout: tuple[int, int, dict[str, Any]], num_questions: int
) -> None:
    """With 1 question all other ranks run empty forward passes; no world size divides 13."""
    world_size, ep_size, parallel = layout
    alone = score_and_generate(Layout(), {}, num_questions)
    together = ranks.run(world_size, on_a_rank, ep_size, parallel, num_questions)
    for mine in together:
        assert mine == together[0], "every rank returns the same bits"
    assert together[0]["texts"] == alone["texts"]
    for found, expected in zip(together[0]["scores"], alone["scores"], strict=True):
        assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert abs(one.log_prob - other.log_prob) < 1e-9


def test_stages_score_and_generate_the_same_bits_in_bfloat16(ranks: Ranks) -> None:
    """Two stages on two ranks read every question together, so nothing has another order."""
    alone = score_and_generate(Layout(), {}, 5, torch.bfloat16)
    for found in ranks.run(2, on_a_rank, 1, {"pp_size": 2, "pp_schedule": "interleaved_1f1b"}, 5, torch.bfloat16):
        assert found == alone


def test_sampled_texts_differ_from_greedy_ones_and_between_equal_prompts() -> None:
    """Control: the comparison above would also pass if temperature had no effect."""
    alone = score_and_generate(Layout(), {}, 13)
    assert alone["texts"]["drawn"] != alone["texts"]["greedy"]
    mesh = build_mesh(Layout(), FlightRecorder())
    context = EvalContext(engine=make_engine(tiny_model_config(seq_len=20)), world=mesh.world, tokens_per_pass=40)
    options = SamplingOptions(temperature=1.0)
    assert (
        len(set(map(tuple, generate_batched(context, [[1, 2]] * 5, max_new_tokens=9, stop_token=-1, sampling=options))))
        == 5
    )

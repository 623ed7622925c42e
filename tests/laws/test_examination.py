"""Law: how many ranks there are, and which experts are where, does not change what a model scores and writes."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.builders import make_engine, tiny_model_config
from tests.ranks import Ranks
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.layout import Layout
from trainer.distributed.mesh import build_mesh
from trainer.evaluation.context import EvalContext
from trainer.evaluation.scoring import Question, score
from trainer.evaluation.tasks.batch_generation import write
from trainer.models.sampling import SamplingOptions
from trainer.parallel.config import ParallelConfig

LAYOUTS = {
    "2 ranks, ep 2": (2, 2, {}),
    "3 ranks, ep 3, uneven experts": (3, 3, {}),
    "4 ranks, ep 2, cut": (4, 2, {"data": "shard"}),
    "2 ranks, ep 1": (2, 1, {}),
}
WRITING = {"greedy": SamplingOptions(temperature=0.0), "drawn": SamplingOptions(temperature=0.7, top_p=0.9)}


def _questions(count: int) -> list[Question]:
    draw = random.Random(count)

    def text(longest: int) -> list[int]:
        return [draw.randrange(32) for _ in range(draw.randint(1, longest))]

    return [Question(prompt=text(12), completions=[text(5) for _ in range(1 + i % 4)]) for i in range(count)]


def examine(layout: Layout, parallel: dict[str, Any], num_questions: int) -> dict[str, Any]:
    """Scores and texts, in passes of a few rows."""
    mesh = build_mesh(layout, FlightRecorder())
    config = tiny_model_config({"num_experts": 8}, seq_len=20)
    engine = make_engine(config, dtype=torch.float64, mesh=mesh, parallel=ParallelConfig.model_validate(parallel))
    subject = EvalContext(engine=engine, world=mesh.world, tokens_per_pass=40)
    questions = _questions(num_questions)
    prompts = [question.prompt for question in questions]
    texts = {
        name: write(subject, prompts, max_new_tokens=9, stop_token=7, options=options)
        for name, options in WRITING.items()
    }
    return {"scores": score(subject, questions), "texts": texts}


def on_a_rank(ep_size: int, parallel: dict[str, Any], num_questions: int) -> dict[str, Any]:
    """`examine` as one of many."""
    layout = Layout(world_size=dist.get_world_size(), rank=dist.get_rank(), ep_size=ep_size)
    return examine(layout, parallel, num_questions)


@pytest.mark.parametrize("num_questions", [1, 13])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_many_ranks_score_and_write_what_one_process_does(
    ranks: Ranks, layout: tuple[int, int, dict[str, Any]], num_questions: int
) -> None:
    """1 question: all but one rank have none, and take part in its forward passes. 13: nothing divides them."""
    world_size, ep_size, parallel = layout
    alone = examine(Layout(), {}, num_questions)
    together = ranks.run(world_size, on_a_rank, ep_size, parallel, num_questions)
    for mine in together:
        assert mine == together[0], "every rank says the same, bit for bit"
    assert together[0]["texts"] == alone["texts"]
    for found, expected in zip(together[0]["scores"], alone["scores"], strict=True):
        assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert abs(one.log_prob - other.log_prob) < 1e-9


def test_what_is_drawn_is_not_greedy_and_not_the_same_for_equal_prompts() -> None:
    """A control: the comparison above would hold for texts that temperature does not reach."""
    alone = examine(Layout(), {}, 13)
    assert alone["texts"]["drawn"] != alone["texts"]["greedy"]
    mesh = build_mesh(Layout(), FlightRecorder())
    subject = EvalContext(engine=make_engine(tiny_model_config(seq_len=20)), world=mesh.world, tokens_per_pass=40)
    options = SamplingOptions(temperature=1.0)
    assert len(set(map(tuple, write(subject, [[1, 2]] * 5, max_new_tokens=9, stop_token=-1, options=options)))) == 5

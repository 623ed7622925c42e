"""k is drawn for every training step from the list, by seed and step."""

from collections import Counter

from tests.builders import make_batch, make_engine, tiny_model_config
from trainer.engine.native import NativeEngine

TOKENS = 4 * 8
MOE = {"num_experts": 8, "router": {"kind": "top_k", "top_k": 2, "top_k_choices": [1, 2, 2, 4]}}


def _k_of_a_step(engine: NativeEngine, step: int) -> float:
    routing = engine.train_step([make_batch(4, 8, seed=step)], lr=1e-3).routing
    assert routing is not None
    counts = routing.counts.sum(1)
    assert (counts == counts[0]).all(), "the same in every layer"
    return int(counts[0]) / TOKENS


def test_steps_draw_as_often_as_the_list_says() -> None:
    engine = make_engine(tiny_model_config(MOE))
    drawn = Counter(_k_of_a_step(engine, step) for step in range(120))
    assert drawn.keys() == {1, 2, 4}
    assert 15 <= drawn[1] <= 45 and 40 <= drawn[2] <= 80 and 15 <= drawn[4] <= 45


def test_another_seed_draws_otherwise_and_the_same_seed_the_same() -> None:
    one, same, other = (make_engine(tiny_model_config(MOE), seed=seed) for seed in (0, 0, 1))
    drawn = [[_k_of_a_step(engine, step) for step in range(20)] for engine in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_run_that_goes_on_draws_what_it_would_have_drawn() -> None:
    whole, first, second = (make_engine(tiny_model_config(MOE)) for _ in range(3))
    expected = [_k_of_a_step(whole, step) for step in range(16)]
    drawn = [_k_of_a_step(first, step) for step in range(8)]
    second.load_state(first.state())
    assert drawn + [_k_of_a_step(second, step) for step in range(8, 16)] == expected


def test_evaluation_has_the_configured_number_or_the_one_it_asks_for() -> None:
    engine = make_engine(tiny_model_config(MOE))
    for asked, expected in ((None, 2), (1, 1), (8, 8)):
        routing = engine.eval_loss(make_batch(4, 8), dropless=True, top_k=asked).routing
        assert routing is not None
        assert int(routing.counts[0].sum()) == expected * TOKENS

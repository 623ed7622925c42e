"""Router choices on the same logits, against numbers computed by hand."""

import pytest
import torch
from torch import Tensor, nn

from tests.added_router import ThresholdRouterConfig
from trainer.errors import ConfigError
from trainer.lab.bench_routers import ChoicesOptions, bench_choices
from trainer.lab.logits import LayerLogits, Logits, synthetic_logits, training_context
from trainer.lab.router_choices import (
    Choice,
    RoutingOptimum,
    chosen_experts,
    compare_choices,
    kinds_without_logits,
    prepare_router,
    set_identity_gate,
)
from trainer.lab.router_configs import MIXTURE_OF_DEPTHS, ROUTERS, router_config
from trainer.moe.routing import Router

KINDS = [kind for kind in ROUTERS if kind != MIXTURE_OF_DEPTHS]


def logits_of(probs: list[list[float]]) -> Logits:
    """One sequence with these softmax scores."""
    logits = torch.tensor(probs).log()
    ids = torch.arange(len(probs))[None]
    context = training_context(ids, torch.ones_like(ids, dtype=torch.bool), seed=0)
    layer = LayerLogits(name="by hand", measured=logits, warmup=[logits])
    return Logits(kind="traced", layers=[layer], context=context, warmup_context=context)


def measured(given: Logits, *kinds: str, top_k: int) -> dict[str, Choice]:
    """Choices by router."""
    return {choice.router: choice for choice in compare_choices(kinds, [given], top_k=top_k, rounds=1)}


def test_scores_drops_and_imbalance_by_hand() -> None:
    everyone_loves_expert_0 = logits_of([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
    found = measured(everyone_loves_expert_0, "top_k", "linear_program", "base", "dense", "round_robin", top_k=1)
    top_k = found["top_k"]
    # A capacity of two tokens per expert: the first two stay, and the optimum sends the last two elsewhere.
    assert top_k.at[1.0].gap == pytest.approx(1 - (0.9 + 0.8) / (0.9 + 0.8 + 0.4 + 0.3), abs=1e-3)
    assert top_k.at[1.0].drop_rate == 0.5
    # Capacity ceil(1.25 * 4 / 2) = 3.
    assert top_k.at[1.25].gap == pytest.approx(1 - (0.9 + 0.8 + 0.6) / (0.9 + 0.8 + 0.7 + 0.4), abs=1e-3)
    assert top_k.at[1.25].drop_rate == 0.25
    assert (top_k.load_imbalance, top_k.experts_per_token, top_k.top_k) == (2.0, 1.0, 1)
    for best in (found["linear_program"], found["base"]):
        assert best.at[1.0].gap == pytest.approx(0, abs=1e-12) and best.at[1.0].drop_rate == 0
        assert best.load_imbalance == 1
    assert found["linear_program"].at[1.25].gap == pytest.approx(0, abs=1e-12), "it uses the larger capacity"
    assert found["base"].at[1.25].gap > 0.05, "it has no capacity option"
    # Turns by position: experts 0, 1, 0, 1.
    assert found["round_robin"].at[1.0].score == pytest.approx(0.9 + 0.2 + 0.6 + 0.3, abs=1e-3)
    dense = found["dense"]
    assert (dense.top_k, dense.experts_per_token, dense.load_imbalance) == (2, 2.0, 1.0)
    assert dense.at[1.0].gap == pytest.approx(0, abs=1e-12), "its own programme gives every token every expert"


def test_greedy_takes_the_best_pair_first_and_pays_for_it_later() -> None:
    given = logits_of([[0.6, 0.39, 0.01], [0.55, 0.05, 0.4], [0.1, 0.1, 0.8]])
    found = measured(given, "greedy", "linear_program", top_k=1)
    assert found["greedy"].at[1.0].score == pytest.approx(0.8 + 0.6 + 0.05, abs=1e-3)
    assert found["greedy"].at[1.0].optimum == pytest.approx(0.8 + 0.55 + 0.39, abs=1e-3)
    assert found["linear_program"].at[1.0].gap == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_nothing_beats_the_linear_programme_and_skew_costs(top_k: int) -> None:
    random, skewed = (
        synthetic_logits(kind, sequences=2, tokens=32, num_experts=6, seed=0) for kind in ("random", "skewed")
    )
    by_kind = {given.kind: measured(given, *KINDS, top_k=top_k) for given in (random, skewed)}
    for found in by_kind.values():
        assert list(found) == KINDS
        for choice in found.values():
            for at in choice.at.values():
                assert at.gap >= -1e-12, choice.router
        for at in found["linear_program"].at.values():
            assert at.gap == pytest.approx(0, abs=1e-12) and at.drop_rate == at.optimum_drop_rate
    worse = by_kind["skewed"]
    assert 1e-4 < worse["greedy"].at[1.0].gap < worse["top_k"].at[1.0].gap
    assert worse["top_k"].at[1.0].drop_rate > 0.25 > by_kind["random"]["top_k"].at[1.0].drop_rate
    assert worse["top_k"].load_imbalance > 1.8 > by_kind["random"]["top_k"].load_imbalance
    assert worse["bias_balanced"].load_imbalance < 0.8 * worse["top_k"].load_imbalance, "its bias was learned first"
    assert worse["switch"].top_k == worse["sinkhorn"].top_k == top_k and worse["base"].top_k == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_router_gets_the_same_logits(kind: str) -> None:
    given = synthetic_logits("skewed", sequences=2, tokens=8, num_experts=5, seed=1)
    options = {"jitter": 0.0} if kind == "switch" else {}
    config = router_config(kind, num_experts=5, top_k=2).model_copy(update=options)
    x = given.layers[0].measured
    output = prepare_router(config, given.layers[0], given.warmup_context)(x, given.context)
    if kind in ("hash", "random", "round_robin"):
        assert output.logits is None
    elif kind == "cosine":
        torch.testing.assert_close(output.logits, 10 * nn.functional.normalize(x, dim=-1))
    else:
        assert torch.equal(output.logits, x)


def test_a_programme_is_solved_with_the_scores_of_valid_tokens_only() -> None:
    valid = torch.tensor([[True, True, False]])
    logits = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.99, 0.01]]).log()
    optimum = RoutingOptimum(logits, training_context(torch.zeros(1, 3, dtype=torch.int64), valid, seed=0))
    chosen = torch.tensor([[True, False], [False, True], [True, False]])
    found = optimum.measure(chosen, top_k=1, factor=1.0)
    assert (found.wanted, found.kept) == (2, 2)
    assert found.score == found.optimum == pytest.approx(0.9 + 0.4, abs=1e-3)


def test_the_choice_of_a_router_is_what_its_rule_says() -> None:
    given = synthetic_logits("skewed", sequences=1, tokens=12, num_experts=3, seed=2)
    layer = given.layers[0]

    def chosen(kind: str) -> Tensor:
        config = router_config(kind, num_experts=3, top_k=1)
        return chosen_experts(prepare_router(config, layer, given.warmup_context), layer.measured, given.context)

    assert torch.equal(chosen("top_k").long().argmax(1), layer.measured.argmax(1))
    assert (chosen("base").sum(0) == 4).all() and (chosen("expert_choice").sum(0) == 4).all()


def test_a_router_with_unknown_weights_is_rejected() -> None:
    class Novel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(1))

    with pytest.raises(ConfigError, match=r"Novel\.temperature: trainer/lab/router_choices\.py has no"):
        set_identity_gate(Novel())


def test_a_router_with_one_gate_of_any_name_is_given_logits() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(3, 3, bias=False)

    own = Own()
    set_identity_gate(own)
    assert torch.equal(own.score.weight, torch.eye(3))
    assert kinds_without_logits(KINDS, num_experts=5, top_k=2) == {}


class NovelConfig(ThresholdRouterConfig):
    """A user's router that has more weights than a gate."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        router = super().build(d_model=d_model, num_experts=num_experts, layer=layer)
        router.temperature = nn.Parameter(torch.ones(1))
        return router


def test_an_added_router_is_compared_or_left_out_with_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ROUTERS, "threshold", ThresholdRouterConfig)
    monkeypatch.setitem(ROUTERS, "novel", NovelConfig)
    options = ChoicesOptions(sequences=1, tokens=8, num_experts=3, top_k=2, seed=0, rounds=1)

    def bench(*kinds: str) -> int:
        return bench_choices(kinds, options, run=None, json_path=None, svg_path=None)

    assert bench("top_k", "threshold", "novel") == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line.startswith(" threshold")] == ["threshold"] * 2
    assert (
        "* novel is left out: ThresholdRouter.temperature: trainer/lab/router_choices.py has no value for it" in printed
    )
    with pytest.raises(ConfigError, match=r"ThresholdRouter\.temperature"):
        bench("novel")


def test_synthetic_logits_repeat_and_their_warm_up_batches_differ() -> None:
    one, again, other = (
        synthetic_logits("skewed", sequences=2, tokens=64, num_experts=4, seed=seed) for seed in (5, 5, 6)
    )
    assert torch.equal(one.layers[0].measured, again.layers[0].measured)
    assert not torch.equal(one.layers[0].measured, other.layers[0].measured)
    offsets = one.layers[0].measured.mean(0)
    assert float(offsets.max() - offsets.min()) == pytest.approx(4, abs=0.8), "from +2 to -2"
    assert all(torch.allclose(drawn.mean(0), offsets, atol=0.8) for drawn in one.layers[0].warmup)
    assert not torch.equal(one.layers[0].warmup[0], one.layers[0].measured)

"""Planned trainings and their outcomes, read from run folders."""

import json
from pathlib import Path

import pytest

from trainer.config.dump import dump
from trainer.errors import ConfigError
from trainer.lab.router_configs import MIXTURE_OF_DEPTHS, ROUTERS
from trainer.lab.router_trainings import Training, plan_trainings
from trainer.lab.training_outcomes import TrainingOutcome, mean_over_seeds, read_outcome
from trainer.moe.config import MoEConfig

CONFIG = """\
name: tiny
seed: 7
model:
  d_model: 32
  seq_len: 16
  moe: {num_experts: 4, d_ff: 24, router: {kind: switch, top_k: 2, jitter: 0.2}, balance: {coef: 0.03}}
train: {steps: 1000, global_batch_size: 4}
"""

SELF_BALANCING = {
    "bias_balanced",
    "group_limited",
    "expert_choice",
    "sinkhorn",
    "base",
    "linear_program",
    "greedy",
    MIXTURE_OF_DEPTHS,
}


def planned(
    folder: Path, *overrides: str, kinds: list[str] | None = None, budget: int | None = 640, seeds: int = 1
) -> list[Training]:
    path = folder / "tiny.yaml"
    path.write_text(CONFIG)
    kinds = list(ROUTERS) if kinds is None else kinds
    return plan_trainings(path, overrides, kinds, budget=budget, seeds=seeds, out=folder / "out")


def moe_of(training: Training) -> MoEConfig:
    assert training.config.model.moe is not None
    return training.config.model.moe


def test_only_the_router_is_replaced_and_the_budget_becomes_steps(tmp_path: Path) -> None:
    trainings = planned(tmp_path)
    assert [training.router for training in trainings] == list(ROUTERS)
    for training in trainings:
        moe = moe_of(training)
        assert moe.router.kind == training.router
        assert training.config.train.steps == 10, "640 tokens, 64 of them in a step"
        assert training.config.metrics.log_every == 1
        assert training.folder.path == tmp_path / "out" / f"{training.router}-seed7"
        is_self_balancing = training.router in SELF_BALANCING
        assert moe.balance.coef == (0 if is_self_balancing else 0.03) and moe.capacity.factor is None
        assert getattr(moe.router, "top_k", 2) == 2
        if training.router != MIXTURE_OF_DEPTHS:
            assert (moe.num_experts, moe.d_ff) == (4, 24)
    assert moe_of(trainings[list(ROUTERS).index("switch")]).router.model_dump()["jitter"] == 0.2, "the config's own"


def test_a_router_that_needs_a_balance_loss_gets_one_and_k_is_drawn_alike(tmp_path: Path) -> None:
    own = "model.moe.router={kind: bias_balanced, top_k_choices: [1, 2, 2, 4]}"
    trainings = planned(tmp_path, own, "model.moe.balance.coef=0", kinds=["top_k", "group_limited", "hash", "greedy"])
    by_router = {training.router: moe_of(training) for training in trainings}
    assert {kind: moe.balance.coef for kind, moe in by_router.items()} == {
        "top_k": 0.01,
        "group_limited": 0,
        "hash": 0.01,
        "greedy": 0,
    }
    for kind in ("top_k", "group_limited"):
        assert by_router[kind].router.model_dump()["top_k_choices"] == [1, 2, 2, 4]
    assert by_router["group_limited"].router.model_dump()["groups_kept"] == 2, "four experts must fit"
    (without,) = planned(tmp_path, "model.moe.balance.coef=0", kinds=["cosine"])
    assert moe_of(without).balance.coef == 0, "top_k without a balance loss is what the config is about"


def test_null_experts_of_the_config_are_no_experts_of_the_others(tmp_path: Path) -> None:
    own = "model.moe.router={kind: top_k, top_k: 6, null_experts: 4}"
    own_kind, other = planned(tmp_path, own, kinds=["top_k", "hash"])
    assert (moe_of(own_kind).router.model_dump()["top_k"], moe_of(other).router.model_dump()["top_k"]) == (6, 4)


def test_mixture_of_depths_has_all_weights_in_one_network(tmp_path: Path) -> None:
    moe = moe_of(planned(tmp_path, kinds=[MIXTURE_OF_DEPTHS])[0])
    assert (moe.num_experts, moe.d_ff, moe.experts_per_token * moe.d_ff) == (1, 4 * 24, 2 * 24)


def test_a_capacity_becomes_the_capacity_option_of_routers_that_limit_experts_themselves(tmp_path: Path) -> None:
    overrides = ["model.moe.capacity.factor=1.5", "model.moe.capacity.renormalize_after_drop=true"]
    by_router = {training.router: moe_of(training) for training in planned(tmp_path, *overrides)}
    assert by_router["top_k"].capacity.factor == by_router["hash"].capacity.factor == 1.5
    for kind in ("greedy", "linear_program"):
        assert by_router[kind].capacity.factor is None and by_router[kind].router.model_dump()["capacity_factor"] == 1.5
    assert by_router["expert_choice"].router.model_dump()["capacity_factor"] == 1.0, (
        "more would be more experts for a token"
    )
    assert by_router["top_p"].capacity.factor is None


def test_seeds_follow_the_config_s_own_and_a_budget_can_be_left_out(tmp_path: Path) -> None:
    trainings = planned(tmp_path, kinds=["top_k", "hash"], seeds=2, budget=None)
    names = [training.config.name for training in trainings]
    assert names == ["top_k-seed7", "hash-seed7", "top_k-seed8", "hash-seed8"]
    assert {training.config.train.steps for training in trainings} == {1000}
    assert {training.config.metrics.log_every for training in trainings} == {10}


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["model.moe=null"], {}, "model.moe: null leaves a router nothing to choose between"),
        (["model.moe.num_experts=1", "model.moe.router={kind: dense}"], {}, "num_experts: 1 leaves a router nothing"),
        ([], {"budget": 31}, "--budget: 31 is less than half a step; a step has 64 tokens"),
        (["train.stepz=1"], {}, r"^<override 1>: train\.stepz: unknown key"),
        (
            ["model.moe.diversity_coef=0.1"],
            {"kinds": ["top_k", "base"]},
            r"^base: .*diversity_coef: needs .*; or compare the others: --only top_k$",
        ),
        (
            ["model.moe.diversity_coef=0.1"],
            {"kinds": ["base", "hash", "mixture_of_depths", "random"]},
            r"(?s)^base: .*\nmixture_of_depths: .*; or compare the others: --only hash,random$",
        ),
        (
            ["model.moe.router={kind: top_k, top_k: 5, null_experts: 4}", "model.moe.diversity_coef=0.1"],
            {"kinds": ["base"]},
            r"^base: .*use 0$",
        ),
    ],
)
def test_conflicts_are_reported_before_any_training(
    tmp_path: Path, overrides: list[str], options: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, *overrides, **options)


def test_a_run_of_another_config_is_rejected(tmp_path: Path) -> None:
    (first,) = planned(tmp_path, kinds=["hash"])
    first.folder.path.mkdir(parents=True)
    first.folder.config.write_text(dump(first.config))
    assert planned(tmp_path, "checkpoint.keep=5", "parallel.micro_batch_size=2", kinds=["hash"])
    with pytest.raises(
        ConfigError, match=r"hash-seed7: was trained with train\.steps 10, and the config has 20; use an"
    ):
        planned(tmp_path, kinds=["hash"], budget=1280)
    with pytest.raises(ConfigError, match=r"was trained with optim\.weight_decay 0\.1, and the config has 0\.2"):
        planned(tmp_path, "optim.weight_decay=0.2", kinds=["hash"])


def test_an_outcome_is_read_from_the_last_tenth_of_a_finished_run(tmp_path: Path) -> None:
    (training,) = planned(tmp_path, kinds=["base"], budget=64 * 20)
    assert read_outcome(training) is None, "nothing is there"
    steps = [
        {"step": n, "step_s": 0.1 * n, "load_imbalance": float(n), "drop_rate": None, "experts_per_token": 1.0}
        for n in range(1, 21)
    ]
    lines = [*steps[:10], {"step": 10, "eval/loss": 3.0}, *steps[10:]]
    training.folder.path.mkdir(parents=True)
    training.folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_outcome(training) is None, "its last step is not evaluated"
    with training.folder.metrics.open("a") as file:
        file.write(json.dumps({"step": 20, "eval/loss": 2.5}) + "\n")
    found = read_outcome(training)
    assert found is not None
    assert (found.held_out_loss, found.load_imbalance, found.drop_rate) == (2.5, 19.5, None)
    assert found.step_s == pytest.approx(1.05)
    assert (found.experts_per_token, found.width_per_token, found.looks_ahead) == (1.0, 24.0, "in training")


def test_seeds_are_averaged_and_times_are_not() -> None:
    one, two, three = (
        TrainingOutcome(
            router="top_k",
            held_out_losses=[loss],
            load_imbalance=load,
            drop_rate=None,
            experts_per_token=2.0,
            expert_width=8,
            step_s=step_s,
            looks_ahead="no",
        )
        for loss, load, step_s in ((1.0, 1.5, 0.1), (2.0, 2.5, 0.2), (6.0, None, 9.9))
    )
    both = mean_over_seeds([one, two, three])
    assert (both.held_out_loss, both.load_imbalance, both.drop_rate, both.step_s) == (3.0, 2.0, None, 0.2)
    assert both.held_out_losses == [1.0, 2.0, 6.0] and both.width_per_token == 16


def test_a_loss_that_is_not_finite_is_no_outcome(tmp_path: Path) -> None:
    (training,) = planned(tmp_path, kinds=["top_k"], budget=64)
    training.folder.path.mkdir(parents=True)
    training.folder.metrics.write_text('{"step": 1, "step_s": 0.1}\n{"step": 1, "eval/loss": null}\n')
    assert read_outcome(training) is None

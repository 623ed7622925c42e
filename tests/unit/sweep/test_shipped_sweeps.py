"""Every shipped sweep loads, with every trial, and answers what it asks."""

from pathlib import Path

import pytest

from trainer.models.flops import model_size
from trainer.models.gpt import GPT
from trainer.sweep.plan_trials import Sweep, plan_sweep

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs/sweeps").glob("*.yaml"))


def planned(name: str, folder: Path) -> Sweep:
    return plan_sweep(ROOT / f"configs/sweeps/{name}.yaml", [f"runs_dir={folder}"])


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED])
def test_every_trial_of_every_shipped_sweep_is_sound(name: str, tmp_path: Path) -> None:
    found = planned(name, tmp_path)
    seeds, folds = found.config.seeds or [0], found.config.folds or 1
    assert found.config.name == name
    assert len(found.trials) == len(found.candidates) * len(seeds) * folds > 1


def test_granularity_changes_neither_flops_nor_weights_but_those_of_the_router(tmp_path: Path) -> None:
    found = planned("granularity", tmp_path)
    sizes = {}
    for trial in found.trials[: len(found.candidates)]:
        model = trial.config.model
        assert model.moe is not None
        size, gates = model_size(GPT(model, 259)), model.num_layers * model.moe.num_experts * model.d_model
        counts = size.total_parameters, size.active_parameters, size.forward_flops_per_token // 2
        sizes[trial.candidate.name] = tuple(count - gates for count in counts)
    assert len(sizes) == 4 and len(set(sizes.values())) == 1


def test_the_dense_model_of_choose_k_has_the_flops_of_two_experts_but_for_the_router(tmp_path: Path) -> None:
    found = planned("choose_k", tmp_path)
    folds = [trial.config.data.fold for trial in found.trials]
    assert [fold.index for fold in folds if fold is not None] == [0] * 5 + [1] * 5 + [2] * 5
    flops = {}
    for trial in found.trials[:5]:
        model = trial.config.model
        gates = 0 if model.moe is None else 2 * model.num_layers * model.moe.num_experts * model.d_model
        flops[trial.candidate.name] = model_size(GPT(model, 259)).forward_flops_per_token - gates
    assert flops["dense"] == flops["top_k-2"]
    assert flops["top_k-1"] < flops["top_k-2"] < flops["top_k-4"] < flops["top_k-8"]

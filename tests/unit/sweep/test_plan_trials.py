"""Trials are planned whole: every config is checked first, and problems are where they were written."""

from pathlib import Path

import pytest

from tests.tiny_training import CONFIG
from trainer.errors import ConfigError
from trainer.sweep.plan_trials import Sweep, plan_sweep

SWEEP = """\
name: ks
config: tiny.yaml
common:
  model.moe.router: {kind: top_k, normalize: false}
over:
  model.moe.router.top_k: [1, 4]
points:
  - {name: dense, model.moe: null}
seeds: [5, 6]
"""


def planned(folder: Path, text: str = SWEEP, *overrides: str) -> Sweep:
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "s.yaml").write_text(text)
    return plan_sweep(folder / "s.yaml", [f"runs_dir={folder}/runs", *overrides])


def refused(folder: Path, old: str, new: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        planned(folder, SWEEP.replace(old, new), *overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_each_candidate_has_each_seed_in_the_folder_of_the_sweep(tmp_path: Path) -> None:
    found = planned(tmp_path, SWEEP, "train.steps=7", "slots=3", "metrics.wandb.project=p")
    assert found.config.slots == 3 and found.folder == tmp_path / "runs/ks"
    names = ["top_k-1", "top_k-4", "dense"]
    assert [trial.name for trial in found.trials] == [f"{name}-seed{seed}" for seed in (5, 6) for name in names]
    for trial in found.trials:
        assert trial.folder.path == tmp_path / "runs/ks" / trial.name
        assert (trial.config.seed, trial.config.train.steps) == (trial.seed, 7)
        assert trial.config.metrics.wandb.group == "ks"
        moe = trial.config.model.moe
        assert ("dense" if moe is None else f"top_k-{moe.experts_per_token:g}") == trial.candidate.name
    assert planned(tmp_path, SWEEP, "metrics.wandb.group=mine").trials[0].config.metrics.wandb.group == "mine"
    alone = planned(tmp_path, SWEEP.replace("seeds: [5, 6]\n", ""), "seed=8")
    assert {trial.seed for trial in alone.trials} == {8}, "that of the experiment"


def test_problems_are_reported_where_they_were_written(tmp_path: Path) -> None:
    assert refused(tmp_path, "seeds:", "seed:") == ["s.yaml:9:1: seed: unknown key; did you mean seeds?"]
    [line] = refused(tmp_path, "tiny.yaml", "tinny.yaml")
    assert line == "s.yaml:2:9: config: tinny.yaml: no such file; did you mean tiny.yaml?"
    first, second = refused(tmp_path, "top_k: [1, 4]", "top_kk: [1, 4]")
    assert first == "s.yaml:6:29: model.moe.router.top_kk: unknown key; did you mean top_k? (trial top_kk-1)"
    assert second.startswith("s.yaml:6:32: ")
    [line] = refused(tmp_path, "[1, 4]", "[1, 5]")
    assert line.startswith("s.yaml:6:31: model.moe.router.top_k: 5 is more than num_experts 4;")
    assert line.endswith("(trial top_k-5)")
    [line] = refused(tmp_path, "model.moe: null", "model.moe: none")
    assert line.startswith("s.yaml:8:30: model.moe: expected") and line.endswith("(trial dense)")
    [line] = refused(tmp_path, "", "", "train.stepss=3")
    assert line == "<override 2>: train.stepss: unknown key; did you mean steps?"
    [line] = refused(tmp_path, "{kind: top_k,", "{kind: top_k, sise: 3,")
    assert line.startswith("s.yaml:4:21: model.moe.router.sise: unknown key")


def test_ranks_that_do_not_fit_are_refused_before_a_trial_starts(tmp_path: Path) -> None:
    lines = refused(tmp_path, "", "", "parallel.ep_size=2", "points=[]")
    assert len(lines) == 1 and "does not divide the 1 ranks" in lines[0] and lines[0].endswith("(trial top_k-1)")
    assert planned(tmp_path, SWEEP, "parallel.ep_size=2", "points=[]", "ranks=2").config.ranks == 2


def test_a_trial_that_was_trained_with_another_config_is_refused(tmp_path: Path) -> None:
    from trainer.config.dump import dump

    for trial in planned(tmp_path).trials:
        trial.folder.path.mkdir(parents=True)
        trial.folder.config.write_text(dump(trial.config))
    planned(tmp_path, SWEEP, "metrics.log_every=3", "parallel.micro_batch_size=2", "slots=2")
    [line] = refused(tmp_path, "", "", "train.grad_clip=2.0")
    assert "runs/ks/top_k-1-seed5: was trained with train.grad_clip 1.0, and the config has 2.0" in line


def test_seeds_can_be_among_the_keys_that_are_tried(tmp_path: Path) -> None:
    text = SWEEP.replace("seeds: [5, 6]\n", "").replace("model.moe.router.top_k: [1, 4]", "seed: [3, 4]")
    found = planned(tmp_path, text, "seed=8").trials
    assert [trial.seed for trial in found] == [trial.config.seed for trial in found] == [3, 4, 8]
    assert [trial.name for trial in found] == ["seed-3-seed3", "seed-4-seed4", "dense-seed8"]


def test_trials_that_would_end_early_and_a_metric_that_is_better_the_other_way_are_refused(tmp_path: Path) -> None:
    for key in ("train.stop_after=3", "train.early_stopping={patience: 2}"):
        assert "trials would end at different steps" in refused(tmp_path, "", "", key)[0]
    [line] = refused(tmp_path, "seeds:", "metric: eval/sums/acc\nseeds:")
    assert line.endswith("maximize: a larger eval/sums/acc is better; use maximize: true")
    assert planned(tmp_path, SWEEP, "metric=eval/sums/acc", "maximize=true").config.maximize


def test_an_override_of_the_sweep_is_named_by_its_number_among_all(tmp_path: Path) -> None:
    [line] = refused(tmp_path, "", "", "train.steps=7", "slots=0")
    assert line.startswith("<override 3>: slots: ")
    [line] = refused(tmp_path, "", "", "train.steps=7", "over.model.moe.router.top_k=[5]")
    assert line.startswith("<override 3>: model.moe.router.top_k: 5 is more than num_experts 4")

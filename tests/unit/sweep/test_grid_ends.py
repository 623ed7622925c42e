"""A best value at an end of its grid is warned of, unless the experiment allows none beyond."""

from dataclasses import replace
from pathlib import Path

from tests.sweep_outcomes import outcome
from tests.tiny_training import CONFIG
from trainer.config.dump import dump
from trainer.sweep.grid_ends import end_warnings
from trainer.sweep.plan_trials import plan_sweep

SWEEP = "name: s\nconfig: tiny.yaml\nseeds: [1, 2]\ncommon: {model.moe.router.normalize: false}\n"
FAILED = 99.0
"""Loss of a candidate whose trials fail."""


def warnings(folder: Path, key: str, values: str, *losses: float, flops: list[float] | None = None) -> list[str]:
    """Return the warnings of a grid over a key, whose values end with these losses, each with two seeds."""
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "s.yaml").write_text(f"{SWEEP}over: {{{key}: {values}}}\n")
    sweep = plan_sweep(folder / "s.yaml", [f"runs_dir={folder}"])
    for trial in sweep.trials:
        trial.folder.path.mkdir(parents=True, exist_ok=True)
        trial.folder.config.write_text(dump(trial.config))
    costs = flops or [1.0] * len(losses)
    pairs = zip(sweep.candidates, losses, costs, strict=True)
    outcomes = [
        replace(outcome(one.name, loss - 0.1, loss + 0.1, flops=cost), candidate=one) for one, loss, cost in pairs
    ]
    outcomes = [one if loss < FAILED else replace(one, results={}) for one, loss in zip(outcomes, losses, strict=True)]
    return end_warnings(sweep, outcomes)


def test_the_best_at_an_end_is_warned_of_with_the_next_value(tmp_path: Path) -> None:
    rates, key = "[0.002, 0.001, 0.004]", "schedule.peak_lr"
    assert warnings(tmp_path, key, rates, 2, 3, 1) == [
        "schedule.peak_lr: the best candidate, peak_lr-0.004, has the highest value of the grid, 0.004: a better one "
        "may lie beyond it; add values such as 0.008"
    ]
    [lowest] = warnings(tmp_path, key, rates, 2, 1, 3)
    assert "the lowest value of the grid, 0.001" in lowest and lowest.endswith("such as 0.0005")
    assert warnings(tmp_path, key, rates, 1, 2, 3) == [], "between the others"
    assert warnings(tmp_path, key, "[0.001, 0.002]", 1, FAILED) == [], "nothing to compare it with"
    [by_difference] = warnings(tmp_path, "optim.weight_decay", "[0, 0.1, 0.3]", 3, 2, 1)
    assert by_difference.endswith("such as 0.9")
    [far] = warnings(tmp_path, key, "[0.1, 0.0001]", 2, 1)
    assert far.endswith("such as 1.0e-05"), "by a factor of 10 at most"
    [whole] = warnings(tmp_path, "model.num_layers", "[1, 2]", 2, 1)
    assert whole.endswith("such as 4")


def test_the_recommended_one_is_warned_of_beside_the_best(tmp_path: Path) -> None:
    found = warnings(tmp_path, "schedule.peak_lr", "[0.001, 0.002, 0.004]", 1.05, 1, 2, flops=[1, 2, 3])
    assert len(found) == 1 and "the recommended candidate, peak_lr-0.001, has the lowest value" in found[0]


def test_ends_that_the_experiment_does_not_allow_to_pass_are_no_reason(tmp_path: Path) -> None:
    key = "model.moe.router.top_k"
    assert warnings(tmp_path, key, "[1, 2, 4]", 3, 2, 1) == [], "there are 4 experts"
    assert warnings(tmp_path, key, "[1, 2, 4]", 1, 2, 3) == [], "a token has at least one"
    assert len(warnings(tmp_path, key, "[1, 2, 3]", 3, 2, 1)) == 1, "4 is allowed"


def test_what_is_no_grid_of_numbers_has_no_ends(tmp_path: Path) -> None:
    assert warnings(tmp_path, "schedule.kind", "[warmup_cosine, warmup_stable_decay]", 2, 1) == []
    assert warnings(tmp_path, "train.grad_clip", "[null, 1.0]", 2, 1) == []
    assert warnings(tmp_path, "model.qk_norm", "[false, true]", 2, 1) == []

"""Tests for groups of runs that differ only by seed, and the numbers by which they are compared."""

import json
from pathlib import Path

import pytest
from scipy import stats

from tests.run_folders import make_run, write_status
from trainer.cli import main
from trainer.runs.compared_runs import SeedGroup, cautions, compare_figures, config_differences, seed_groups
from trainer.runs.run_figures import read_listed_run

LOSSES = {"a": [2.0, 2.1, 2.3], "b": [3.0, 3.4, 3.1]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a1 to a3 and b1 to b3: two configs, three seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    for name, losses in LOSSES.items():
        for seed, loss in enumerate(losses, 1):
            overrides = [f"seed={seed}", f"optim.weight_decay={0.1 if name == 'a' else 0.2}"]
            run = make_run(folder / f"{name}{seed}", *overrides, losses=[4.0, loss], eval_loss=loss)
            write_status(run, 0, 1, state="ended", exit_code=0)
    return folder


def groups_of(*paths: Path) -> list[SeedGroup]:
    return seed_groups([read_listed_run(path) for path in paths])


def test_seeds_are_grouped_and_their_means_compared_as_scipy_does(runs: Path) -> None:
    groups = groups_of(*sorted(runs.iterdir()))
    assert [[run.path.name for run in group.runs] for group in groups] == [["a1", "a2", "a3"], ["b1", "b2", "b3"]]
    assert config_differences(groups) == {"optim.weight_decay": ["0.1", "0.2"]}
    figure = compare_figures(groups)[0]
    expected = stats.ttest_ind(LOSSES["b"], LOSSES["a"], equal_var=False)
    assert figure.key == "eval_loss" and figure.num_seeds == [3, 3] and figure.differences[0] is not None
    assert figure.means == pytest.approx([sum(losses) / 3 for losses in LOSSES.values()], rel=1e-12)
    assert figure.standard_errors == pytest.approx([stats.sem(losses) for losses in LOSSES.values()], rel=1e-12)
    assert figure.differences[0].p == pytest.approx(expected.pvalue, rel=1e-9)
    assert cautions(groups) == []


def test_one_seed_twice_is_one_sample(runs: Path, tmp_path: Path) -> None:
    again = make_run(tmp_path / "again", "seed=1", "optim.weight_decay=0.1", losses=[4.0, 4.0], eval_loss=4.0)
    [figure, *_] = compare_figures(groups_of(runs / "a1", again, runs / "b1"))
    assert (figure.num_seeds, figure.means[0], figure.standard_errors[0]) == ([1, 1], 3.0, None)
    assert figure.differences[0] is not None and figure.differences[0].p is None


def test_cautions_name_other_budgets_unfinished_runs_and_single_seeds(runs: Path, tmp_path: Path) -> None:
    longer = make_run(tmp_path / "longer", "train.steps=9", losses=[4.0, 3.0, 2.0])
    said = cautions(groups_of(runs / "a1", runs / "a2", longer))
    assert [line.partition(":")[0] for line in said[1:]] == ["not finished", "one seed"]
    assert "different numbers of tokens" in said[0] and str(longer) in said[1] and "no significance" in said[2]


def test_the_command_prints_both_and_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["compare", *arguments])
        out, err = capsys.readouterr()
        assert exit_.value.code == code, err
        return err if code else out

    paths = [str(path) for path in sorted(runs.iterdir())]
    out = said(*paths)
    p = stats.ttest_ind(LOSSES["b"], LOSSES["a"], equal_var=False).pvalue
    assert "optim.weight_decay  0.1  0.2" in out and "2.1333 \u00b1 0.0882" in out and f"+1.0333 (p {p:.2g})" in out
    assert out.count("\u2524") >= 6  # two charts with axes
    record = json.loads(said(*paths, "--json"))
    assert record["config"] == {"optim.weight_decay": ["0.1", "0.2"]}
    assert [group["seeds"] for group in record["groups"]] == [[1, 2, 3], [1, 2, 3]]
    assert "has no metric nothing" in said(*paths, "--metric", "nothing")
    assert "is one run, and two or more are compared" in said(paths[0], f"{runs}/../{runs.name}/a1", code=2)
    assert "has no config.yaml, so it is not a run folder" in said(paths[0], str(runs), code=4)
    (runs / "b1/metrics.jsonl").write_text("damaged\n")
    assert "metrics.jsonl: line 1 damaged" in said(*paths)
    (runs / "b1/config.yaml").write_text("[")
    assert "b1/config.yaml:1" in said(*paths, code=2)

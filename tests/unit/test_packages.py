"""Optional packages: every extra that a message names exists, and a failed import names the command."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from trainer import packages
from trainer.errors import ConfigError
from trainer.evaluation.tasks.text_metrics import score_texts
from trainer.ops.assignment import balanced_assignment, solve_linear_program

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def names(lines: list[str]) -> set[str]:
    return {Requirement(line).name for line in lines}


def test_every_extra_that_a_message_names_has_the_package_and_the_base_has_it_not() -> None:
    base = names(PROJECT["dependencies"])
    for package, extra in packages._EXTRAS.items():
        distribution = package.replace("_", "-")
        assert distribution in names(PROJECT["optional-dependencies"][extra])
        assert distribution not in base


@pytest.mark.parametrize(("package", "extra"), packages._EXTRAS.items())
def test_the_message_has_the_extra(package: str, extra: str) -> None:
    assert packages.missing(package, user="x") == (
        f"x: needs {package}, which is not installed; pip install 'turnout[{extra}]'"
    )


@pytest.mark.parametrize(("package", "arguments"), packages._ARGUMENTS.items())
def test_a_package_of_no_extra_has_a_command_of_its_own(package: str, arguments: str) -> None:
    assert package not in packages._EXTRAS
    assert packages.missing(package, user="x") == f"x: needs {package}, which is not installed; pip install {arguments}"


def test_a_missing_module_of_a_package_names_the_module_and_the_package_s_command() -> None:
    expected = r"^x: needs no_such_module, which is not installed; pip install 'turnout\[lm-eval\]'$"
    with pytest.raises(ConfigError, match=expected), packages.importing("lm_eval", user="x"):
        importlib.import_module("no_such_module")


def test_metrics_and_solvers_name_their_extra_when_they_are_reached_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy.optimize", "sacrebleu.metrics", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    scores = torch.ones(2, 2)
    with pytest.raises(ConfigError, match=r"pip install 'turnout\[lab\]'$"):
        solve_linear_program(scores, top_k=1, capacity=1)
    with pytest.raises(ConfigError, match=r"pip install 'turnout\[lab\]'$"):
        balanced_assignment(scores)
    for metric in ("bleu", "chrf", "rouge"):
        with pytest.raises(ConfigError, match=r"^eval\.tasks: \w+: .*; pip install 'turnout\[text-metrics\]'$"):
            score_texts(metric, ["a"], [["a"]], bleu_tokenize="13a")

"""Contract checks of plug-ins: sound ones pass, and each broken one fails the check that is about its fault."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.contracts import dispatcher, experts_kernel, optimizer_and_schedule, source, task, tokenizer, tracker
from trainer.contracts.ensure import ContractError
from trainer.contracts.plugin import Outcome, check_plugin
from trainer.data.sources.registry import SourceOptions, TextSourceConfig
from trainer.data.tokenizers.registry import ByteTokenizerConfig
from trainer.errors import ConfigError
from trainer.evaluation.tasks.registry import ChoiceTaskConfig
from trainer.metrics.config import TrackerOptions
from trainer.moe.dispatch.registry import AllGatherDispatcherConfig, AllToAllDispatcherConfig, DispatcherOptions
from trainer.ops.expert_ffn import loop_ffn
from trainer.optim.registry import AdamWConfig, OptimizerOptions, WarmupCosineConfig, WarmupOptions

HERE = f"{__name__}"


class SGDConfig(OptimizerOptions):
    """An optimizer without moments."""

    def build(self, *, decayed: Iterable[Any], not_decayed: Iterable[Any]) -> Any:
        return torch.optim.SGD([*decayed, *not_decayed], lr=0.0)


class NegativeConfig(WarmupOptions):
    """A schedule that goes below zero."""

    def build(self, *, total_steps: int) -> Callable[[int], float]:
        return lambda step: self.peak_lr * (1 - 2 * step / total_steps)


class SilentSourceConfig(SourceOptions):
    """A source without documents."""

    def build(self) -> Any:
        built = TextSourceConfig(path="/nowhere/*.txt").build()
        built.files = list
        built.parts = list
        return built


class BareConfig(TrackerOptions):
    """A plug-in without options."""

    def build(self, folder: Path, *, start_step: int, config: dict[str, Any]) -> Any:
        return object()


class DeafTrackerConfig(TrackerOptions):
    """A tracker that accepts no record."""

    def build(self, folder: Path, *, start_step: int, config: dict[str, Any]) -> Any:
        return object()


class QuietTracker:
    def log(self, record: Any, experts: Any = None) -> None: ...

    def written(self) -> list[tuple[str, str]]:
        return [("here", "there")]

    def close(self, exit_code: int, *, patience_s: float) -> None: ...


class QuietTrackerConfig(TrackerOptions):
    """A tracker that keeps nothing."""

    def build(self, folder: Path, *, start_step: int, config: dict[str, Any]) -> Any:
        return QuietTracker()


def half(x: Tensor, rows: Tensor, w_in: Tensor, w_out: Tensor, activation: Any) -> Tensor:
    """A kernel that is wrong by a factor."""
    return loop_ffn(x, rows, w_in, w_out, activation) / 2


def outcomes(name: str, *options: str) -> tuple[str, list[Outcome]]:
    group, found = check_plugin(name, options)
    return group, list(found)


def failed(name: str, *options: str) -> set[str]:
    return {outcome.name for outcome in outcomes(name, *options)[1] if outcome.error is not None}


def test_a_sound_router_passes_every_check() -> None:
    group, found = outcomes("tests.added_router:ThresholdRouterConfig", "threshold=0.55")
    assert group == "routers" and len(found) > 10
    assert [outcome for outcome in found if outcome.error is not None] == []
    assert [outcome.name for outcome in found if outcome.is_skipped] == [
        "k_of_one_call_is_k_of_the_config",
        "given_experts_are_used",
    ]
    assert all(outcome.promise.endswith(".") for outcome in found)


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("SGDConfig", {"state_is_two_moments"}),
        ("NegativeConfig", {"rates_are_rates"}),
        ("DeafTrackerConfig", {"records_are_accepted"}),
        ("QuietTrackerConfig", set()),
        ("half", {"rows_equal_the_loop", "idle_experts_equal_the_loop"}),
    ],
)
def test_a_fault_is_found_by_its_check(name: str, checks: set[str]) -> None:
    assert failed(f"{HERE}:{name}") == checks


def test_a_source_without_documents_fails() -> None:
    assert "documents_are_the_same_every_time" in failed(f"{HERE}:SilentSourceConfig")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            f"{HERE}:Outcome",
            [],
            "Outcome is not the config class of a plug-in; derive it from one of trainer.moe.routers",
        ),
        (f"{HERE}:SGDConfig", ["weight_decai=1"], "weight_decai: unknown key; did you mean weight_decay?"),
        (f"{HERE}:half", ["x=1"], "is a function, and has no options; leave out x=1"),
        ("os:path", [], "os:path: is a module; name a config class, or the function of an experts kernel"),
        ("top_k", [], "top_k: is built in; name a plug-in, my_package.module:ClassConfig"),
        ("tests.added_router.py:X", [], "tests.added_router.py is a file; write the module, without .py"),
        (
            "trainer.optim.registry:OptimizerOptions",
            [],
            "OptimizerOptions is the base class of such plug-ins; derive one from it",
        ),
        (f"{HERE}:BareConfig", ["x=1"], "x: unknown key; this plug-in has no options"),
        ("nowhere_at_all:X", [], "nowhere_at_all:X: there is no module nowhere_at_all"),
    ],
)
def test_what_cannot_be_checked_is_explained(name: str, options: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        outcomes(name, *options)
    assert expected in str(error.value)


@pytest.mark.parametrize("check", dispatcher.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("config", [AllToAllDispatcherConfig(), AllGatherDispatcherConfig()], ids=lambda c: c.kind)
def test_the_dispatchers_of_this_project_keep_their_contract(config: DispatcherOptions, check: Any) -> None:
    check(config)


def test_a_dispatcher_that_rounds_breaks_it() -> None:
    with pytest.raises(ContractError, match=r"the output of token \d is off by 0\.0"):
        dispatcher.two_ranks_equal_one(AllToAllDispatcherConfig(wire="bfloat16"))


def test_others_of_this_project_keep_their_contracts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}\n")
    (tmp_path / "rows.jsonl").write_text('{"q": "is it?", "a": "yes"}\n{"q": "was it?", "a": "no"}\n')
    texts = TextSourceConfig(path=str(tmp_path / "*.txt"))
    questions = ChoiceTaskConfig.model_validate(
        {
            "name": "t",
            "rows": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")},
            "prompt": "{q} ",
            "choices": ["yes", "no"],
            "answer": "a",
        }
    )
    subjects: list[tuple[Any, Any]] = [
        (source.CHECKS, texts),
        (tokenizer.CHECKS, ByteTokenizerConfig()),
        (optimizer_and_schedule.OPTIMIZER_CHECKS, AdamWConfig()),
        (optimizer_and_schedule.SCHEDULE_CHECKS, WarmupCosineConfig()),
        (experts_kernel.CHECKS, loop_ffn),
        (task.CHECKS, questions),
        (tracker.CHECKS, QuietTrackerConfig()),
    ]
    for checks, subject in subjects:
        for check in checks:
            check(subject)

"""The canary of a run: all ranks take the same kernel, fall back or refuse as configured, and say what was wrong."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import Ranks, mesh_here
from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError
from trainer.moe.dispatch.registry import AllToAllDispatcherConfig
from trainer.ops.expert_ffn import loop_ffn
from trainer.ops.kernels import fallback_kernels
from trainer.ops.layer_widths import LayerWidths
from trainer.parallel.canary import CanaryReport, check_dispatcher, first_sound, run_canary
from trainer.parallel.config import ParallelConfig, RecomputeEveryConfig

CPU = torch.device("cpu")
WIDTHS = LayerWidths(d_model=16, d_ff=16, activation="swiglu", dtype=torch.float32)


def halved(x: Tensor, rows: Tensor, w_in: Tensor, w_out: Tensor, activation: Any) -> Tensor:
    """A kernel that is wrong by a factor."""
    return loop_ffn(x, rows, w_in, w_out, activation) / 2


HALVED = f"{__name__}:halved"


def canary(**values: Any) -> CanaryReport:
    return run_canary(ParallelConfig(**values), WIDTHS, 4, Mesh.of_one(), CPU)


@pytest.mark.parametrize("kernel_canary", ["auto", "fall_back", "refuse", "off"])
def test_a_sound_kernel_is_kept(kernel_canary: str) -> None:
    report = canary(experts_kernel="fused", kernel_canary=kernel_canary)
    assert report.experts_kernel == "fused" and not report.refused
    assert (report.seconds > 0) == (kernel_canary != "off")


def test_a_wrong_kernel_falls_back_to_the_next() -> None:
    report = canary(experts_kernel=HALVED, kernel_canary="fall_back")
    assert report.experts_kernel == "fused"
    assert list(report.refused) == [HALVED]
    assert "the output of token" in report.refused[HALVED] and "is off by 0.5 of its size" in report.refused[HALVED]


@pytest.mark.parametrize("kernel_canary", ["auto", "refuse"])
def test_a_wrong_kernel_that_was_named_is_refused_with_a_remedy(kernel_canary: str) -> None:
    with pytest.raises(ConfigError) as error:
        canary(experts_kernel=HALVED, kernel_canary=kernel_canary)
    text = str(error.value)
    assert text.startswith(f"parallel.experts_kernel: {HALVED} is wrong on this device: groups of 0, 1, 7, 63, 65")
    assert "parallel.kernel_canary=fall_back" in text and "parallel.kernel_canary=off" in text


def test_off_trains_with_what_is_wrong() -> None:
    assert canary(experts_kernel=HALVED, kernel_canary="off") == CanaryReport(experts_kernel=HALVED)


def test_the_order_of_kernels_ends_with_the_loop() -> None:
    assert fallback_kernels("grouped", "cuda") == ["loop"]
    assert fallback_kernels("fused_onednn", "cpu") == fallback_kernels("grouped", "cpu") == ["fused", "loop"]
    assert fallback_kernels("fused", "cpu") == ["loop"]
    assert fallback_kernels("loop", "cpu") == fallback_kernels("loop", "cuda") == []


def test_a_run_without_a_sound_kernel_is_refused_with_all_that_was_wrong() -> None:
    with pytest.raises(ConfigError) as error:
        first_sound(["grouped", "loop"], lambda name: f"{name} is odd", Group.of_one(), remedy="do that")
    first, second = str(error.value).splitlines()
    assert "grouped is odd" in first and second.endswith(
        "loop is odd; do that; or set parallel.kernel_canary=off to train with it all the same"
    )


def _sound(candidates: dict[int, list[str]], wrong: list[tuple[int, str]]) -> Any:
    """Return what this rank takes, given its candidates and which kernel is wrong on which rank."""
    rank, group = dist.get_rank(), mesh_here().host
    try:
        fault_of = lambda name: "odd" if (rank, name) in wrong else None  # noqa: E731
        report = first_sound(candidates[rank], fault_of, group, remedy="do that")
    except ConfigError as error:
        return str(error)
    return report.experts_kernel, dict(report.refused)


def test_a_kernel_that_is_wrong_on_one_rank_is_wrong_for_all(ranks: Ranks) -> None:
    same = {0: ["grouped", "fused", "loop"], 1: ["grouped", "fused", "loop"]}
    refused = {"grouped": "rank 1: odd"}
    assert ranks.run(2, _sound, same, [(1, "grouped")]) == [("fused", refused)] * 2
    assert ranks.run(2, _sound, same, []) == [("grouped", {})] * 2
    both = {"grouped": "rank 1: odd", "fused": "rank 0: odd"}
    assert ranks.run(2, _sound, same, [(1, "grouped"), (0, "fused")]) == [("loop", both)] * 2


def test_hosts_with_other_kernels_agree_on_what_is_wrong(ranks: Ranks) -> None:
    other = {0: ["fused_onednn", "fused", "loop"], 1: ["grouped", "fused", "loop"]}
    assert [name for name, _ in ranks.run(2, _sound, other, [])] == ["fused_onednn", "grouped"]
    assert [name for name, _ in ranks.run(2, _sound, other, [(1, "grouped")])] == ["fused_onednn", "fused"]
    answers = ranks.run(2, _sound, {0: ["a"], 1: ["b", "c"]}, [(0, "a")])
    assert len(set(answers)) == 1 and "a is wrong on this device: rank 0: odd" in answers[0]


def test_a_wrong_kernel_is_refused_even_if_no_other_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.parallel.canary.kernel_fault", lambda *args, **options: "odd")
    with pytest.raises(ConfigError, match="loop is wrong on this device: odd; no kernel is right here: suspect"):
        canary(experts_kernel="grouped", kernel_canary="fall_back")


@pytest.mark.parametrize("recompute", ["experts", "block", RecomputeEveryConfig(every=2)])
def test_what_is_computed_again_is_checked_if_the_run_does_so(monkeypatch: pytest.MonkeyPatch, recompute: Any) -> None:
    monkeypatch.setattr(
        "trainer.ops.fused_ffn.FusedKernel.hidden", lambda self, rows, weights: weights.w_in.new_ones(136, 32)
    )
    assert canary(experts_kernel="fused").experts_kernel == "fused"
    with pytest.raises(ConfigError, match=r"fused is wrong on this device: groups of .* the gradient of x of token"):
        canary(experts_kernel="fused", recompute=recompute)


BENT = f"{__name__}:BentConfig"


class BentConfig(AllToAllDispatcherConfig):
    """A dispatcher that doubles what it sends on one rank."""

    kind: Any = f"{__name__}:BentConfig"

    def build(self, mesh: Any, num_experts: int) -> Any:
        built = super().build(mesh, num_experts)
        whole = built.forward
        built.forward = lambda x, decision, experts: whole(x, decision, experts) * (1 + (mesh.layout.rank == 1))
        return built


def _refusal() -> str:
    mesh = mesh_here(ep_size=2)
    config = ParallelConfig.model_validate({"experts_kernel": "loop", "dispatcher": {"kind": BENT}})
    try:
        run_canary(config, WIDTHS, 4, mesh, CPU)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_wrong_dispatcher_is_refused_on_all_ranks_with_the_rank_and_a_remedy(ranks: Ranks) -> None:
    answers = ranks.run(2, _refusal)
    assert len(set(answers)) == 1
    # Rank 0 gets doubled gradients of what it sent and computed.
    assert f"parallel.dispatcher: {BENT} is wrong on these ranks: rank 0: pass 1: the gradient of" in answers[0]
    assert "such as all_to_all" in answers[0] and "parallel.kernel_canary=off" in answers[0]


def _rounding(kind: str) -> None:
    dispatcher = {"kind": kind, "wire": "bfloat16"}
    config = ParallelConfig.model_validate({"experts_kernel": "loop", "dispatcher": dispatcher})
    check_dispatcher(config, torch.float32, 4, mesh_here(ep_size=2), CPU)


@pytest.mark.parametrize("kind", ["all_to_all", "deduplicated_all_to_all"])
def test_rows_that_the_config_rounds_are_not_wrong(ranks: Ranks, kind: str) -> None:
    ranks.run(2, _rounding, kind)

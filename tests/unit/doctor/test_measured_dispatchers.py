"""Dispatchers of a config are measured on its ranks, on doubles if they need GPUs; wrong ones are named."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.doubles import deep_ep, nccl_ep, symmetric_memory
from tests.ranks import Ranks, mesh_here
from trainer.config.loader import load
from trainer.doctor.cluster import measure_dispatchers as measuring
from trainer.doctor.cluster.dispatch_checks import DISPATCH_CHECKS
from trainer.doctor.cluster.dispatch_evidence import DispatcherSpeed, DispatchEvidence
from trainer.doctor.cluster.dispatch_lines import dispatch_lines
from trainer.doctor.cluster.timed_rounds import Rounds
from trainer.doctor.finding import examine
from trainer.experiment import ExperimentConfig
from trainer.moe.dispatch.all_gather import AllGatherDispatcher

TINY = ["model.seq_len=16", "model.d_model=16", "model.moe.num_experts=8", "parallel.micro_batch_size=2"]


def measure(ep_size: int, ranks_per_node: int, overrides: list[str], doubled: bool) -> DispatchEvidence:
    """Return what is measured, as this rank has it."""
    config = load("configs/quickstart.yaml", [*TINY, f"parallel.ep_size={ep_size}", *overrides], ExperimentConfig)
    mesh = mesh_here(ep_size=ep_size, ranks_per_node=ranks_per_node)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if doubled:
            stack.enter_context(deep_ep.doubled())
            stack.enter_context(nccl_ep.doubled())
            stack.enter_context(symmetric_memory.doubled())
            asked = measuring.refusal
            patch.setattr(
                measuring, "refusal", lambda *given: None if given[1].needs_gpus else asked(*given)
            )  # as if this were a GPU that has the package
        return measuring.measure_dispatchers(config, mesh, torch.device("cpu"), budget_s=0.0)


def kinds(found: DispatchEvidence) -> list[str]:
    return [one.kind for one in found.speeds]


def test_all_that_can_serve_are_measured_and_the_others_say_why(ranks: Ranks) -> None:
    capacity = [
        "model.moe.capacity={factor: 1.0}",
        "parallel.dispatcher={kind: deduplicated_all_to_all, wire: bfloat16}",
    ]
    first, *others = ranks.run(4, measure, 4, 2, capacity, False)
    assert all(one.speeds == first.speeds for one in others), "the same on every rank"
    assert kinds(first)[0] == "deduplicated_all_to_all" == first.own
    assert set(kinds(first)) == {
        "all_to_all", "padded_all_to_all", "deduplicated_all_to_all", "all_gather", "hierarchical"
    }  # fmt: skip
    assert all(one.fault is None and one.rounds and len(one.rounds.seconds) == 3 for one in first.speeds)
    assert all(one.options["wire"] == "bfloat16" for one in first.speeds)
    assert first.refused == dict.fromkeys(["deepep", "nccl_ep", "symmetric_memory"], "it needs GPUs")
    assert (first.tokens, first.top_k, first.num_experts) == (32, 2, 8)

    plain, _ = ranks.run(2, measure, 2, 2, [], False)
    assert set(kinds(plain)) == {"all_to_all", "deduplicated_all_to_all", "all_gather"}
    assert "model.moe.capacity.factor is null" in plain.refused["padded_all_to_all"]
    assert plain.refused["hierarchical"] == "the ranks that share experts are on one machine"


def test_libraries_are_measured_on_their_doubles(ranks: Ranks) -> None:
    for found in ranks.run(2, measure, 2, 2, ["train.dtype=bfloat16"], True):
        deepep, shared = found.of("deepep"), found.of("symmetric_memory")
        other = found.of("nccl_ep")
        assert other is not None and other.rounds, other
        assert deepep is not None and shared is not None and deepep.rounds and shared.rounds, found.speeds
        assert deepep.yaml == "dispatcher: {kind: deepep, tokens_per_rank: 32}"


def test_what_a_config_cannot_have_is_not_tried(ranks: Ranks) -> None:
    """The library is there, and refuses float32."""
    for found in ranks.run(2, refused, "float32"):
        assert "sends rows in bfloat16, and train.dtype is float32" in found
    assert ranks.run(2, refused, "bfloat16") == [None] * 2


def refused(dtype: str) -> str | None:
    config = load("configs/quickstart.yaml", [*TINY, "parallel.ep_size=2", f"train.dtype={dtype}"], ExperimentConfig)
    (options,) = (one for one in measuring.possible_dispatchers(config) if one.kind == "deepep")
    with deep_ep.doubled(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.config.check_packages.is_installed", lambda package: True)
        return measuring.refusal(config, options, mesh_here(ep_size=2), torch.device("cuda"))


def wrong(where: str) -> DispatchEvidence:
    """Measure with an all-gather that is wrong: always, or for many rows only, which the canary does not have."""
    whole = AllGatherDispatcher.finish

    def finish(self: AllGatherDispatcher, computed: Any) -> Tensor:
        y = whole(self, computed)
        return y * 2 if where == "always" or len(y) > 20 else y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AllGatherDispatcher, "finish", finish)
        return measure(2, 2, ["parallel.dispatcher={kind: all_gather}"], False)


@pytest.mark.parametrize(("where", "words"), [("always", "pass 1"), ("many rows", "outputs of 32 tokens are wrong")])
def test_a_wrong_dispatcher_is_named_and_never_recommended(ranks: Ranks, where: str, words: str) -> None:
    evidence = ranks.run(2, wrong, where)[0]
    own = evidence.of("all_gather")
    assert own is not None and own.rounds is None and own.fault is not None and words in own.fault
    assert "rank 0" in own.fault and "all_gather" not in [one.kind for one in evidence.right]
    (sign,) = examine(DISPATCH_CHECKS, evidence)
    assert (
        sign.check == "wrong_dispatcher" and sign.severity == "severe" and sign.remedy.startswith("use dispatcher: {")
    )


def evidence(own: list[float], other: list[float]) -> DispatchEvidence:
    speeds = [
        DispatcherSpeed(kind=kind, options={"kind": kind, **more}, rounds=Rounds(seconds=seconds))
        for kind, more, seconds in (("all_to_all", dict[str, Any](), own), ("deepep", {"tokens_per_rank": 64}, other))
    ]
    broken = DispatcherSpeed(kind="all_gather", options={"kind": "all_gather"}, fault="rank 1: pass 1: off")
    shape: dict[str, Any] = {"ep_size": 2, "tokens": 64, "top_k": 2, "num_experts": 8, "d_model": 16}
    return DispatchEvidence(
        own="all_to_all",
        speeds=[*speeds, broken],
        refused={"symmetric_memory": "no NVSHMEM"},
        dtype="bfloat16",
        **shape,
    )


def test_the_fastest_is_recommended_with_its_line_and_never_by_chance() -> None:
    clear = evidence([0.020, 0.022, 0.021], [0.010, 0.011, 0.012])
    (sign,) = examine(DISPATCH_CHECKS, clear)
    assert sign.check == "slow_dispatcher" and "all_to_all takes 1.91 times as long as deepep" in sign.found
    assert sign.remedy == "set parallel.dispatcher: {kind: deepep, tokens_per_rank: 64}"
    disturbed = evidence([0.011, 0.022, 0.021], [0.010, 0.011, 0.012])
    assert examine(DISPATCH_CHECKS, disturbed) == [], "one of its rounds was as fast"
    assert list(dispatch_lines(disturbed))[-1].endswith("64}; all_to_all, as the config has it, is not surely slower")
    assert examine(DISPATCH_CHECKS, evidence([0.010] * 3, [0.009] * 3)) == []
    record = clear.record()
    assert record["fastest"] == "deepep" and record["refused"] == {"symmetric_memory": "no NVSHMEM"}
    assert [one["seconds"] for one in record["of"]] == [0.021, 0.011, None]
    lines = list(dispatch_lines(clear))
    assert lines[-1] == "fastest: parallel.dispatcher: {kind: deepep, tokens_per_rank: 64}"
    assert any("rank 1: pass 1: off" in line for line in lines) and any("no NVSHMEM" in line for line in lines)
    nobody = replace(clear, speeds=[replace(one, rounds=None, fault="off") for one in clear.speeds])
    assert not nobody.right and nobody.record()["fastest"] is None
    (sign,) = examine(DISPATCH_CHECKS, nobody)
    assert sign.remedy == "none is right: look at the links"

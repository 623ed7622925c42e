"""Every check of a step finds its seeded fault, planted in the program or in the config, by a real step."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_training import config_of_text
from trainer.config.loader import load
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import Layout
from trainer.doctor.finding import DoctorFinding, examine
from trainer.doctor.step import measure_step as measuring
from trainer.doctor.step import probe_layers
from trainer.doctor.step.diagnose_step import diagnose_step
from trainer.doctor.step.measure_step import measure_step
from trainer.doctor.step.step_checks import STEP_CHECKS
from trainer.doctor.step.step_evidence import StepEvidence, TextEvidence
from trainer.doctor.step.text_checks import TEXT_CHECKS
from trainer.engine import native, step
from trainer.experiment import ExperimentConfig
from trainer.moe import layer
from trainer.moe.experts import Experts
from trainer.moe.routers import top_k
from trainer.moe.routers.bias_balanced import BiasBalancedRouter
from trainer.moe.routers.top_k import TopKRouter
from trainer.prove.small_config import shrink
from trainer.training import memory

ROOT = Path(__file__).parents[3]
CHECKS = (*STEP_CHECKS, *TEXT_CHECKS)
LOOP = "parallel.experts_kernel=loop"
SHORT = "data.sources=[{kind: jsonl, domain: short, path: FOLDER/short.jsonl}]"
"""Texts of little more than half a row, so that no two fit into one."""
PROMPTS = SHORT.replace("}]", ", prompt: '{text} {text}', text: '{end}'}]")
"""Prompts that are read and not learned, whose experts in the last layer get no gradient."""
TOP_K = "model.moe.router={kind: top_k, top_k: 2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    lines = [json.dumps({"text": f"line number {number:04}", "end": "!"}) for number in range(200)]
    (folder / "short.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def measured(folder: Path, *overrides: str) -> StepEvidence:
    """Take a step of a tiny config."""
    config = config_of_text(folder, *(text.replace("FOLDER", str(folder)) for text in overrides))
    return measure_step(config, Mesh.of_one(), torch.device("cpu"), warn=lambda _: None)


def found(folder: Path, *overrides: str) -> dict[str, DoctorFinding]:
    return {finding.check: finding for finding in examine(CHECKS, measured(folder, *overrides))}


def detached(self: TopKRouter, scores: torch.Tensor, *arguments: Any) -> Any:
    return DECIDE(self, scores.detach(), *arguments)


def constant(gate: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return GATE(gate, torch.ones_like(x))


def rounded(gate: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return GATE(gate, x).bfloat16()


def all_valid(routed: Any, limited: Any, context: Any, **more: Any) -> Any:
    every = torch.ones_like(context.valid)
    decision = replace(routed.decision, kept=torch.ones_like(routed.decision.kept))
    return STATS(replace(routed, decision=decision), limited, replace(context, valid=every, num_valid=None), **more)


def apart(self: BiasBalancedRouter, counts: torch.Tensor) -> None:
    self.bias += self.bias_update_rate * torch.sign(counts - counts.double().mean()).to(self.bias)


def standing(self: BiasBalancedRouter, counts: torch.Tensor) -> None:
    pass


def unbiased(self: BiasBalancedRouter, scores: torch.Tensor) -> torch.Tensor:
    return scores


def equal_experts(*arguments: Any, **options: Any) -> Any:
    model = BUILD(*arguments, **options)
    for moe in model.moe_layers():
        for weight in (moe.experts.w_in, moe.experts.w_out):
            weight.data[2] = weight.data[0]
    return model


def one_expert_untrained(self: Experts, *arguments: Any, **options: Any) -> torch.Tensor:
    self.w_out.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), 0.0))
    return EXPERTS(self, *arguments, **options)


def not_a_number(self: Experts, *arguments: Any, **options: Any) -> torch.Tensor:
    return EXPERTS(self, *arguments, **options) / 0.0


def without_experts(self: native.NativeEngine) -> torch.Tensor:
    experts, self._experts = self._experts, []
    try:
        return NORM(self)
    finally:
        self._experts = experts


def frozen_step(self: native.NativeEngine, lr: float, grad_norm: float) -> None:
    kept = self.learning["blocks.0.attention.out.weight"].detach().clone()
    UPDATE(self, lr, grad_norm)
    self.learning["blocks.0.attention.out.weight"].data.copy_(kept)


def decays_all(config: Any, *, decayed: Any, not_decayed: Any) -> torch.optim.Optimizer:
    return OPTIMIZER(config, decayed=[*decayed, *not_decayed], not_decayed=[])


DRIFT = itertools.count()


def drifting(self: step.StepEngine, *arguments: Any, **options: Any) -> Any:
    done = ACCUMULATE(self, *arguments, **options)
    return replace(done, grad_norm=done.grad_norm * (1 + 1e-9 * next(DRIFT)))


def by_the_future(self: TopKRouter, x: torch.Tensor, context: Any) -> Any:
    rows = x.view(context.num_sequences, -1, x.shape[-1])
    return FORWARD(self, (rows + 10 * rows.roll(-1, 1)).flatten(0, 1), context)


def by_the_batch(self: TopKRouter, x: torch.Tensor, context: Any) -> Any:
    return FORWARD(self, x + 10 * x.flip(0), context)


def broken_canary(*arguments: Any, **options: Any) -> Any:
    options["warn"]("parallel.experts_kernel: grouped is wrong on this device: y differs")
    return arguments[0], None


DECIDE, GATE, STATS = TopKRouter.decide, top_k.gate_logits, layer.collect_stats
BUILD, EXPERTS, NORM = measuring.build_parallel_model, Experts.forward, native.NativeEngine._reduce_gradients
UPDATE, OPTIMIZER = native.NativeEngine._update, native.create_optimizer
ACCUMULATE, FORWARD = step.StepEngine.accumulate, TopKRouter.forward


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What to break, and the config to break it under."""

    name: str
    place: Any = None
    attribute: str = ""
    broken: Callable[..., Any] | None = None
    overrides: list[str] = field(default_factory=list)


FAULTS = [
    Fault(name="dead_router", place=TopKRouter, attribute="decide", broken=detached, overrides=[TOP_K]),
    Fault(name="constant_logits", place=top_k, attribute="gate_logits", broken=constant, overrides=[TOP_K]),
    Fault(name="router_precision", place=top_k, attribute="gate_logits", broken=rounded, overrides=[TOP_K]),
    Fault(name="padding_counted", place=layer, attribute="collect_stats", broken=all_valid, overrides=[TOP_K]),
    Fault(name="bias_direction", place=BiasBalancedRouter, attribute="update", broken=apart),
    Fault(name="bias_direction", place=BiasBalancedRouter, attribute="update", broken=standing),
    Fault(name="bias_without_effect", place=BiasBalancedRouter, attribute="selection_scores", broken=unbiased),
    Fault(name="identical_experts", place=measuring, attribute="build_parallel_model", broken=equal_experts),
    Fault(name="expert_gradients", place=Experts, attribute="forward", broken=one_expert_untrained),
    Fault(
        name="wrong_kernel",
        place=measuring,
        attribute="check_kernel",
        broken=broken_canary,
        overrides=[LOOP],
    ),
    Fault(name="gradient_norm", place=native.NativeEngine, attribute="_reduce_gradients", broken=without_experts),
    Fault(name="not_finite", place=Experts, attribute="forward", broken=not_a_number),
    Fault(name="stuck_weights", place=native.NativeEngine, attribute="_update", broken=frozen_step),
    Fault(name="decayed_vectors", place=native, attribute="create_optimizer", broken=decays_all),
    Fault(name="later_tokens", place=TopKRouter, attribute="forward", broken=by_the_future),
    Fault(name="batch_dependent_evaluation", place=TopKRouter, attribute="forward", broken=by_the_batch),
    Fault(name="initial_loss", overrides=["model.init_std=3.0"]),
    Fault(name="unrepeatable_step", place=step.StepEngine, attribute="accumulate", broken=drifting),
    Fault(name="mostly_padding", overrides=[SHORT, "data.packing=bfd", "model.seq_len=32"]),
    Fault(name="many_epochs", overrides=["train.steps=100000"]),
    Fault(name="spare_rows", overrides=["model.vocab_size=4096"]),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_check_finds_its_seeded_fault(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault.broken is not None:
        monkeypatch.setattr(fault.place, fault.attribute, fault.broken)
    finding = found(folder, *fault.overrides)[fault.name]
    assert finding.found and finding.remedy and ("#" in finding.source or "arXiv" in finding.source)


def test_every_check_of_a_step_has_a_seeded_fault() -> None:
    names = {check.name for check in CHECKS}
    assert len(names) == len(CHECKS) and names - {fault.name for fault in FAULTS} == {"few_targets"}
    read_only = StepEvidence(text=TextEvidence(num_tokens=100, targets=1))
    assert [finding.check for finding in examine(TEXT_CHECKS, read_only)] == ["few_targets"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [TOP_K],
        ["model.moe=null"],
        ["model.moe.router={kind: expert_choice}", "model.moe.balance.coef=0"],
        ["model.moe.router={kind: hash, top_k: 2}"],
        [PROMPTS, "data.packing=bfd", "model.seq_len=40", "model.moe.num_experts=16", "train.global_batch_size=3"],
        ["model.moe.router={kind: switch}", "model.moe.capacity.factor=1.25", "train.dtype=bfloat16"],
        ["model.moe.router={kind: group_limited, groups: 2, groups_kept: 1, bias_update_rate: 0.001}"],
        ["model.lora={rank: 2}"],
        ["model.moe.router={kind: top_k, null_experts: 2}", "train.freeze=[embedding]", "parallel.ep_size=2"],
    ],
    ids=lambda overrides: " ".join(overrides) or "as it is",
)
def test_nothing_is_found_where_nothing_is_wrong(overrides: list[str], folder: Path) -> None:
    assert found(folder, *overrides) == {}


@pytest.mark.parametrize("name", ["smoke", "quickstart", "founding/sparse_expert_model", "stages/pretrain"])
def test_nothing_is_found_in_a_step_of_a_shipped_config(name: str, folder: Path) -> None:
    short = SHORT.replace("FOLDER", str(folder))  # their own text takes seconds to read
    config = load(ROOT / f"configs/{name}.yaml", [short, f"data.cache_dir={folder}/cache"], ExperimentConfig)
    evidence = measure_step(shrink(config), Mesh.of_one(), torch.device("cpu"), warn=lambda _: None)
    assert {finding.check for finding in examine(CHECKS, evidence)} <= {"many_epochs"}, "the text is short"


def test_a_step_that_is_too_large_is_one_of_a_small_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of_text(folder)
    monkeypatch.setattr(memory, "total_memory", lambda device: 1000)
    (note,) = diagnose_step(config, Layout(), scale="full").notes
    assert note.startswith("no step was taken: ") and "--scale small" in note
    monkeypatch.undo()
    monkeypatch.setattr("trainer.doctor.step.diagnose_step._MOST_FLOPS", 1e6)
    found = diagnose_step(config, Layout(), scale="auto")
    assert len(found.notes) == 1 and "small copy" in found.notes[0] and "FLOPs" in found.notes[0]
    assert found.checks and not found.findings


def test_a_leak_is_none_where_the_model_says_that_it_looks_ahead(folder: Path) -> None:
    evidence = measured(folder, "model.moe.router={kind: expert_choice, evaluation_routing: as_trained}")
    assert evidence.later_tokens_change == {}
    assert probe_layers._EVALUATION.dropless

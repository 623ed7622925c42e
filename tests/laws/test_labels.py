"""Law: `prove` labels exactly the configs whose losses or capacity depend on the micro-batches of a step."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_engine, rows_of, tiny_model_config
from tests.ranks import Ranks, mesh_here
from trainer.experiment import ExperimentConfig
from trainer.moe.config import MoEConfig
from trainer.parallel.config import ParallelConfig
from trainer.prove.cases import apply_case, labels, reference

ROWS, SEQ_LEN = 4, 8

ALONE: dict[str, dict[str, Any]] = {
    "balance": {"balance": {"coef": 2.0}},
    "device_balance": {"device_balance": {"coef": 2.0, "groups": 2}},
    "importance": {"cv_squared": {"importance_coef": 2.0}},
    "load": {"cv_squared": {"load_coef": 2.0}, "router": {"kind": "noisy_top_k"}},
    "z": {"z_loss_coef": 0.5},
    "diversity": {"diversity_coef": 0.5},
    "router": {"router": {"kind": "top_p", "sparsity_coef": 0.5}},
}
"""Every auxiliary loss on its own."""
COUNTS: list[dict[str, Any]] = [
    {"scope": "sequence"},
    {"scope": "global_batch", "counts": "exact"},
    {"scope": "global_batch", "counts": "previous_step"},
    {"scope": "global_batch", "counts": "running"},
    {"scope": "micro_batch"},
]
"""Every way of counting for a balance loss."""
ALWAYS_EVEN: dict[str, dict[str, Any]] = {
    "dense": {"router": {"kind": "dense"}},
    "expert_choice": {"router": {"kind": "expert_choice"}},
    "all experts": {"router": {"kind": "top_k", "top_k": 4}},
    "all experts and nulls": {"router": {"kind": "bias_balanced", "top_k": 6, "null_experts": 2}},
    "one expert": {"num_experts": 1, "router": {"kind": "top_k", "top_k": 1, "normalize": False}},
    "no probabilities": {"router": {"kind": "hash"}},
}
"""Routers with an even load by construction, or without a balance loss."""
NEARLY_EVEN: dict[str, dict[str, Any]] = {
    "base": {"router": {"kind": "base"}, "num_experts": 3},
    "all experts but one": {"router": {"kind": "top_k", "top_k": 3}},
    "all experts, some let go": {"router": {"kind": "gshard", "top_k": 4}},
    "first choices of all experts": {
        "router": {"kind": "top_k", "top_k": 4},
        "balance": {"coef": 2.0, "convention": "gshard_first_choice"},
    },
}
CAPACITIES: dict[str, dict[str, Any]] = {
    "sequence": {"capacity": {"factor": 0.6, "min": 1}},
    "rank": {"capacity": {"factor": 0.6, "min": 1, "scope": "rank"}},
    "rank, with room for all": {"capacity": {"factor": 2.0, "min": 1, "scope": "rank"}},
    "rank, dropless": {"capacity": {"scope": "rank"}},
}


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every loss with every way of counting and both scopes; routers; capacities."""
    for name, alone in ALONE.items():
        for counts in COUNTS:
            balance = {"coef": 0.0, **alone.get("balance", {}), **counts}
            for cv_scope in ("sequence", "global_batch") if "cv_squared" in alone else (None,):
                cv = {} if cv_scope is None else {"cv_squared": {**alone["cv_squared"], "scope": cv_scope}}
                yield f"{name}, {' '.join(map(str, [*counts.values(), cv_scope or '']))}", {
                    "z_loss_coef": 0.0, **alone, **cv, "balance": balance
                }  # fmt: skip
    for name, router in {**ALWAYS_EVEN, **NEARLY_EVEN}.items():
        balance = {"coef": 2.0, **router.get("balance", {}), "scope": "micro_batch"}
        yield f"micro_batch under {name}", {**router, "balance": balance}
    for name, capacity in CAPACITIES.items():
        yield f"capacity of {name}", {"balance": {"coef": 0.0}, **capacity}


def config_of(moe: dict[str, Any]) -> ExperimentConfig:
    sizes = {"num_layers": 1, "d_model": 8, "num_heads": 2, "d_ff": 8, "seq_len": SEQ_LEN, "init_std": 0.5}
    model = {**sizes, "moe": {"num_experts": 4, "d_ff": 6, **moe}}
    return ExperimentConfig.model_validate({"name": "x", "model": model})


def learned(config: ExperimentConfig, num_pieces: int) -> torch.Tensor:
    """Train two steps with this many micro-batches each; return losses, norms and final weights."""
    kernel = config.parallel.experts_kernel
    engine = make_engine(config.model, dtype=torch.float64, kernel="loop" if kernel == "auto" else kernel)
    rows, values = ROWS // num_pieces, []
    for step in range(2):
        batch = make_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step)
        result = engine.train_step([rows_of(batch, i * rows, (i + 1) * rows) for i in range(num_pieces)], lr=1e-2)
        values += [result.loss, result.balance_loss or 0.0, result.z_loss or 0.0, result.grad_norm]
        values += result.extra_losses.values()
    weights = [parameter.detach().flatten() for parameter in engine.parameters.values()]
    return torch.cat([torch.tensor(values, dtype=torch.float64), *weights])


def test_every_loss_is_under_the_law() -> None:
    everything = {key: value for alone in ALONE.values() for key, value in alone.items()}
    everything["cv_squared"] = {"importance_coef": 1.0, "load_coef": 1.0}
    everything["router"] = {"kind": "noisy_top_k"}
    assert {term.name for term in MoEConfig.model_validate(everything).aux_losses.terms()} == set(ALONE)


@pytest.mark.parametrize("moe", [pytest.param(moe, id=name) for name, moe in cases()])
def test_a_config_is_labelled_exactly_if_micro_batches_change_what_it_learns_or_logs(moe: dict[str, Any]) -> None:
    config = config_of(moe)
    difference = float((learned(config, 1) - learned(config, 2)).abs().max())
    assert difference < 1e-11 or difference > 1e-6, "neither rounding nor a difference"
    assert bool(labels(config)) == (difference > 1e-6), (labels(config), difference)


def _learned_on_a_rank(wire: str, dtype: torch.dtype) -> list[float]:
    """Train two steps on two ranks with expert parallelism; return losses and norms."""
    mesh = mesh_here(ep_size=2)
    parallel = ParallelConfig.model_validate({"ep_size": 2, "dispatcher": {"kind": "all_to_all", "wire": wire}})
    engine = make_engine(tiny_model_config(), dtype=dtype, mesh=mesh, parallel=parallel)
    rank, values = mesh.layout.rank, []
    for step in range(2):
        batch = make_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step)
        result = engine.train_step([rows_of(batch, 2 * rank, 2 * rank + 2)], lr=1e-2)
        values += [result.loss, result.grad_norm]
    return values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_rounded_by_the_dispatcher_are_labelled_unless_already_rounded(ranks: Ranks, dtype: str) -> None:
    plain, rounded = (
        ranks.run(2, _learned_on_a_rank, wire, getattr(torch, dtype))[0] for wire in ("compute", "bfloat16")
    )
    sections = {"parallel": {"dispatcher": {"kind": "all_to_all", "wire": "bfloat16"}}, "train": {"dtype": dtype}}
    config = ExperimentConfig.model_validate({"name": "x", **sections})
    assert bool(labels(config)) == (plain != rounded) == (dtype == "float32")


def test_a_kernel_that_rounds_rows_together_is_labelled() -> None:
    """Numbers far below the largest of the 32 rows that share a scale lose bits; a proof runs this kernel itself."""
    sizes = {"num_layers": 1, "d_model": 32, "num_heads": 2, "seq_len": SEQ_LEN, "init_std": 0.5}
    model = {**sizes, "moe": {"num_experts": 4, "d_ff": 32, "balance": {"coef": 0.0}}}
    for kernel in ("loop", "mxfp8"):
        parallel = {"experts_kernel": kernel, "device": "cpu"}
        train = {"dtype": "float64"}
        config = ExperimentConfig.model_validate({"name": "x", "model": model, "parallel": parallel, "train": train})
        difference = float((learned(config, 1) - learned(config, 2)).abs().max())
        assert bool(labels(config)) == (difference > 1e-9) == (kernel == "mxfp8"), difference
        proved = apply_case(config, reference(config)).parallel.experts_kernel
        assert proved == ("mxfp8" if kernel == "mxfp8" else "auto")

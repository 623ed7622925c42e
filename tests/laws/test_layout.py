"""Law: the split of a global batch into micro-batches does not change what is learned."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_engine, make_packed_batch, rows_of, tiny_model_config
from tests.registries import ROUTERS, router_sections
from trainer.data.batches.batch import Batch

STEPS, ROWS, SEQ_LEN = 8, 16, 8  # of padding and repeats there are four kinds of steps

INVARIANT: dict[str, dict[str, Any]] = {
    "global_batch exact": {"balance": {"coef": 0.1}},
    "global_batch previous_step": {"balance": {"coef": 0.1, "counts": "previous_step"}},
    "no coefficient, logged all the same": {"balance": {"coef": 0.0}},
    "sequence": {"balance": {"coef": 0.1, "scope": "sequence"}},
    "capacity by position": {"capacity": {"factor": 0.6, "min": 1}},
    "capacity choice_major, renormalised": {
        "capacity": {"factor": 0.6, "min": 1, "policy": "choice_major", "renormalize_after_drop": True}
    },
    "capacity by probability": {"capacity": {"factor": 0.6, "min": 1, "policy": "probability"}},
    "jitter": {"router": {"kind": "top_k", "jitter": 0.3}},
    "bias_balanced with jitter and capacity": {
        "router": {"kind": "bias_balanced", "jitter": 0.3, "bias_update_rate": 0.05},
        "capacity": {"factor": 1.0, "min": 1},
    },
    "gshard_first_choice": {"balance": {"coef": 0.1, "convention": "gshard_first_choice"}},
    "shared expert": {"num_shared_experts": 1},
    "capacity at random": {"capacity": {"factor": 0.6, "min": 1, "policy": "random"}},
    "a bias over null experts": {
        "router": {"kind": "bias_balanced", "top_k": 3, "null_experts": 2, "bias_update_rate": 0.05},
        "balance": {"coef": 0},
    },
    "null experts": {"router": {"kind": "top_k", "top_k": 3, "null_experts": 2}, "balance": {"coef": 0.1}},
    "importance and load": {
        "router": {"kind": "noisy_top_k"},
        "cv_squared": {"importance_coef": 0.3, "load_coef": 0.3},
    },
    "importance beside the counts of the step before": {
        "cv_squared": {"importance_coef": 0.3},
        "balance": {"coef": 0.1, "counts": "previous_step"},
    },
    "importance of sequences": {"cv_squared": {"importance_coef": 0.3, "scope": "sequence"}},
    "device balance, diversity": {
        "balance": {"coef": 0.0},
        "device_balance": {"coef": 0.2, "groups": 2},
        "diversity_coef": 0.5,
    },
    "gshard": {"router": {"kind": "gshard"}, "capacity": {"factor": 1.0, "min": 1, "policy": "random"}},
    "k drawn in every step": {
        "router": {"kind": "top_k", "top_k_choices": [1, 2, 4]},
        "capacity": {"factor": 1.0, "min": 1},
        "balance": {"coef": 0.1, "counts": "previous_step"},
    },
    "mixture_of_depths": {"router": {"kind": "mixture_of_depths", "capacity": 0.5}, "num_experts": 1},
}
INVARIANT |= router_sections(without=INVARIANT.values())

NOT_INVARIANT = {
    "micro_batch": {"balance": {"coef": 2.0, "scope": "micro_batch"}},
    "running": {"balance": {"coef": 2.0, "counts": "running"}},
    "capacity per rank": {"capacity": {"factor": 0.6, "min": 1, "scope": "rank"}},
}


def test_every_router_is_under_the_law() -> None:
    models: list[dict[str, Any]] = list(INVARIANT.values())
    assert {moe.get("router", {}).get("kind", "top_k") for moe in models} == set(ROUTERS)


def _ragged(step: int) -> Batch:
    return make_batch(
        ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step, ragged=step % 2 == 1, repeats=step % 4 in (1, 2)
    )


def _packed(step: int) -> Batch:
    return make_packed_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step)


def _losses(
    moe: dict, num_pieces: int, dtype: torch.dtype, batch_of: Callable[[int], Batch] = _ragged, **model: Any
) -> torch.Tensor:
    """Loss, balance loss and gradient norm of every step, with this number of micro-batches."""
    engine = make_engine(tiny_model_config(moe, **model), dtype=dtype)
    rows = ROWS // num_pieces
    curve = []
    for step in range(STEPS):
        batch = batch_of(step)
        pieces = [rows_of(batch, i * rows, (i + 1) * rows) for i in range(num_pieces)]
        result = engine.train_step(pieces, lr=8e-3)
        curve.append([result.loss, result.balance_loss or 0.0, result.z_loss or 0.0, result.grad_norm])
        curve[-1].append(sum(result.extra_losses.values()))
    return torch.tensor(curve, dtype=torch.float64)


@pytest.mark.parametrize("moe", INVARIANT.values(), ids=INVARIANT.keys())
def test_one_and_four_micro_batches_learn_the_same_in_float64(moe: dict) -> None:
    whole, pieces = _losses(moe, 1, torch.float64), _losses(moe, 4, torch.float64)
    assert whole[-1, 0] < whole[0, 0] or not ROUTERS[moe.get("router", {}).get("kind", "top_k")].learns_weights
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("moe", INVARIANT.values(), ids=INVARIANT.keys())
def test_one_and_four_micro_batches_learn_the_same_in_float32(moe: dict) -> None:
    whole, pieces = _losses(moe, 1, torch.float32), _losses(moe, 4, torch.float32)
    torch.testing.assert_close(pieces[:, 0], whole[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["global_batch exact", "bias_balanced with jitter and capacity"])
def test_packed_documents_whose_answers_are_learned_are_the_same_in_any_pieces(name: str) -> None:
    options = {"dtype": torch.float64, "batch_of": _packed, "document_mask": True}
    whole, pieces = _losses(INVARIANT[name], 1, **options), _losses(INVARIANT[name], 4, **options)
    assert whole[-1, 0] < whole[0, 0]
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("moe", NOT_INVARIANT.values(), ids=NOT_INVARIANT.keys())
def test_what_is_labelled_not_invariant_is_not(moe: dict) -> None:
    """Control experiment: if this fails, the tests above do not measure what they claim."""
    whole, pieces = _losses(moe, 1, torch.float64), _losses(moe, 4, torch.float64)
    assert (whole - pieces).abs().max() > 1e-6


def test_jitter_is_on_in_the_law_above() -> None:
    with_noise = _losses(INVARIANT["jitter"], 1, torch.float64)
    without = _losses({"router": {"kind": "top_k"}}, 1, torch.float64)
    assert (with_noise - without).abs().max() > 1e-6


def test_uneven_pieces_and_padding_rows_change_nothing() -> None:
    moe = {"capacity": {"factor": 0.8, "min": 1}, "balance": {"coef": 0.1}}
    config = tiny_model_config(moe)
    whole, pieces = make_engine(config, dtype=torch.float64), make_engine(config, dtype=torch.float64)
    for step in range(3):
        batch = make_batch(5, SEQ_LEN, seed=step, first_sample=5 * step)
        filled = make_batch(6, SEQ_LEN, seed=99)
        last = Batch(
            **{
                name: torch.cat([tensor[3:], torch.zeros_like(getattr(filled, name)[5:])])
                for name, tensor in batch.tensors().items()
            }
        )
        mine = whole.train_step([batch], lr=1e-2)
        theirs = pieces.train_step([rows_of(batch, 0, 3), last], lr=1e-2)
        assert abs(mine.loss - theirs.loss) < 1e-12
        assert abs(mine.grad_norm - theirs.grad_norm) < 1e-12

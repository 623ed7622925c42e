"""Law: a packed document is learned as if it were alone in its row, and padding has no effect."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_engine, make_model, make_packed_batch, tiny_model_config
from trainer.data.batches.assemble import pad_rows
from trainer.data.batches.batch import Batch
from trainer.engine.native import NativeEngine

ROWS, SEQ_LEN = 5, 24


def _logits_alone(model: torch.nn.Module, packed: Batch, number: int) -> torch.Tensor:
    """Logits of one of the packed documents, alone in a row."""
    here = packed.document_id == number
    tokens, targets = packed.tokens[here][None], packed.targets[here][None]
    alone = make_batch(1, tokens.shape[1])
    alone = replace(alone, tokens=tokens, targets=targets, document_id=torch.full_like(tokens, number))
    return model(alone, want_logits=True).logits[0]


@pytest.mark.parametrize("router", [{"kind": "top_k"}, {"kind": "bias_balanced"}, {"kind": "dense"}], ids=str)
def test_logits_are_those_that_a_document_has_alone_in_a_row(router: dict) -> None:
    """Rotary positions are relative: the position of a document in its row does not matter."""
    config = tiny_model_config({"router": router}, seq_len=SEQ_LEN, document_mask=True, num_layers=3)
    model, packed = make_model(config, dtype=torch.float64), make_packed_batch(ROWS, SEQ_LEN, longest=12)
    logits = model(packed, want_logits=True).logits
    numbers = packed.document_id[packed.valid].unique().tolist()
    assert len(numbers) > 2 * ROWS and (~packed.valid).any()
    for number in numbers:
        together, alone = logits[packed.document_id == number], _logits_alone(model, packed, number)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_within_a_row_documents_see_those_before_them() -> None:
    """Control experiment."""
    config = tiny_model_config(seq_len=SEQ_LEN, document_mask=False)
    model, packed = make_model(config, dtype=torch.float64), make_packed_batch(1, SEQ_LEN, longest=12)
    logits = model(packed, want_logits=True).logits
    together, alone = logits[packed.document_id == 1], _logits_alone(model, packed, 1)
    assert (together - alone).abs().max() > 1e-3


def _wider(batch: Batch, seq_len: int) -> Batch:
    """The same rows followed by padding, whose content must not matter."""
    rows, present = batch.tokens.shape
    padding = make_batch(rows, seq_len, seed=77)
    padding = replace(padding, valid=torch.zeros_like(padding.valid), document_id=torch.full_like(padding.tokens, -1))
    parts = {
        name: torch.cat([tensor, getattr(padding, name)[:, present:]], dim=1)
        for name, tensor in batch.tensors().items()
    }
    return Batch(**parts | {"sample_id": batch.sample_id[:, :1].expand(rows, seq_len).contiguous()})


def _step(moe: dict, batch: Batch, document_mask: bool) -> tuple[dict[str, Any], NativeEngine]:
    """All results of a step."""
    config = tiny_model_config({"balance": {"coef": 0.1}, **moe}, document_mask=document_mask)
    engine = make_engine(config, dtype=torch.float64, seed=3)
    step = engine.accumulate([batch])
    values = {f"gradient of {name}": part.tensor.clone() for name, part in engine.gradients().slices.items()}
    result = engine.apply(step, lr=1e-2)
    routing = result.routing
    assert routing is not None and routing.entropy_sum is not None and result.balance_loss is not None
    numbers = {"loss": result.loss, "balance": result.balance_loss, "z": result.z_loss, "norm": result.grad_norm}
    values |= {name: torch.tensor(value) for name, value in numbers.items()} | {
        "tokens": torch.tensor(result.num_tokens),
        "counts": routing.counts,
        "dropped": routing.dropped,
        "routed": routing.tokens,
        "entropy": routing.entropy_sum,
    }
    return values, engine


# C = factor * k * S / E: the same for rows of 8 with 1.0 and for rows of 16 with 0.5.
MODELS = {
    "dropless, global balance": ({}, {}),
    "balance of sequences": ({"balance": {"coef": 0.1, "scope": "sequence"}}, {}),
    "jitter": ({"router": {"kind": "bias_balanced", "jitter": 0.3}}, {}),
    "shared expert, dense router": ({"router": {"kind": "dense"}, "num_shared_experts": 1}, {}),
    "capacity": ({"capacity": {"factor": 1.0, "min": 1}}, {"capacity": {"factor": 0.5, "min": 1}}),
}


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(("moe", "in_wide_rows"), MODELS.values(), ids=MODELS.keys())
def test_padding_in_rows_changes_no_loss_gradient_or_statistic(
    moe: dict, in_wide_rows: dict, document_mask: bool
) -> None:
    batch = make_packed_batch(6, 8, first_sample=40)
    expected, _ = _step(moe, batch, document_mask)
    filled, engine = _step({**moe, **in_wide_rows}, pad_rows(_wider(batch, 16), 9), document_mask)
    assert expected.keys() == filled.keys()
    for name, value in expected.items():
        torch.testing.assert_close(filled[name], value, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    if moe.get("capacity"):
        assert expected["dropped"].sum() > 0
    sums = engine.eval_loss(_wider(batch, 16), dropless=True)
    assert sums.target_tokens == int(batch.target_mask.sum())
    # Evaluation counts the tokens whose next token is predicted, and no padding.
    assert sums.routing is not None and sums.routing.tokens.tolist() == [int(batch.target_mask.sum())] * 2

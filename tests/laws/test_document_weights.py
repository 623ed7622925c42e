"""Law: the training loss is the sum of weight times nats over all targets, divided by the sum of their weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.builders import make_batch, make_engine, make_model, rows_of, tiny_model_config
from trainer.data.batches.assemble import pad_rows
from trainer.data.batches.batch import Batch
from trainer.engine.native import NativeEngine
from trainer.library.training_parts import training_loss

CONFIG = tiny_model_config({"balance": {"coef": 0.1}}, vocab_z_loss_coef=0.0)


def _weighted(scale: float = 1.0) -> Batch:
    """Rows with weights from 0 to 2.5, beside positions that are no targets."""
    batch = make_batch(6, 8, ragged=True)
    weights = scale * torch.tensor([0.0, 0.25, 2.5, 1.0, 0.75, 1e-3], dtype=torch.float64)
    return replace(batch, loss_mask=batch.loss_mask * weights[:, None])


def _engine(batch: Batch, rows: int, *, loss_chunk: int | None = 5, z_coef: float = 0.0) -> tuple[NativeEngine, float]:
    """Accumulate the gradient of a batch, this many rows at a time; return the engine and the loss."""
    config = CONFIG.model_copy(update={"vocab_z_loss_coef": z_coef})
    engine = make_engine(config, dtype=torch.float64)
    engine.model.loss_chunk = loss_chunk
    pieces = [pad_rows(rows_of(batch, i, i + rows), rows) for i in range(0, 6, rows)]
    return engine, float(engine.accumulate(pieces).total.loss)


def _gradients(engine: NativeEngine) -> dict[str, Tensor]:
    return {name: part.tensor.clone() for name, part in engine.gradients().slices.items()}


@pytest.mark.parametrize("z_coef", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "loss_chunk"), [(6, None), (6, 5), (4, 5), (1, 48)])
def test_a_step_is_the_weighted_mean_however_it_is_divided(rows: int, loss_chunk: int | None, z_coef: float) -> None:
    batch, model = _weighted(), make_model(CONFIG, dtype=torch.float64)
    logits = model(batch, want_logits=True).logits
    nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view(6, 8)
    total = sum(
        batch.loss_mask[b, s] * (nats[b, s] + z_coef * logits[b, s].logsumexp(0) ** 2)
        for b in range(6)
        for s in range(8)
        if batch.valid[b, s]
    )
    divisor = sum(float(batch.loss_mask[b, s]) for b in range(6) for s in range(8) if batch.valid[b, s])
    balance = training_loss(model, replace(batch, loss_mask=torch.zeros_like(batch.valid)))[0]
    assert isinstance(total, Tensor)
    (total / divisor + balance).backward()
    engine, loss = _engine(batch, rows, loss_chunk=loss_chunk, z_coef=z_coef)
    if z_coef == 0:
        assert loss == pytest.approx(float(total.detach()) / divisor, rel=1e-12)
    found = _gradients(engine)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_only_ratios_of_weights_matter() -> None:
    """By powers of two nothing is rounded, and sums of less than 1 are divisors as well."""
    (engine, loss), (other, same) = _engine(_weighted(), 3), _engine(_weighted(2.0**-30), 3)
    assert loss == same
    for name, gradient in _gradients(engine).items():
        assert torch.equal(gradient, _gradients(other)[name]), name


def test_a_weight_of_one_is_none() -> None:
    batch = make_batch(6, 8, ragged=True)
    (engine, loss), (other, same) = (
        _engine(batch, 3),
        _engine(replace(batch, loss_mask=batch.loss_mask.double()), 3),
    )
    assert loss == same
    for name, gradient in _gradients(engine).items():
        assert torch.equal(gradient, _gradients(other)[name]), name


def test_a_document_of_weight_0_is_read_and_not_learned() -> None:
    batch = _weighted()
    other = replace(batch, targets=batch.targets.where(batch.loss_mask > 0, 7))
    assert not torch.equal(batch.targets[0], other.targets[0])
    (engine, loss), (same, equal) = _engine(batch, 6), _engine(other, 6)
    assert loss == equal
    for name, gradient in _gradients(engine).items():
        assert torch.equal(gradient, _gradients(same)[name]), name
    assert engine.accumulate([batch]).num_tokens == int(batch.valid.sum()), "routed and counted"


def test_a_step_whose_weights_are_all_0_is_one_without_targets() -> None:
    batch = _weighted(0.0)
    (engine, loss), (other, same) = (
        _engine(batch, 6),
        _engine(replace(batch, loss_mask=torch.zeros_like(batch.valid)), 6),
    )
    assert loss == same == 0
    for name, gradient in _gradients(engine).items():
        assert gradient.isfinite().all() and torch.equal(gradient, _gradients(other)[name]), name
    assert training_loss(engine.model, batch)[0].detach() > 0, "the balance loss is still there"

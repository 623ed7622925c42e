"""Tests for giving rows their recorded experts: found by number, and refused where a token is another one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.builders import make_batch
from trainer.data.batches.assemble import pad_rows
from trainer.errors import DataError
from trainer.routing_record.record_batches import record_rows
from trainer.routing_record.record_manifest import ModelFacts, RecordFacts, TrainedRows
from trainer.routing_record.record_reader import RoutingRecord
from trainer.routing_record.record_writer import RecordWriter, finish_record
from trainer.routing_record.replayed_rows import ReplayedRows, check_same_model

MODEL = ModelFacts(moe_layers=[0, 1], num_experts=5, top_k=2, router="top_k")
ROWS = TrainedRows(seed=0, seq_len=8, packing="bfd", data_fingerprint="f", every=1)
FACTS = RecordFacts(
    origin="train", made_by="a", model=MODEL, vocab_size=32, tokenizer_fingerprint="byte", rows=ROWS, domains=["d"]
)
BATCH = make_batch(3, 8, ragged=True, first_sample=20)
EXPERTS = torch.rand(3, 8, 2, 5, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :2].int()


def _record(folder: Path, *, times: int = 1, facts: RecordFacts = FACTS) -> RoutingRecord:
    """Record the batch, with a padding row, in an order that is not that of its rows."""
    writer = RecordWriter(folder, MODEL, vocab_size=32)
    order = torch.tensor([2, 0, 1])
    shuffled = type(BATCH)(**{name: part[order] for name, part in BATCH.tensors().items()})
    for _ in range(times):
        record_rows(writer, pad_rows(shuffled, 4), torch.cat([EXPERTS[order], 0 * EXPERTS[:1]]))
    writer.flush()
    finish_record(folder, facts)
    return RoutingRecord(folder)


def test_rows_get_their_own_experts(tmp_path: Path) -> None:
    record = _record(tmp_path)
    assert record.num_sequences == 3, "padding is not recorded"
    batch = ReplayedRows(record, ROWS).with_experts(pad_rows(BATCH, 5))
    assert batch.experts is not None and batch.experts.dtype == torch.uint8
    assert torch.equal(batch.experts[:3][BATCH.valid].int(), EXPERTS[BATCH.valid])
    assert (batch.experts[~batch.valid] == torch.tensor([0, 1])).all(), "padding has any"
    learned = record.sequence(1).is_learned
    assert learned is not None and learned.tolist() == [False, *(BATCH.loss_mask & BATCH.valid)[0][BATCH.valid[0]][:-1]]


def test_another_token_is_refused_by_row_and_position(tmp_path: Path) -> None:
    rows = ReplayedRows(_record(tmp_path), ROWS)
    tokens = BATCH.tokens.clone()
    tokens[1, 1] = 31 - tokens[1, 1]
    said = f"row 21, position 1: token {int(BATCH.tokens[1, 1])} was recorded, and this run reads {int(tokens[1, 1])}"
    with pytest.raises(DataError, match=said):
        rows.with_experts(replace(BATCH, tokens=tokens))
    longer = torch.ones_like(BATCH.valid)
    number = int(np.flatnonzero(~BATCH.valid.all(1).numpy())[0])
    with pytest.raises(DataError, match=rf"row {20 + number} has \d tokens with experts, and 8 in this run"):
        rows.with_experts(replace(BATCH, valid=longer))
    with pytest.raises(DataError, match="row 30 is not recorded, only 3 rows from 20 to 22"):
        rows.with_experts(replace(BATCH, sample_id=BATCH.sample_id + 10))


def test_a_row_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 20 is recorded twice"):
        ReplayedRows(_record(tmp_path, times=2), ROWS)


def test_a_record_without_rows_is_refused(tmp_path: Path) -> None:
    record = _record(tmp_path, facts=FACTS.model_copy(update={"origin": "engine", "rows": None}))
    with pytest.raises(DataError, match=r"was recorded by engine, .*; use train\.routing_replay\.rows: sequences"):
        ReplayedRows(record, ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "other"}, "was recorded with another tokenizer; its token ids mean other text"),
        ({"vocab_size": 31}, "has token ids below 32, and this model knows 31"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    same: dict[str, Any] = {"tokenizer": "byte", "vocab_size": 32}
    record = _record(tmp_path)
    check_same_model(record, MODEL, **same)
    with pytest.raises(DataError, match=message):
        check_same_model(record, MODEL, **same | changes)

"""Give training rows the experts that were recorded for them: by row number, after comparing every token.

# B rows of S tokens, L MoE layers, k experts per token.
"""

from dataclasses import replace

import numpy as np
import torch

from trainer.config.nodes import shown_path
from trainer.data.batches.assemble import PADDING
from trainer.data.batches.batch import Batch
from trainer.errors import DataError
from trainer.routing_record.record_manifest import ModelFacts, TrainedRows
from trainer.routing_record.record_reader import RoutingRecord

KEY = "train.routing_replay.path"


class ReplayedRows:
    """The recorded experts of a training run's rows."""

    def __init__(self, record: RoutingRecord, rows: TrainedRows) -> None:
        """Index the record; raise DataError if its rows are in another order than `rows`, this run's, or not unique."""
        self._record = record
        theirs = record.manifest.rows
        if theirs is None:
            raise DataError(
                f"{KEY}: {shown_path(record.folder)} was recorded by {record.manifest.origin}, not by training, so it "
                "has sequences of its own; use train.routing_replay.rows: sequences"
            )
        for name in ("seed", "seq_len", "packing", "data_fingerprint"):
            before, now = getattr(theirs, name), getattr(rows, name)
            if before != now:
                raise DataError(
                    f"{KEY}: {shown_path(record.folder)} was recorded with {name} {_short(before)}, and this run has "
                    f"{_short(now)}, so its rows are others; use the config of the recorded run"
                )
        self._by_row = np.argsort(record.index.sample_id, kind="stable")
        self._sample_id = record.index.sample_id[self._by_row]
        if (np.diff(self._sample_id) == 0).any():
            twice = int(self._sample_id[1:][np.diff(self._sample_id) == 0][0])
            raise DataError(f"{shown_path(record.folder)}: row {twice} is recorded twice; record again")

    def with_experts(self, batch: Batch) -> Batch:
        """Return a batch whose tokens have their recorded experts.

        Raises:
            DataError: naming the row and the token, if one is not recorded, or was another one.
        """
        rows, length = batch.tokens.shape
        model = self._record.manifest.model
        dtype = torch.uint8 if model.num_choices <= 256 else torch.int32
        experts = torch.arange(model.top_k, dtype=dtype).expand(rows, length, len(model.moe_layers), -1).clone()
        for row, sample in enumerate(batch.sample_id[:, 0].tolist()):
            if sample == PADDING:
                continue
            sequence = self._record.sequence(self._find(sample))
            tokens = batch.tokens[row][batch.valid[row]].numpy()
            where = f"{shown_path(self._record.folder)}: row {sample}"
            if len(sequence.experts) != len(tokens):
                raise DataError(
                    f"{where} has {len(sequence.experts)} tokens with experts, and {len(tokens)} in this run; its text "
                    "is another; use the config of the recorded run"
                )
            if (different := np.flatnonzero(sequence.tokens != tokens)).size:
                at = int(different[0])
                raise DataError(
                    f"{where}, position {at}: token {sequence.tokens[at]} was recorded, and this run reads "
                    f"{tokens[at]}; its text is another; use the config of the recorded run"
                )
            experts[row, batch.valid[row]] = torch.from_numpy(sequence.experts.astype(np.int32)).to(dtype)
        return replace(batch, experts=experts)

    def _find(self, sample: int) -> int:
        at = int(np.searchsorted(self._sample_id, sample))
        if at == len(self._sample_id) or self._sample_id[at] != sample:
            first, last = int(self._sample_id[0]), int(self._sample_id[-1])
            rows = self._record.manifest.rows
            every = f", of every {rows.every}. step" if rows is not None and rows.every > 1 else ""
            raise DataError(
                f"{shown_path(self._record.folder)}: row {sample} is not recorded, only {len(self._sample_id)} rows "
                f"from {first} to {last}{every}; record every step that is to be replayed"
            )
        return int(self._by_row[at])


def check_same_model(record: RoutingRecord, model: ModelFacts, *, tokenizer: str, vocab_size: int) -> None:
    """Check that a record's experts mean those of a model.

    Raises:
        DataError: naming the fact that differs.
    """
    theirs, where = record.manifest.model, f"{KEY}: {shown_path(record.folder)}"
    told = {
        "moe_layers": "the MoE layers",
        "num_experts": "num_experts",
        "num_null_experts": "null_experts",
        "top_k": "top_k",
    }
    for name, shown in told.items():
        if (before := getattr(theirs, name)) != (now := getattr(model, name)):
            raise DataError(f"{where} has {shown} {before}, and this model {now}; replay it on the model that chose")
    if theirs.router != model.router and record.manifest.origin != "engine":
        raise DataError(
            f"{where} was chosen by the router {theirs.router}, and this model has {model.router}; replay it on the "
            "model that chose"
        )
    fingerprint = record.manifest.tokenizer_fingerprint
    if fingerprint is not None and fingerprint != tokenizer:
        raise DataError(f"{where} was recorded with another tokenizer; its token ids mean other text")
    if record.manifest.vocab_size > vocab_size:
        raise DataError(
            f"{where} has token ids below {record.manifest.vocab_size}, and this model knows {vocab_size}; it was "
            "recorded with another tokenizer"
        )


def _short(value: object) -> str:
    return str(value)[:12]

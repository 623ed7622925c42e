"""Read a trace as the forward passes that it was made of.

# B rows of S tokens, T = B * S, L MoE layers, k experts per token, m experts listed for each token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.config.nodes import shown_path
from trainer.errors import DataError
from trainer.moe.routing import RoutingContext
from trainer.routing_record.record_reader import RoutingRecord
from trainer.routing_record.trace_facts import TraceFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedPass:
    """One forward pass, padded as it was."""

    domain: int
    number: int
    """Of the pass in its domain."""
    listed: Tensor
    """(T, L, m) int64 experts, best first; expert 0 for padding."""
    values: Tensor
    """(T, L, m) scores of a ranking router, or combine weights; 0 for padding."""
    context: RoutingContext
    """That of an evaluation with a capacity: without noise."""

    @property
    def counted(self) -> Tensor:
        """(T,) bool: the tokens that an evaluation counts."""
        assert self.context.counted is not None, "set for each pass"
        return self.context.counted


class Trace:
    """A trace whose hashes were compared."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Open a trace.

        Raises:
            DataError: if it is damaged, or a routing record without what a trace has.
        """
        self.record = RoutingRecord(folder, verify=verify)
        if self.record.manifest.trace is None:
            raise DataError(
                f"{shown_path(folder)}: is a routing record without scores, not a trace; make one with turnout trace"
            )
        self.facts: TraceFacts = self.record.manifest.trace
        self.model = self.record.manifest.model

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return int(self.record.lengths().sum())

    def passes(self) -> Iterator[TracedPass]:
        """Yield the passes: of each domain `rows_per_pass` rows after the other, the last one filled up."""
        domains, rows = self.record.index.domain, self.facts.rows_per_pass
        for domain in np.unique(domains).tolist():
            numbers = np.flatnonzero(domains == domain)
            for place, first in enumerate(range(0, len(numbers), rows)):
                yield self._pass(domain, place, numbers[first : first + rows].tolist())

    def _pass(self, domain: int, place: int, numbers: list[int]) -> TracedPass:
        facts, shape = self.facts, (self.facts.rows_per_pass, self.facts.row_length)
        listed_shape = (*shape, len(self.model.moe_layers), facts.num_ranked or self.model.top_k)
        listed, valid, counted = np.zeros(listed_shape, np.int64), np.zeros(shape, bool), np.zeros(shape, bool)
        token_ids = np.zeros(shape, np.int64)
        values = np.zeros(listed_shape, np.dtype(facts.score_dtype))
        for row, number in enumerate(numbers):
            sequence = self.record.sequence(number)
            traced, length = sequence.traced, len(sequence.tokens)
            if length > facts.row_length or len(sequence.experts) != length:
                raise DataError(f"{self.record.place(number)}: is no row of {facts.row_length} positions; trace again")
            valid[row, :length], counted[row, :length] = True, traced["is_counted"]
            token_ids[row, :length] = sequence.tokens
            parts = [sequence.experts, traced["further_experts"]] if facts.num_ranked else [sequence.experts]
            listed[row, :length] = np.concatenate(parts, -1)
            values[row, :length] = traced["scores" if facts.num_ranked else "combine_weights"]
        context = RoutingContext(
            token_ids=torch.from_numpy(token_ids).flatten(),
            valid=torch.from_numpy(valid).flatten(),
            position=torch.arange(shape[1]).repeat(shape[0]),
            sequence_index=torch.arange(shape[0]).repeat_interleave(shape[1]),
            num_sequences=shape[0],
            counted=torch.from_numpy(counted).flatten(),
        )
        flat = (torch.from_numpy(part).flatten(0, 1) for part in (listed, values))
        listed, values = flat
        return TracedPass(domain=domain, number=place, listed=listed, values=values, context=context)

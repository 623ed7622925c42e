"""Preservation gate: whether a model that was made from another one still computes the same logits."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch

from trainer.data.batches.batch import Batch
from trainer.data.batches.evaluation import evaluation_batches
from trainer.data.corpus import Corpus
from trainer.errors import CheckpointError
from trainer.experiment import ExperimentConfig
from trainer.models.gpt import GPT
from trainer.moe.routing import RoutingOptions

TOLERANCE = 1e-5
"""Largest difference, as a share of the largest logit if that is above 1: float32 rounds in units of what it rounds."""
_BATCHES, _ROWS = 4, 4


@dataclass(frozen=True, slots=True)
class LogitDifference:
    """Largest difference between the logits of two models."""

    largest: float
    scale: float
    """The largest logit, at least 1."""
    num_tokens: int

    def check(self, name: str, why: str, *, is_allowed: bool) -> str:
        """Return what was measured, for the user, if it is preserved or may change.

        Raises:
            CheckpointError: otherwise, with the reasons why it may differ.
        """
        said = f"logits differ by up to {self.largest:.1e} from those before over {self.num_tokens} tokens"
        if self.is_preserved or is_allowed:
            return said
        raise CheckpointError(f"{name}: not written: its {said}: {why}; --allow-change writes it")

    @property
    def is_preserved(self) -> bool:
        """True if nothing but rounding differs."""
        return self.largest <= TOLERANCE * self.scale


@torch.no_grad()
def logit_difference(before: GPT, after: GPT, batches: Iterable[Batch]) -> LogitDifference:
    """Compare the logits of two models in full precision, dropless and without noise."""
    largest, scale, num_tokens = 0.0, 1.0, 0
    device = before.embedding.weight.device
    for batch in batches:
        here, options = batch.to(device), RoutingOptions(dropless=True)
        old, new = (model(here, options, want_logits=True).logits for model in (before, after))
        assert old is not None and new is not None, "they are wanted"
        valid = here.valid
        largest = max(largest, float((old - new)[valid].abs().max().nan_to_num(nan=float("inf"))))
        scale = max(scale, float(old[valid].abs().max()))
        num_tokens += int(valid.sum())
    return LogitDifference(largest, scale, num_tokens)


def held_out_batches(config: ExperimentConfig, corpus: Corpus) -> list[Batch]:
    """Return several small batches of held-out text, of every domain."""
    batches: list[Batch] = []
    for domain in range(len(corpus.domains)):
        found = evaluation_batches(
            corpus,
            domain,
            packing=config.data.packing,
            seq_len=config.model.seq_len,
            batch_size=_ROWS,
            max_tokens=_BATCHES * _ROWS * config.model.seq_len,
        )
        batches += islice(found, _BATCHES)
    return batches

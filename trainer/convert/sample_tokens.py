"""Tokens that a gate compares models on: of the run's own held-out text where it is still there, and random ones.

# B rows, S tokens in a row.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trainer.data.corpus import Corpus, build_corpus
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import TurnoutError
from trainer.experiment import ExperimentConfig

_ROWS, _BATCHES, _MAX_LENGTH = 2, 4, 128
_TEXTS: Final = (
    "It was a bright cold day in April, and the clocks were striking thirteen.",
    "  def f(x):\n\treturn x**2  # 3.14\n\n",
    "\u00c4\u00df \u4e2d\u6587 \U0001f600 e\u0301 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    " ",
    "\r\n\x00\x7f",
)
"""Texts on which tokenizers tend to differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTokens:
    """Batches of token ids, and texts."""

    batches: list[Tensor]
    """int64 (B, S)."""
    texts: list[str]
    origin: str
    """Where the tokens come from."""


def sample_tokens(config: ExperimentConfig, tokenizer: Tokenizer) -> SampleTokens:
    """Return batches of held-out text if the run's text can be read, else random ones, and always one random batch."""
    length = min(config.model.seq_len, _MAX_LENGTH)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (_ROWS, length)
    random = [torch.randint(0, tokenizer.vocab_size, shape, generator=generator) for _ in range(_BATCHES)]
    try:
        corpus = build_corpus(config.data, tokenizer=tokenizer, seq_len=config.model.seq_len)
    except TurnoutError:  # moved, or never there: the weights come from elsewhere
        return SampleTokens(batches=random, texts=[*_TEXTS], origin="random text")
    real = _held_out(corpus, length)
    texts = [tokenizer.decode(row.tolist()).decode("utf-8", "replace") for batch in real for row in batch]
    return SampleTokens(
        batches=[*real, *random[: _BATCHES - len(real)]],
        texts=[*_TEXTS, *texts],
        origin="held-out and random text",
    )


def _held_out(corpus: Corpus, length: int) -> list[Tensor]:
    """Return up to one batch less than all, from evenly spaced places of every domain."""
    rows = []
    for side in corpus.validation:
        starts = np.linspace(0, max(0, len(side.tokens) - length), _ROWS * (_BATCHES - 1)).astype(int)
        rows += [side.tokens[start : start + length].astype(np.int64) for start in starts]
    full = [torch.from_numpy(row) for row in rows if len(row) == length]
    every = max(1, len(full) // (_ROWS * (_BATCHES - 1)))
    chosen = full[::every][: _ROWS * (_BATCHES - 1)]
    return [torch.stack(chosen[i : i + _ROWS]) for i in range(0, len(chosen), _ROWS)]

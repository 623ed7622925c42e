"""Document folds for cross-validation: a pure function of the text, like the hash split. Imports no torch."""

import hashlib
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from trainer.config.base import Config, Problem
from trainer.config.numbers import Whole

MAX_FOLDS = 1000


class FoldConfig(Config):
    """One fold of a cross-validation: its documents are held out, and those of all other folds are learned."""

    index: Annotated[int, Field(ge=0, lt=MAX_FOLDS)]
    """Fold that is held out, from 0 to `of` - 1."""
    of: Annotated[int, Field(ge=2, le=MAX_FOLDS)]
    """Number of folds. Each document is in one of them: over all values of `index`, it is held out exactly once."""
    seed: Whole = 0
    """Seed of the hash that assigns documents to folds; another one draws other folds."""

    def problems(self) -> Iterator[Problem]:
        """Check that there is such a fold."""
        if self.index >= self.of:
            yield Problem("index", f"{self.index}, but the folds are 0 to {self.of - 1}; use one of those")


def fold_of(text: bytes, *, of: int, seed: int) -> int:
    """Return the fold of a text: the leading bits of its hash, scaled to 0 to `of` - 1.

    It depends on nothing but the text, prompt included: copies of a text are in the same fold, whatever files, shards
    and sources they are in, and a document keeps its fold when others are added, removed or reordered.
    """
    digest = hashlib.sha256(b"fold %d\n" % seed + text).digest()
    return int.from_bytes(digest[:8], "big") * of >> 64

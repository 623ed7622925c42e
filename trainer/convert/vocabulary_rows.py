"""Rows of an embedding or head under another tokenizer, carried over by piece.

    a piece of both vocabularies       its row
    any other piece                    the mean of the rows of the old pieces that its bytes encode to
    end of document, special tokens    the row of the old one, or of the same name
    what has no bytes and no namesake  the mean of all old rows: a random row of the head would be far too probable
                                       (Hewitt 2021, Initializing New Word Embeddings)

# V rows here, D d_model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trainer.convert.parent_tensors import ParentTensors
from trainer.data.tokenizers.base import Tokenizer

_BLOCK_ROWS: Final = 1024
_GAP: Final = 16  # rows that are read needlessly rather than by another read


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyMap:
    """The old rows whose mean each new row is."""

    sources: Sequence[Sequence[int]]
    """By new row; empty: the mean of the rows of all old ids."""
    num_old: int
    """Old ids."""
    note: str
    """Counts of rows by their sources, in words."""


def map_vocabulary(old: Tokenizer, new: Tokenizer, *, old_rows: int, new_rows: int) -> VocabularyMap:
    """Return the sources of each row under `new`; rows beyond the ids are taken from such rows in turn."""
    spare = range(old.vocab_size, old_rows)
    beyond = [[spare[i]] if i < len(spare) else [] for i in range(new_rows - new.vocab_size)]
    if old.fingerprint == new.fingerprint:
        same = [[i] for i in range(old.vocab_size)]
        note = f"{new_rows} rows of the vocabulary instead of {old_rows}, of which {old.vocab_size} are the tokenizer's"
        return VocabularyMap(sources=same + beyond, num_old=old.vocab_size, note=note)
    pieces: dict[bytes, int] = {}
    for i in range(old.vocab_size):
        if content := old.decode([i]):
            pieces.setdefault(content, i)
    old_special, new_special = old.special_tokens(), {i: name for name, i in new.special_tokens().items()}
    sources: list[Sequence[int]] = []
    found = dict.fromkeys(("pieces", "means", "special", "unknown"), 0)
    for i in range(new.vocab_size):
        content = new.decode([i])
        if i == new.end_of_document:
            sources.append([old.end_of_document])
            continue
        if content in pieces:
            kind, row = "pieces", [i if _has_bytes(old, i, content) else pieces[content]]
        elif content and (encoded := _encoded(old, pieces, content)):
            kind, row = "means", encoded
        elif (name := new_special.get(i)) in old_special:
            kind, row = "special", [old_special[name or ""]]
        else:
            kind, row = "unknown", []
        sources.append(row)
        found[kind] += 1
    note = (
        f"another tokenizer: of {new.vocab_size} pieces {found['pieces']} are pieces of the old vocabulary, "
        f"{found['means']} are means of such pieces, {found['special']} special tokens have the old ones' names, "
        f"{found['unknown']} are new and start from the mean of all; the end of document is kept"
    )
    return VocabularyMap(sources=sources + beyond, num_old=old.vocab_size, note=note)


class VocabularyRows:
    """Rows of a new embedding or head, from those of the old one."""

    def __init__(self, parent: ParentTensors, name: str, vocabulary: VocabularyMap) -> None:
        self._parent, self._name, self._vocabulary = parent, name, vocabulary
        self._mean: Tensor | None = None

    def rows(self, start: int, length: int) -> Tensor:
        """Return (length, D) new rows, in float64."""
        wanted = self._vocabulary.sources[start : start + length]
        pairs = sorted((old, here) for here, sources in enumerate(wanted) for old in sources)
        total = torch.zeros((length, *self._parent.tensors[self._name].shape[1:]), dtype=torch.float64)
        for some in _near(pairs):
            first, last = some[0][0], some[-1][0] + 1
            block = self._parent.read(self._name, first, last - first).double()
            old, here = (torch.tensor(column) for column in zip(*some, strict=True))
            total.index_add_(0, here, block[old - first])
        counts = torch.tensor([max(1, len(sources)) for sources in wanted], dtype=torch.float64)
        total /= counts[:, None]
        for here, sources in enumerate(wanted):
            if not sources:
                total[here] = self._mean_row()
        return total

    def _mean_row(self) -> Tensor:
        """Return (D,): the mean of the rows of all old ids."""
        if self._mean is None:
            num_old = self._vocabulary.num_old
            starts = range(0, num_old, _BLOCK_ROWS)
            blocks = (self._parent.read(self._name, s, min(_BLOCK_ROWS, num_old - s)).double().sum(0) for s in starts)
            self._mean = torch.stack(list(blocks)).sum(0) / num_old
        return self._mean


def _near(pairs: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    """Yield pairs of (old row, new row), sorted, in groups of old rows that are read together."""
    begin = 0
    for i in range(1, len(pairs) + 1):
        is_end = i == len(pairs)
        if is_end or pairs[i][0] - pairs[i - 1][0] > _GAP or pairs[i][0] - pairs[begin][0] >= _BLOCK_ROWS:
            yield pairs[begin:i]
            begin = i


def _has_bytes(tokenizer: Tokenizer, i: int, content: bytes) -> bool:
    return i < tokenizer.vocab_size and tokenizer.decode([i]) == content


def _encoded(old: Tokenizer, pieces: dict[bytes, int], content: bytes) -> list[int]:
    """Return the old pieces of some bytes: those of the text, or single bytes if it is no text."""
    try:
        return old.encode(content.decode()).tolist()
    except UnicodeDecodeError:
        return [pieces[bytes([byte])] for byte in content if bytes([byte]) in pieces]

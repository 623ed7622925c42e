"""Token ids of a rendered chat, in which the names of special tokens are those tokens, with the place of each in it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from trainer.data.tokenizers.base import Tokenizer, token_dtype


@dataclass(frozen=True, slots=True)
class RenderedTokens:
    """Ids of a text; `starts` and `ends` are the characters that each covers, at least in part. All are (T,)."""

    ids: NDArray[np.integer]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def overlapping(self, spans: tuple[tuple[int, int], ...]) -> NDArray[np.bool_]:
        """Return (T,): whether a token overlaps one of these ordered spans of characters."""
        mask = np.zeros(len(self.ids), dtype=np.bool_)
        for start, end in spans:
            first, last = np.searchsorted(self.ends, start, side="right"), np.searchsorted(self.starts, end)
            mask[first:last] = True
        return mask


def encode_rendered(
    tokenizer: Tokenizer, text: str, pattern: re.Pattern[str], *, break_mark: str = ""
) -> RenderedTokens:
    """Return the ids of `text` with special tokens, whose names have the pattern `names_pattern`.

    `break_mark` is a character inside of names that are text here, not tokens; it is not encoded, and places do not
    count it.
    """
    special = tokenizer.special_tokens()
    names = pattern.findall(text)
    pieces = pattern.split(text)
    if break_mark:
        pieces = [piece.replace(break_mark, "") for piece in pieces]
    encoded = tokenizer.encode_batch(pieces)
    num_bytes = tokenizer.token_bytes()
    ids: list[NDArray[np.integer]] = []
    sizes: list[NDArray[np.int64]] = []
    for piece, name in zip_longest(encoded, names):
        ids.append(piece)
        sizes.append(num_bytes[piece])
        if name is not None:
            ids.append(np.array([special[name]]))
            sizes.append(np.array([len(name.encode())]))
    content = np.frombuffer(text.replace(break_mark, "").encode() if break_mark else text.encode(), dtype=np.uint8)
    character = np.cumsum((content & 0xC0) != 0x80) - 1  # of each byte: all but continuation bytes begin one
    after = np.cumsum(np.concatenate(sizes), dtype=np.int64)
    before = after - np.concatenate(sizes)
    dtype = token_dtype(tokenizer.vocab_size)
    return RenderedTokens(np.concatenate(ids).astype(dtype), character[before], character[after - 1] + 1)


def names_pattern(names: Mapping[str, int]) -> re.Pattern[str]:
    """Return a pattern of the names, the longest first, as the library `tokenizers` finds them."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

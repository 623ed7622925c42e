"""Sort tokens by how they are written, since an expert may be for a kind of token that no list of words tells.

# N tokens, V distinct ones.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainer.report.measure_words import MIN_COUNT, Vocabulary
from trainer.report.routed_text import TextRows
from trainer.report.token_text import TokenText

KINDS: Final = (
    "line break",
    "space",
    "punctuation",
    "number",
    "capital letter",
    "beginning of a word",
    "inside of a word",
    "part of a character",
    "special token",
)
"""Every token is of one kind; a word that begins with a capital is of the kind `capital letter`."""
_BEGINS, _INSIDE = KINDS.index("beginning of a word"), KINDS.index("inside of a word")


@dataclass(frozen=True, slots=True)
class _Written:
    """How a token is written by itself."""

    kind: int
    begins_with_letter: bool
    ends_with_letter: bool


def token_kinds(text: TextRows, shown: TokenText) -> Vocabulary:
    """Return the kind of each token, as a vocabulary whose words are indices of `KINDS`."""
    flat, place, S = text.tokens.ravel(), text.place, text.tokens.shape[1]
    tokens, number = np.unique(flat, return_inverse=True)  # (V,), (R * S,)
    written = [_written(shown, int(token)) for token in tokens]
    kind = np.array([one.kind for one in written])[number]
    begins = np.array([one.begins_with_letter for one in written])[number]
    ends = np.array([one.ends_with_letter for one in written])[number]
    document = text.document.ravel()
    goes_on = np.roll(ends, 1) & (np.roll(document, 1) == document) & (np.arange(len(flat)) % S > 0)
    kind = np.where((kind == _BEGINS) & begins & goes_on, _INSIDE, kind)[place]
    return _vocabulary(kind)


def _vocabulary(kind: NDArray[np.int64]) -> Vocabulary:
    counts = np.bincount(kind, minlength=len(KINDS))
    frequent = np.flatnonzero(counts >= MIN_COUNT)
    number = np.full(len(KINDS), len(frequent))
    number[frequent] = np.arange(len(frequent))
    return Vocabulary(
        words=tuple((index,) for index in frequent.tolist()), code=number[kind], occurrences=counts[frequent]
    )


def _written(shown: TokenText, token: int) -> _Written:
    if shown.is_special(token):
        return _Written(KINDS.index("special token"), False, False)
    try:
        text = shown.bytes_of(token).decode()
    except UnicodeDecodeError:  # mostly of letters, as in a tokenizer of bytes
        return _Written(KINDS.index("part of a character"), False, True)
    letters = [character for character in text if character.isalpha()]
    if letters:
        name = "capital letter" if letters[0].isupper() else "beginning of a word"
    elif any(character.isnumeric() for character in text):
        name = "number"
    elif text.strip():
        name = "punctuation"
    else:
        name = "line break" if "\n" in text else "space"
    return _Written(KINDS.index(name), text[:1].isalpha(), text[-1:].isalpha())

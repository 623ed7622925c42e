"""Short reviews, good or bad: words alone do not tell, for there is "not dull" and "slow, but moving"."""

import random

from scripts.recipes.rows import Files, Row, split

ASPECTS = ("the plot", "the acting", "the music", "the ending", "the pace", "the camera work", "the cast", "the script")
GOOD = ("wonderful", "moving", "clever", "fresh", "charming", "gripping", "brilliant", "honest")
BAD = ("dull", "clumsy", "predictable", "tired", "noisy", "lazy", "shallow", "messy")
PLAIN = ("is", "is really", "is truly", "is often")
TURNED = ("is not", "is never", "is hardly", "is anything but")


def files(rng: random.Random) -> Files:
    """Return rows with `text` and `label`: 0 is bad, 1 good."""
    return split(rng, _row, lambda row: row["text"], train=3000, test=200)


def _row(rng: random.Random) -> Row:
    label = rng.randrange(2)
    first, second = rng.sample(ASPECTS, 2)
    form = rng.randrange(3)
    if form == 0:
        text = _clause(rng, first, label)
    elif form == 1:
        text = f"{_clause(rng, first, label)} and {_clause(rng, second, label)}"
    else:  # the last word counts
        text = f"{_clause(rng, first, 1 - label)}, but {_clause(rng, second, label)}"
    return {"text": f"{text[0].upper()}{text[1:]}.", "label": label}


def _clause(rng: random.Random, aspect: str, label: int) -> str:
    is_turned = rng.random() < 0.5
    words = GOOD if (label == 1) != is_turned else BAD
    return f"{aspect} {rng.choice(TURNED if is_turned else PLAIN)} {rng.choice(words)}"

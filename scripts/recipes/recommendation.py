"""Watch histories: each user keeps to one genre, and to the order of the parts of a series."""

import random

from scripts.recipes.rows import Files, Row, split

GENRES = {
    "space": ("Star Harbour", "Red Orbit", "Far Signal"),
    "crime": ("Cold Harbour", "Silent Street", "Last Witness"),
    "nature": ("Green Valley", "Deep Water", "High Ridge"),
    "kitchen": ("Salt and Fire", "Sweet Bread", "Slow Table"),
}
NUM_PARTS = 5
ITEMS = [f"{series} {part}" for genre in GENRES.values() for series in genre for part in range(1, NUM_PARTS + 1)]


def files(rng: random.Random) -> Files:
    """Return rows with `history`, `next` and `user`, and all items."""
    parts = split(rng, _row, lambda row: row["history"], train=4000, test=100)
    return {**parts, "items.txt": ITEMS}


def _row(rng: random.Random) -> Row:
    series = list(rng.choice(list(GENRES.values())))
    rng.shuffle(series)
    seen = dict.fromkeys(series, 0)
    watched: list[str] = []
    for _ in range(rng.randint(5, 9)):
        # Mostly on with what was begun first; then something new of the same kind.
        open_ones = [name for name in series if seen[name] < NUM_PARTS]
        name = open_ones[0] if rng.random() < 0.7 else rng.choice(open_ones)
        seen[name] += 1
        watched.append(f"{name} {seen[name]}")
    return {"user": rng.randrange(10_000), "history": "; ".join(watched[:-1]), "next": watched[-1]}

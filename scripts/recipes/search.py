"""The same words are looked for by different people: what somebody bought before tells which gloves are meant."""

import random

from scripts.recipes.rows import Files, Row, split

PEOPLE = {
    "cyclist": ("cycling", "bike", "road race"),
    "cook": ("kitchen", "oven", "chef"),
    "gardener": ("garden", "rose", "lawn"),
    "sailor": ("sailing", "deck", "harbour"),
    "painter": ("studio", "canvas", "oil paint"),
    "climber": ("climbing", "alpine", "glacier"),
}
THINGS = {
    "gloves": ("gloves", "mittens"),
    "bag": ("bag", "backpack"),
    "knife": ("knife", "blade"),
    "lamp": ("lamp", "light"),
    "shoes": ("shoes", "boots"),
    "book": ("book", "guide"),
    "stand": ("stand", "rack"),
    "brush": ("brush", "cleaning brush"),
}
COLOURS = ("black", "blue", "red", "green", "grey")


def files(rng: random.Random) -> Files:
    """Return rows with `user`, `query`, `document`; those of the test with ten `candidates` as well."""
    parts = split(rng, _row, lambda row: (row["user"], row["query"], row["document"]), train=5000, test=100)
    for row in parts["train.jsonl"]:
        del row["candidates"]
    return parts


def _row(rng: random.Random) -> Row:
    person, thing = rng.choice(list(PEOPLE)), rng.choice(list(THINGS))
    before = [_document(rng, person, rng.choice([t for t in THINGS if t != thing])) for _ in range(2)]
    document = _document(rng, person, thing)
    others: list[str] = []
    while len(others) < 9:
        # For others who ask the same, for the same person who asks something else, and neither.
        strangers, things = [p for p in PEOPLE if p != person], [t for t in THINGS if t != thing]
        kind = len(others) % 3
        other = _document(
            rng, person if kind == 1 else rng.choice(strangers), thing if kind == 0 else rng.choice(things)
        )
        if other not in others:
            others.append(other)
    candidates = [document, *others]
    rng.shuffle(candidates)
    return {"user": " and ".join(before), "query": thing, "document": document, "candidates": candidates}


def _document(rng: random.Random, person: str, thing: str) -> str:
    return f"{rng.choice(COLOURS)} {rng.choice(PEOPLE[person])} {rng.choice(THINGS[thing])}"

"""Select parameters by role or by pattern of names, as `train.freeze` and `train.lr_scale` do. Imports no torch."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from math import prod
from typing import Annotated, Final

from pydantic import Field

from trainer.config.nodes import shown
from trainer.config.wording import near
from trainer.errors import ConfigError

PatternText = Annotated[str, Field(min_length=1, max_length=201)]
"""A role, or a pattern of names; with an exclamation mark, an exception."""
_PATTERN = re.compile(r"[A-Za-z0-9_.*?\[\]-]{1,200}")
_FEED_FORWARD = {"router", "experts", "shared"}
_IS_OF: Final[dict[str, Callable[[list[str]], bool]]] = {
    "embedding": lambda parts: "embedding" in parts,
    "head": lambda parts: "head" in parts,
    "norms": lambda parts: any(part == "norm" or part.endswith("_norm") for part in parts),
    "attention": lambda parts: "attention" in parts,
    "router": lambda parts: "router" in parts,
    "experts": lambda parts: "experts" in parts,
    "shared": lambda parts: "shared" in parts,
    "dense": lambda parts: "ffn" in parts and not _FEED_FORWARD & set(parts),
}
"""Whether a parameter has a role, by the parts of its name. The norms of queries and keys are attention's too."""
_ELSEWHERE = {"expert": "experts", "norm": "norms", "routers": "router", "embeddings": "embedding", "lm_head": "head"}
TIED: Final = {"embedding.weight": "head.weight"}
"""Second name of the embedding that is also the head."""
TWICE: Final = (
    "embedding and head at once (model.tie_embeddings: true); list both embedding and head, or use "
    "model.tie_embeddings=false"
)
"""What to say of a tied embedding."""


def unknown_role(entry: str, *, may_except: bool = True) -> str | None:
    """Return what is wrong with an entry that is neither a role nor a pattern of names; None if nothing is.

    An entry that begins with an exclamation mark is an exception, where there may be some.
    """
    word = entry.removeprefix("!") if may_except else entry
    if not _PATTERN.fullmatch(word):
        allowed = "letters, digits, '.', '_', '-', '*', '?' and brackets"
        return f"{shown(entry)} is not a pattern of names; use at most 200 {allowed}, such as blocks.0.*"
    if word in _IS_OF or "." in word or "*" in word:
        return None
    meant = _ELSEWHERE.get(word) or near(word, list(_IS_OF), cutoff=0.6)
    hint = f"did you mean {meant}?" if meant else f"use one of {', '.join(_IS_OF)}, or a pattern such as {word}.*"
    return f"{word} is not a role of weights; {hint}"


def matches(entry: str, name: str) -> bool:
    """Return whether a role or pattern selects a parameter: by its name, or that of a module that it is in."""
    parts = name.split(".")
    if entry in _IS_OF:
        return _IS_OF[entry](parts)
    return any(fnmatchcase(module, entry) for module in accumulate(parts, "{}.{}".format))


def selected(entries: Iterable[str], name: str) -> bool:
    """Return whether any entry selects a parameter and no exception does."""
    entries = list(entries)
    excepted = any(matches(entry[1:], name) for entry in entries if entry.startswith("!"))
    return not excepted and any(matches(entry, name) for entry in entries if not entry.startswith("!"))


def factor_of(factors: Mapping[str, float], name: str) -> float:
    """Return the product of all factors whose entries match a parameter; 1 if none does."""
    return prod(factor for entry, factor in factors.items() if matches(entry, name))


def in_fewer_layers(entry: str, *, before: int, after: int) -> str:
    """Return an entry for a model with fewer layers: one of layers that are gone selects a layer at the same height."""
    mark, word = entry[: entry.startswith("!")], entry.removeprefix("!")
    blocks, _, rest = word.partition(".")
    layer, dot, inside = rest.partition(".")
    chosen = [number for number in range(before) if fnmatchcase(str(number), layer)]
    if blocks != "blocks" or not chosen or chosen[0] < after:
        return entry
    return f"{mark}blocks.{chosen[0] * after // before}{dot}{inside}"


def check_matches(key: str, entries: Iterable[str], names: Sequence[str], *, is_tied: bool) -> None:
    """Refuse an entry that matches no parameter.

    Raises:
        ConfigError: with the key and the first such entry.
    """
    every = [*names, *TIED.values()] if is_tied else names
    for entry in entries:
        if not any(matches(entry.removeprefix("!"), name) for name in every):
            raise ConfigError(f"{key}: {entry} matches no weight of this model; its weights are {_examples(names)}")


def check_selection(key: str, entries: Sequence[str], names: Sequence[str], *, is_tied: bool) -> None:
    """Refuse entries that match no parameter, or select only one of the two uses of a tied embedding.

    Raises:
        ConfigError: with the key and the first such entry.
    """
    check_matches(key, entries, names, is_tied=is_tied)
    for embedding, head in TIED.items() if is_tied else ():
        chosen = [name for name in (embedding, head) if selected(entries, name)]
        if len(chosen) == 1:
            raise ConfigError(f"{key}: selects {chosen[0]} alone, which is {TWICE}")


def _examples(names: Iterable[str]) -> str:
    """Return the kinds of names, one for all layers, for a message."""
    return ", ".join(kinds_of(names))


def kinds_of(names: Iterable[str]) -> list[str]:
    """Return names with * in place of numbers, each once."""
    return list(dict.fromkeys(_without_numbers(name) for name in names))


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))

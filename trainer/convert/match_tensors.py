"""Which tensor of another model each tensor of a new one is taken from, by name. Imports no torch."""

import re
from collections.abc import Collection, Iterable, Mapping

from trainer.checkpoint.init_from import InitFromConfig
from trainer.errors import ConfigError
from trainer.models.parameter_patterns import kinds_of, matches, selected
from trainer.models.parameter_roles import is_adapter

_HEAD, _EMBEDDING = "head.weight", "embedding.weight"


def match_tensors(
    init: InitFromConfig, theirs: Collection[str], ours: Iterable[str], *, born_here: Collection[str], where: str
) -> dict[str, str | None]:
    """Return the source of each of our tensors; None: its initial values.

    Args:
        init: the section, with what is excluded and renamed.
        theirs: names of the other model's tensors.
        ours: names of the new model's.
        born_here: those of ours that may be without a source.
        where: the other model, for messages.

    Raises:
        ConfigError: if a tensor has no place or no source and is not excluded, two have one place, or a pattern matches
            nothing.
    """
    ours = list(ours)
    _check_patterns(init, theirs, ours, where)
    places = _places(init, theirs, where)
    found: dict[str, str | None] = {}
    for name in ours:
        source = places.get(name)
        if source is None and name == _HEAD and _HEAD not in theirs and not _is_excluded(init, name):
            source = places.get(_EMBEDDING)  # the other model's head is its embedding
        if source is None and name not in born_here and not _is_excluded(init, name):
            raise ConfigError(_missing(name, theirs, where))
        found[name] = source
    for name, source in places.items():
        if name not in found and not _is_excluded(init, name):
            raise ConfigError(
                f"init_from: {where} has {source}"
                + ("" if name == source else f", here {name},")
                + f" and this model has no place for it; {_remedy(source)}"
            )
    return found


def _places(init: InitFromConfig, theirs: Iterable[str], where: str) -> dict[str, str]:
    """Return the name there of each tensor that is taken, by its name here.

    A renamed one is left out if both names are excluded: so a block that is dropped, or new, may have the number of one
    that moves.
    """
    places: dict[str, str] = {}
    for name in theirs:
        here = renamed(init.rename, name)
        if _is_excluded(init, name) and _is_excluded(init, here):
            continue
        if here in places:
            raise ConfigError(
                f"init_from.rename: {name} and {places[here]} of {where} would both be {here}; exclude one, or rename "
                "both"
            )
        places[here] = name
    return places


def renamed(renamings: Mapping[str, str], name: str) -> str:
    """Return the name here of a tensor there: by the first pattern that matches, or its own."""
    for old, new in renamings.items():
        if (match := _pattern(old).fullmatch(name)) is not None:
            parts = new.split("*")
            texts = [*match.groups()[: len(parts) - 1], ""]
            return "".join(part + text for part, text in zip(parts, texts, strict=True))
    return name


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(map(re.escape, text.split("*"))))


def _is_excluded(init: InitFromConfig, name: str) -> bool:
    return selected(init.exclude, name)


def _check_patterns(init: InitFromConfig, theirs: Iterable[str], ours: Iterable[str], where: str) -> None:
    theirs, ours = list(theirs), list(ours)
    for pattern in init.exclude:
        if not any(matches(pattern.removeprefix("!"), name) for name in [*theirs, *ours]):
            raise ConfigError(
                f"init_from.exclude: {pattern} matches no tensor of this model or of {where}; {_examples(ours)}"
            )
    for old in init.rename:
        if not any(_pattern(old).fullmatch(name) for name in theirs):
            raise ConfigError(f"init_from.rename: {old} matches no tensor of {where}; {_examples(theirs)}")


def _remedy(source: str) -> str:
    if is_adapter(source):  # without it the other model is the one before its adaptation
        return "keep model.lora as it is there, or merge it first: turnout surgery merge-lora RUN NAME"
    return f"leave it out by init_from.exclude: [{source}]"


def _examples(names: Iterable[str]) -> str:
    return f"its tensors are {', '.join(kinds_of(names))}"


def _missing(name: str, theirs: Collection[str], where: str) -> str:
    remedy = f"start it from initial values by init_from.exclude: [{name}], or say what it is there by rename"
    parts = name.split(".ffn.")
    if len(parts) == 2 and parts[1].startswith(("experts.", "router.")) and f"{parts[0]}.ffn.w_in.weight" in theirs:
        remedy = "its layer is dense there: make experts of it by `turnout upcycle`, whose run can then be named here"
    return f"init_from: {where} has no {name}; {remedy}"

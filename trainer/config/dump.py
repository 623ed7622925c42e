"""Write a configuration as YAML, and compare two configurations."""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, Final, NamedTuple

from trainer.config.base import Config
from trainer.config.nodes import MAX_SHOWN
from trainer.config.yaml_nodes import resolve


class _Absent:
    """Type of ABSENT."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT: Final = _Absent()
"""Value of a key that only the other configuration has: an option of another kind, an entry of a longer list."""


class Change(NamedTuple):
    """A key whose value differs between two configurations."""

    key: str
    """Dotted, as overrides write it."""
    old: Any
    """Plain value, or ABSENT."""
    new: Any
    """Plain value, or ABSENT."""

    def __str__(self) -> str:
        """Format as `key: old -> new`."""
        return f"{self.key}: {short(self.old)} -> {short(self.new)}"


def dump(config: Config) -> str:
    """Write a configuration as YAML with every key, in schema order.

    Reading it back gives an equal configuration, also with a YAML 1.1 reader.
    """
    return "".join(f"{line}\n" for line in _block(config.model_dump()))


def inline(value: Any) -> str:
    """Write a plain value as YAML on one line, in the form of an override."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            text = repr(value)
            # YAML 1.1 sees a number in 1.0e-05 but text in 1e-05.
            return text.replace("e", ".0e") if "e" in text and "." not in text else text
        case dict():
            return "{" + ", ".join(f"{_key(key)}: {inline(inner)}" for key, inner in _kind_first(value)) + "}"
        case list() | tuple():
            return "[" + ", ".join(inline(entry) for entry in value) + "]"
        case str():
            return value if _is_plain(value) else _quoted(value)
    return str(value)


def short(value: Any) -> str:
    """Write a plain value on one line, truncated for a message."""
    if value is ABSENT:
        return repr(value)
    text = inline(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def changed_keys(old: Config, new: Config) -> list[Change]:
    """Return every key whose value differs, in schema order."""
    return changed_values(old.model_dump(), new.model_dump())


def changed_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return every key whose value differs between two dumped configurations."""
    return list(_changes(dict(old), dict(new), ""))


def diff(old: Config, new: Config) -> list[str]:
    """Return `key: old -> new` for every key whose value differs."""
    return [str(change) for change in changed_keys(old, new)]


def _changes(old: Any, new: Any, key: str) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for part in {**old, **new}:
            yield from _changes(old.get(part, ABSENT), new.get(part, ABSENT), f"{key}.{part}".lstrip("."))
    elif _has_sections(old) and _has_sections(new):
        for index, (old_entry, new_entry) in enumerate(zip_longest(old, new, fillvalue=ABSENT)):
            yield from _changes(old_entry, new_entry, f"{key}.{index}")
    elif old != new:
        yield Change(key, old, new)


def _has_sections(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(entry, dict) for entry in value)


def _block(value: dict[str, Any]) -> Iterator[str]:
    for key, inner in _kind_first(value):
        if isinstance(inner, dict) and inner:
            yield f"{_key(key)}:"
            yield from (f"  {line}" for line in _block(inner))
        elif _has_sections(inner):
            yield f"{_key(key)}:"
            for entry in inner:
                lines = list(_block(entry)) if isinstance(entry, dict) and entry else [inline(entry)]
                yield from (f"{'    ' if i else '  - '}{line}" for i, line in enumerate(lines))
        else:
            yield f"{_key(key)}: {inline(inner)}"


def _kind_first(value: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(value.items(), key=lambda item: item[0] != "kind")


def _key(key: object) -> str:
    """Write a key; keys outside the schema, as in DeepSpeed's own sections, may be any text."""
    return inline(str(key))


def _is_plain(text: str) -> bool:
    """Return whether text needs no quotes in YAML 1.2 and 1.1, which has more words for true and false."""
    safe = text.isascii() and text[:1].isalpha() and text.replace("/", "").replace("_", "").replace(".", "").isalnum()
    return safe and resolve(text) == text and text.lower() not in {"y", "n", "yes", "no", "on", "off"}


def _quoted(text: str) -> str:
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else _escape(ord(c))) for c in text) + '"'


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

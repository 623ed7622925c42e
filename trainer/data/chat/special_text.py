"""Names of special tokens in the text of a conversation: they are text there, never tokens.

Whoever writes a message could otherwise end their turn and speak as the system. A character that occurs nowhere in the
conversation is put inside of each such name, the template renders that, and the tokenizer takes what is broken by it
as text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_MARKS: Final = range(0xF0000, 0xFFFFD)  # a private-use plane


def has_match(value: Any, pattern: re.Pattern[str]) -> bool:
    """Return whether a string or key of a JSON value has a match."""
    return any(pattern.search(text) for text in _strings(value))


def unused_character(value: Any) -> str:
    """Return a private-use character that no string of a JSON value has."""
    used = {ord(character) for text in _strings(value) if not text.isascii() for character in text}
    return next(chr(code) for code in _MARKS if code not in used)


def broken(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    """Return a JSON value with `mark` after the first character of each match in its strings and keys."""
    if isinstance(value, str):
        while pattern.search(value):  # a name that overlapped with one that is broken now
            value = pattern.sub(lambda name: f"{name[0][0]}{mark}{name[0][1:]}", value)
        return value
    if isinstance(value, Mapping):
        return {broken(key, pattern, mark): broken(item, pattern, mark) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [broken(item, pattern, mark) for item in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)

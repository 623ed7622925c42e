"""Build what a section describes; a plug-in that cannot be built is a config error. Imports no torch."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from trainer.config.base import Config
from trainer.config.plugins import kinds
from trainer.errors import ConfigError, TurnoutError, first_line, is_out_of_memory

Built = TypeVar("Built")


def is_plugin(section: Config) -> bool:
    """Return whether a section is a plug-in's."""
    return not kinds(type(section))


@contextmanager
def plugin_errors(section: Config, where: str) -> Iterator[None]:
    """Convert errors of a plug-in's code; those of this project, of memory and of built-in kinds stay.

    Raises:
        ConfigError: in place of the error, starting with `where`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TurnoutError) or is_out_of_memory(error) or not is_plugin(section):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        raise ConfigError(f"{where} raised {type(error).__name__}: {first_line(error)} ({place})") from error


def build_plugin(section: Config, expected: type[Built], key: str, *values: Any, **options: Any) -> Built:
    """Call a section's `build` with these arguments.

    Args:
        section: of a plug-in or a built-in kind.
        expected: class of the result.
        key: key of the section, for the error message; may be empty.
        values: positional arguments.
        options: keyword arguments.

    Raises:
        ConfigError: if the `build` of a plug-in raises, or returns something else.
    """
    where = f"{f'{key}: ' if key else ''}{getattr(section, 'kind', '')}.build"
    with plugin_errors(section, where):
        found = section.build(*values, **options)  # type: ignore[attr-defined] - every kind has it
    if not isinstance(found, expected):
        wanted = f"{expected.__module__}.{expected.__qualname__}"
        what = "None" if found is None else f"a {type(found).__qualname__}"
        raise ConfigError(f"{where} returned {what}, not a {wanted}")
    return found

"""Check, before anything starts, that the packages a config needs are installed."""

from collections.abc import Iterator

from trainer.config.base import Config
from trainer.errors import ConfigError
from trainer.packages import is_installed, missing


def check_packages(config: Config, *, at: str = "") -> None:
    """Refuse a config that needs packages which are not installed.

    Args:
        config: all of an experiment or one section of it.
        at: key of the section.

    Raises:
        ConfigError: with a line and a command for each key.
    """
    lines = [
        f"{missing(package, user=key)}, or change this key"
        for key, package in _packages(config, at)
        if not is_installed(package)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def _packages(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, package) of a section and of every section below it."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _packages(item, f"{key}.{index}")
    elif isinstance(value, Config):
        for own_key, package in value.packages():
            yield f"{key}.{own_key}".lstrip("."), package
        for name in type(value).model_fields:
            yield from _packages(getattr(value, name), f"{key}.{name}".lstrip("."))

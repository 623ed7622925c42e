"""Configs that come with the package: a command finds them by name, in any folder."""

from pathlib import Path
from typing import Final

from trainer.config.base import expand_home
from trainer.config.nodes import shown_path
from trainer.errors import ConfigError

FOLDER: Final = Path(__file__).parents[1] / "configs"
"""In a clone a link to the repository's own configs/."""
SCHEMA: Final = FOLDER / "schema.json"


def shipped_names() -> list[str]:
    """Return the names of the configs, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def as_config(text: str) -> Path:
    """Return the path that an argument names: a file or a folder or, if there is none, a shipped config."""
    path = Path(expand_home(text))
    return FOLDER / f"{text}.yaml" if text in shipped_names() and not path.exists() else path


def check_name(path: Path) -> None:
    """Refuse a bare name that is neither a file, nor nearly one, nor a shipped config."""
    is_bare = path.name == str(path) and not path.suffix
    if is_bare and not path.exists() and not path.with_suffix(".yaml").exists():
        raise ConfigError(
            f"{shown_path(str(path))}: no such file, and no config of the package; those are "
            f"{', '.join(shipped_names())}; `turnout init NAME` writes a first one of your own"
        )

"""A published model by its name: its folder in the hub's cache on this machine, downloaded if it is not there."""

import logging
import re
from pathlib import Path
from typing import Final

from trainer.config.nodes import shown, shown_path
from trainer.errors import DataError, first_line
from trainer.packages import importing

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_WANTED: Final = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]


def local_folder(given: str) -> Path:
    """Return the folder that an argument names: a folder here, or OWNER/NAME on the hub.

    Raises:
        DataError: if it is neither, or the hub cannot be reached.
        ConfigError: if huggingface_hub is not installed.
    """
    path = Path(given).expanduser()
    if path.exists():
        return path
    if not _NAME.fullmatch(given):
        raise DataError(
            f"{shown_path(given)}: no such folder; give that of a published model, or OWNER/NAME of the hub"
        )
    with importing("huggingface_hub", user=f"{given} (no folder here, so a name on the hub)"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        return Path(snapshot_download(given, allow_patterns=_WANTED))
    except MemoryError:
        raise
    except Exception as error:  # of any HTTP client
        raise DataError(
            f"{shown(given)[1:-1]}: is no folder here, and cannot be fetched from the hub ({first_line(error):.150}); "
            "check the name and the network, or give a folder that was downloaded elsewhere"
        ) from None

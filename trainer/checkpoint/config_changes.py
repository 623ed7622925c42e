"""Decide whether a run may continue under a changed config. Imports no torch, so that a refusal is immediate."""

import re
from collections.abc import Iterable

from trainer.checkpoint.run_folder import RunFolder
from trainer.config.dump import ABSENT, Change, inline
from trainer.errors import ConfigError

_MODEL_KEYS = ("model.", "data.tokenizer")
_COMPARED_BY_CONTENT = "data.tokenizer.path"
_LEARNING_KEYS = ("seed", "data.", "optim.", "schedule.", "train.")
_HARMLESS_KEYS = (
    "train.steps",
    "train.stop_after",
    "train.max_consecutive_skips",
    "train.early_stopping",
    "data.cache_dir",
    "data.workers",
    "data.changed",
)
_ORDER_KEYS = re.compile(r"seed|data\.(mixture\..*|packing|sources\.\d+\.weight)")
"""Keys that determine the order of the rows, besides the text."""
_SHARE_KEYS = re.compile(r"data\.(mixture\..*|sources\.\d+\.weight)")
"""Those of them that only change which domain comes next."""
_TEXT_KEYS = re.compile(r"data\.(split\..*|fold(\..*)?|sources\.(?!\d+\.weight$).*)")
_BATCH_KEY, _FREEZE_KEY, _EMA_KEY = "train.global_batch_size", "train.freeze", "train.ema"


def check_belongs(
    folder: RunFolder, changes: Iterable[Change], *, goes_on: bool = True, may_read_other_text: bool = False
) -> list[str]:
    """Check the changes between the config that a run folder was started with and the current one.

    With `goes_on` the run resumes from a checkpoint, so some text has been read under the old config. With
    `may_read_other_text` (`data.changed`) each domain goes on where it was, once the text is another.

    Returns:
        A warning for each change of what is learned, and one about the order of the rows if that changes.

    Raises:
        ConfigError: if the model itself changed; one line for each key.
    """
    changes = list(changes)
    new_kinds = {change.key.rpartition(".")[0] for change in changes if change.key.endswith(".kind")}
    refused, warnings = [], []
    for key, old, new in changes:
        is_of_other_kind = ABSENT in (old, new) and key.rpartition(".")[0] in new_kinds
        if is_of_other_kind or key == _COMPARED_BY_CONTENT:  # the line about the kind is enough
            continue
        if key == "model" or key.startswith(_MODEL_KEYS):
            refused.append(
                f"{folder.path}: was written with {key} {inline(old)}, the config has {inline(new)}; "
                f"set '{key}={inline(old)}', or use a new name=..."
            )
        elif key.startswith(_LEARNING_KEYS) and not key.startswith(_HARMLESS_KEYS):
            meaning = _meaning(key, new) if goes_on else ""
            warnings.append(f"{key} was {inline(old)} in {folder.path} and is now {inline(new)}{meaning}")
    if refused:
        raise ConfigError("\n".join(refused))
    if goes_on and any(key.partition(".")[0] == "init_from" and new not in (None, ABSENT) for key, _, new in changes):
        warnings.append(
            f"init_from is not what it was in {folder.path}, and is not read: the run has weights of its own and goes "
            "on from them; use a new name=... to begin with others"
        )
    keys = [change.key for change in changes]
    if may_read_other_text and any(map(_TEXT_KEYS.fullmatch, keys)):  # the run says so when it has read the text
        keys = [key for key in keys if not _SHARE_KEYS.fullmatch(key)]
    return [*warnings, *(order_warnings(keys) if goes_on else [])]


def _meaning(key: str, new: object) -> str:
    """Return what a change means for a run that goes on, as the end of its warning."""
    if key == _BATCH_KEY:
        return f"; the rows keep their order, {inline(new)} a step"
    if key == _FREEZE_KEY:
        return "; weights that learn from here on start without moments, and those that no longer do lose theirs"
    if key == _EMA_KEY:
        return "; the average is dropped" if new is None else "; the average begins at the weights of the checkpoint"
    return ""


def order_warnings(changed: Iterable[str]) -> list[str]:
    """Return a warning if any of these keys changes the order of the rows of a run that resumes."""
    keys = [key for key in changed if _ORDER_KEYS.fullmatch(key)]
    if not keys:
        return []
    return [
        f"{', '.join(keys)}: from here on the order of the rows changes: in the current epoch some documents are read "
        f"again and others are left out; set {'it' if len(keys) == 1 else 'them'} back, or use a new name=..., to "
        "read each once"
    ]

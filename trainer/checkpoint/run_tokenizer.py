"""Tokenizer in a run's folder, so that a resumed run encodes text to the same ids.

It is used once there is a checkpoint, which records its fingerprint; until then every start overwrites it.
"""

from pathlib import Path

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import abridged
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.nodes import shown_path
from trainer.data.config import DataConfig
from trainer.data.corpus import build_tokenizer
from trainer.data.token_cache.build_cache import IngestProgress
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.hf_files import (
    OPTIONS,
    TOKENIZER,
    parse_json_object,
    read_tokenizer_file,
    stated_end_of_document,
)
from trainer.errors import CheckpointError, ResourceError

_ADVICE = "restore it, or remove it to use data.tokenizer if that is still the same"


def fingerprint_in_use(folder: RunFolder) -> str | None:
    """Return the tokenizer fingerprint that the newest checkpoint records; None if none does."""
    checkpoints = CheckpointFolder(folder.checkpoints)
    for step in reversed(checkpoints.steps()):
        try:
            fingerprint = checkpoints.manifest(step).run.get("tokenizer_fingerprint")
        except (CheckpointError, ResourceError):  # reported when it is loaded
            continue
        if isinstance(fingerprint, str):
            return fingerprint
    return None


def save_tokenizer(folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's files into the run folder."""
    for name, text in tokenizer.files().items():
        folder.write(folder.path / name, text)


def tokenizer_of(
    folder: RunFolder, data: DataConfig, *, fingerprint: str | None, progress: IngestProgress | None = None
) -> Tokenizer:
    """Return a run's own tokenizer, or the one that `data`, its config's section, names if it has none.

    `fingerprint` is of the tokenizer that its checkpoints were trained with; None if it has no checkpoint. `progress`
    is of training a new tokenizer.

    Raises:
        CheckpointError: if the run's own tokenizer is damaged, or is gone and `data` gives another one.
        DataError: if the run has none of its own and the one that `data` names is unusable.
    """
    own = None
    if fingerprint is not None and data.tokenizer.kind != "byte":  # the byte tokenizer is code, without files
        own = _read_own(folder, fingerprint=fingerprint)
    tokenizer = own or build_tokenizer(data, progress=progress)
    if fingerprint not in (None, tokenizer.fingerprint):
        raise CheckpointError(
            f"{folder.checkpoints}: was trained with another tokenizer than data.tokenizer gives (fingerprint "
            f"{abridged(fingerprint)}, now {abridged(tokenizer.fingerprint)}), and {folder.tokenizer} is gone; restore "
            "it, or use a new name=..."
        )
    return tokenizer


def check_given(folder: RunFolder, data: DataConfig, tokenizer: Tokenizer) -> None:
    """Check that the file that `data` names, if it exists, is still the tokenizer of the run.

    Raises:
        CheckpointError: if the file has changed.
        DataError: if the file is unusable now.
    """
    section = data.tokenizer
    if section.kind != "file" or not Path(section.path).exists():
        return
    given = section.build().fingerprint
    if given != tokenizer.fingerprint:
        raise CheckpointError(
            f"{folder.tokenizer}: is the tokenizer of this run, and {shown_path(section.path)} is another one "
            f"(fingerprint {abridged(tokenizer.fingerprint)}, now {abridged(given)}); restore that file, or use a new "
            "name=..."
        )


def _read_own(folder: RunFolder, *, fingerprint: str) -> Tokenizer | None:
    """Return the tokenizer in the run folder after comparing its fingerprint; None if its files are gone."""
    from trainer.data.tokenizers.subword import SubwordTokenizer, tokenizer_fingerprint

    try:
        text, options = (read_tokenizer_file(folder.path / name, through_links=False) for name in (TOKENIZER, OPTIONS))
        end = stated_end_of_document(parse_json_object(options)) or ""
        now = tokenizer_fingerprint(text, end)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise CheckpointError(f"{folder.tokenizer}: cannot be read ({reason}); {_ADVICE}") from None
    if now != fingerprint:
        raise CheckpointError(
            f"{folder.tokenizer}: is not the tokenizer that {folder.checkpoints} were trained with (fingerprint "
            f"{abridged(now)}, theirs {abridged(fingerprint)}); {_ADVICE}"
        )
    return SubwordTokenizer(text, end)

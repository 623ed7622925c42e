"""A tokenizer on its way from rank 0 to the others, which need no file of it: as the text of its files."""

from typing import Any

from trainer.data.config import DataConfig
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.data.tokenizers.folder import OPTIONS, TOKENIZER, parse, stated_end
from trainer.errors import DataError


def to_plain(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what `of_plain` needs."""
    return {"fingerprint": tokenizer.fingerprint, "files": dict(tokenizer.files())}


def of_plain(value: dict[str, Any], data: DataConfig) -> Tokenizer:
    """Return the same tokenizer.

    One of a kind that is neither bytes nor subword units, which somebody has added, is made of the config here as well.

    Args:
        value: what `to_plain` returned.
        data: the `data` section.

    Raises:
        DataError: if the config gives another tokenizer here than on rank 0.
    """
    fingerprint, files = value["fingerprint"], value["files"]
    if fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    from trainer.data.tokenizers.subword import SubwordTokenizer, fingerprint_of  # its library, for whom uses it only

    text, end = files[TOKENIZER], stated_end(parse(files[OPTIONS])) or ""
    if fingerprint == fingerprint_of(text, end):
        return SubwordTokenizer(text, end)
    tokenizer = data.tokenizer.build(data)
    if tokenizer.fingerprint != fingerprint:
        raise DataError("data.tokenizer: gives another tokenizer here than on rank 0; all ranks need the same files")
    return tokenizer

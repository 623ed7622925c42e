"""Transfer of a tokenizer from rank 0 to ranks that may not have its files."""

from typing import Any

from trainer.data.config import DataConfig
from trainer.data.corpus import build_tokenizer
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.data.tokenizers.hf_files import OPTIONS, TOKENIZER, parse_json_object, stated_end_of_document
from trainer.errors import DataError


def tokenizer_to_plain(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer as JSON values for `tokenizer_from_plain`."""
    return {"fingerprint": tokenizer.fingerprint, "files": dict(tokenizer.files())}


def tokenizer_from_plain(value: dict[str, Any], data: DataConfig) -> Tokenizer:
    """Restore a tokenizer from its files, or rebuild it from the config if it is of a kind unknown here.

    Raises DataError if the config gives another tokenizer here than on rank 0.
    """
    fingerprint, files = value["fingerprint"], value["files"]
    if fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    from trainer.data.tokenizers.subword import SubwordTokenizer, tokenizer_fingerprint  # needs `tokenizers`

    text, end = files[TOKENIZER], stated_end_of_document(parse_json_object(files[OPTIONS])) or ""
    if fingerprint == tokenizer_fingerprint(text, end):
        return SubwordTokenizer(text, end)
    tokenizer = build_tokenizer(data)
    if tokenizer.fingerprint != fingerprint:
        raise DataError("data.tokenizer: gives another tokenizer here than on rank 0; all ranks need the same files")
    return tokenizer

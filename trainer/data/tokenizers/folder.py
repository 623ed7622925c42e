"""A tokenizer as files in Hugging Face's form: tokenizer.json, and beside it what ends a document."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.atomic_io import open_regular

TOKENIZER, OPTIONS = "tokenizer.json", "tokenizer_config.json"
END_OF_DOCUMENT = "<|endoftext|>"
"""End-of-document token of the tokenizers that are trained here."""

_LARGEST_BYTES = 256 << 20


def folder_of(text: str, end_of_document: str) -> Mapping[str, str]:
    """Return the files of a tokenizer, from the text of its tokenizer.json."""
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_document,
        "clean_up_tokenization_spaces": False,
    }
    return {TOKENIZER: text, OPTIONS: json.dumps(options, indent=1) + "\n"}


def read_text(path: Path, *, through_links: bool) -> str:
    """Return a file's text.

    Raises:
        OSError: if it cannot be read, or is no file.
        ValueError: if it is too large, or not UTF-8.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY, through_links=through_links), "rb") as file:
        content = file.read(_LARGEST_BYTES + 1)
    if len(content) > _LARGEST_BYTES:
        raise ValueError(f"it has more than {_LARGEST_BYTES >> 20} MiB")
    return content.decode("utf-8")


def parse(text: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ValueError: if it holds none.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def stated_end(options: Mapping[str, Any]) -> str | None:
    """Return the token that a tokenizer_config.json or special_tokens_map.json names as the end of a text."""
    token = options.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None

"""Files of a tokenizer in Hugging Face's format: tokenizer.json, and the end of document in a second file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.atomic_io import open_regular

TOKENIZER, OPTIONS = "tokenizer.json", "tokenizer_config.json"
END_OF_DOCUMENT = "<|endoftext|>"  # end-of-document token of byte tokenizers and trained tokenizers
CHAT_MARKERS = ("<|im_start|>", "<|im_end|>")  # around a message, in ChatML

_MAX_BYTES = 256 << 20


def hf_files(text: str, end_of_document: str) -> Mapping[str, str]:
    """Return the files of a tokenizer, given the text of its tokenizer.json."""
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_document,
        "clean_up_tokenization_spaces": False,
    }
    return {TOKENIZER: text, OPTIONS: json.dumps(options, indent=1) + "\n"}


def read_tokenizer_file(path: Path, *, through_links: bool) -> str:
    """Return the text of a regular file, or raise OSError; raise ValueError if it is too large or not UTF-8."""
    with os.fdopen(open_regular(path, os.O_RDONLY, through_links=through_links), "rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
    return content.decode("utf-8")


def parse_json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; raise ValueError if the text is anything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def stated_end_of_document(options: Mapping[str, Any]) -> str | None:
    """Return the eos_token of a parsed tokenizer_config.json or special_tokens_map.json; None if it has none."""
    return stated_token(options, "eos_token")


def stated_token(options: Mapping[str, Any], name: str) -> str | None:
    """Return a token that a parsed file names; None if it names none."""
    token = options.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None

"""Tokenizers from a tokenizer.json, or a local Hugging Face folder with one."""

import json
from pathlib import Path
from typing import Any

from trainer.atomic_io import NotRegular
from trainer.config.nodes import shown, shown_path
from trainer.data.tokenizers.hf_files import (
    OPTIONS,
    TOKENIZER,
    parse_json_object,
    read_tokenizer_file,
    stated_end_of_document,
)
from trainer.data.tokenizers.lossless import UnsuitableTokenizer, make_lossless
from trainer.data.tokenizers.subword import SubwordTokenizer
from trainer.errors import DataError, MissingFile

_COMMON_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|end\u2581of\u2581sentence|>", "</s>", "<eos>", "[EOS]")
"""GPT-2 and Qwen; Llama 3; DeepSeek; Llama 2 and Mistral; Gemma; others."""
_MAX_LISTED = 8


def read_tokenizer(path: Path, *, end_of_document: str | None) -> SubwordTokenizer:
    """Read a tokenizer.json, or that of a folder, and make it lossless.

    Without `end_of_document`, it is the eos_token of the folder, else a well-known name. Raises DataError if the file
    is missing or damaged, cannot be made lossless, or has no such token.
    """
    file = path / TOKENIZER if path.is_dir() else path
    content = _content(file)
    try:
        end = _end_of_document(file, content, end_of_document)
        lossless = make_lossless(content, end_of_document=end)
        return SubwordTokenizer(json.dumps(lossless, ensure_ascii=False, indent=1), end)
    except UnsuitableTokenizer as error:
        raise DataError(
            f"{shown_path(file)}: {error}; a text must come back byte for byte; use a byte-level tokenizer (GPT-2, "
            "Llama 3, Qwen) or one that falls back to bytes (Llama 2, Mistral, Gemma)"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        message = f"{shown_path(file)}: is not a tokenizer.json ({reason}); it may be damaged: download it again"
        raise DataError(message) from None


def _content(file: Path) -> dict[str, Any]:
    name = shown_path(file)
    try:
        return parse_json_object(read_tokenizer_file(file, through_links=True))
    except NotRegular:
        message = f"{name}: is not a regular file; a tokenizer.json is needed; correct data.tokenizer.path"
        raise DataError(message) from None
    except FileNotFoundError:
        if file.parent.is_dir() and file.name == TOKENIZER:
            advice = "write one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        else:
            advice = f"a tokenizer.json or a folder with one is needed; paths are relative to {Path.cwd()}"
        raise MissingFile(f"{name}: no such file; {advice}") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); make it readable") from None
    except ValueError as error:
        raise DataError(f"{name}: cannot be read ({error}); it may be damaged: download it again") from None


def _end_of_document(file: Path, content: dict[str, Any], wanted: str | None) -> str:
    tokens = [token["content"] for token in content["added_tokens"]]
    listed = ", ".join(map(shown, tokens[:_MAX_LISTED])) + (", ..." if len(tokens) > _MAX_LISTED else "")
    if wanted is not None:
        if wanted not in tokens:
            raise DataError(
                f"{shown_path(file)}: has no added token {shown(wanted)} (data.tokenizer.end_of_document); it has "
                f"{listed or 'none'}; name one of them"
            )
        return wanted
    options = [file.parent / name for name in (OPTIONS, "special_tokens_map.json")] if file.name == TOKENIZER else []
    stated = [stated_end_of_document(_content(path)) for path in options if path.exists()]
    for name in (*stated, *_COMMON_END_TOKENS):
        if name is not None and name in tokens:
            return name
    raise DataError(
        f"{shown_path(file)}: does not name the token that ends a document; its added tokens are {listed or 'none'}; "
        "one must stand between documents: set data.tokenizer.end_of_document"
    )

"""A tokenizer that somebody has made: a tokenizer.json, or a local folder of Hugging Face's with one."""

import json
from pathlib import Path
from typing import Any

from trainer.atomic_io import NotRegular
from trainer.config.nodes import shown, shown_path
from trainer.data.tokenizers.exact import Unsuitable, made_exact
from trainer.data.tokenizers.folder import OPTIONS, TOKENIZER, parse, read_text, stated_end
from trainer.data.tokenizers.subword import SubwordTokenizer
from trainer.errors import DataError, MissingFile

_KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|end\u2581of\u2581sentence|>", "</s>", "<eos>", "[EOS]")
"""GPT-2 and Qwen; Llama 3; DeepSeek; Llama 2 and Mistral; Gemma; others."""
_MOST_SHOWN = 8


def read_tokenizer(path: Path, *, end_of_document: str | None) -> SubwordTokenizer:
    """Return the tokenizer of a tokenizer.json or of the folder it is in.

    Args:
        path: of either.
        end_of_document: name of the token that stands between documents. None: what the folder calls its eos_token,
            else a name that is well known.

    Raises:
        DataError: if there is none, it is damaged, it does not keep every character, or it has no such token.
    """
    file = path / TOKENIZER if path.is_dir() else path
    content = _content(file)
    try:
        end = _end_of_document(file, content, end_of_document)
        exact = made_exact(content, end_of_document=end)
        return SubwordTokenizer(json.dumps(exact, ensure_ascii=False, indent=1), end)
    except Unsuitable as error:
        raise DataError(
            f"{shown_path(file)}: {error}; a text must come back byte for byte; use a byte-level tokenizer (GPT-2, "
            "Llama 3, Qwen) or one that falls back to bytes (Llama 2, Mistral, Gemma)"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise DataError(
            f"{shown_path(file)}: is no tokenizer.json ({reason}); it may be damaged: fetch it anew"
        ) from None


def _content(file: Path) -> dict[str, Any]:
    name = shown_path(file)
    try:
        return parse(read_text(file, through_links=True))
    except NotRegular:
        raise DataError(
            f"{name}: is no regular file; a tokenizer.json is needed; correct data.tokenizer.path"
        ) from None
    except FileNotFoundError:
        if file.parent.is_dir() and file.name == TOKENIZER:
            advice = "write one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        else:
            advice = f"a tokenizer.json or a folder with one is needed; paths are relative to {Path.cwd()}"
        raise MissingFile(f"{name}: no such file; {advice}") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); make it readable") from None
    except ValueError as error:
        raise DataError(f"{name}: cannot be read ({error}); it may be damaged: fetch it anew") from None


def _end_of_document(file: Path, content: dict[str, Any], wanted: str | None) -> str:
    """Return the name of the token that stands between documents.

    Raises:
        DataError: if there is none.
    """
    tokens = [token["content"] for token in content["added_tokens"]]
    has = ", ".join(map(shown, tokens[:_MOST_SHOWN])) + (", ..." if len(tokens) > _MOST_SHOWN else "")
    if wanted is not None:
        if wanted not in tokens:
            raise DataError(
                f"{shown_path(file)}: has no added token {shown(wanted)} (data.tokenizer.end_of_document); it has "
                f"{has or 'none'}; name one of them"
            )
        return wanted
    beside = [file.parent / name for name in (OPTIONS, "special_tokens_map.json")] if file.name == TOKENIZER else []
    stated = [stated_end(_content(path)) for path in beside if path.exists()]
    for name in (*stated, *_KNOWN_ENDS):
        if name is not None and name in tokens:
            return name
    raise DataError(
        f"{shown_path(file)}: does not say which token ends a document; its added tokens are {has or 'none'}; one must "
        "stand between documents: name it as data.tokenizer.end_of_document"
    )

"""The chat template of a run: a file, that of its tokenizer's folder, or one of ours."""

import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from trainer.atomic_io import NotRegular
from trainer.config.nodes import shown, shown_path
from trainer.data.chat.chat_template import ChatTemplate, ChatTemplateError
from trainer.data.chat.config import ChatTemplateConfig
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.hf_files import (
    CHAT_MARKERS,
    OPTIONS,
    parse_json_object,
    read_tokenizer_file,
    stated_token,
)
from trainer.data.tokenizers.registry import FileTokenizerConfig, TokenizerOptions

TEMPLATE: Final = "chat_template.jinja"
SPECIAL_TOKENS: Final = "special_tokens_map.json"
_DEFAULT: Final = "default"
_NEEDED: Final = {"byte": ("<|system|>", "<|end|>"), "chatml": CHAT_MARKERS}
"""Special tokens of a tokenizer that a builtin template is for."""


def find_template(config: ChatTemplateConfig, options: TokenizerOptions, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template that `data.chat_template` names, for the tokenizer of `data.tokenizer`.

    Raises:
        ChatTemplateError: if there is none, or it cannot be read.
    """
    folder = folder_of(options)
    tokens = special_tokens_in(folder) if folder else {}
    special = tokenizer.special_tokens()
    end = next((name for name, index in special.items() if index == tokenizer.end_of_document), "")  # "": a plug-in's
    tokens = {"eos_token": end} | tokens
    text, name = _text(config, folder, tokenizer)
    return ChatTemplate(text, special_tokens=tokens, name=name, today=config.today)


def builtin_for(tokenizer: Tokenizer) -> str | None:
    """Return the name of the builtin template that a tokenizer has special tokens for."""
    special = tokenizer.special_tokens()
    return next((name for name, needed in _NEEDED.items() if all(token in special for token in needed)), None)


def builtin_text(name: str) -> str:
    """Return a builtin template."""
    return (files("trainer.data.chat") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def folder_of(options: TokenizerOptions) -> Path | None:
    """Return the folder that a tokenizer is read from, which may have a template."""
    if not isinstance(options, FileTokenizerConfig):
        return None
    path = Path(options.path)
    return path if path.is_dir() else path.parent


def template_in(folder: Path) -> str | None:
    """Return the template of a folder of transformers: a file, or a key of tokenizer_config.json. None: it has none.

    Raises:
        ChatTemplateError: if it has several and none is the default one.
    """
    with suppress(OSError, ValueError):
        return read_tokenizer_file(folder / TEMPLATE, through_links=True)
    with suppress(OSError, ValueError):
        stated = parse_json_object(read_tokenizer_file(folder / OPTIONS, through_links=True)).get("chat_template")
        if isinstance(stated, str):
            return stated
        if isinstance(stated, list):
            return _default(folder, [entry for entry in stated if isinstance(entry, dict)])
    return None


def special_tokens_in(folder: Path) -> dict[str, str]:
    """Return `bos_token`, `eos_token`, ... of a folder of transformers, as far as it names them."""
    found: dict[str, str] = {}
    for name in (SPECIAL_TOKENS, OPTIONS):
        with suppress(OSError, ValueError):
            content = parse_json_object(read_tokenizer_file(folder / name, through_links=True))
            tokens = {key: stated_token(content, key) for key in content if key.endswith("_token")}
            found |= {key: token for key, token in tokens.items() if token is not None}
    return found


def template_files(template: ChatTemplate) -> Mapping[str, str]:
    """Return text by file name: what `template_in` and `special_tokens_in` read."""
    return {TEMPLATE: template.text, SPECIAL_TOKENS: json.dumps(template.special_tokens, indent=1) + "\n"}


def _text(config: ChatTemplateConfig, folder: Path | None, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return a template and its name."""
    if config.path is not None:
        return _read(Path(config.path)), shown_path(config.path)
    if config.builtin is None and folder is not None and (text := template_in(folder)) is not None:
        return text, shown_path(folder / TEMPLATE)
    name = builtin_for(tokenizer)
    if config.builtin is not None and config.builtin != name:
        needed = ", ".join(_NEEDED[config.builtin])
        raise ChatTemplateError(
            f"data.chat_template.builtin: {config.builtin} needs a tokenizer with the special tokens {needed}, which "
            f"data.tokenizer lacks; {_advice(name)}"
        )
    if name is None:
        where = "" if folder is None else f" in {shown_path(folder)}"
        raise ChatTemplateError(
            f"data.chat_template: there is no chat template{where}, and the tokenizer has no tokens that mark turns; "
            f"{_advice(None)}"
        )
    return builtin_text(name), f"the builtin template {name}"


def _advice(name: str | None) -> str:
    if name is not None:
        return f"use {name}"
    return (
        "set data.chat_template.path to a Jinja file, train a tokenizer with them (data.tokenizer: {kind: bpe, chat: "
        "true}), or use one that has them"
    )


def _read(path: Path) -> str:
    name = f"data.chat_template.path: {shown_path(path)}"
    try:
        return read_tokenizer_file(path, through_links=True)
    except FileNotFoundError:
        raise ChatTemplateError(f"{name}: no such file; paths are relative to {Path.cwd()}") from None
    except NotRegular:
        raise ChatTemplateError(f"{name}: is not a regular file; a Jinja file is needed") from None
    except OSError as error:
        raise ChatTemplateError(f"{name}: cannot be read ({error.strerror}); make it readable") from None
    except ValueError as error:
        raise ChatTemplateError(f"{name}: cannot be read ({error}); a text file in UTF-8 is needed") from None


def _default(folder: Path, entries: list[dict[str, Any]]) -> str | None:
    named = {entry.get("name"): entry.get("template") for entry in entries}
    text = named.get(_DEFAULT)
    if named and not isinstance(text, str):
        listed = ", ".join(shown(name) for name in named)
        message = f"has the chat templates {listed}, and none is the default; name a file in data.chat_template.path"
        raise ChatTemplateError(f"{shown_path(folder / OPTIONS)}: {message}")
    return text

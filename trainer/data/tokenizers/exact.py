"""A tokenizer.json without what loses or adds text, so that its ids stand for exactly the text they came from.

Left out, for nothing of the vocabulary is lost with it: a space before the text (Llama 2 and its kin write one),
Unicode normalisation to NFC (Qwen's), white space that a token swallows beside it, BOS and EOS, padding, truncation
and dropped merges. Refused: whatever else changes or drops characters, for the vocabulary was made for its results.
"""

from collections.abc import Callable
from typing import Any

Part = dict[str, Any]
"""Part of a tokenizer.json: a step of text processing, or a model."""

_KEEPING = frozenset({"ByteLevel", "Digits", "FixedLength", "Metaspace", "Punctuation", "Split", "UnicodeScripts"})
"""Pre-tokenizers that cut a text and drop nothing of it, unless their behaviour is Removed."""


class Unsuitable(ValueError):
    """A tokenizer that cannot be used; the message says why, as the end of a sentence."""


def made_exact(content: dict[str, Any], *, end_of_document: str) -> dict[str, Any]:
    """Return the content of a tokenizer.json without what loses or adds text.

    Args:
        content: of the file.
        end_of_document: the token that stands between documents, which text must not give.

    Raises:
        Unsuitable: if the tokenizer was made to change or drop characters.
        KeyError, TypeError, AttributeError: if the file is of another form.
    """
    tokens = [_as_written(token) for token in content["added_tokens"]]
    for token in tokens:
        if token["content"] == end_of_document:
            token["special"] = True
    return content | {
        "truncation": None,
        "padding": None,
        "post_processor": None,  # BOS and EOS
        "added_tokens": tokens,
        "normalizer": _mapped(content.get("normalizer"), "normalizers", _normalizer),
        "pre_tokenizer": _mapped(content.get("pre_tokenizer"), "pretokenizers", _pre_tokenizer),
        "decoder": _mapped(content.get("decoder"), "decoders", _decoder),
        "model": _model(content["model"]),
    }


def parts_of(section: Part | None, key: str) -> list[Part]:
    """Return the parts of a section that may be a sequence, and a sequence of sequences; `key` is where it has them."""
    if section is None:
        return []
    if section["type"] != "Sequence":
        return [section]
    return [part for one in section[key] for part in parts_of(one, key)]


def _mapped(section: Part | None, key: str, change: Callable[[Part], Part | None]) -> Part | None:
    """Change each part of a section, or leave it out."""
    parts = [changed for part in parts_of(section, key) if (changed := change(part)) is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    return {"type": "Sequence", key: parts}


def _as_written(token: Part) -> Part:
    return token | {"lstrip": False, "rstrip": False}


def _normalizer(part: Part) -> Part | None:
    match part:
        case {"type": "Prepend" | "NFC"}:
            return None
        case {"type": "ByteLevel"} | {"type": "Replace", "pattern": {"String": " "}}:
            return part
    raise Unsuitable(f"its normalizer {part['type']} changes the text")


def _pre_tokenizer(part: Part) -> Part:
    if part["type"] not in _KEEPING or part.get("behavior") == "Removed":
        raise Unsuitable(f"its pre-tokenizer {part['type']} drops characters")
    return _without_prefix(part)


def _decoder(part: Part) -> Part | None:
    return None if part["type"] == "Strip" else _without_prefix(part)  # what was not put before the text stays


def _without_prefix(part: Part) -> Part:
    """Put no space before a text, nor expect one."""
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    if part["type"] == "Metaspace":
        return {key: value for key, value in part.items() if key != "add_prefix_space"} | {"prepend_scheme": "never"}
    return part


def _model(model: Part) -> Part:
    kind = model.get("type") or ("BPE" if "merges" in model else "without a type")  # GPT-2's own file has none
    if kind not in ("BPE", "Unigram"):
        raise Unsuitable(f"its model is {kind}, which does not keep every character")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise Unsuitable(
                f"its tokens say where words begin or end ({key} {model[key]!r}) instead of keeping spaces"
            )
    return model | {"dropout": None} if kind == "BPE" else model

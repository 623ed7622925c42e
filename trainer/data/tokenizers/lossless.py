"""Make a tokenizer.json lossless, so that the ids of a text stand for exactly its bytes.

Removed, because the vocabulary works without them: the space before a text (Llama 2 and similar), Unicode normalisation
to NFC (Qwen), tokens that absorb the white space around them, BOS and EOS, padding, truncation and BPE dropout.
Refused: every other step that changes or drops characters, because the vocabulary was built on its output.
"""

from collections.abc import Callable
from typing import Any

Step = dict[str, Any]
"""A step of text processing in a tokenizer.json, or its model."""

_LOSSLESS = frozenset({"ByteLevel", "Digits", "FixedLength", "Metaspace", "Punctuation", "Split", "UnicodeScripts"})
"""Pre-tokenizers that split a text without dropping any of it, unless their behaviour is Removed."""


class UnsuitableTokenizer(ValueError):
    """A tokenizer that cannot be used; the message is the reason, as the end of a sentence."""


def make_lossless(content: dict[str, Any], *, end_of_document: str) -> dict[str, Any]:
    """Return a parsed tokenizer.json without the steps that add or lose text.

    The token `end_of_document` becomes special, so that no text encodes to it. Raises UnsuitableTokenizer if the
    vocabulary depends on a step that changes or drops characters, and KeyError, TypeError or AttributeError if the file
    has another structure.
    """
    tokens = [token | {"lstrip": False, "rstrip": False} for token in content["added_tokens"]]
    for token in tokens:
        if token["content"] == end_of_document:
            token["special"] = True
    return content | {
        "truncation": None,
        "padding": None,
        "post_processor": None,  # BOS and EOS
        "added_tokens": tokens,
        "normalizer": _map_steps(content.get("normalizer"), "normalizers", _normalizer),
        "pre_tokenizer": _map_steps(content.get("pre_tokenizer"), "pretokenizers", _pre_tokenizer),
        "decoder": _map_steps(content.get("decoder"), "decoders", _decoder),
        "model": _model(content["model"]),
    }


def flatten_steps(section: Step | None, key: str) -> list[Step]:
    """Return the steps of a section, which may be nested sequences; `key` names the list of a sequence."""
    if section is None:
        return []
    if section["type"] != "Sequence":
        return [section]
    return [step for nested in section[key] for step in flatten_steps(nested, key)]


def _map_steps(section: Step | None, key: str, change: Callable[[Step], Step | None]) -> Step | None:
    """Change each step of a section; None removes it."""
    steps = [changed for step in flatten_steps(section, key) if (changed := change(step)) is not None]
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", key: steps}


def _normalizer(step: Step) -> Step | None:
    match step:
        case {"type": "Prepend" | "NFC"}:
            return None
        case {"type": "ByteLevel"} | {"type": "Replace", "pattern": {"String": " "}}:
            return step
    raise UnsuitableTokenizer(f"its normalizer {step['type']} changes the text")


def _pre_tokenizer(step: Step) -> Step:
    if step["type"] not in _LOSSLESS or step.get("behavior") == "Removed":
        raise UnsuitableTokenizer(f"its pre-tokenizer {step['type']} drops characters")
    return _without_prefix(step)


def _decoder(step: Step) -> Step | None:
    # Strip removes the space before a text, which is no longer put there.
    return None if step["type"] == "Strip" else _without_prefix(step)


def _without_prefix(step: Step) -> Step:
    """Neither put a space before a text nor expect one."""
    if step["type"] == "ByteLevel":
        return step | {"add_prefix_space": False}
    if step["type"] == "Metaspace":
        return {key: value for key, value in step.items() if key != "add_prefix_space"} | {"prepend_scheme": "never"}
    return step


def _model(model: Step) -> Step:
    kind = model.get("type") or ("BPE" if "merges" in model else "without a type")  # GPT-2's own file has no type
    if kind not in ("BPE", "Unigram"):
        raise UnsuitableTokenizer(f"its model is {kind}, which does not keep every character")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            marks = f"{key} {model[key]!r}"
            raise UnsuitableTokenizer(f"its tokens say where words begin or end ({marks}) instead of keeping spaces")
    return model | {"dropout": None} if kind == "BPE" else model

"""The small files of a folder for transformers: configs and tokenizer. Tensors and card are written elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.convert.exported_model import ExportedModel
from trainer.data.chat.chat_template import ChatTemplateError
from trainer.data.chat.encode_chat import ChatEncoder
from trainer.data.chat.find_template import TEMPLATE
from trainer.data.tokenizers.hf_files import OPTIONS, TOKENIZER, parse_json_object
from trainer.errors import ConfigError


def config_json(model: ExportedModel) -> dict[str, Any]:
    """Return config.json: the family's keys, dtype and token ids.

    All ids are given, also as null: transformers has defaults of its own, which are those of other tokenizers.
    """
    values = model.family.to_hf(model.config, model.vocab_size)
    # Rows of a shorter run do not shorten what the published model was made for.
    values["max_position_embeddings"] = max(values["max_position_embeddings"], model.published_positions)
    return values | {"torch_dtype": model.dtype} | _token_ids(model)


def write_small_files(folder: Path, model: ExportedModel, chat: ChatEncoder | None) -> None:
    """Write config.json, generation_config.json and the tokenizer, and the template of `chat`.

    Raises:
        ConfigError: if the tokenizer has no tokenizer.json.
    """
    _write_json(folder / "config.json", config_json(model))
    _write_json(folder / "generation_config.json", _generation_config(model, chat))
    files = dict(model.tokenizer.files())
    if TOKENIZER not in files or OPTIONS not in files:
        kind = type(model.tokenizer).__name__
        raise ConfigError(f"data.tokenizer: {kind} has no {TOKENIZER}, which transformers reads; use byte, bpe or file")
    options = parse_json_object(files.pop(OPTIONS))
    end = options["eos_token"]
    options |= {"bos_token": end, "pad_token": end, "model_max_length": model.config.seq_len}
    if model.family.has_own_splitting:  # else transformers adds one that is not in the vocabulary
        options["unk_token"] = end
    if chat is not None:  # older readers want the template here, newer ones in a file
        template = chat.template
        options |= template.special_tokens | {"eos_token": end}
        for name in ("bos_token", "eos_token"):
            if name in template.text and options[name] != template.special_tokens.get(name):
                template = template.with_own(name)
        options["chat_template"] = template.text
        (folder / TEMPLATE).write_text(template.text, encoding="utf-8")
    _write_json(folder / OPTIONS, options)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _token_ids(model: ExportedModel) -> dict[str, Any]:
    """Return the ids of special tokens: documents begin after the end of another."""
    end = int(model.tokenizer.end_of_document)
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def _generation_config(model: ExportedModel, chat: ChatEncoder | None) -> dict[str, Any]:
    """Return the ids of special tokens; what ends an answer of a chat ends a generated text too."""
    ids = _token_ids(model)
    try:
        others = set() if chat is None else chat.stop_tokens - {ids["eos_token_id"]}
    except ChatTemplateError:  # it cannot be used, and is given back as it came
        others = set()
    return ids | {"eos_token_id": [ids["eos_token_id"], *sorted(others)]} if others else ids


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The tokenizer of an imported model: that of its folder, or one that gives the same ids."""

from collections.abc import Iterator
from typing import Any, Final

from trainer.config.build_plugin import build_plugin
from trainer.config.nodes import shown_path
from trainer.convert.foreign_folder import CONFIG, ForeignFolder
from trainer.convert.import_config import OWN_TOKENIZER
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.file import read_tokenizer
from trainer.data.tokenizers.hf_files import OPTIONS, TOKENIZER, parse_json_object, stated_end_of_document
from trainer.data.tokenizers.lossless import make_lossless
from trainer.data.tokenizers.registry import BPETokenizerConfig, FileTokenizerConfig
from trainer.errors import ConfigError, DataError
from trainer.experiment import ExperimentConfig

_MAX_BYTES: Final = 256 << 20
_KEPT: Final = (
    *(TOKENIZER, OPTIONS, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json", CONFIG),
)
"""Small files that a run keeps as they are, so that an export can give them back."""


def tokenizer_for(config: ExperimentConfig, folder: ForeignFolder) -> Tokenizer:
    """Return the tokenizer of a run.

    Raises:
        ConfigError: if the config names another one than the folder has.
        DataError: if it is missing or unusable.
    """
    wanted = config.data.tokenizer
    where, is_own = shown_path(folder.path), getattr(wanted, "path", None) == OWN_TOKENIZER
    if isinstance(wanted, BPETokenizerConfig):
        raise ConfigError(
            f"data.tokenizer.kind: bpe trains a new tokenizer, and {where} was trained with its own; use "
            f"{{kind: file, path: {where}}}"
        )
    if not folder.has(TOKENIZER):
        if is_own:
            raise DataError(
                f"{where}: has no {TOKENIZER}; write one with AutoTokenizer.from_pretrained(...).save_pretrained(...), "
                "or set data.tokenizer to the one that the model was trained with"
            )
        return build_plugin(wanted, Tokenizer, "data.tokenizer")
    for name in (TOKENIZER, OPTIONS, "special_tokens_map.json"):
        if folder.has(name):
            folder.json(name, at_most=_MAX_BYTES)  # a regular file of the folder, and JSON
    end = wanted.end_of_document if isinstance(wanted, FileTokenizerConfig) else None
    theirs = read_tokenizer(folder.path, end_of_document=end)
    if is_own:
        return theirs
    mine = build_plugin(wanted, Tokenizer, "data.tokenizer")
    if not _give_equal_ids(mine, theirs):
        raise ConfigError(
            f"data.tokenizer: is another tokenizer than {where} has, so the same ids would mean different text; use "
            f"{{kind: file, path: {where}}}"
        )
    return mine


def source_files(folder: ForeignFolder) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the small files that a run keeps.

    Raises:
        DataError: if one is no regular file of the folder, or too large.
    """
    for name in _KEPT:
        if folder.has(name):
            yield name, folder.bytes_of(name, at_most=_MAX_BYTES)


def _give_equal_ids(mine: Tokenizer, theirs: Tokenizer) -> bool:
    if mine.fingerprint == theirs.fingerprint:
        return True
    # The byte tokenizer is code, and its files are a tokenizer with the same ids.
    files = mine.files()
    end = stated_end_of_document(parse_json_object(files[OPTIONS])) or ""
    lossless = make_lossless(parse_json_object(files[TOKENIZER]), end_of_document=end)
    other = parse_json_object(theirs.files()[TOKENIZER])
    special = {*mine.special_tokens().values(), *theirs.special_tokens().values()}
    same_end = mine.end_of_document == theirs.end_of_document
    return same_end and _of_text(lossless, special) == _of_text(other, special)


def _of_text(content: dict[str, Any], special: set[int]) -> dict[str, Any]:
    """Return a tokenizer.json without special tokens, which are not ids of any text: earlier versions had fewer."""
    added = [token for token in content["added_tokens"] if token["id"] not in special]
    model, vocab = content["model"], content["model"]["vocab"]
    if isinstance(vocab, dict):
        model = model | {"vocab": {token: index for token, index in vocab.items() if index not in special}}
    return content | {"added_tokens": added, "model": model}

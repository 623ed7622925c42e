"""A tokenizer that a config names beside the one of a published folder."""

import json
from pathlib import Path

import pytest

from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.import_tokenizer import tokenizer_for
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig


def folder_with(folder: Path, *, markers: bool, swapped: bool = False) -> ForeignFolder:
    """Write a byte tokenizer, also as versions without markers of chats wrote it, or with two bytes exchanged."""
    for name, text in ByteTokenizer().files().items():
        (folder / name).write_text(text)
    content = json.loads((folder / "tokenizer.json").read_text())
    if not markers:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] == 0xFF]
        content["model"]["vocab"] |= {chr(byte): byte for byte in range(0xF8, 0xFF)}
    if swapped:
        content["model"]["vocab"] |= {"a": ord("b"), "b": ord("a")}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "config.json").write_text("{}")
    return ForeignFolder(folder)


@pytest.mark.parametrize("markers", [True, False])
def test_the_byte_tokenizer_is_known_with_markers_of_chats_and_without(markers: bool, tmp_path: Path) -> None:
    config = ExperimentConfig(name="x")
    assert isinstance(tokenizer_for(config, folder_with(tmp_path, markers=markers)), ByteTokenizer)


def test_other_ids_for_a_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer: is another tokenizer than"):
        tokenizer_for(ExperimentConfig(name="x"), folder_with(tmp_path, markers=True, swapped=True))

"""Where a run's chat template is found."""

import json
from pathlib import Path

import pytest

from tests.chat_templates import STYLES
from trainer.data.chat.chat_template import ChatTemplateError
from trainer.data.chat.config import ChatTemplateConfig
from trainer.data.chat.find_template import builtin_text, find_template
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.data.tokenizers.registry import BPETokenizerConfig, ByteTokenizerConfig, FileTokenizerConfig


def found(folder: Path, **options: object) -> str:
    config = FileTokenizerConfig(path=str(folder))
    return find_template(ChatTemplateConfig.model_validate(options), config, config.build()).text


def test_a_file_comes_before_the_tokenizers_own_and_that_before_ours(folder: Path):
    STYLES[0].write(folder)
    (folder / "mine.jinja").write_text("mine")
    assert found(folder, path=str(folder / "mine.jinja")) == "mine"
    assert found(folder) == STYLES[0].text
    assert found(folder, builtin="chatml") == builtin_text("chatml")
    (folder / "chat_template.jinja").unlink()
    assert found(folder) == builtin_text("chatml")


def test_a_template_in_the_tokenizers_options_is_read(folder: Path):
    STYLES[1].write(folder)
    (folder / "chat_template.jinja").unlink()
    options = folder / "tokenizer_config.json"
    stated = json.loads(options.read_text())
    options.write_text(json.dumps(stated | {"chat_template": "theirs"}))
    assert found(folder) == "theirs"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    options.write_text(json.dumps(stated | {"chat_template": named}))
    assert found(folder) == "usual"
    options.write_text(json.dumps(stated | {"chat_template": named[:1]}))
    with pytest.raises(ChatTemplateError, match="has the chat templates 'tool_use', and none is the default"):
        found(folder)


def test_a_tokenizer_without_marks_of_turns_has_no_template(folder: Path):
    STYLES[1].write(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ChatTemplateError, match=r"no chat template in .*kind: bpe, chat: true"):
        found(folder)
    with pytest.raises(ChatTemplateError, match=r"builtin: byte needs a tokenizer with .* <\|system\|>"):
        found(folder, builtin="byte")


@pytest.mark.parametrize(("name", "problem"), [("none.jinja", "no such file"), (".", "is not a regular file")])
def test_a_file_that_cannot_be_read_is_named(name: str, problem: str):
    with pytest.raises(ChatTemplateError, match=f"data.chat_template.path: {name}: {problem}"):
        find_template(ChatTemplateConfig(path=name), ByteTokenizerConfig(), ByteTokenizer())


def test_bytes_have_a_template_of_their_own():
    assert find_template(ChatTemplateConfig(), ByteTokenizerConfig(), ByteTokenizer()).text == builtin_text("byte")
    with pytest.raises(ChatTemplateError, match=r"data\.tokenizer lacks; use byte"):
        find_template(ChatTemplateConfig(builtin="chatml"), ByteTokenizerConfig(), ByteTokenizer())


@pytest.mark.parametrize("date", ["2026-02-30", "tomorrow", "2026-1-1"])
def test_a_date_that_does_not_exist_is_refused(date: str):
    with pytest.raises(ValueError, match="is not a date such as 2026-01-31"):
        ChatTemplateConfig(date=date)
    assert not BPETokenizerConfig().chat

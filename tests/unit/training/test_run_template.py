"""The template of a run is the one in its folder, once there is a checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.run_folder import RunFolder
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.errors import CheckpointError, DataError
from trainer.experiment import ExperimentConfig
from trainer.training import run_template
from trainer.training.run_template import save_template, training_template

TOKENIZER = ByteTokenizer()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run with a checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_template, "fingerprint_in_use", lambda folder: TOKENIZER.fingerprint)
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def config_of(**data: Any) -> ExperimentConfig:
    sources = [{"kind": "chat", "path": "a.jsonl"}]
    return ExperimentConfig.model_validate({"name": "x", "data": {"sources": sources, "packing": "bfd", **data}})


def test_a_run_keeps_its_template_when_the_file_is_gone(folder):
    config, file = config_of(chat_template={"path": "t.jinja"}), Path("t.jinja")
    file.write_text("{{ messages[0].content }}")
    save_template(config, folder, TOKENIZER)
    given = training_template(config, folder, TOKENIZER)
    file.unlink()
    kept = training_template(config, folder, TOKENIZER)
    assert given is not None and kept is not None
    assert (kept.text, kept.fingerprint) == (given.text, given.fingerprint)
    file.write_text("{{ messages[1].content }}")
    with pytest.raises(CheckpointError, match=r"is the chat template of this run, and t\.jinja is another one"):
        training_template(config, folder, TOKENIZER)


def test_a_run_does_not_go_on_under_a_builtin_template_that_is_not_its_own(folder):
    Path("t.jinja").write_text("{{ messages[0].content }}")
    save_template(config_of(chat_template={"path": "t.jinja"}), folder, TOKENIZER)
    with pytest.raises(CheckpointError, match="is the chat template of this run, and the builtin template byte is ano"):
        training_template(config_of(chat_template={"builtin": "byte"}), folder, TOKENIZER)
    with pytest.raises(DataError, match="chatml needs a tokenizer with the special tokens"):
        training_template(config_of(chat_template={"builtin": "chatml"}), folder, TOKENIZER)


def test_a_run_without_a_checkpoint_reads_the_file(folder, monkeypatch):
    config = config_of(chat_template={"path": "t.jinja"})
    Path("t.jinja").write_text("{{ messages[0].content }}")
    save_template(config, folder, TOKENIZER)
    monkeypatch.setattr(run_template, "fingerprint_in_use", lambda folder: None)
    Path("t.jinja").write_text("{{ messages[1].content }}")
    template = training_template(config, folder, TOKENIZER)
    assert template is not None and "[1]" in template.text
    Path("t.jinja").unlink()
    with pytest.raises(DataError, match="no such file"):
        training_template(config, folder, TOKENIZER)


@pytest.mark.parametrize("kind", ["chat", "hf_chat", "hf_chat_stream"])
def test_every_kind_of_conversations_has_a_template(folder, kind):
    config = config_of(sources=[{"kind": kind, "path": "a/b"}])
    save_template(config, folder, TOKENIZER)
    assert (folder.path / "chat_template.jinja").is_file()


def test_a_run_on_text_has_none(folder):
    config = config_of(sources=[{"kind": "text", "path": "a.txt"}])
    save_template(config, folder, TOKENIZER)
    assert training_template(config, folder, TOKENIZER) is None
    assert list(folder.path.iterdir()) == []

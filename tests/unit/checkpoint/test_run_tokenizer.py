"""A run's tokenizer is kept in its folder and used whenever the run resumes."""

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import foreign_tokenizers
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.config_changes import check_belongs
from trainer.checkpoint.run_folder import RunFolder
from trainer.cli import main
from trainer.config.dump import Change
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.data import train_bpe
from trainer.distributed.mesh import Mesh
from trainer.errors import CheckpointError, ConfigError
from trainer.experiment import ExperimentConfig
from trainer.training.run import RunState
from trainer.training.setup import build_run

CONFIG = """\
name: tiny
model: {num_layers: 1, d_model: 8, num_heads: 2, seq_len: 8, d_ff: 8, moe: {num_experts: 2, d_ff: 8}}
train: {steps: 10, global_batch_size: 4}
eval: {max_tokens_per_domain: 64}
schedule: {kind: warmup_cosine, warmup_steps: 0}
"""
BPE = "data.tokenizer={kind: bpe, vocab_size: 280}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a config, a text and a tokenizer file; its runs are in `runs`."""
    text = "It was a bright cold day in April, and the clocks were striking. " * 50
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "theirs.json").write_text(json.dumps(foreign_tokenizers.byte_level()))
    return tmp_path


def _words(folder: Path, overrides: list[str]) -> list[str]:
    source = f"data.sources=[{{kind: text, path: {folder}/text.txt}}]"
    return [source, f"data.cache_dir={folder}/cache", f"runs_dir={folder}/runs", *overrides]


def _file(folder: Path, name: str = "theirs.json") -> str:
    return f"data.tokenizer={{kind: file, path: {folder}/{name}}}"


def _build(folder: Path, overrides: list[str], mesh: Mesh | None = None) -> RunState:
    config = load(folder / "tiny.yaml", _words(folder, overrides), ExperimentConfig)
    where = RunFolder(Path(config.runs_dir) / config.name)
    return build_run(config, where, Console(0, file=io.StringIO()), mesh or Mesh.of_one(), torch.device("cpu"))


def _saved(folder: Path, overrides: list[str]) -> RunState:
    """Start a run that has a checkpoint of step 1."""
    run = _build(folder, overrides)
    run.saver.start(1, run.engine.state(), run.checkpoint_info())
    saved = run.saver.wait()
    assert saved is not None and saved.error is None
    return run


def _verb(folder: Path, *words: str) -> int:
    """Run a verb on the run folder; return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([words[0], str(folder / "runs/tiny"), *words[1:]])
    return int(caught.value.code or 0)


@pytest.fixture
def trains_no_more(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[], None]:
    """Make training a tokenizer fail from now on."""

    def forbid() -> None:
        shutil.rmtree(folder / "cache")
        monkeypatch.setattr(train_bpe, "_train", lambda *_, **__: pytest.fail("trained a tokenizer"))

    return forbid


@pytest.mark.parametrize("kind", ["byte", "bpe", "file"])
def test_a_run_folder_has_the_tokenizer_and_all_records_have_its_hash(folder, kind):
    run = _build(folder, [{"byte": "data.tokenizer.kind=byte", "bpe": BPE, "file": _file(folder)}[kind]])
    tokenizer = run.corpus.tokenizer
    assert {name: (run.folder.path / name).read_text() for name in tokenizer.files()} == tokenizer.files()
    assert json.loads(run.folder.environment.read_text())["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert run.checkpoint_info()["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert run.engine.model.config.seq_len == 8 and run.size.total_parameters > 8 * tokenizer.vocab_size


def test_a_resumed_run_uses_its_own_tokenizer_and_trains_none(folder, trains_no_more):
    first = _saved(folder, [BPE])
    trains_no_more()
    run = _build(folder, [BPE])
    assert run.start_step == 1
    assert run.corpus.tokenizer.fingerprint == first.corpus.tokenizer.fingerprint
    assert run.corpus.fingerprint == first.corpus.fingerprint


def test_eval_and_generate_read_the_run_s_own_tokenizer(folder, trains_no_more, capsys):
    _saved(folder, [BPE])
    trains_no_more()
    assert _verb(folder, "eval", "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1
    assert _verb(folder, "generate", "--prompt", "It was \u2581", "--max-tokens", "3") == 0
    assert capsys.readouterr().out.startswith("It was \u2581")


def test_a_run_without_a_checkpoint_uses_the_config_s_tokenizer(folder):
    _build(folder, [BPE])
    run = _build(folder, ["data.tokenizer={kind: bpe, vocab_size: 270}"])
    assert run.corpus.tokenizer.vocab_size == 270
    assert run.folder.tokenizer.read_text() == run.corpus.tokenizer.files()["tokenizer.json"]


def test_any_flipped_byte_of_the_run_s_tokenizer_is_detected(folder):
    run = _saved(folder, [BPE])
    whole, chance = run.folder.tokenizer.read_bytes(), random.Random(0)
    for place in [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(30))]:
        run.folder.tokenizer.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError) as caught:
            _build(folder, [BPE])
        message = str(caught.value)
        assert message.startswith(f"{run.folder.tokenizer}: ") and "\n" not in message
        assert message.endswith("; restore it, or remove it to use data.tokenizer if that is still the same")


def test_a_damaged_tokenizer_is_exit_4_and_one_line_for_every_verb(folder, capsys):
    run = _saved(folder, [BPE])
    run.folder.tokenizer.write_text(run.folder.tokenizer.read_text().replace("<|endoftext|>", "<|endoftexu|>"))
    for verb in ("eval", "generate"):
        assert _verb(folder, verb) == 4
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{run.folder.tokenizer}: is not the tokenizer that {run.folder.checkpoints} were trained with" in said
        assert f", theirs {run.corpus.tokenizer.fingerprint[:12]}); restore it" in said


def test_another_end_of_document_is_another_tokenizer(folder):
    run = _saved(folder, [_file(folder)])
    options = run.folder.path / "tokenizer_config.json"
    whole = options.read_text()
    options.write_text(whole.replace("<|end_of_text|>", "<|begin|>"))
    with pytest.raises(CheckpointError, match="is not the tokenizer that"):
        _build(folder, [_file(folder)])
    options.write_text(whole.replace("<|end_of_text|>", "\\ud800"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        _build(folder, [_file(folder)])


def test_without_the_run_s_file_the_config_s_tokenizer_is_compared(folder):
    run = _saved(folder, [_file(folder)])
    run.folder.tokenizer.unlink()
    assert _build(folder, [_file(folder)]).start_step == 1
    run.folder.tokenizer.unlink()
    (folder / "theirs.json").write_text(json.dumps(foreign_tokenizers.byte_fallback()))
    with pytest.raises(CheckpointError, match=r"checkpoints: was trained with another tokenizer than data\.tokenizer"):
        _build(folder, [_file(folder)])


def test_a_file_that_changed_since_is_refused_with_both_named(folder):
    run = _saved(folder, [_file(folder)])
    (folder / "theirs.json").write_text(json.dumps(foreign_tokenizers.byte_fallback()))
    with pytest.raises(CheckpointError) as caught:
        _build(folder, [_file(folder)])
    assert str(caught.value).startswith(
        f"{run.folder.tokenizer}: is the tokenizer of this run, and {folder}/theirs.json is another one "
        f"(fingerprint {run.corpus.tokenizer.fingerprint[:12]}, now "
    )
    assert _verb(folder, "generate", "--max-tokens", "1") == 0, "what was learned is still read as it was"


def test_a_file_may_be_elsewhere_or_gone(folder):
    first = _saved(folder, [_file(folder)])
    (folder / "theirs.json").rename(folder / "moved.json")
    for path in ("theirs.json", "moved.json", "runs/tiny"):
        run = _build(folder, [_file(folder, path)])
        assert run.start_step == 1
        assert run.corpus.tokenizer.fingerprint == first.corpus.tokenizer.fingerprint


def test_another_path_is_accepted_and_another_kind_is_refused(folder):
    where = RunFolder(folder / "runs/tiny")
    assert check_belongs(where, [Change("data.tokenizer.path", "a.json", "/mnt/a.json")]) == []
    with pytest.raises(ConfigError, match=r"was written with data\.tokenizer\.kind byte, the config has bpe"):
        check_belongs(where, [Change("data.tokenizer.kind", "byte", "bpe")])


def test_a_link_in_place_of_the_run_s_tokenizer_is_not_followed(folder):
    run = _saved(folder, [BPE])
    run.folder.tokenizer.rename(folder / "real.json")
    run.folder.tokenizer.symlink_to(folder / "real.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read \(is no regular file\)"):
        _build(folder, [BPE])


def _fingerprint_here(folder: Path, overrides: list[list[str]]) -> tuple[str, str]:
    mesh = mesh_here()
    corpus = _build(folder, overrides[mesh.layout.rank], mesh).corpus
    return corpus.tokenizer.fingerprint, corpus.fingerprint


def test_all_ranks_use_rank_0_s_tokenizer(ranks: Ranks, folder: Path) -> None:
    found = ranks.run(2, _fingerprint_here, folder, [[_file(folder)], [_file(folder, "not-on-this-host.json")]])
    assert found[0] == found[1]

"""Law: what is imported and exported again is the same bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.builders import make_engine
from tests.checkpoint_helpers import digest, load, resume
from tests.exported_runs import TEXT
from tests.foreign_models import FAMILIES, make_foreign, save_foreign
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load as load_config
from trainer.convert.hf_export import ExportOptions, export
from trainer.convert.hf_import import import_model
from trainer.experiment import ExperimentConfig
from trainer.families.registry import FAMILIES as KNOWN
from trainer.models.config import ModelConfig
from trainer.parallel.config import ParallelConfig
from trainer.prove.gather import gather_state

SOURCE = "data.sources=[{kind: text, path: text.txt, domain: prose}]"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)


def _import(folder: str, name: str) -> tuple[ExperimentConfig, RunFolder]:
    overrides = [f"name={name}", SOURCE, "data.cache_dir=cache"]
    imported = import_model(Path(folder), None, overrides, gate="logits")
    return load_config(imported.run / "config.yaml", [], ExperimentConfig), RunFolder(imported.run)


def _on_disk(folder: str) -> dict[str, Tensor]:
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def _weights(run: RunFolder) -> dict[str, Tensor]:
    found = load(CheckpointFolder(run.checkpoints), 0)
    return {name: tensor for name, tensor in found.items() if name.startswith("model.")}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "mixtral in bfloat16, tied": ("mixtral", {"dtype": torch.bfloat16, "tie_word_embeddings": True}),
    "qwen3_moe, a key head each, padded": ("qwen3_moe", {"num_key_value_heads": 4, "vocab_size": 270}),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("family", "values"), THEIRS.values(), ids=THEIRS.keys())
def test_theirs_comes_back(family: str, values: dict[str, Any]) -> None:
    save_foreign(Path("theirs"), make_foreign(family, **values))
    config, run = _import("theirs", "a")
    dtype: Any = str(values.get("dtype", torch.float32)).removeprefix("torch.")
    export(config, run, Path("again"), ExportOptions(family=KNOWN[family], dtype=dtype), warn=pytest.fail)
    _assert_equal(_on_disk("again"), _on_disk("theirs"))


def test_shorter_rows_do_not_shorten_a_published_model() -> None:
    save_foreign(Path("theirs"), make_foreign("mixtral", max_position_embeddings=9000))
    config, run = _import("theirs", "a")
    assert config.model.seq_len == 4096
    export(config, run, Path("again"), ExportOptions(family=KNOWN["mixtral"], gate="tensors"), warn=pytest.fail)
    assert json.loads(Path("again/config.json").read_text())["max_position_embeddings"] == 9000


def _here(model: ModelConfig, folder: Path, ep_size: int) -> dict[str, str]:
    """Hashes of the weights that ranks put together after each has loaded its part; of use on rank 0."""
    mesh = mesh_here(ep_size=ep_size)
    engine = make_engine(model, vocab_size=256, seed=9, mesh=mesh, parallel=ParallelConfig(ep_size=ep_size))
    resume(engine, folder, 0)
    state = gather_state(engine.state(), mesh)
    if mesh.layout.rank:
        return {}
    assert all(not part.tensor.any() for name, part in state.slices.items() if name.startswith("optim."))
    return {name: digest(part.tensor) for name, part in state.slices.items() if name.startswith("model.")}


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [2, 3])
def test_every_rank_reads_its_experts(ranks: Ranks, ep_size: int) -> None:
    save_foreign(Path("theirs"), make_foreign("qwen3_moe"))
    config, run = _import("theirs", "a")
    found = ranks.run(ep_size, _here, config.model, run.checkpoints.absolute(), ep_size)[0]
    assert found == {name: digest(tensor) for name, tensor in _weights(run).items()}

"""From a run of ours to transformers' format and back: the same run, bit for bit, whoever wrote its checkpoint.

    python -m tests.native_trips [CONFIG]

prints it for every family, with the sizes of an experiment file, by default configs/quickstart.yaml.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from tests.builders import make_engine
from tests.checkpoint_helpers import load, resume
from tests.exported_runs import make_run
from tests.family_models import LATENT_FAMILIES, MODELS, SIZES
from tests.launched_ranks import ROOT
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.saver import Saver
from trainer.config.loader import load as load_config
from trainer.convert.hf_export import ExportOptions, export
from trainer.convert.hf_import import import_model
from trainer.experiment import ExperimentConfig
from trainer.families.expressible import inference_values
from trainer.families.registry import FAMILIES
from trainer.models.config import ModelConfig
from trainer.parallel.config import ParallelConfig

EP_SIZES: Final = (1, 2, 3)
"""Ranks that save a checkpoint, each its experts: 2 does not divide 5 experts, and 3 neither 5 nor 8."""


class Case(NamedTuple):
    """A model of a family, and how many ranks wrote its checkpoint."""

    family: str
    kv_heads: int | None
    """None: latent attention."""
    tied: bool
    ep_size: int

    def __str__(self) -> str:
        heads = "latent" if self.kv_heads is None else f"{self.kv_heads} key heads"
        return f"{self.family}, {heads}, {'tied' if self.tied else 'untied'}, ep {self.ep_size}"

    def model(self, sizes: Mapping[str, Any] | None = None, moe: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return values of `model`; these replace the tiny ones, and widths of heads and latents grow with d_model."""
        own: dict[str, Any] = {**SIZES, **MODELS[self.family], **(sizes or {})}
        times = own["d_model"] // SIZES["d_model"]
        if own["moe"] is not None:
            own["moe"] = {**own["moe"], **(moe or {})}
        attention = dict(own.get("attention", {}))
        if "head_dim" in attention:
            attention["head_dim"] *= times
        if "latent" in attention:
            attention["latent"] = {key: width * times for key, width in attention["latent"].items()}
        own["attention"] = attention
        return {**own, "num_kv_heads": self.kv_heads, "tie_embeddings": self.tied}


def cases_of(family: str) -> list[Case]:
    """Return the cases of a family: every number of key heads, tied and untied, by every number of ranks."""
    heads = (None,) if family in LATENT_FAMILIES else (1, 2, 4)
    return [Case(family, kv_heads, tied, n) for kv_heads, tied, n in product(heads, (False, True), EP_SIZES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRun:
    """A run, with its checkpoint as one process wrote it and as the ranks did."""

    family: str
    config: ExperimentConfig
    alone: RunFolder
    by_ranks: RunFolder


def write_runs(ranks: Ranks, folder: Path, models: Mapping[Case, Mapping[str, Any]]) -> dict[Case, NativeRun]:
    """Write the runs of models; ranks read the checkpoint of one process and save their parts."""
    runs: dict[Case, NativeRun] = {}
    for number, (case, model) in enumerate(models.items()):
        place = folder / str(number)
        place.mkdir()
        config, alone, _ = make_run(place, dict(model))
        by_ranks = RunFolder(alone.path.with_name("by_ranks"))
        shutil.copytree(alone.path, by_ranks.path, ignore=shutil.ignore_patterns("checkpoints"))
        runs[case] = NativeRun(family=case.family, config=config, alone=alone, by_ranks=by_ranks)
    for ep_size in sorted({case.ep_size for case in models}):
        saved = [run for case, run in runs.items() if case.ep_size == ep_size]
        saves = [(run.config.model, run.alone.checkpoints, run.by_ranks.checkpoints) for run in saved]
        ranks.run(ep_size, _save_again, ep_size, saves)
    return runs


def _save_again(ep_size: int, saves: Sequence[tuple[ModelConfig, Path, Path]]) -> None:
    """Load checkpoints as one of the ranks of a run, and save them elsewhere."""
    meshes = {is_dense: mesh_here(ep_size=1 if is_dense else ep_size) for is_dense in (False, True)}
    for model, source, target in saves:
        mesh = meshes[model.moe is None]
        parallel = ParallelConfig(ep_size=mesh.layout.ep_size)
        engine = make_engine(model, vocab_size=256, seed=9, mesh=mesh, parallel=parallel)
        found = resume(engine, source, 0)
        saver = Saver(CheckpointFolder(target), mesh)
        saver.start(0, engine.state(), found.run)
        saved = saver.wait()
        saver.close()
        assert saved is not None and saved.error is None, saved


def check_trip(run: NativeRun, folder: Path, *, shard_bytes: int) -> int:
    """Export the checkpoint of the ranks, import that, and export it again; return the number of tensors.

    Raises:
        AssertionError: if something is not the same bit for bit, or not as one process has it.
    """
    options = ExportOptions(family=FAMILIES[run.family], gate="tensors", shard_bytes=shard_bytes)
    export(run.config, run.by_ranks, folder / "out", options, warn=_fail)
    overrides = ["name=again", f"runs_dir={folder}", "data.sources=[{kind: text, path: text.txt, domain: prose}]"]
    imported = import_model(folder / "out", None, overrides, gate="tensors")
    config, again = load_config(imported.run / "config.yaml", [], ExperimentConfig), RunFolder(imported.run)
    _check_model(config.model, run.config.model)
    ours, theirs = _tensors_of(run.alone), _tensors_of(again)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype is tensor.dtype and torch.equal(theirs[name], tensor), name
    export(config, again, folder / "back", options, warn=_fail)
    assert _weights_of(folder / "back") == _weights_of(folder / "out")
    _check_config(folder / "back", folder / "out")
    return len(ours)


def _check_model(found: ModelConfig, expected: ModelConfig) -> None:
    mine, theirs = inference_values(expected), inference_values(found)
    assert theirs == mine, {key: (mine.get(key), theirs.get(key)) for key in mine if mine[key] != theirs.get(key)}
    assert (found.seq_len, found.vocab_size) == (expected.seq_len, expected.vocab_size)


def _check_config(found: Path, expected: Path) -> None:
    """Compare what both config.json say, but for the standard deviation of initial weights, which is not imported."""
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (expected, found))
    theirs["initializer_range"] = mine["initializer_range"]
    assert theirs == mine, {key: (mine.get(key), theirs.get(key)) for key in mine if mine[key] != theirs.get(key)}


def _weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*.safetensors*")}


def _tensors_of(run: RunFolder) -> dict[str, torch.Tensor]:
    found = load(CheckpointFolder(run.checkpoints), 0)
    return {name: tensor for name, tensor in found.items() if name.startswith("model.")}


def _fail(message: str) -> None:
    raise AssertionError(message)


def main() -> int:
    """Print the round trip of every case of every family with the sizes of an experiment file."""
    path = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "configs/quickstart.yaml"
    model = load_config(path, [], ExperimentConfig).model
    assert model.moe is not None, f"{path}: has no experts"
    sizes = {key: getattr(model, key) for key in ("num_layers", "d_model", "num_heads", "d_ff", "seq_len", "init_std")}
    moe = {"num_experts": model.moe.num_experts, "d_ff": model.moe.d_ff}
    ranks = Ranks()
    try:
        for family in MODELS:
            began, counts = time.monotonic(), set()
            with tempfile.TemporaryDirectory() as name:
                runs = write_runs(ranks, Path(name), {case: case.model(sizes, moe) for case in cases_of(family)})
                for number, run in enumerate(runs.values()):
                    place = Path(name) / f"trip{number}"
                    place.mkdir()
                    counts.add(check_trip(run, place, shard_bytes=5_000_000))
                    shutil.rmtree(place)
            tensors = " or ".join(map(str, sorted(counts)))
            seconds = time.monotonic() - began
            print(f"{family}: {len(runs)} runs of {tensors} tensors the same bit for bit, {seconds:.0f} s", flush=True)
    finally:
        ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

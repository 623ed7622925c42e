"""Law: three stages, each of which begins with the weights of the one before, resume bit for bit under every layout.

Pretraining, annealing on other text and a chat, on one rank, on two that share the experts, and under DeepSpeed. Each
stage is killed in its middle and ends as if it had not been, and each knows what it was made from.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scripts.recipes import chat
from tests.ranks import Ranks, mesh_here
from tests.tiny_training import config_of, final_files, kill_after, losses, train_here
from trainer.checkpoint.ancestors import ancestors, describe
from trainer.checkpoint.run_folder import RunFolder

pytestmark = pytest.mark.slow

STAGES = ("pretrain", "anneal", "chat")
PROSE = "It was a bright cold day in April, and the clocks were striking. "
FIRST, LAST = "step_00000000", "step_00000004"
LAYOUTS = {
    "one": [],
    "two": ["parallel.ep_size=2"],
    "zero": ["parallel.ep_size=2", "engine={kind: deepspeed, zero_stage: 1}"],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the texts of the stages."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "code.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(150)))
    (folder / "prose.txt").write_text(PROSE * 90)
    rows = chat.files(random.Random(0))["train.jsonl"][:60]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def _overrides(folder: Path, layout: str, stage: str) -> list[str]:
    """Return what makes a stage of the tiny run; runs of a layout have its name in theirs."""
    sources = {
        "pretrain": f"{{kind: text, path: {folder}/code.txt}}",
        "anneal": f"{{kind: text, path: {folder}/prose.txt}}",
        "chat": f"{{kind: chat, path: {folder}/chat.jsonl, truncate: left}}",
    }
    own = {
        "pretrain": ["schedule={kind: warmup_stable_decay, peak_lr: 1e-2, warmup_steps: 1, decay_fraction: 0.0}"],
        "anneal": [f"init_from={{run: {folder}/runs/{layout}-pretrain, parts: weights+optimizer}}"],
        "chat": [f"init_from={{run: {folder}/runs/{layout}-anneal}}", "data.packing=bfd", "model.document_mask=true"],
    }
    common = [f"name={layout}-{stage}", f"data.sources=[{sources[stage]}]", "model.seq_len=128"]
    steps = ["train.steps=4", "checkpoint.every=2", "eval.every=2", "eval.max_tokens_per_domain=512"]
    return [*common, *steps, *own[stage], *LAYOUTS[layout]]


def _train(folder: Path, layout: str, stage: str) -> None:
    config = config_of(folder, *_overrides(folder, layout, stage))
    train_here(config, None if layout == "one" else mesh_here(ep_size=2))


def _train_all(folder: Path, layout: str) -> None:
    """Train each stage whole, then again after a kill in its middle, and compare the two on rank 0."""
    for stage in STAGES:
        run, whole = folder / f"runs/{layout}-{stage}", folder / f"whole/{layout}-{stage}"
        _train(folder, layout, stage)
        if layout == "one" or mesh_here().layout.rank == 0:
            shutil.copytree(run, whole)
            kill_after(run, 2)
        if layout != "one":
            mesh_here().world.all_gather_objects(None)
        _train(folder, layout, stage)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_resumes_in_its_middle_bit_for_bit(ranks: Ranks, workplace: Path, layout: str) -> None:
    if layout == "one":
        _train_all(workplace, layout)
    else:
        ranks.run(2, _train_all, workplace, layout)
    for stage in STAGES:
        resumed, whole = workplace / f"runs/{layout}-{stage}", workplace / f"whole/{layout}-{stage}"
        assert final_files(resumed) == final_files(whole) and losses(resumed) == losses(whole)
        if layout != "one":
            of_one = [loss for _, loss in losses(workplace / f"runs/one-{stage}")]
            assert [loss for _, loss in losses(resumed)] == pytest.approx(of_one, rel=1e-4), stage


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    tensors = [tensor for file in checkpoint.glob("*.safetensors") for tensor in load_file(file).items()]
    return {name: tensor for name, tensor in tensors if name.startswith("model.")}


def test_every_stage_knows_its_parents_and_begins_where_they_ended(workplace: Path) -> None:
    pretrained, annealed, tuned = (workplace / f"runs/one-{stage}" for stage in STAGES)
    assert describe(ancestors(RunFolder(tuned))) == (
        "one-anneal at step 4 (init_from), of one-pretrain at step 4 (init_from)"
    )
    assert len(ancestors(RunFolder(annealed))) == 1
    for parent, run in ((pretrained, annealed), (annealed, tuned)):
        before, after = (_weights(run / f"checkpoints/{step}") for run, step in ((parent, LAST), (run, FIRST)))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_learned_of_a_conversation_is_its_answers(workplace: Path) -> None:
    records = [json.loads(line) for line in (workplace / "runs/one-chat/metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval/chat/loss"] for record in records if "eval/chat/loss" in record]
    assert held_out[-1] < held_out[0]

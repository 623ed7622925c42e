"""Law: an imported model that is trained and exported is the one that transformers would have trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.builders import make_batch, make_engine, rows_of
from tests.checkpoint_helpers import resume, save
from tests.exported_runs import TEXT
from tests.foreign_models import make_foreign, save_foreign
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.choice import CheckpointChoice
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load as load_config
from trainer.convert.hf_export import ExportOptions, export
from trainer.convert.hf_import import import_model
from trainer.data.batches.batch import Batch
from trainer.experiment import ExperimentConfig
from trainer.families.registry import FAMILIES

STEPS, ROWS, SEQ_LEN, LR, COEF = 5, 4, 16, 2e-3, 0.1

# Their balance loss pools all MoE layers, and ours is the mean over layers: equal if there is one MoE layer.
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "mixtral": ("mixtral", {"num_hidden_layers": 1, "router_aux_loss_coef": COEF}, COEF),
    "qwen3_moe, tied": (
        "qwen3_moe",
        {"mlp_only_layers": [0], "router_aux_loss_coef": COEF, "tie_word_embeddings": True},
        COEF,
    ),
    "dots1": ("dots1", {}, 0.0),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, 0.0),
}


def _batch(step: int) -> Batch:
    return make_batch(ROWS, SEQ_LEN, vocab_size=250, seed=step, first_sample=ROWS * step)


def _their_loss(model: Any, batch: Batch, coef: float) -> tuple[Tensor, Tensor]:
    """Return the loss that they minimize, and its cross-entropy."""
    output = model(input_ids=batch.tokens, use_cache=False, **({"output_router_logits": True} if coef else {}))
    loss = F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten())
    if not coef:
        return loss, loss
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    routed = tuple(logits for logits in output.router_logits if logits is not None)
    assert len(routed) == 1
    experts, top_k = routed[0].shape[-1], model.config.num_experts_per_tok
    return loss + coef * load_balancing_loss_func(routed, experts, top_k), loss  # pyrefly: ignore


def _train_theirs(model: Any, coef: float) -> list[float]:
    """Train by AdamW as a user of transformers writes it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        total, loss = _their_loss(model, _batch(step), coef)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("family", "values", "coef"), CASES.values(), ids=CASES.keys())
def test_five_steps_are_theirs(
    family: str, values: dict[str, Any], coef: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    theirs = make_foreign(family, **values)
    save_foreign(Path("theirs"), theirs)
    fixed = ["model.moe.router.bias_update_rate=0.0"] if family == "dots1" else []  # they never move it
    overrides = [*fixed, "name=a", "data.sources=[{kind: text, path: text.txt, domain: prose}]", "data.cache_dir=cache"]
    run = RunFolder(import_model(Path("theirs"), None, overrides, gate="logits").run)
    config = load_config(run.config, [], ExperimentConfig)
    assert (config.model.moe.balance.coef if config.model.moe is not None else 0.0) == coef

    engine = make_engine(config.model, vocab_size=256, seed=3, weight_decay=0.0)
    started = resume(engine, run.checkpoints, 0)
    halves = [(0, ROWS // 2), (ROWS // 2, ROWS)]
    losses = [engine.train_step([rows_of(_batch(step), *half) for half in halves], lr=LR).loss for step in range(STEPS)]
    expected = _train_theirs(theirs, coef)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-4)
    assert max(losses) - min(losses) > 1e-2, "something happens"

    save(CheckpointFolder(run.checkpoints), STEPS, engine.state(), {**started.run, "data_fingerprint": "some text"})
    export(
        config,
        run,
        Path("out"),
        ExportOptions(family=FAMILIES[family], choice=CheckpointChoice(step=STEPS)),
        warn=pytest.fail,
    )
    returned: Any = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        batch = _batch(STEPS)
        torch.testing.assert_close(
            _their_loss(returned, batch, coef)[0], _their_loss(theirs, batch, coef)[0], rtol=0, atol=1e-4
        )
    state, own = returned.state_dict(), theirs.state_dict()
    assert state.keys() == own.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")

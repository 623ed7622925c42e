"""The gates' own control: of folders with one fault each, every one is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.builders import make_model, tiny_model_config
from tests.exported_runs import make_run
from trainer.convert import gates
from trainer.convert.exported_model import ExportedModel
from trainer.convert.gate_report import Gate, GateError
from trainer.convert.gates import is_tied, logits_gate, our_logits, tensors_gate, tokenizer_gate
from trainer.convert.hf_export import ExportOptions, export
from trainer.convert.sample_tokens import sample_tokens
from trainer.convert.shard_writer import plan_shards
from trainer.families.registry import FAMILIES

GROUPS = {"kind": "group_limited", "groups": 4, "groups_kept": 2, "top_k": 3, "scale": 2.5, "bias_update_rate": 0.1}
MODEL = {
    **{"num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24, "seq_len": 16, "init_std": 0.3},
    **{"qk_norm": True, "norm_eps": 0.01, "rope_theta": 50.0},
    "moe": {"num_experts": 8, "d_ff": 16, "num_shared_experts": 1, "first_dense_layers": 1, "router": GROUPS},
}
MLP, ATTENTION = "model.layers.1.mlp", "model.layers.0.self_attn"
EXPERT = f"{MLP}.experts.5"


class Export:
    """An export, and a function that gates a copy of it."""

    def __init__(self, folder: Path) -> None:
        config, run, _ = make_run(folder, MODEL, tokenizer={"kind": "bpe", "vocab_size": 280})
        self.folder = folder / "out"
        options = ExportOptions(family=FAMILIES["dots1"])
        self.model: ExportedModel = export(config, run, self.folder, options, warn=pytest.fail).model
        self.samples = sample_tokens(config, self.model.tokenizer)

    def check(self, folder: Path, gate: Gate) -> None:
        """Run a gate on a folder."""
        tokenizer_gate(folder, self.model, self.samples.texts)
        if gate == "tensors":
            tensors_gate(folder, self.model, plan_shards(self.model, 10**9))
        else:
            logits_gate(folder, self.model, self.samples.batches[:2], tokens="text")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return Export(tmp_path_factory.mktemp("gates"))


def _exchange(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    def exchange(tensors: dict[str, Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    return exchange


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def replace(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return replace


def _one_bit(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(torch.int32)[0, 0] ^= 1
    return changed


TENSORS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "an expert is zero": _replace(f"{EXPERT}.down_proj.weight", torch.zeros_like),
    "an expert is transposed": _replace(f"{EXPERT}.up_proj.weight", lambda t: t.T),
    "an expert is missing": lambda tensors: tensors.pop(f"{EXPERT}.gate_proj.weight"),
    "two experts changed places": _exchange(f"{EXPERT}.up_proj.weight", f"{MLP}.experts.6.up_proj.weight"),
    "gate and up changed places": _exchange(f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight"),
    "experts of the shared one": _exchange(f"{EXPERT}.up_proj.weight", f"{MLP}.shared_experts.up_proj.weight"),
    "one bit of a weight": _replace(f"{MLP}.gate.weight", _one_bit),
    "the selection bias has its initial value": _replace(f"{MLP}.gate.e_score_correction_bias", torch.zeros_like),
    "a norm has its initial value": _replace("model.norm.weight", torch.ones_like),
    "two norms changed places": _exchange(f"{ATTENTION}.q_norm.weight", f"{ATTENTION}.k_norm.weight"),
    "keys and values changed places": _exchange(f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.v_proj.weight"),
    "the head is the embedding": lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    "a tensor too many": lambda t: t.update({f"{ATTENTION}.q_proj.bias": torch.zeros(16)}),
    "an expert too many": lambda t: t.update({f"{MLP}.experts.8.up_proj.weight": torch.zeros(16, 16)}),
}
CONFIG: dict[str, dict[str, Any]] = {
    "rope_theta": {"rope_theta": 10000.0},
    "rms_norm_eps": {"rms_norm_eps": 0.02},
    "num_experts_per_tok": {"num_experts_per_tok": 2},
    "norm_topk_prob": {"norm_topk_prob": False},
    "routed_scaling_factor": {"routed_scaling_factor": 1.0},
    "topk_group": {"topk_group": 4},
    "n_routed_experts": {"n_routed_experts": 4},
    "first_k_dense_replace": {"first_k_dense_replace": 0},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "windows": {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "model_type": {"model_type": "glm4_moe"},
    "hidden_act": {"hidden_act": "gelu"},
    "num_key_value_heads": {"num_key_value_heads": 1},
}
FILES: dict[str, Callable[[Path], object]] = {
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "the tensors are missing": lambda folder: (folder / "model.safetensors").unlink(),
    "the tensors end early": lambda folder: _cut(folder / "model.safetensors"),
    "a tokenizer of another vocabulary": lambda folder: _edit(folder / "tokenizer.json", _without_merges),
    "another end of documents": lambda folder: _edit(folder / "tokenizer_config.json", _end_is_a),
    "no tokenizer": lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _without_merges(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"] = []


def _end_is_a(options: dict[str, Any]) -> None:
    options["eos_token"] = "a"


@pytest.mark.parametrize("gate", ["logits", "tensors"])
def test_an_export_without_a_fault_passes(exported: Export, gate: Gate) -> None:
    exported.check(exported.folder, gate)


def test_the_logits_are_those_of_transformers(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that is in no tensor and no key of the config."""
    load = gates.load_model

    def louder(folder: Path) -> Any:
        model: Any = load(folder)
        model.lm_head.register_forward_hook(lambda _, inputs, output: output * 1.001)
        return model

    monkeypatch.setattr(gates, "load_model", louder)
    with pytest.raises(GateError, match="logits differ by"):
        exported.check(exported.folder, "logits")


def test_only_a_row_in_which_experts_score_alike_is_left_out() -> None:
    """Two columns of the gate that differ by less than rounding, and experts that do not."""
    config = tiny_model_config({"num_experts": 4, "router": {"kind": "top_k", "top_k": 2}})
    model = make_model(config)
    row = torch.arange(8)[None]
    assert not is_tied(model, row, 1e-5)
    for block in model.blocks:
        gate = block.ffn.router.gate.weight.data  # pyrefly: ignore
        gate[1:] = gate[1] * (1 + 1e-7 * torch.arange(3)[:, None])
    before = our_logits(model, row)
    assert is_tied(model, row, 1e-5)
    assert torch.equal(our_logits(model, row), before), "the weights are as they were"


@pytest.mark.parametrize("gate", ["logits", "tensors"])
@pytest.mark.parametrize("fault", [*TENSORS, *(f"config: {key}" for key in CONFIG), *FILES])
def test_a_fault_is_caught(exported: Export, fault: str, gate: Gate, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.folder, tmp_path / "copy"))
    if fault in TENSORS:
        tensors = load_file(folder / "model.safetensors")
        TENSORS[fault](tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif fault in FILES:
        FILES[fault](folder)
    else:
        key = fault.removeprefix("config: ")
        _edit(folder / "config.json", lambda values: values.update(CONFIG[key]))
    with pytest.raises(GateError):
        exported.check(folder, gate)

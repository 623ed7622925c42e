"""Adapter files are what peft loads: the same logits on the exported base, in every family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.exported_runs import make_run
from tests.family_models import MODELS, SIZES
from trainer.convert.gates import our_logits
from trainer.convert.hf_export import ExportOptions, export
from trainer.convert.peft_adapter import AdapterOptions, export_adapter
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.families.registry import choose_family
from trainer.models.parameter_roles import is_adapter

PeftModel = pytest.importorskip("peft").PeftModel
LORA = {"rank": 3, "alpha": 2.0}
PARTS = ["attention", "experts.w_out", "shared", "dense.w_in"]


def options(config: ExperimentConfig) -> ExportOptions:
    family = choose_family(config.model)
    assert not isinstance(family, str), family
    return ExportOptions(family=family, gate="tensors")


def adapter_options(config: ExperimentConfig, **more: Any) -> AdapterOptions:
    return AdapterOptions(family=options(config).family, **more)


@pytest.mark.parametrize("name", MODELS)
def test_merged_and_loaded_by_peft_a_model_has_our_logits(name: str, tmp_path: Path) -> None:
    model = {**SIZES, **MODELS[name], "init_std": 0.06}
    config, run, ours = make_run(tmp_path, {**model, "lora": LORA})
    prompts = torch.randint(0, 255, (4, 9), generator=torch.Generator().manual_seed(0))
    expected = our_logits(ours, prompts)
    export(config, run, tmp_path / "merged", options(config), warn=pytest.fail)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(prompts).logits, expected, rtol=0, atol=1e-6)
    (tmp_path / "parent").mkdir()
    parent, parent_run, _ = make_run(tmp_path / "parent", model)
    export(parent, parent_run, tmp_path / "base", options(parent), warn=pytest.fail)
    slow = {"experts_implementation": "eager"} if ours.config.moe is not None else {}  # the fast one has no float64
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **slow)
    without = base(prompts).logits
    assert float((without - expected).abs().max()) > 0.01
    written = export_adapter(config, run, tmp_path / "adapter", adapter_options(config), warn=pytest.fail)
    found = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(found(prompts).logits, expected, rtol=0, atol=1e-6)
    exact = our_logits(ours.double(), prompts)  # transformers computes norms and positions in float32 all the same
    torch.testing.assert_close(found.double()(prompts).logits, exact, rtol=0, atol=1e-6)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name, _ in found.named_parameters() if ".lora_" in name} == stored.keys()
    assert written.parameters >= sum(p.numel() for name, p in ours.named_parameters() if is_adapter(name))


def test_half_of_the_matrices_are_named_so_that_no_other_is_meant(tmp_path: Path) -> None:
    moe = {**MODELS["qwen2_moe"]["moe"], "first_dense_layers": 1}
    model = {**SIZES, **MODELS["qwen2_moe"], "moe": moe, "init_std": 0.06}
    lora = {**LORA, "targets": PARTS, "use_rslora": True}
    config, run, _ = make_run(tmp_path, {**model, "lora": lora})
    export_adapter(config, run, tmp_path / "out", adapter_options(config, base="a/base"), warn=pytest.fail)
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert values["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert values["target_parameters"] == [
        "mlp.experts.down_proj",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "shared_expert.down_proj.weight",
        "shared_expert.gate_proj.weight",
        "shared_expert.up_proj.weight",
    ]
    assert values["base_model_name_or_path"] == "a/base" and values["r"] == 3 and values["use_rslora"] is True
    export(config, run, tmp_path / "merged", options(config), warn=pytest.fail)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    (tmp_path / "parent").mkdir()
    parent, parent_run, _ = make_run(tmp_path / "parent", model)
    export(parent, parent_run, tmp_path / "base", options(parent), warn=pytest.fail)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    prompts = torch.randint(0, 255, (2, 9), generator=torch.Generator().manual_seed(0))
    found = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(found(prompts).logits, merged(prompts).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (None, r"--adapter: the run has no adapters \(model.lora: null\); leave the option out"),
        (
            {**LORA, "trains": ["router", "norms"]},
            "--adapter: the run also trained router, norms .* cannot hold; leave",
        ),
    ],
)
def test_what_adapters_do_not_say_is_refused(lora: Any, message: str, tmp_path: Path) -> None:
    config, run, _ = make_run(tmp_path, {**SIZES, **MODELS["mixtral"], "lora": lora})
    with pytest.raises(ConfigError, match=message):
        export_adapter(config, run, tmp_path / "out", adapter_options(config), warn=pytest.fail)
    assert not (tmp_path / "out").exists()

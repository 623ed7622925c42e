"""An exported folder is our model in transformers, or it is not there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import foreign_tokenizers
from tests.exported_runs import make_run
from tests.family_models import MODELS, RAW_GROUPS, SHARED, SIZES
from trainer.checkpoint.run_folder import RunFolder
from trainer.convert.gates import our_logits
from trainer.convert.hf_export import Exported, ExportOptions, export
from trainer.errors import CheckpointError
from trainer.experiment import ExperimentConfig
from trainer.families.registry import FAMILIES, choose_family
from trainer.models.generation import generate
from trainer.models.sampling import SamplingOptions


def exported(config: ExperimentConfig, run: RunFolder, out: Path, **options: Any) -> Exported:
    """Export a run to the first family that can express it."""
    family = choose_family(config.model)
    assert not isinstance(family, str), family
    return export(config, run, out, ExportOptions(family=family, **options), warn=pytest.fail)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_has_our_logits_and_our_texts(name: str, tmp_path: Path) -> None:
    """Greedy texts of 20 prompts, token by token."""
    config, run, ours = make_run(tmp_path, {**SIZES, **MODELS[name]})
    result = exported(config, run, tmp_path / "out")
    assert result.model.family.name == name and result.report.worst < 1e-5 and result.report.num_tokens == 256
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 255, (20, 5), generator=generator)
    torch.testing.assert_close(theirs(prompts).logits, our_logits(ours, prompts), rtol=0, atol=1e-5)
    texts = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=False)
    compared = 0
    for prompt, text in zip(prompts.tolist(), texts.tolist(), strict=True):
        options = SamplingOptions(temperature=0.0)
        mine = [*generate(ours, prompt, max_new_tokens=12, options=options, generator=generator, stop_token=255)]
        assert text[5 : 5 + len(mine)] == mine and (len(mine) == 12 or text[5 + len(mine)] == 255)
        compared += len(mine)
    assert compared > 100, "most texts do not end at once"


def test_shards_have_the_names_and_sizes_of_transformers(tmp_path: Path) -> None:
    """Also from a checkpoint whose tensors are in slices, as several ranks write them."""
    config, run, _ = make_run(tmp_path, {**SIZES, **MODELS["qwen3_moe"]}, file_bytes=3000)
    assert len(list((run.checkpoints / "step_00000000").glob("*.safetensors"))) > 10
    one, several = (
        exported(config, run, tmp_path / out, shard_bytes=size) for out, size in (("a", 10**9), ("b", 9000))
    )
    assert one.num_files == 1 and several.num_files > 3
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == several.size_bytes
    whole, parts = load_file(tmp_path / "a" / "model.safetensors"), {}
    for file in files:
        found = load_file(tmp_path / "b" / file)
        assert sum(tensor.nbytes for tensor in found.values()) <= 9000 or len(found) == 1
        assert {name for name, where in index["weight_map"].items() if where == file} == found.keys()
        parts |= found
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("gate", ["logits", "tensors"])
def test_bfloat16_is_rounded_once_and_a_selection_bias_not_at_all(gate: Any, tmp_path: Path) -> None:
    config, run, ours = make_run(tmp_path, {**SIZES, **MODELS["dots1"]})
    exported(config, run, tmp_path / "out", dtype="bfloat16", gate=gate)
    found = load_file(tmp_path / "out" / "model.safetensors")
    weights = dict(ours.named_buffers()) | dict(ours.named_parameters())
    bias = found["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype is torch.float32 and torch.equal(bias, weights["blocks.1.ffn.router.bias"])
    down = found["model.layers.1.mlp.experts.7.down_proj.weight"]
    assert torch.equal(down, weights["blocks.1.ffn.experts.w_out"][7].bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_tensor_that_they_do_not_have_must_be_zero(tmp_path: Path) -> None:
    rate = {**RAW_GROUPS, "bias_update_rate": 0.1}
    config, run, _ = make_run(tmp_path, {**SIZES, **MODELS["deepseek_v2"], "moe": {**SHARED, "router": rate}})
    options = ExportOptions(family=FAMILIES["deepseek_v2"])
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.router\.bias is not zero, and deepseek_v2 has no such"):
        export(config, run, tmp_path / "out", options, warn=pytest.fail)
    assert not (tmp_path / "out").exists()


def _tokenizer(kind: str, folder: Path) -> dict[str, Any]:
    match kind:
        case "byte":
            return {"kind": "byte"}
        case "bpe":
            return {"kind": "bpe", "vocab_size": 300}
        case _:
            path = folder / "tokenizer.json"
            path.write_text(json.dumps(getattr(foreign_tokenizers, kind)()))
            return {"kind": "file", "path": str(path)}


@pytest.mark.parametrize("kind", ["byte", "bpe", "byte_level", "byte_fallback", "metaspace"])
def test_the_tokenizer_gives_the_same_ids_and_template(kind: str, tmp_path: Path) -> None:
    config, run, _ = make_run(tmp_path, {**SIZES, **MODELS["mixtral"]}, tokenizer=_tokenizer(kind, tmp_path))
    (run.path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    model = exported(config, run, tmp_path / "out").model
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("It was a bright cold day", " the  day", "\u4e2d\u6587 \n\t x", ""):
        assert theirs(text)["input_ids"] == model.tokenizer.encode(text).tolist()
    assert theirs.eos_token_id == theirs.pad_token_id == model.tokenizer.end_of_document
    options = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert options["chat_template"] == (tmp_path / "out" / "chat_template.jinja").read_text()
    chat = theirs.apply_chat_template([{"role": "user", "content": "cold"}], tokenize=False)
    assert chat == "cold"
    assert not model.config.tie_embeddings or model.vocab_size == model.tokenizer.vocab_size


def test_more_rows_than_ids_are_exported(tmp_path: Path) -> None:
    config, run, _ = make_run(tmp_path, {**SIZES, **MODELS["qwen2_moe"], "vocab_size": 260})
    assert exported(config, run, tmp_path / "out").model.vocab_size == 260
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 260


def test_the_card_has_figures_config_gate_and_picture(tmp_path: Path) -> None:
    config, run, _ = make_run(tmp_path, {**SIZES, **MODELS["mixtral"]})
    run.metrics.write_text('{"step": 0, "loss": 3.25}\n{"step": 0, "eval/loss": 3.5}\n{"step": 9, "loss": 1.0}\nbad\n')
    run.experts_picture.write_text("<svg/>")
    parent = {"id": "0123456789abcdef", "name": "a|b", "step": 7, "folder": "/elsewhere"}
    run.run_id.write_text("fedcba9876543210\n")
    run.origin.write_text(json.dumps({"id": "fedcba9876543210", "parent": parent}))
    run.made_from.write_text(json.dumps({"command": "init_from", "parents": [parent]}))
    exported(config, run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| training loss (nats per token) | 3.250 |" in card and "| held-out loss (nats per token) | 3.500 |" in card
    assert "gate logits: loaded by transformers, 46 tensors equal ours" in card
    assert "![Experts by domain](experts.svg)" in card and (tmp_path / "out" / "experts.svg").read_text() == "<svg/>"
    assert "| made from | a\\|b at step 7 (init_from) |" in card and "elsewhere" not in card
    assert "  d_model: 16\n" in card and str(tmp_path) not in card


def test_the_card_of_a_dense_model_says_so(tmp_path: Path) -> None:
    config, run, _ = make_run(tmp_path, {**SIZES, **MODELS["qwen3"]})
    exported(config, run, tmp_path / "out", gate="tensors")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "tags: [dense, turnout]" in card and "A dense language model" in card and "| experts |" not in card


def test_a_tokenizer_that_transformers_would_split_otherwise_is_refused(tmp_path: Path) -> None:
    """Transformers knows one way to split words for qwen2."""
    tokenizer = _tokenizer("metaspace", tmp_path)
    config, run, _ = make_run(tmp_path, {**SIZES, **MODELS["qwen2"]}, tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match=r"for qwen2 transformers splits words as Qwen2 does, .* another target$"):
        exported(config, run, tmp_path / "out", gate="tensors")
    assert not (tmp_path / "out").exists()

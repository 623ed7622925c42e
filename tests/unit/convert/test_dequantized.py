"""Quantized weights are the numbers that transformers makes of them, whichever rows are asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.checkpoint_helpers import load
from tests.foreign_models import change_json, make_foreign, save_foreign
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.convert.dequantized import DequantizedFolder
from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.hf_import import import_model
from trainer.convert.quantization import quantization_problem
from trainer.errors import CheckpointError, ConfigError

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 6], "fmt": "e4m3", "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4"}


def _fp8(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    numbers = (30 * torch.randn(rows, columns, generator=generator)).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 4), -(-columns // 6), generator=generator) + 0.01
    return numbers, scales


def _opened(folder: Path, section: Mapping[str, Any], **tensors: Tensor) -> DequantizedFolder:
    save_file(tensors, folder / "model.safetensors")
    return DequantizedFolder(ForeignFolder(folder), section)


def test_fp8_in_blocks_is_transformers_own(tmp_path: Path) -> None:
    numbers, scales = _fp8(8, 12)
    expected = Fp8Dequantize(None)._dequantize_one(numbers, scales)
    assert expected.dtype is torch.float32 and expected.unique().numel() > 50
    with _opened(tmp_path, FP8, **{"a.weight": numbers, "a.weight_scale_inv": scales, "norm": torch.ones(3)}) as found:
        assert found.entries.keys() == {"a.weight", "norm"}
        assert torch.equal(found.read("a.weight"), expected)
        for first in range(8):
            for last in range(first + 1, 9):
                assert torch.equal(found.read("a.weight", first, last), expected[first:last])
        assert torch.equal(found.read("norm", 1, 3), torch.ones(2))


def test_blocks_at_the_edges_are_cut(tmp_path: Path) -> None:
    """DeepSeek-V3 has 576 rows in blocks of 128."""
    numbers, scales = _fp8(7, 9)
    with _opened(tmp_path, FP8, **{"a.weight": numbers, "a.weight_scale_inv": scales}) as found:
        values = found.read("a.weight", 3, 7)
    for row in range(3, 7):
        for column in range(9):
            assert values[row - 3, column] == numbers[row, column].float() * scales[row // 4, column // 6]


def test_mxfp4_is_transformers_own(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 4, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 4, 2), generator=generator, dtype=torch.uint8)
    scales[0, 0, 0] = 0
    expected = convert_moe_packed_tensors(blocks, scales)
    with _opened(tmp_path, MXFP4, experts_blocks=blocks, experts_scales=scales) as found:
        assert found.entries.keys() == {"experts"} and found.entries["experts"].shape == (3, 64, 4)
        assert torch.equal(found.read("experts"), expected) and expected.dtype is torch.bfloat16
        assert torch.equal(found.read("experts", 1, 2), expected[1:2])


def test_an_fp8_model_is_imported_as_what_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_foreign("deepseek_v3")
    save_foreign(Path("theirs"), model)
    tensors, whole = load_file("theirs/model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if "_proj.weight" in name:
            numbers, scales = _fp8(*tensor.shape, seed=len(whole))
            tensors |= {name: numbers, f"{name}_scale_inv": scales}
            by_element = scales.repeat_interleave(4, 0).repeat_interleave(6, 1)
            whole[name] = numbers.float() * by_element[: tensor.shape[0], : tensor.shape[1]]
    save_file(tensors, "theirs/model.safetensors")
    change_json(Path("theirs/config.json"), quantization_config=FP8)
    with pytest.raises(ConfigError, match="its weights are quantized, and transformers would compute with them"):
        import_model(Path("theirs"), None, ["name=a"], gate="logits")
    imported = import_model(Path("theirs"), None, ["name=a"], gate="tensors")
    ours = load(CheckpointFolder(imported.run / "checkpoints"), 0)
    expected = whole["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert torch.equal(ours["model.blocks.1.ffn.experts.w_out"][2], expected)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": _fp8(8, 12)[0]}, r"'a\.weight' is quantized, and 'a\.weight_scale_inv' is missing"),
        ({"a.weight": _fp8(8, 12)[0], "a.weight_scale_inv": torch.ones(2, 3)}, "which do not fit"),
        ({"a_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8)}, "'a_scales' is missing"),
        (
            {"a_blocks": torch.zeros(1, 2, 3, 8, dtype=torch.uint8), "a_scales": torch.zeros(1, 2, 3).byte()},
            "which do not fit",
        ),
    ],
)
def test_numbers_without_their_scales_are_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        _opened(tmp_path, FP8, **tensors)


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ("fp8", "null"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({**FP8, "fmt": "e5m2"}, "e5m2"),
    ],
)
def test_other_ways_are_refused_by_name(section: object, word: str) -> None:
    problem = quantization_problem(section)
    assert problem is not None and word in problem
    assert quantization_problem(FP8) is None and quantization_problem(MXFP4) is None


def test_gpt_oss_in_mxfp4_is_imported_as_what_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_foreign(Path("theirs"), make_foreign("gpt_oss", hidden_size=32, intermediate_size=32))
    tensors, whole = load_file("theirs/model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        for name, rows in (("gate_up_proj", 64), ("down_proj", 32)):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = torch.randint(0, 256, (6, rows, 1, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 126, (6, rows, 1), generator=generator, dtype=torch.uint8)
            whole[f"{layer} {name}"] = convert_moe_packed_tensors(blocks, scales).float()
            assert whole[f"{layer} {name}"].shape == tensors.pop(key).shape
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    save_file(tensors, "theirs/model.safetensors")
    change_json(Path("theirs/config.json"), quantization_config=MXFP4)
    imported = import_model(Path("theirs"), None, ["name=a"], gate="tensors")
    ours = load(CheckpointFolder(imported.run / "checkpoints"), 0)
    both = whole["1 gate_up_proj"]
    assert torch.equal(ours["model.blocks.1.ffn.experts.w_in"], torch.cat([both[..., ::2].mT, both[..., 1::2].mT], 1))
    assert torch.equal(ours["model.blocks.0.ffn.experts.w_out"], whole["0 down_proj"].mT)

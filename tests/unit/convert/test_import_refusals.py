"""Whatever is wrong with a published folder: one line, the right exit code, and nothing is left."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.foreign_models import change_json, make_foreign, save_foreign
from trainer.cli import main

Spoil = Callable[[Path], object]
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foreign(tmp_path_factory.mktemp("single") / "theirs", make_foreign("mixtral"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several files: model-00001-of-0000N.safetensors, and their index."""
    folder = tmp_path_factory.mktemp("sharded") / "theirs"
    return save_foreign(folder, make_foreign("mixtral"), max_shard_size="12KB")


def _set(**values: Any) -> Spoil:
    return lambda folder: change_json(folder / CONFIG, **values)


def _write(name: str, content: str | bytes) -> Spoil:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def _tensors(change: Callable[[dict[str, Any]], object], name: str = "model.safetensors") -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, {"format": "pt"})

    return spoil


def _header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change the header of the file and leave its tensors."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def _cut(num_bytes: int) -> Spoil:
    return lambda folder: os.truncate(folder / "model.safetensors", num_bytes)


def _link_out(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        elsewhere = folder.parent / f"elsewhere {name}"
        (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)

    return spoil


def _index(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return spoil


def _index_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{QUERY}": "x.safetensors",', 1))


def _another_ones_tokenizer(folder: Path) -> None:
    change_json(folder / CONFIG, vocab_size=200)
    cut = ("model.embed_tokens.weight", "lm_head.weight")
    _tensors(lambda tensors: tensors.update({name: tensors[name][:200].clone() for name in cut}))(folder)


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


SINGLE: dict[str, tuple[Spoil, int, str]] = {
    "config.json is missing": (lambda folder: (folder / CONFIG).unlink(), 3, r"config\.json: no such file"),
    "config.json is not JSON": (_write(CONFIG, "{'a': 1}"), 3, r"config\.json: is not the JSON that it should be"),
    "config.json is a list": (_write(CONFIG, "[]"), 3, "it holds no object"),
    "config.json is not UTF-8": (_write(CONFIG, b'{"a": "\xff"}'), 3, r"config\.json: is not the JSON"),
    "config.json is nested": (_write(CONFIG, '{"a": ' + "[" * 100_000), 3, "nested too deeply"),
    "config.json is huge": (_write(CONFIG, b" " * (100 << 20)), 3, "has 104857600 bytes, and at most 1048576 are read"),
    "a key twice": (_write(CONFIG, '{"model_type": "mixtral", "model_type": "x"}'), 3, "'model_type' is given twice"),
    "not a number": (_write(CONFIG, '{"rms_norm_eps": NaN}'), 3, "NaN is not a number"),
    "config.json leads elsewhere": (_link_out(CONFIG), 3, r"config\.json: is a link out of the folder"),
    "config.json is a pipe": (
        lambda folder: ((folder / CONFIG).unlink(), os.mkfifo(folder / CONFIG)),
        *(3, r"config\.json: is not a regular file"),
    ),
    "unknown family": (_set(model_type="gpt2"), 3, r"config\.json: model_type: 'gpt2' is not among mixtral"),
    "no family": (_set(model_type=None), 3, "model_type: None is not among"),
    "remote code": (
        _set(model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"}),
        *(3, r"its model is code that comes with it \(auto_map\), which is never run"),
    ),
    "another head": (_set(architectures=["MixtralForTokenClassification"]), 3, "only MixtralForCausalLM is imported"),
    "inexpressible": (_set(hidden_act="relu"), 3, "hidden_act: 'relu' cannot be expressed here; only 'silu'"),
    "an unknown key": (_set(mystery=3), 3, "mystery: 3 is unknown for mixtral"),
    "a wrong type": (_set(hidden_size="16"), 3, "hidden_size: '16' is not a number of the right type"),
    "a negative width": (_set(hidden_size=-16), 3, r"config\.json: "),
    "a huge model": (_set(hidden_size=1 << 24, num_local_experts=1 << 20), 3, "parameters are more than a machine"),
    "a model of many layers": (_set(num_hidden_layers=10_000), 4, r"lacks 'model\.layers\.2\.input_layernorm"),
    "no layers": (_set(num_hidden_layers=0), 3, r"num_layers"),
    "quantized": (_set(quantization_config={"quant_method": "gptq"}), 3, "quantiz"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        *(4, r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
    ),
    "pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        *(4, r"'pytorch_model\.bin', a pickle, which can run code and is never read; convert them"),
    ),
    "weights lead elsewhere": (_link_out("model.safetensors"), 4, "is a link out of the folder"),
    "truncated": (_cut(20_000), 4, "it has 20000 bytes, and its tensors need"),
    "truncated in its header": (_cut(100), 4, "100 bytes cannot hold its header"),
    "empty": (_cut(0), 4, "0 bytes cannot hold its header"),
    "a huge header": (
        lambda folder: (
            _write("model.safetensors", struct.pack("<Q", 1 << 25))(folder),
            os.truncate(folder / "model.safetensors", 1 << 26),
        ),
        *(4, "a header of 33554432 bytes, and at most 16777216 are read"),
    ),
    "a header that is not JSON": (_write("model.safetensors", struct.pack("<Q", 3) + b"{,}"), 4, "is not the JSON"),
    "an unknown dtype": (
        _header(lambda header: header[QUERY].update(dtype="F4")),
        *(4, r"'model\.layers\.0\.self_attn\.q_proj\.weight' has dtype 'F4'"),
    ),
    "tensors that overlap": (
        _header(lambda header: header[QUERY].update(data_offsets=header["lm_head.weight"]["data_offsets"])),
        *(4, "is said to be in bytes"),
    ),
    "offsets that are no numbers": (
        _header(lambda header: header[QUERY].update(data_offsets="all")),
        4,
        "is said to be",
    ),
    "a negative shape": (_header(lambda header: header[QUERY].update(shape=[-16, -16])), 4, "has no shape"),
    "a wrong shape": (
        _tensors(lambda tensors: tensors.update({QUERY: tensors[QUERY][:8].clone()})),
        *(4, r"q_proj\.weight is \[8, 16\], and by its config\.json it is \[16, 16\]"),
    ),
    "a missing expert": (
        _tensors(lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.5.w1.weight")),
        *(4, r"lacks 'model\.layers\.1\.block_sparse_moe\.experts\.5\.w1\.weight', which its config\.json promises"),
    ),
    "an expert too many": (
        _tensors(
            lambda tensors: tensors.update({"model.layers.0.block_sparse_moe.experts.6.w1.weight": torch.ones(1)})
        ),
        *(4, r"experts\.6\.w1\.weight', for which mixtral with its config\.json has no place"),
    ),
    "of integers": (
        _tensors(lambda tensors: tensors.update({QUERY: tensors[QUERY].int()})),
        *(4, r"q_proj\.weight is int32; bfloat16, float16 and float32 are imported"),
    ),
    "not finite": (_tensors(lambda tensors: tensors[QUERY].fill_(torch.inf)), 4, "has values that are not finite"),
    "no tokenizer": (_without_tokenizer, 3, r"has no tokenizer\.json; write one"),
    "a tokenizer that is not JSON": (_write("tokenizer.json", "hello"), 3, r"tokenizer\.json: is not the JSON"),
    "a tokenizer that leads elsewhere": (_link_out("tokenizer.json"), 3, "is a link out of the folder"),
    "a tokenizer that drops characters": (
        lambda folder: change_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"}),
        *(3, "its normalizer Lowercase changes the text"),
    ),
    "the tokenizer of another model": (
        _another_ones_tokenizer,
        *(2, "its embedding has 200 rows, and the tokenizer 256 ids: it is another model's"),
    ),
    "a padding that is none": (_set(vocab_size=1000), 2, "1000 rows for 256 ids of the tokenizer, which looks like"),
}
SHARDED: dict[str, tuple[Spoil, int, str]] = {
    "a missing shard": (
        lambda folder: (folder / "model-00002-of-00006.safetensors").unlink(),
        *(4, r"'model-00002-of-00006\.safetensors' is missing, in which"),
    ),
    "a shard under another one's name": (
        lambda folder: shutil.copy(
            folder / "model-00001-of-00006.safetensors", folder / "model-00002-of-00006.safetensors"
        ),
        *(4, "one is too many|does not list there"),
    ),
    "a name out of the folder": (
        _index(lambda where: where.update({QUERY: "../theirs/model-00001-of-00006.safetensors"})),
        *(4, r"in '\.\./theirs/model-00001-of-00006\.safetensors', no safetensors file beside it"),
    ),
    "an absolute name": (
        _index(lambda where: where.update({QUERY: "/etc/passwd"})),
        4,
        "no safetensors file beside it",
    ),
    "a name that is no text": (_index(lambda where: where.update({QUERY: 3})), 4, "no safetensors file beside"),
    "a pickle in the index": (
        _index(lambda where: where.update({QUERY: "model.bin"})),
        4,
        "no safetensors file beside",
    ),
    "a tensor twice in the index": (_index_twice, 4, "is given twice"),
    "a tensor in another shard": (
        _index(lambda where: where.update({QUERY: "model-00006-of-00006.safetensors"})),
        *(4, "does not list there"),
    ),
    "a tensor in no shard": (
        _index(lambda where: where.update({"more": "model-00006-of-00006.safetensors"})),
        *(4, r"'more' is not in model-00006-of-00006\.safetensors"),
    ),
    "no weight_map": (_write(INDEX, "{}"), 4, "has no weight_map"),
    "an index of another kind": (_write(INDEX, '{"weight_map": []}'), 4, "has no weight_map"),
    "a huge index": (lambda folder: os.truncate(folder / INDEX, (64 << 20) + 1), 4, "are read"),
}


def _refused(folder: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["import", str(folder), *arguments])
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1 and len(lines[0]) < 600, said.err
    return exit_.value.code, lines[0]


def _check(
    whole: Path, case: tuple[Spoil, int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str
) -> None:
    folder = shutil.copytree(whole, tmp_path / "theirs")
    case[0](folder)
    code, line = _refused(folder, "name=mine", *arguments, capsys=capsys)
    assert code == case[1], line
    assert re.search(case[2], line), line
    assert not (tmp_path / "runs").exists()


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SINGLE)
def test_one_file(name: str, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _check(single, SINGLE[name], tmp_path, capsys)


@pytest.mark.parametrize("name", SHARDED)
def test_several_files(name: str, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (sharded / "model-00006-of-00006.safetensors").exists(), "the cases name it"
    _check(sharded, SHARDED[name], tmp_path, capsys)

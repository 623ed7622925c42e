"""Malicious checkpoints, whose manifests have the right hash."""

import hashlib
import json
import os
import pickle
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tests.chaos.sandbox import Sandbox

Attack = Callable[[Sandbox], object]
WEIGHT = "model.blocks.0.ffn.experts.w_in"


class Payload:
    """Creates the canary file when it is unpickled."""

    def __init__(self, box: Sandbox) -> None:
        self.path = str(box.canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def pickled(box: Sandbox, protocol: int = 4) -> bytes:
    """Return a pickle that executes code."""
    return pickle.dumps(Payload(box), protocol=protocol)


def rewrite(box: Sandbox, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and update its hash."""
    path = box.checkpoint / "manifest.json"
    values = json.loads(path.read_text())
    del values["manifest_sha256"]
    change(values)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**values, "manifest_sha256": digest}))


def put(box: Sandbox, data: bytes) -> None:
    """Replace the tensor file and update its size and hash in the manifest."""
    box.tensors.write_bytes(data)
    stated = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(box, lambda values: values["files"].update({box.tensors.name: stated}))


def _header(change: Callable[[dict[str, Any]], object]) -> Attack:
    """Change the header of the safetensors file."""

    def harm(box: Sandbox) -> None:
        data = box.tensors.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        put(box, struct.pack("<Q", len(text)) + text + data[8 + length :])

    return harm


def _raw(length: int, rest: bytes) -> Attack:
    return lambda box: put(box, struct.pack("<Q", length) + rest)


def _text(text: bytes, times: int = 0, end: bytes = b"") -> Attack:
    """Replace the manifest with a text, whose last part may be repeated; generated when it is written."""

    def harm(box: Sandbox) -> None:
        head, _, part = text.partition(b"|")
        (box.checkpoint / "manifest.json").write_bytes(head + part * times + end if times else text)

    return harm


def _says(change: Callable[[dict[str, Any]], object]) -> Attack:
    return lambda box: rewrite(box, change)


def _tensor(**fields: Any) -> Attack:
    return _says(lambda values: values["tensors"][WEIGHT].update(fields))


def _slice(**fields: Any) -> Attack:
    return _says(lambda values: values["tensors"][WEIGHT]["slices"][0].update(fields))


def _run(**fields: Any) -> Attack:
    return _says(lambda values: values["run"].update(fields))


def _named(name: str) -> Attack:
    """Rename the tensor file, and list it under the new name."""

    def harm(box: Sandbox) -> None:
        def change(values: dict[str, Any]) -> None:
            values["files"] = {name: values["files"][box.tensors.name]}
            for tensor in values["tensors"].values():
                tensor["slices"] = [{**part, "file": name} for part in tensor["slices"]]

        (box.outside / "x.safetensors").write_bytes(box.tensors.read_bytes())
        rewrite(box, change)

    return harm


def _instead(make: Callable[[Path, Sandbox], object], name: str = "tensors-00000-00000.safetensors") -> Attack:
    """Replace a file with something that is not a regular file."""

    def harm(box: Sandbox) -> None:
        path = box.checkpoint / name
        path.rename(box.outside / name)
        make(path, box)

    return harm


def _socket(path: Path, box: Sandbox) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        before = Path.cwd()
        os.chdir(path.parent)  # the name of a socket is short
        try:
            made.bind(path.name)
        finally:
            os.chdir(before)


def _large(box: Sandbox) -> None:
    with (box.checkpoint / "manifest.json").open("r+b") as file:
        file.truncate(300 << 20)


def _spoiled(spoil: Callable[[dict[str, torch.Tensor]], object]) -> Attack:
    def harm(box: Sandbox) -> None:
        tensors = safetensors.torch.load(box.tensors.read_bytes())
        spoil(tensors)
        put(box, safetensors.torch.save(tensors))

    return harm


def _beside(name: str) -> Attack:
    def harm(box: Sandbox) -> None:
        if name.endswith(".pt"):
            torch.save(Payload(box), box.checkpoint / name)
        else:
            (box.checkpoint / name).write_bytes(pickled(box))

    return harm


def _deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


_EACH = {"dtype": "int8", "shape": [1], "slices": []}

MANIFESTS: dict[str, Attack] = {
    # what the manifest is
    "manifest of 300 MB": _large,
    "manifest of less than the most objects": _text(b'{"a": [|{},', 1_900_000, b"{}]}"),
    "manifest of more than the most objects": _text(b'{"a": [|{},', 40_000_000, b"{}]}"),
    "manifest of more than the most numbers": _text(b'{"a": [|10000,', 20_000_000, b"1]}"),
    "manifest of one text": _text(b'{"format": 2, "a": "|\\u1234', 20_000_000, b'"}'),
    "manifest nested deeply": _text(b"|[", 1_000_000),
    "manifest nested deeply, of objects": _text(b'|{"a":', 1_000_000),
    "manifest not UTF-8": _text(b'{"format": 2, "\xff\xfe": 1}'),
    "manifest of UTF-16": _text('{"format": 2}'.encode("utf-16")),
    "manifest with a key twice": _text(b'{"format": 2, "format": 2, "manifest_sha256": ""}'),
    "manifest with NaN": _text(b'{"format": 2, "step": NaN, "manifest_sha256": ""}'),
    "manifest with a number of 5000 digits": _text(b'{"format": ' + b"9" * 5000 + b"}"),
    "manifest a list": _text(b"[]"),
    "manifest empty": _text(b""),
    "format a truth": _says(lambda values: values.update(format=True)),
    "format a long text": _says(lambda values: values.update(format="\x1b[2J\n" * 10_000)),
    # what it says
    "shape of 2^63": _tensor(shape=[1 << 63, 32, 16]),
    "shape of 2^40, in no file": _tensor(shape=[0, 1 << 40, 1 << 40], slices=[]),
    "shape of many dimensions": _tensor(shape=[1 << 40] * 100_000),
    "shape larger than its file": _tensor(shape=[4, 1 << 20, 1 << 10]),
    "shape negative": _tensor(shape=[-4, 32, 16]),
    "shape of a truth": _tensor(shape=[True, 32, 16]),
    "shape of a text": _tensor(shape=["4", 32, 16]),
    "shape of a fraction": _tensor(shape=[4.0, 32, 16]),
    "dtype of an object": _tensor(dtype="object"),
    "start beyond 64 bits": _slice(start=1 << 64),
    "start negative": _slice(start=-1),
    "slice missing": _tensor(slices=[]),
    "slices overlapping": _tensor(
        slices=[{"file": "tensors-00000-00000.safetensors", "start": s, "length": 3} for s in (0, 1)]
    ),
    "one file for two slices": _tensor(
        slices=[{"file": "tensors-00000-00000.safetensors", "start": s, "length": 2} for s in (0, 2)]
    ),
    "a name that steers a terminal": _says(
        lambda values: values["tensors"].update({"\x1b]0;x\x07\n" * 1000: {"dtype": "float32", "shape": [1]}})
    ),
    "twenty thousand tensors that are nowhere": _says(
        lambda values: values["tensors"].update({f"x{number}": {**_EACH} for number in range(20_000)})
    ),
    "run nested deeply": _run(config=_deep(900)),
    "experts without moments": _says(lambda values: values["tensors"].pop("optim.exp_avg.blocks.0.ffn.experts.w_in")),
    "another step": _says(lambda values: values.update(step=4)),
}
"""What is wrong with these is seen wherever a manifest is read."""

FILES: dict[str, Attack] = {
    # pickles
    "pickle as manifest": lambda box: (box.checkpoint / "manifest.json").write_bytes(pickled(box)),
    "pickle of protocol 0 as manifest": lambda box: (box.checkpoint / "manifest.json").write_bytes(pickled(box, 0)),
    "pickle as tensors": lambda box: put(box, pickled(box)),
    "torch.save as tensors": lambda box: (torch.save(Payload(box), box.tensors), put(box, box.tensors.read_bytes())),
    **{f"pickle beside as {name}": _beside(name) for name in ("model.pt", "x.bin", "__0_0.distcp", ".metadata")},
    # names of files
    **{
        f"tensors in {name[:24]!r}": _named(name)
        for name in (
            "../../../../../outside/x.safetensors",
            "/etc/passwd",
            "..",
            "a/../x.safetensors",
            "x.safetensors\n",
            "x\0.safetensors",
            "\u2025/x.safetensors",
            "x.pt",
            "x" * 5000 + ".safetensors",
        )
    },
    "tensors behind a link": _instead(lambda path, box: path.symlink_to(box.outside / path.name)),
    "tensors a folder": _instead(lambda path, box: path.mkdir()),
    "tensors a pipe": _instead(lambda path, box: os.mkfifo(path)),
    "tensors a device": _instead(lambda path, box: path.symlink_to("/dev/zero")),
    "tensors a socket": _instead(_socket),
    "manifest behind a link": _instead(lambda path, box: path.symlink_to(box.outside / path.name), "manifest.json"),
    "manifest a folder": _instead(lambda path, box: path.mkdir(), "manifest.json"),
    "manifest a pipe": _instead(lambda path, box: os.mkfifo(path), "manifest.json"),
    "manifest a device": _instead(lambda path, box: path.symlink_to("/dev/zero"), "manifest.json"),
    # safetensors
    "header of 2^63 bytes": _raw(1 << 63, b"{}"),
    "header of 2^64 - 1 bytes": _raw((1 << 64) - 1, b"{}"),
    "header longer than its file": _raw(1000, b"{}"),
    "header no JSON": _raw(8, b"not json"),
    "header not UTF-8": _raw(8, b'{"\xff\xff":}'),
    "header nested deeply": _raw(200_000, b"[" * 200_000),
    "header nested deeply, of objects": _raw(600_000, b'{"a":' * 120_000),
    "header shorter than its length": lambda box: put(box, b"\x01"),
    "header of 90 MB": lambda box: _raw(90 << 20, b"{}" + b" " * ((90 << 20) - 2))(box),
    "header of a million tensors": lambda box: put(box, _empty_tensors(1_000_000)),
    "header of as many tensors as are read": lambda box: put(box, _empty_tensors(240_000)),
    "file empty": lambda box: put(box, b""),
    "offsets overlapping": _header(
        lambda header: header[WEIGHT].update(data_offsets=header["model.norm.weight"]["data_offsets"])
    ),
    "offsets out of the file": _header(lambda header: header[WEIGHT].update(data_offsets=[1 << 40, (1 << 40) + 8192])),
    "offsets reversed": _header(lambda header: header[WEIGHT]["data_offsets"].reverse()),
    "offsets negative": _header(lambda header: header[WEIGHT].update(data_offsets=[-8192, 0])),
    "another dtype": _header(lambda header: header[WEIGHT].update(dtype="I32")),
    "an unknown dtype": _header(lambda header: header[WEIGHT].update(dtype="PICKLE")),
    "another shape": _header(lambda header: header[WEIGHT]["shape"].reverse()),
    "a shape that overflows": _header(lambda header: header[WEIGHT].update(shape=[1 << 62, 1 << 62])),
    "a tensor that is not there": _header(lambda header: header.update({"model.other": header.pop(WEIGHT)})),
    "weights not finite": _spoiled(lambda tensors: tensors[WEIGHT].fill_(torch.nan)),
    "experts equal": _spoiled(lambda tensors: tensors[WEIGHT].copy_(tensors[WEIGHT][:1].expand(4, -1, -1).clone())),
}  # fmt: skip


def _empty_tensors(count: int) -> bytes:
    each = ",".join(f'"t{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(count))
    return struct.pack("<Q", len(each) + 2) + b"{" + each.encode() + b"}"


FINE_TO_EVALUATE = {
    "weights not finite",
    "experts equal",  # what they evaluate to is their own affair
    *(name for name in FILES if "beside" in name),  # never opened
}

FOR_A_RUN: dict[str, Attack] = {
    "position negative": _run(position=-1),
    "position a text": _run(position="0; import os"),
    "position of 2^70": _run(position=1 << 70),
    "position missing": _says(lambda values: values["run"].pop("position")),
    "tokens missing": _says(lambda values: values["run"].pop("tokens")),
    "skipped steps a list": _run(skipped_steps=[1]),
    "fingerprint of the data missing": _says(lambda values: values["run"].pop("data_fingerprint")),
    "fingerprint of the tokenizer that steers a terminal": _run(tokenizer_fingerprint="\x1b[2J\n" * 1000),
    "fingerprint of the data that steers a terminal": _run(data_fingerprint="\x1b[2J\n" * 1000),
    "config a list": _run(config=[1]),
    "model a text": _run(config={"model": "x" * 100_000}),
    "model of another size, in many words": _run(config={"model": {"d_model": "\x1b[2J\n" * 100_000}}),
    "model with a key of its own": _run(config={"model": {"\x1b[2J\n" * 1000: 1}}),
    "model nested deeply": _run(config={"model": _deep(150)}),
    "updates missing": _says(lambda values: values["values"].clear()),
    "updates a text": _says(lambda values: values["values"].update(optimizer_steps="1")),
    "updates of 2^80": _says(lambda values: values["values"].update(optimizer_steps=1 << 80)),
    "updates negative": _says(lambda values: values["values"].update(optimizer_steps=-1)),
    "a tensor too many, of a long name": _says(
        lambda values: values["tensors"].update(
            {"model." + "x" * 100_000: {"dtype": "int8", "shape": [0], "slices": []}}
        )
    ),
    **{name: FILES[name] for name in ("pickle as tensors", "tensors a pipe", "header of 2^63 bytes")},
}

"""Malicious configs, overrides and names."""

import os
from collections.abc import Callable

from tests.chaos.hostile_checkpoints import pickled
from tests.chaos.sandbox import Sandbox

Given = tuple[Callable[[Sandbox], object], list[str]]


def nothing(box: Sandbox) -> None:
    pass


def _config(text: str, *overrides: str) -> Given:
    """A config file of this text; CANARY in it is the path that a payload makes."""

    def prepare(box: Sandbox) -> None:
        (box.path / "evil.yaml").write_text(text.replace("CANARY", str(box.canary)))

    return prepare, ["train", "evil.yaml", *overrides]


def _own_config(text: str, *arguments: str) -> Given:
    """The record that the run folder keeps of its config."""

    def prepare(box: Sandbox) -> None:
        (box.run / "config.yaml").write_text(text.replace("CANARY", str(box.canary)))

    return prepare, list(arguments)


def _override(*overrides: str) -> Given:
    return nothing, ["train", "tiny.yaml", *overrides]


def _as_file(make: Callable[[Sandbox], object], *arguments: str) -> Given:
    return make, list(arguments)


_TAG = '!!python/object/apply:os.system ["touch CANARY"]'
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
NAMES = {
    "up": "../x",
    "up and out": "../../outside/x",
    "dots": "..",
    "a dot": ".",
    "absolute": "/tmp/x",
    "NUL": '"x\\0y"',
    "a new line": '"x\\ny"',
    "a last new line": '"x\\n"',
    "5 kB": "x" * 5000,
    "129 letters": "x" * 129,
    "empty": '""',
    "a slash": "tiny/checkpoints",
    "a backslash": "..\\x",
    "a fraction slash": "..\u2044x",
    "a full-width dot": "\uff0e\uff0e",
    "Cyrillic letters": "t\u0456ny",
    "a mark that reorders": "tiny\u202eyaml",
    "a dash": "-rf",
    "home": "~",
    "a variable": "$HOME",
    "a command": "$(touch ../canary)",
    "half of a pair": "x\udcff",
    "a device of another system": "C:x",
    "hidden": ".ssh",
}

REFUSED: dict[str, Given] = {
    # tags and bombs
    "tag in a config": _config(f"name: {_TAG}\n"),
    "tag of a list": _config(f"data:\n  sources: {_TAG}\n"),
    "tag of an object": _config("name: !!python/object/new:os.system [touch CANARY]\n"),
    "tag of a name": _config("name: !!python/name:os.system\n"),
    "tag of a module": _config("name: !!python/module:os\n"),
    "tag as a key": _config(f"? {_TAG}\n: 1\n"),
    "tag in an override": _override("name=!!python/object/apply:os.system [touch ../canary]"),
    "tag in the run's own config, train": _own_config(f"name: {_TAG}\n", "train", "tiny.yaml"),
    "tag in the run's own config, eval": _own_config(f"name: {_TAG}\n", "eval", "runs/tiny"),
    "tag in the run's own config, prune": _own_config(f"name: {_TAG}\n", "checkpoint", "prune", "runs/tiny"),
    "aliases without end": _config(_BOMB),
    "aliases without end, eval": _own_config(_BOMB, "eval", "runs/tiny"),
    "an alias in itself": _config("name: &a [*a]\n"),
    "merge keys": _config("x: &x {name: y}\n<<: *x\n"),
    "nested deeply": _config("a: " + "[" * 200_000),
    "nested deeply, of maps": _config("{a: " * 100_000),
    "a block nested deeply": _config("- " * 100_000),
    "more than a megabyte": _config("name: x\n" + "# x\n" * 400_000),
    "a key of 900 kB": _config("x" * 900_000 + ": 1\n"),
    "a value of 900 kB": _config(f'name: "{"x" * 900_000}"\n'),
    "a number of 900 kB": _config(f"name: tiny\nseed: {'9' * 900_000}\n"),
    "escapes for a terminal": _config('"\\e]0;x\\a\\e[2J": 1\n'),
    "a pickle for a config": _as_file(lambda box: (box.path / "x.yaml").write_bytes(pickled(box)), "train", "x.yaml"),
    "a pickle to evaluate": _as_file(lambda box: (box.path / "evil.pt").write_bytes(pickled(box)), "eval", "evil.pt"),
    "a pickle as text": _as_file(lambda box: (box.path / "text.txt").write_bytes(pickled(box)), "train", "tiny.yaml"),
    "a base that is a pickle": _as_file(
        lambda box: ((box.path / "b").write_bytes(pickled(box)), (box.path / "evil.yaml").write_text("base: b\n")),
        "train",
        "evil.yaml",
    ),
    "a base that is a device": _config("base: /dev/zero\n"),
    "a base that is itself": _config("base: evil.yaml\n"),
    "a base that is a pipe": _as_file(
        lambda box: (os.mkfifo(box.path / "pipe"), (box.path / "evil.yaml").write_text("base: pipe\n")),
        "train",
        "evil.yaml",
    ),
    "a base with NUL": _config('base: "a\\0b"\n'),
    "a base of 5 kB": _config(f"base: {'x' * 5000}\n"),
    "text in a pipe": _as_file(
        lambda box: os.mkfifo(box.path / "pipe"), "train", "tiny.yaml", "name=x", "data.sources.0.path=pipe"
    ),
    "text with NUL in its name": _override("name=x", 'data.sources.0.path="a\\0b"'),
    "text of a name of 5 kB": _override("name=x", f"data.sources.0.path={'x' * 5000}"),
    # numbers
    "numbers beyond all": _override(
        "model.num_layers=1000000000", "model.moe.capacity.factor=1e300", f"parallel.micro_batch_size={2**63 - 1}"
    ),
    "more parameters than can be counted": _override(
        "model.d_model=16777216", "model.moe.num_experts=1048576", "model.moe.d_ff=16777216"
    ),
    "logits beyond all": (nothing, ["bench", "routers", "--tokens", "9" * 18]),
    "a proof without end": (nothing, ["prove", "tiny.yaml", "--steps", "9" * 18, "--timeout", "nan"]),
    # names
    **{f"name: {what}": _override(f"name={name}") for what, name in NAMES.items()},
    "name in a file": _config("name: ../x\n"),
    "name in a file, to list": (_config("name: ../x\n")[0], ["checkpoint", "list", "evil.yaml"]),
    "name to prune": (nothing, ["checkpoint", "prune", "tiny.yaml", "name=../../outside"]),
    "runs_dir with NUL": _override('runs_dir="a\\0b"'),
    "runs_dir of 5 kB": _override(f"runs_dir={'x' * 5000}"),
    "cache_dir with NUL": _override("name=x", 'data.cache_dir="a\\0b"'),
    "cache_dir of 5 kB": _override("name=x", f"data.cache_dir={'x' * 5000}"),
    # overrides
    "override of 60000 parts": _override("a." * 60_000 + "a=1"),
    "override of 100 kB": _override("x" * 100_000 + "=1"),
    "override nested deeply": _override("name=" + "[" * 50_000),
    "override that steers a terminal": _override("\x1b[2J\n=1"),
    "override of a list index of 100 digits": _override(f"data.sources.{'9' * 100}.path=x"),
    "override of half of a pair": _override("\udcff=1"),
    # what is named on the command line
    "a run of 5 kB": (nothing, ["eval", "x" * 5000]),
    "a run of 5 kB, to list": (nothing, ["checkpoint", "list", "x/" * 5000]),
    "a run with NUL": (nothing, ["eval", "a\0b"]),
    "a run with NUL, to verify": (nothing, ["checkpoint", "verify", "a\0b"]),
    "a run that steers a terminal": (nothing, ["eval", "\x1b[2J\n"]),
    "a run of half of a pair": (nothing, ["eval", "x\udcff"]),
    "a run that is a device": (nothing, ["eval", "/dev/zero"]),
    "a step of 100 digits": (nothing, ["eval", "runs/tiny", "--step", "9" * 100]),
    "a step below 0": (nothing, ["checkpoint", "verify", "runs/tiny", "--step=-1"]),
    "an export into what is there": (nothing, ["checkpoint", "export-dcp", "runs/tiny", "../outside"]),
    "an export with NUL": (nothing, ["checkpoint", "export-dcp", "runs/tiny", "a\0b"]),
    "an export of 5 kB": (nothing, ["checkpoint", "export-dcp", "runs/tiny", "x" * 5000]),
    "an export through a file": (nothing, ["checkpoint", "export-dcp", "runs/tiny", "text.txt/out"]),
}  # fmt: skip

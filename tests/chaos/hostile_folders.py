"""Malicious run folders: links, pipes and malformed logs left for the next run."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.chaos.hostile_checkpoints import pickled
from tests.chaos.sandbox import Sandbox
from tests.folders import hard_linked

MORE = ["train", "tiny.yaml", "train.steps=5"]
SEEN = "steps_00000004-00000004_rank00000"
KEEPS_ALL = [*MORE, "metrics.tensorboard=true", "profile={start: 4, steps: 1}"]
PRUNE = ["checkpoint", "prune", "runs/tiny", "--damaged"]
REFUSED, GOES_ON = {2, 3, 4}, {0}

_NO_RECORDS = b"".join(
    line + b"\n"
    for line in (
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"step": 1, "\xff": 1}',
        b'{"step": ' + b"9" * 5000 + b', "loss": 1.0}',
        b"null",
        b"\0" * 5000,
        b'{"step": 1, "loss": 1.0}\r{"step": 1}',
    )
)
_NOT_OURS = b"".join(
    line + b"\n"
    for line in (
        b'{"loss": 1.0}',
        b'{"step": 2, "loss": "\\u001b[2J"}',
        b'{"step": "2; x", "loss": 1.0}',
        b'{"step": [2], "loss": 1.0}',
        b'{"step": true, "loss": 1.0}',
        b'{"step": -Infinity, "loss": NaN}',
        b'{"step": -1e300, "loss": 1.0}',
        b'{"step": -5, "loss": 1.0}',
        b'{"step": 1, "loss": 1e308}',
        b'{"step": 1, "loss": NaN}',
        b'{"step": 1, "loss": null}',
        b'{"step": 1, "loss": {}}',
        b'{"step": 1, "eval/loss": "x"}',
    )
)


def _precious(box: Sandbox) -> Path:
    return box.outside / "precious.txt"


def _log(data: bytes, name: str = "metrics.jsonl") -> Callable[[Sandbox], object]:
    """Append to a log."""

    def prepare(box: Sandbox) -> None:
        with (box.run / name).open("ab") as file:
            file.write(data)

    return prepare


def _instead(name: str, make: Callable[[Path, Sandbox], object]) -> Callable[[Sandbox], object]:
    """Something else, in the place of a file of the run."""

    def prepare(box: Sandbox) -> None:
        path = box.run / name
        path.unlink(missing_ok=True)
        make(path, box)

    return prepare


def _sparse(box: Sandbox) -> None:
    with (box.run / "metrics.jsonl").open("r+b") as file:
        file.truncate(3 << 29)


def _link(path: Path, box: Sandbox) -> None:
    path.symlink_to(_precious(box))


def _pipe(path: Path, box: Sandbox) -> None:
    os.mkfifo(path)


def _folder(path: Path, box: Sandbox) -> None:
    path.mkdir()


def _device(path: Path, box: Sandbox) -> None:
    path.symlink_to("/dev/zero")


def _checkpoints(name: str, make: Callable[[Path, Sandbox], object]) -> Callable[[Sandbox], object]:
    return lambda box: make(box.run / "checkpoints" / name, box)


def _to_outside(path: Path, box: Sandbox) -> None:
    """A link to a folder in which something lies."""
    (box.outside / "step_00000001").mkdir()
    (box.outside / "step_00000001/manifest.json").write_text("{}")
    path.symlink_to(box.outside / "step_00000001")


def _elsewhere(path: Path, box: Sandbox) -> None:
    """A record by which the run was started where its text is not."""
    path.write_text(json.dumps({"working_directory": str(box.outside), "run_folder": str(box.run)}))


def _file(path: Path, box: Sandbox) -> None:
    path.write_text("x")


def _snapshot(box: Sandbox) -> None:
    """A copy of the run by `cp -al`, with what a killed run leaves, beside what nothing may change."""
    left = {
        "status/.rank00000.json",
        "metrics.jsonl.tmp",
        ".start",
        f"profile/{SEEN}.txt",
        "checkpoints/.tmp-step_00000005/x",
    }
    for name in left:
        (box.run / name).parent.mkdir(exist_ok=True)
        (box.run / name).write_text("not finished")
    hard_linked(box.run, box.outside / "snapshot")


def _below(name: str, make: Callable[[Path, Sandbox], object]) -> Callable[[Sandbox], object]:
    """The same as `_instead`, in a folder that need not be there."""

    def prepare(box: Sandbox) -> None:
        (box.run / name).parent.mkdir(exist_ok=True)
        _instead(name, make)(box)

    return prepare


def _nowhere(path: Path, box: Sandbox) -> None:
    path.symlink_to(box.outside / "not_there")


CASES: dict[str, tuple[Callable[[Sandbox], object], list[str], set[int]]] = {
    # logs of a run that goes on
    "log with lines that are no records": (lambda box: _log(_NO_RECORDS + pickled(box) + b"\n")(box), MORE, GOES_ON),
    "log with records that are none of ours": (_log(_NOT_OURS), MORE, GOES_ON),
    "log with a line of 50 MB": (_log(b'{"step": 1, "loss": "' + b"x" * 50_000_000 + b'"}\n'), MORE, GOES_ON),
    "log with many lines and half a line": (_log(b"[]\n" * 100_000 + b"x" * 3_000_000), MORE, GOES_ON),
    "log of 1.5 GB of zeros": (_sparse, MORE, GOES_ON),
    "routing log with lines that are no records": (_log(_NO_RECORDS, "routing.jsonl"), MORE, GOES_ON),
    # what is no file
    "log a link": (_instead("metrics.jsonl", _link), MORE, REFUSED),
    "log a pipe": (_instead("metrics.jsonl", _pipe), MORE, REFUSED),
    "log a folder": (_instead("metrics.jsonl", _folder), MORE, REFUSED),
    "log a device": (_instead("metrics.jsonl", _device), MORE, REFUSED),
    "routing log a link": (_instead("routing.jsonl", _link), MORE, REFUSED),
    "what a log is cut in, a link": (
        lambda box: (_log(b"x\n")(box), _link(box.run / "metrics.jsonl.tmp", box)),
        MORE,
        GOES_ON,
    ),
    "lock a link": (_instead(".lock", _link), MORE, REFUSED),
    "lock a link, to prune": (_instead(".lock", _link), PRUNE, REFUSED),
    "lock a pipe": (_instead(".lock", _pipe), MORE, REFUSED),
    "lock a folder": (_instead(".lock", _folder), MORE, REFUSED),
    "environment a link": (_instead("environment.json", _link), MORE, GOES_ON),
    "environment a pipe": (_instead("environment.json", _pipe), ["eval", "runs/tiny"], GOES_ON),
    "environment of elsewhere": (_instead("environment.json", _elsewhere), ["eval", "runs/tiny"], GOES_ON),
    "list of skipped rows a link": (_instead("skipped_rows.jsonl", _link), MORE, GOES_ON),
    "list of skipped rows a folder": (_instead("skipped_rows.jsonl", _folder), MORE, GOES_ON),
    "tokenizer a link": (_instead("tokenizer.json", _link), MORE, GOES_ON),
    "run id a link": (_instead("run_id", _link), MORE, GOES_ON),
    "run id a pipe": (_instead("run_id", _pipe), MORE, GOES_ON),
    "run id a device": (_instead("run_id", _device), MORE, GOES_ON),
    "origin a link": (_instead("origin.json", _link), MORE, GOES_ON),
    "origin a pipe": (_instead("origin.json", _pipe), MORE, GOES_ON),
    "origin nested deeply": (_instead("origin.json", lambda path, _: path.write_text("[" * 60_000)), MORE, GOES_ON),
    "origin somewhere else": (
        _instead("origin.json", lambda path, box: path.write_text(f'{{"folder": "{box.outside}", "parent": {{}}}}')),
        MORE,
        GOES_ON,
    ),
    "run id a path": (_log(b"/../../x\n", "run_id"), MORE, GOES_ON),
    "config a link": (
        lambda box: (
            (box.run / "config.yaml").rename(box.outside / "config.yaml"),
            (box.run / "config.yaml").symlink_to(box.outside / "config.yaml"),
        ),
        MORE,
        GOES_ON,
    ),
    "config a pipe": (_instead("config.yaml", _pipe), ["eval", "runs/tiny"], REFUSED),
    "config a device": (_instead("config.yaml", _device), ["eval", "runs/tiny"], REFUSED),
    "status a link": (_instead("status/rank00000.json", _link), MORE, GOES_ON),
    "what a status is written in, a link": (_instead("status/.rank00000.json", _link), MORE, GOES_ON),
    "what a status is written in, a pipe": (_instead("status/.rank00000.json", _pipe), MORE, GOES_ON),
    "tables of a profile a link": (_below(f"profile/{SEEN}.txt", _link), KEEPS_ALL, GOES_ON),
    "a trace a link to nowhere": (_below(f"profile/{SEEN}.json.gz", _nowhere), KEEPS_ALL, GOES_ON),
    "a snapshot by hard links": (_snapshot, KEEPS_ALL, GOES_ON),
    "a snapshot by hard links, to prune": (_snapshot, PRUNE, GOES_ON),
    "a snapshot by hard links, to evaluate": (_snapshot, ["eval", "runs/tiny"], GOES_ON),
    # names among the checkpoints
    "names that are links": (
        lambda box: (
            _checkpoints(".tmp-step_00000005", _to_outside)(box),
            (box.run / "checkpoints/.trash-step_00000003").symlink_to(box.outside),
            (box.run / "checkpoints/step_00000009").symlink_to(box.outside / "step_00000001"),
        ),
        MORE,
        GOES_ON,
    ),
    "names that are files": (
        lambda box: (
            _checkpoints(".tmp-step_00000005", _file)(box),
            _checkpoints(".trash-step_00000003", _file)(box),
            _checkpoints("step_00000009", _file)(box),
        ),
        MORE,
        GOES_ON,
    ),
    "checkpoints a link into another run": (
        lambda box: (
            (box.run / "checkpoints").rename(box.outside / "checkpoints"),
            (box.outside / ".lock").touch(),
            (box.run / "checkpoints").symlink_to(box.outside / "checkpoints"),
        ),
        MORE,
        REFUSED,
    ),
    "a checkpoint that is a link, to prune": (_checkpoints("step_00000009", _to_outside), PRUNE, GOES_ON),
    "what is removed a link, to prune": (_checkpoints(".trash-step_00000009", _to_outside), PRUNE, GOES_ON),
    "a checkpoint a link to nowhere": (_checkpoints("step_00000005", _nowhere), MORE, GOES_ON),
    "a number in other digits": (_checkpoints("step_" + 8 * "\u0669", _folder), MORE, GOES_ON),
    "a number of 18 digits": (_checkpoints("step_999999999999999999", _folder), PRUNE, GOES_ON),
    "a folder in the place of a checkpoint": (_checkpoints("step_00000005", _folder), MORE, GOES_ON),
}  # fmt: skip

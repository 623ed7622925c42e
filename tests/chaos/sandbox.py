"""Sandbox for malicious input: a folder with a trained run, and a monitored process that reads it.

base/
  canary            what a payload would make; it must never be there
  outside/          what nothing may change
  sandbox/              where the command runs: tiny.yaml text.txt runs/tiny/ .cache/
"""

import os
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import imported_once
from tests.folders import content_of

TIMEOUT_S = 60.0

CONFIG = """\
name: tiny
seed: 3
model:
  num_layers: 1
  d_model: 16
  num_heads: 2
  d_ff: 32
  seq_len: 16
  moe: {num_experts: 4, d_ff: 16}
data:
  sources: [{kind: text, path: text.txt, domain: prose}]
train: {steps: 3, global_batch_size: 4}
eval: {every: null, max_tokens_per_domain: 64}
checkpoint: {every: null}
metrics: {log_every: 1}
parallel: {experts_kernel: loop}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command did."""

    code: int | None
    """None: it did not end in time."""
    output: str
    errors: str
    grown_bytes: int
    """Of memory, at the most."""
    changed: list[str]
    """Paths below the base that are new, gone or not what they were."""
    executed: bool
    """The canary is there."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Paths of a sandbox."""

    base: Path

    @property
    def path(self) -> Path:
        """Where commands run."""
        return self.base / "sandbox"

    @property
    def canary(self) -> Path:
        """What a payload would make."""
        return self.base / "canary"

    @property
    def outside(self) -> Path:
        """What nothing may change."""
        return self.base / "outside"

    @property
    def run(self) -> Path:
        """The trained run."""
        return self.path / "runs/tiny"

    @property
    def checkpoint(self) -> Path:
        """Its only checkpoint."""
        return self.run / "checkpoints/step_00000003"

    @property
    def tensors(self) -> Path:
        """The only file of tensors in it."""
        return self.checkpoint / "tensors-00000-00000.safetensors"


class SandboxFactory:
    """Creates sandboxes, one after another at the same path, from a run that is trained once."""

    def __init__(self, folder: Path) -> None:
        """Train the run.

        Args:
            folder: empty.
        """
        self._template, self._box = folder / "template", Sandbox(folder / "base")
        self._box.path.mkdir(parents=True)
        self._box.outside.mkdir()
        (self._box.outside / "precious.txt").write_text("not to be touched\n")
        (self._box.path / "tiny.yaml").write_text(CONFIG)
        (self._box.path / "text.txt").write_text("It was a bright cold day in April. " * 100)
        trained = self.run(self._box, ["train", "tiny.yaml"])
        assert trained.code == 0, trained.errors
        shutil.copytree(self._box.base, self._template)  # with the times of files, which the token cache compares

    def fresh(self) -> Sandbox:
        """Return the sandbox as it was after training."""
        shutil.rmtree(self._box.base)
        shutil.copytree(self._template, self._box.base)
        return self._box

    def run(self, sandbox: Sandbox, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Outcome:
        """Run a command in a sandbox, in a process of its own, and see what it did."""
        before = content_of(sandbox.base)
        report = sandbox.base.with_name("report")
        shutil.rmtree(report, ignore_errors=True)
        report.mkdir()
        process = imported_once.CONTEXT.Process(
            target=_work, args=(sandbox.path, report, list(arguments), dict(environment or {}))
        )
        process.start()
        process.join(TIMEOUT_S)
        hangs = process.is_alive()
        if hangs:
            process.kill()
            process.join()
        after, grown = content_of(sandbox.base), report / "grown"
        return Outcome(
            code=None if hangs else process.exitcode,
            output=(report / "output").read_text(errors="replace"),
            errors=(report / "errors").read_text(errors="replace"),
            grown_bytes=int(grown.read_text()) if grown.exists() else 0,
            changed=sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)),
            executed=sandbox.canary.exists(),
        )


def _work(cwd: Path, report: Path, arguments: list[str], environment: dict[str, str]) -> None:
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(report / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ |= environment
    from trainer.cli import main

    imported_once.shorten_sample()
    start = _peak_bytes()
    try:
        main(arguments)
    finally:
        (report / "grown").write_text(str(_peak_bytes() - start))
        sys.stdout.flush()
        sys.stderr.flush()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Malicious input: checkpoints, configs, names and logs, each through the command line.

Nothing of it is executed, nothing outside the run folder changes, memory stays bounded, and the result is an exit code
with a short message. A run that can continue without the input does so.

python -m tests.chaos.hostile [WORDS]        all cases, or those with these words in their name
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import hostile_checkpoints, hostile_configs, hostile_folders
from tests.chaos.sandbox import Outcome, Sandbox, SandboxFactory

LARGEST_BYTES = 1 << 30
LONGEST_LINE = 700


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One malicious input and a command that reads it."""

    name: str
    prepare: Callable[[Sandbox], object]
    arguments: Sequence[str]
    codes: frozenset[int] = frozenset({2, 3, 4})
    may_write: tuple[str, ...] = ("sandbox/runs/",)
    environment: dict[str, str] = field(default_factory=dict)


def cases() -> list[Case]:
    """Return all of them."""
    found = []
    read = {**hostile_checkpoints.MANIFESTS, **hostile_checkpoints.FILES}
    for name, prepare in read.items():
        if name not in hostile_checkpoints.FINE_TO_EVALUATE:
            found.append(Case(name=f"eval: {name}", prepare=prepare, arguments=["eval", "runs/tiny"]))
    for name, prepare in hostile_checkpoints.FILES.items():
        found.append(Case(name=f"verify: {name}", prepare=prepare, arguments=["checkpoint", "verify", "runs/tiny"]))
    for name, prepare in hostile_checkpoints.FOR_A_RUN.items():
        found.append(Case(name=f"train: {name}", prepare=prepare, arguments=["train", "tiny.yaml", "train.steps=5"]))
    for name, (prepare, arguments) in hostile_configs.REFUSED.items():
        found.append(Case(name=name, prepare=prepare, arguments=arguments))
    for name, (prepare, arguments, codes) in hostile_folders.CASES.items():
        found.append(Case(name=name, prepare=prepare, arguments=arguments, codes=frozenset(codes)))
    secrets = {"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET}
    for name in ("tiny", "fresh"):
        arguments = ["train", "tiny.yaml", f"name={name}", "train.steps=5"]
        found.append(
            Case(
                name=f"secrets: {name}",
                prepare=hostile_configs.nothing,
                arguments=arguments,
                codes=frozenset({0}),
                environment=secrets,
            )
        )
    return found


SECRET = "hf_never_to_be_written_anywhere"


def wrong(case: Case, box: Sandbox, outcome: Outcome) -> list[str]:
    """Return everything that is wrong with an outcome."""
    found = []
    if outcome.executed:
        found.append("the payload was executed")
    if outside := [path for path in outcome.changed if not path.startswith(case.may_write)]:
        found.append(f"written outside the run folder: {outside}")
    if outcome.grown_bytes >= LARGEST_BYTES:
        found.append(f"took {outcome.grown_bytes / 1e6:.0f} MB")
    if outcome.code is None:
        found.append("did not end")
    elif outcome.code not in case.codes:
        found.append(f"exit code {outcome.code}, not one of {sorted(case.codes)}")
    if "Traceback" in outcome.output + outcome.errors:
        found.append("a traceback")
    if outcome.code != 0:
        lines = (outcome.errors or outcome.output).splitlines()
        if not 1 <= len(lines) <= 3 or any(len(line) > LONGEST_LINE or not line.isprintable() for line in lines):
            found.append(f"{len(lines)} lines, the longest of {max(map(len, lines), default=0)} characters")
    if case.environment and _holds_secret(box.base, outcome):
        found.append("a secret was written down")
    return found


def _holds_secret(base: Path, outcome: Outcome) -> bool:
    files = [path.read_bytes() for path in base.rglob("*") if path.is_file() and not path.is_symlink()]
    return any(SECRET.encode() in data for data in (*files, outcome.output.encode(), outcome.errors.encode()))


def main() -> None:
    """Print the errors and a summary; exit with 1 if there are any."""
    words, failed, peak_bytes, began = " ".join(sys.argv[1:]), 0, 0, time.monotonic()
    chosen = [case for case in cases() if words in case.name]
    with tempfile.TemporaryDirectory() as folder:
        sandboxes = SandboxFactory(Path(folder))
        for case in chosen:
            box = sandboxes.fresh()
            case.prepare(box)
            outcome = sandboxes.run(box, case.arguments, case.environment)
            found = wrong(case, box, outcome)
            failed, peak_bytes = failed + bool(found), max(peak_bytes, outcome.grown_bytes)
            if found:
                print(f"{case.name}: {'; '.join(found)}\n  {outcome.errors[-600:] or outcome.output[-600:]!r}")
    print(
        f"{len(chosen)} hostile inputs: {failed} did harm or were not answered in a line; at most "
        f"{peak_bytes / 1e6:.0f} MB more memory; {time.monotonic() - began:.0f} s"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

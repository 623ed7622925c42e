"""Run the benchmarks behind the goals of part 9 and print each goal with what was measured.

    python -m scripts.done_when --out /tmp/figures [--only layer step] [--before OLDER_FIGURES]

Every line is a ratio of interleaved rounds, or a count. Keep the machine idle; with two cores all take about half an
hour. `--before` names the folder of another commit's figures, for the peak memory of a step. `--read` measures nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

RUNS = {
    "kept": "memory --experts 16 --top-k 4 --d-model 64 --d-ff 32 --tokens 512 --dtype float32,bfloat16 --peers none",
    "sent": "dispatch --experts 64 --top-k 8 --d-model 64 --d-ff 32 --tokens 512 --ranks 8 --rounds 1",
    "step": "step bench --dtype bfloat16,float32 --peers grouped_mm,eager --rounds {rounds}",
    "smoke": "step smoke --peers none --rounds {rounds}",
    "layer": "layer --experts 8,64 --dtype bfloat16,float32 --kernel auto --compile --peers none --rounds {rounds}",
    "scaling": "scaling quickstart --rounds {rounds}",
    "ours_and_theirs": "scaling quickstart model.moe.num_experts=32 model.moe.d_ff=512 train.global_batch_size=16 "
    "parallel.micro_batch_size=4 --rounds {rounds}",
}


class Line(NamedTuple):
    """A goal and what was measured."""

    what: str
    value: float
    goal: float
    is_least: bool = False
    """The value may not be below the goal; else not above."""

    def __str__(self) -> str:
        is_met = self.value >= self.goal if self.is_least else self.value <= self.goal
        sign = ">=" if self.is_least else "<="
        return f"{'met   ' if is_met else 'MISSED'} {self.value:7.3f} ({sign} {self.goal:g})  {self.what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--read", action="store_true", help="print the lines of figures that are there")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        path = options.out / f"{name}.json"
        if not options.read:
            words = RUNS[name].format(rounds=options.rounds).split()
            subprocess.run([sys.executable, "-m", "trainer", "bench", *words, "--json", str(path)], check=True)
        for line in lines_of(name, path, options.before):
            print(line, flush=True)


def lines_of(name: str, path: Path, before: Path | None) -> Iterator[Line]:
    """Yield the goals of one run."""
    cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"]
    if name in ("kept", "sent"):
        for case in cases:
            yield from _counts(name, case)
    for case in cases if name in ("step", "smoke") else []:
        yield from _steps(name, case)
    if name == "step" and before is not None:
        old = json.loads((before / "step.json").read_text())["cases"]
        for case, other in zip(cases, old, strict=True):
            peak = _named(case, "turnout")["peak_bytes"] / _named(other, "turnout")["peak_bytes"]
            yield Line(f"peak memory of a step over that before, {case['dtype']}", peak, 0.6)
    for case in cases if name == "layer" else []:
        for entry in case["entries"]:
            what = f"{entry['contender']}, {case['dtype']}, {entry['num_experts']} experts, {entry['routing']}"
            if "turnout" in entry["contender"] and entry["over_first_routing"]:
                yield Line(f"skewed over balanced: {what}", entry["over_first_routing"][0], 1.2)
            elif "turnout" in entry["contender"] and entry["over_fewest_experts"]:
                yield Line(f"64 over 8 experts: {what}", entry["over_fewest_experts"][0], 1.25)
    if name == "scaling":
        alone, together = cases[0]["entries"][:2]
        yield Line("two ranks of one thread, throughput over one process of two", _ratio(alone, together), 0.92, True)
    for case in cases if name in ("scaling", "ours_and_theirs") else []:
        ours, theirs = _named(case, "turnout, 2 ranks"), _named(case, "DeepSpeed's own MoE, ZeRO 1")
        yield Line(f"DeepSpeed's own MoE over two ranks of ours, {case['d_ff']} wide", _ratio(theirs, ours), 1.0, True)


def _counts(name: str, case: dict[str, Any]) -> Iterator[Line]:
    """Yield the goals that need no clock."""
    for entry in case["entries"]:
        if "turnout" not in entry["contender"] or "saved_bytes_per_token" not in entry:  # or it cannot run
            continue
        what = f"{entry['contender']}, {case['dtype']}, {case.get('ranks', 1)} ranks"
        if name == "kept":
            kept = entry["saved_bytes_per_token"] / entry["least_saved_bytes_per_token"]
            yield Line(f"bytes kept over X and H: {what}", kept, 1.15)
        elif "deduplicated" in entry["contender"]:
            sent = entry["row_bytes_per_token"] / entry["least_row_bytes_per_token"]
            yield Line(f"bytes of rows sent over the fewest, {entry['routing']}: {what}", sent, 1.0)


def _steps(name: str, case: dict[str, Any]) -> Iterator[Line]:
    """Yield the goals of a step beside its twin and the faster of Hugging Face's."""
    ours, twin = _named(case, "turnout"), _named(case, "dense twin")
    is_narrow = case["dtype"] == "bfloat16"
    goal = 1.3 if name == "smoke" else 1.12 if is_narrow else 1.05
    yield Line(f"{name}: over its dense twin, {case['dtype']}", _ratio(ours, twin), goal)
    peers = [entry for entry in case["entries"] if entry["contender"].startswith("hf") and entry.get("median_s")]
    if peers:
        best = min(peers, key=lambda entry: entry["median_s"])
        what = f"{name}: times as fast as Hugging Face's {best['contender'].removeprefix('hf ')}, {case['dtype']}"
        yield Line(what, _ratio(best, ours), 2.0 if is_narrow else 1.2, True)


def _named(case: dict[str, Any], contender: str) -> dict[str, Any]:
    return next(entry for entry in case["entries"] if entry["contender"] == contender)


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the median ratio of times in the same round."""
    return statistics.median(a / b for a, b in zip(one["seconds"], other["seconds"], strict=True))


if __name__ == "__main__":
    main()

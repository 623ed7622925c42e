"""The script that reads the goals off the figures of the benchmarks."""

import json
from pathlib import Path

from scripts.done_when import Line, lines_of


def test_a_line_says_whether_its_goal_is_met() -> None:
    assert str(Line("x", 1.1, 1.12)) == "met      1.100 (<= 1.12)  x"
    assert str(Line("x", 1.13, 1.12)).startswith("MISSED")
    assert str(Line("x", 1.13, 1.12, is_least=True)) == "met      1.130 (>= 1.12)  x"


def test_ratios_are_medians_over_rounds_and_the_faster_peer_counts(tmp_path: Path) -> None:
    seconds = {"turnout": [2.0, 4.0], "dense twin": [1.0, 4.0], "hf eager": [8.0, 8.0], "hf grouped_mm": [6.0, 8.0]}
    entries = [{"contender": name, "seconds": s, "median_s": sum(s) / 2} for name, s in seconds.items()]
    (tmp_path / "step.json").write_text(json.dumps({"cases": [{"dtype": "float32", "entries": entries}]}))
    twin, peer = lines_of("step", tmp_path / "step.json", None)
    assert (twin.value, twin.goal, twin.is_least) == (1.5, 1.05, False)
    assert (peer.value, peer.goal, peer.is_least) == (2.5, 1.2, True) and "grouped_mm" in peer.what

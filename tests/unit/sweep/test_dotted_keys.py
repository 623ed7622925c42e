"""Keys of `over` in parts, as on the command line, are the dotted keys of a sweep file."""

from pathlib import Path

import pytest

from tests.tiny_training import CONFIG
from trainer.errors import ConfigError
from trainer.sweep.plan_trials import plan_sweep

SWEEP = """\
name: rates
config: tiny.yaml
method: {kind: random, draws: 3}
over:
  schedule.peak_lr: [0.1]
  train.grad_clip: [1.0]
"""


def drawn(folder: Path, *overrides: str) -> list[dict[str, object]]:
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "s.yaml").write_text(SWEEP)
    return [dict(one.changes) for one in plan_sweep(folder / "s.yaml", [f"runs_dir={folder}", *overrides]).candidates]


def test_an_override_of_a_dotted_key_replaces_its_values_in_their_place(tmp_path: Path) -> None:
    grid = "method={kind: grid}"
    found = drawn(tmp_path, grid, "over.schedule.peak_lr=[0.2, 0.3]", "over.model.moe.router.jitter=[0.5]")
    assert [list(one.items()) for one in found] == [
        [("schedule.peak_lr", rate), ("train.grad_clip", 1.0), ("model.moe.router.jitter", 0.5)] for rate in (0.2, 0.3)
    ]
    ranges = ["over.schedule.peak_lr={log_uniform: [0.1, 0.3]}", "over.train.grad_clip.uniform=[2, 3]"]
    for one in drawn(tmp_path, *ranges):
        rate, clip = one.values()
        assert isinstance(rate, float) and isinstance(clip, float) and 0.1 <= rate <= 0.3 and 2 <= clip <= 3


def test_keys_that_do_not_exist_are_refused_by_their_dotted_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"<override 2>: schedule.peak_lrr: unknown key; did you mean peak_lr\?"):
        drawn(tmp_path, "over.schedule.peak_lrr=[1]")
    with pytest.raises(ConfigError, match=r"<override 2>: over.'schedule.peak_lr': expected a list or a mapping"):
        drawn(tmp_path, "over.schedule.peak_lr=0.2")
    with pytest.raises(ConfigError, match=r"log_unform: unknown key; did you mean log_uniform\?"):
        drawn(tmp_path, "over={schedule.peak_lr: {log_unform: [0.1, 0.2]}}")

"""Console output of a run, in a log and on a terminal."""

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from rich.cells import cell_len

from trainer.console.console import Console
from trainer.console.summary import DomainScore, ExpertCounts, RunSummary

ESCAPE = "\x1b"
RECORD = {
    "step": 10, "tokens": 163840, "loss": 2.25, "balance_loss": 1.0, "z_loss": 0.1, "grad_norm": 0.84, "lr": 1e-3,
    "tokens_per_s": 45210.0, "step_s": 0.5, "mfu": None, "drop_rate": 0.025, "load_imbalance": 1.234, "dead_experts": 0,
    "router_entropy": 1.9, "skipped_steps": 0,
}  # fmt: skip
TIMES = {"time/data": 0.01, "time/forward": 0.13, "time/backward": 0.3, "time/communication": 0.06, "time/other": 0.0}
EVALUATION = {"step": 10, "eval/loss": 2.0, "eval/bits_per_byte": 2.885}
SUMMARY = RunSummary(
    title="a run: 2,000 steps in 14m 02s",
    facts=[("tokens", "32.8M"), ("speed", "45.2k tokens/s"), ("parameters", "11.2M"), ("active", "4.9M")],
    steps=list(range(10, 2001, 10)),
    losses=[1.8 + 300 / (s + 50) for s in range(10, 2001, 10)],
    scores=[
        DomainScore(name="prose", bits_per_byte=2.41, unigram_bits_per_byte=4.55),
        DomainScore(name="a very long name of a domain \u65e5\u672c\u8a9e", bits_per_byte=1.6),
    ],
    eval_loss=1.41,
    eval_loss_capacity=1.42,
    tasks=[
        ("translation", {"bleu": 21.5, "chrf": 48.0, "cut_prompts": 3}),
        ("a\x1b" + "b" * 40, {"acc": 0.75, "n": 0}),
    ],
    experts=ExpertCounts(
        counts=[[[1, 2, 3], [3, 2, 1]]] * 3, domains=["prose", "code"], layer_names=["layer 0", "layer 1", "layer 2"]
    ),
    prompt="def read(",
    sample="self):\n\treturn\x1b[31m \x07 " + "x" * 300,
    written=[("checkpoint", "runs/" + "deep/" * 40 + "step_00002000"), ("metrics", "runs/a/metrics.jsonl")],
)


@pytest.fixture(autouse=True)
def _capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")


def test_a_log_has_one_plain_line_for_each_logged_step():
    lines = _log(lambda c: [c.step({**RECORD, "step": s}) for s in (10, 20)])
    assert len(lines) == 2
    for part in (
        "step  10 / 200",
        "loss 2.2500",
        "tokens/s 45.2k",
        "imbalance 1.23x",
        "dropped  2.5%",
        "lr 1.0e-03",
    ):
        assert part in lines[0]


def test_a_log_has_no_control_characters_even_where_colour_is_forced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    text = "\n".join(_log(_everything))
    assert [c for c in text if (c < " " and c != "\n") or "\x7f" <= c < "\xa0"] == []


def test_ticks_between_logged_steps_write_nothing_to_a_log():
    assert _log(lambda c: [c.tick(s) for s in range(5)]) == []


def test_a_missing_value_is_a_dash():
    nothing = {key: None for key in RECORD} | {"step": 10}
    (line,) = _log(lambda c: c.step(nothing))
    for label in ("loss", "tokens/s", "eta", "imbalance", "dropped", "lr", "grad norm"):
        assert re.search(rf"  {label} +-(  |$)", line), label
    (line,) = _log(lambda c: c.step({"step": 10}))
    assert line.count(" -") == 7
    (line,) = _log(lambda c: c.evaluation({"step": 10, "eval/loss": None, "eval/bits_per_byte": None}))
    assert "held out - bits/byte" in line


def test_a_number_that_is_not_finite_is_shown_as_such():
    (line,) = _log(lambda c: c.step({**RECORD, "loss": float("nan"), "grad_norm": float("inf")}))
    assert re.search(r"loss +nan", line) and re.search(r"grad norm +inf", line)


def test_dead_experts_and_skipped_steps_are_named_only_when_there_are_any():
    healthy, ill = _log(lambda c: [c.step(RECORD), c.step({**RECORD, "dead_experts": 3, "skipped_steps": 1})])
    assert "dead" not in healthy and "skipped" not in healthy
    assert "3 dead experts" in ill and "1 skipped step" in ill and "1 skipped steps" not in ill


def test_the_time_left_is_estimated_from_the_wall_clock_since_the_first_record():
    now = [100.0]
    file = io.StringIO()
    console = Console(110, file=file, clock=lambda: now[0])
    console.step({**RECORD, "step": 10, "step_s": 0.5})  # only the record has a pace
    now[0] += 20.0
    console.step({**RECORD, "step": 20, "step_s": 0.5})  # 2 s a step, evaluations included
    now[0] += 1.0
    console.step({**RECORD, "step": 30, "step_s": 0.5, "eta_s": 7.0})  # the caller's estimate takes precedence
    etas = re.findall(r"eta +(.*?)  ", file.getvalue())
    assert etas == ["50s", "3m 00s", "7s"]


def test_an_evaluation_shows_the_change_since_the_previous_one():
    def run(console: Console) -> None:
        for bits in (3.0, 2.5, 2.75, None, 2.5):
            console.evaluation({**EVALUATION, "eval/bits_per_byte": bits})

    changes = [re.findall(r" [+-]\d\.\d+", line) for line in _log(run)]
    assert changes == [[], [" -0.500"], [" +0.250"], [], []]


def test_an_evaluation_shows_the_loss_at_capacity_when_there_is_one():
    lines = _log(lambda c: [c.evaluation(EVALUATION), c.evaluation({**EVALUATION, "eval/loss_capacity": 2.05})])
    assert "capacity" not in lines[0]
    assert "loss 2.000 (capacity 2.050)" in lines[1]


def test_a_task_has_a_line_of_its_own_without_counts_that_are_zero():
    numbers = {"acc": 0.75, "acc_norm": 0.5, "cut_prompts": 0}
    assert _log(lambda c: c.task(10, "mood", numbers)) == ["step  10  mood  acc 0.750  acc_norm 0.500"]
    assert _log(lambda c: c.task(10, "m\x1b", {"cut_prompts": 3})) == ["step  10  m\ufffd  cut_prompts 3"]


def test_the_summary_lists_tasks_below_each_other():
    lines = [line.strip() for line in _log(lambda c: c.summary(SUMMARY), width=60)]
    assert "translation            bleu 21.500   chrf 48.000" in lines
    assert "cut_prompts 3" in lines and any(line.endswith("acc 0.750") for line in lines)


def test_a_checkpoint_line_holds_the_path_unbroken():
    path = Path("runs") / ("long" * 50) / "step_00000010"
    assert _log(lambda c: c.checkpoint(path, 10)) == [f"step  10  saved {path}"]


def test_the_header_aligns_labels():
    lines = _log(lambda c: c.header(["turnout", ("model", "6 layers"), ("data", "3 domains"), "note"]))
    assert lines == ["turnout", "  model  6 layers", "  data   3 domains", "note"]


def test_text_from_outside_is_never_read_as_markup():
    lines = _log(lambda c: [c.message("[bold]x[/] :smile:"), c.warning("a [red]b")])
    assert lines == ["[bold]x[/] :smile:", "warning: a [red]b"]


def test_a_finished_job_leaves_one_line_in_a_log():
    now = [0.0]

    def run(console: Console) -> None:
        with console.progress_bar("reading text", 100) as bar:
            for done in range(0, 40_001, 10_000):
                now[0] += 0.5
                bar.update(done, 40_000, "reading prose")

    assert _log(run, clock=lambda: now[0]) == ["reading text  40.0 kB in 2.5s"]


def test_a_long_job_logs_a_line_every_ten_seconds():
    now = [0.0]

    def run(console: Console) -> None:
        with console.progress_bar("reading", 100) as bar:
            for done in range(101):
                now[0] += 0.25
                bar.update(done)

    lines = _log(run, clock=lambda: now[0])
    assert [line.split("  ")[1][:3] for line in lines[:-1]] == ["39%", "79%"]


def test_a_failed_job_leaves_no_line():
    def run(console: Console) -> None:
        with pytest.raises(OSError, match="gone"), console.progress_bar("reading", 100):
            raise OSError("gone")

    assert _log(run) == []


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_summary_keeps_to_the_width_and_shows_everything(width: int, encoding: str):
    text = "\n".join(_log(lambda c: c.summary(SUMMARY), width=width, encoding=encoding))
    assert max(map(cell_len, text.splitlines())) <= width
    for part in ("training loss", "2.410", "4.550", "layer 2", "def read(self):", "runs/a/metrics.jsonl"):
        assert part in text
    flat = re.sub(r"\s+", "", text)
    assert SUMMARY.written[0][1] in flat  # folded, not cut
    assert "1.420atthecapacity" in flat


def test_the_summary_of_a_diverged_run_still_appears():
    nan = float("nan")
    summary = RunSummary(
        title="a",
        steps=[1, 2, 3],
        losses=[3.0, nan, nan],
        scores=[DomainScore(name="prose", bits_per_byte=nan, unigram_bits_per_byte=4.5)],
        experts=ExpertCounts(counts=[[[0, 0]]], domains=["prose"], layer_names=["layer 0"]),
    )
    assert any("nan" in line and "4.500" in line for line in _log(lambda c: c.summary(summary)))
    _log(lambda c: c.summary(RunSummary(title="a", steps=[1], losses=[None])))
    _log(lambda c: c.summary(RunSummary(title="nothing at all")))


def test_a_log_shows_the_time_shares_of_a_step_with_each_evaluation():
    lines = _log(lambda c: [c.step({**RECORD, **TIMES, "time_max/data": 9.0}), c.evaluation(EVALUATION)])
    assert len(lines) == 3
    assert lines[2] == "step  10  time  data  2%  forward 26%  backward 60%  communication 12%  other  0%"


@pytest.mark.parametrize("width", [40, 120])
def test_a_terminal_shows_it_in_the_panel(width: int):
    raw = _terminal(lambda c: [c.step({**RECORD, **TIMES}), c.evaluation(EVALUATION)], width=width)
    lines = _visible(raw).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert any("backward 60%" in line for line in lines) and not any("  time  " in line for line in lines)


def test_the_summary_falls_back_to_the_losses_seen():
    def run(console: Console) -> None:
        for step in (10, 20):
            console.step({**RECORD, "step": step})
        console.summary(RunSummary(title="a"))

    assert "20 steps" in "\n".join(_log(run))


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_terminal_gets_a_live_panel_within_its_width(width: int):
    raw = _terminal(_everything, width=width)
    lines = _visible(raw).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert any(re.search(r"loss +bits/byte +tokens/s", line) for line in lines)
    assert any(re.search(r"step +20 / 200 ", line) for line in lines)


def test_the_live_panel_leaves_the_screen_and_returns_the_cursor():
    raw = _terminal(lambda c: [c.step(RECORD), c.close()], width=80)
    assert raw.count(f"{ESCAPE}[?25l") == raw.count(f"{ESCAPE}[?25h") == 1
    assert raw.rfind(f"{ESCAPE}[2K") > raw.rfind("tokens/s")  # erased


def test_the_cursor_returns_when_training_fails():
    def run(console: Console) -> None:
        with pytest.raises(RuntimeError), closing(console):
            console.step(RECORD)
            raise RuntimeError

    assert _terminal(run, width=80).count(f"{ESCAPE}[?25h") == 1


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    assert ESCAPE not in _terminal(_everything, width=80)


def test_the_live_panel_is_redrawn_at_most_ten_times_a_second():
    now = [0.0]

    def run(console: Console) -> None:
        for step in range(1000):
            now[0] += 0.001
            console.tick(step)

    raw = _terminal(run, width=80, clock=lambda: now[0])
    assert 5 <= raw.count(" / 200") <= 12


def test_a_reader_that_goes_away_does_not_stop_training(tmp_path: Path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from contextlib import closing\n"
        "from trainer.console.console import Console\n"
        "with closing(Console(100000)) as console:\n"
        "    for step in range(20000):\n"
        "        console.step({'step': step, 'loss': 1.0})\n"
        "open(sys.argv[1], 'w').write('trained')\n"
    )
    done = tmp_path / "done"
    pipeline = '"$0" "$1" "$2" | head -n 2; echo "exit ${PIPESTATUS[0]}"'
    command = ["bash", "-c", pipeline, sys.executable, str(script), str(done)]
    # Only a buffered stream has something left to flush when Python exits.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    assert done.read_text() == "trained"
    assert result.stdout.splitlines()[2:] == ["exit 0"]
    assert result.stderr == ""


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_an_output_that_was_never_there_or_is_full_does_not_stop_training(redirection: str):
    program = "from trainer.console.console import Console; c = Console(2); c.step({'step': 1}); import os; os._exit(0)"
    result = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, program], timeout=60, check=False
    )
    assert result.returncode == 0


def test_a_terminal_that_hangs_up_does_not_stop_training():
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as file:
        console = Console(200, file=file)
        os.close(leader)
        _everything(console)


def test_a_file_that_was_closed_does_not_stop_training():
    file = io.StringIO()
    console = Console(200, file=file)
    file.close()
    _everything(console)


def _everything(console: Console) -> None:
    console.header(["turnout", ("model", "6 layers " * 20)])
    with console.progress_bar("reading " * 10, 100) as bar:
        bar.update(50, 100)
    for step in (10, 20):
        console.step({**RECORD, "step": step, "dead_experts": step})
        console.tick(step)
        console.evaluation({**EVALUATION, "step": step, "eval/loss_capacity": 2.1})
    console.checkpoint("runs/a/checkpoints/step_00000020", 20)
    console.warning("a long warning \x1b[31m " * 10)
    console.message("a message \x1b]0;title\x07")
    console.summary(SUMMARY)
    console.close()


def _log(
    run: Callable[[Console], object],
    *,
    width: int | None = None,
    encoding: str = "utf-8",
    clock: Callable[[], float] = lambda: 0.0,
) -> list[str]:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding)
    run(Console(200, file=file, width=width, clock=clock))
    file.flush()
    return buffer.getvalue().decode(encoding).splitlines()


def _terminal(run: Callable[[Console], object], *, width: int, clock: Callable[[], float] = time.monotonic) -> str:
    """Run on a real pseudo-terminal and return every byte that reached it."""
    leader, follower = pty.openpty()
    with tempfile.TemporaryFile() as received:
        # The kernel's buffer is small: a reader must drain it while the console writes.
        reader = subprocess.Popen(["cat"], stdin=leader, stdout=received, stderr=subprocess.DEVNULL)
        os.close(leader)
        with os.fdopen(follower, "w", encoding="utf-8") as file:
            run(Console(200, file=file, width=width, clock=clock))
        reader.wait(timeout=20)
        received.seek(0)
        return received.read().decode().replace("\r\n", "\n")


def _visible(raw: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw).replace("\r", "\n")

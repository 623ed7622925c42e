"""End-to-end tests for tasks: during training, by eval, on two ranks, and with unusable rows."""

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests import imported_once
from tests.launched_ranks import launched

CONFIG = """\
name: tiny
model: {num_layers: 2, d_model: 32, num_heads: 2, d_ff: 64, seq_len: 32, moe: {num_experts: 4, d_ff: 32}}
data:
  sources: [{kind: text, path: a.txt, domain: a}, {kind: text, path: b.txt, domain: b}]
train: {steps: 6, global_batch_size: 4, dtype: float64}
parallel: {micro_batch_size: 4}
metrics: {log_every: 1}
eval:
  every: 3
  max_tokens_per_domain: 256
  tasks:
    - {name: mood, kind: choice, rows: {kind: jsonl, path: rows.jsonl}, prompt: "{text} ", choices: [good, bad],
       answer: mood}
    - {name: next, kind: ranking, rows: {kind: jsonl, path: rows.jsonl}, prompt: "{text} ", candidates_column: items,
       relevant: mood, k: [1, 3], every: 2}
    - {name: echo, kind: generation, rows: {kind: jsonl, path: rows.jsonl}, prompt: "{text} ", references: ["{text}"],
       max_new_tokens: 10, every: end}
"""
TASKS = {"mood": [3, 6], "next": [2, 4, 6], "echo": [6]}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a config, two texts and seven rows."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "a.txt").write_text("It was a bright cold day in April. " * 100)
    (tmp_path / "b.txt").write_text("def f(x): return [x ** 2 for x in range(10)]\n" * 100)
    rows = [{"text": f"a {i} b", "mood": i % 2, "items": ["x", f"y{i}", "zz", "z"]} for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def _run(workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return imported_once.run(["-m", "trainer", *arguments], cwd=workplace)


def _evaluations(workplace: Path, name: str = "tiny") -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if any(key.startswith("eval/") for key in record)}


def test_tasks_are_evaluated_when_they_are_due_and_eval_gives_the_same_numbers(workplace: Path) -> None:
    trained = _run(workplace, "train", "tiny.yaml")
    assert trained.returncode == 0, trained.stderr
    found = _evaluations(workplace)
    for name, steps in TASKS.items():
        assert [step for step, record in found.items() if f"eval/{name}/cut_prompts" in record] == steps
        assert sum(line.split()[2:3] == [name] for line in trained.stdout.splitlines()) == len(steps)
    assert [step for step, record in found.items() if "eval/loss" in record] == [3, 6]
    assert 0 <= found[6]["eval/expert_domain_mi_share"] <= 1
    environment = json.loads((workplace / "runs/tiny/environment.json").read_text())
    assert environment["tasks"]["echo"]["bleu"].startswith("nrefs:1|")
    predictions = workplace / "runs/tiny/predictions/echo-step6.jsonl"
    assert len(predictions.read_text().splitlines()) == 7
    before = predictions.read_text()
    predictions.unlink()

    evaluated = _run(workplace, "eval", "runs/tiny", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    numbers = json.loads(evaluated.stdout)
    assert numbers.pop("eval/echo/bleu_signature").startswith("nrefs:1|")
    assert numbers.pop("eval/echo/chrf_signature")
    asked = {key: value for key, value in found[6].items() if not key.startswith("data/")}
    assert numbers == pytest.approx(asked, rel=1e-9)
    assert predictions.read_text() == before
    picture = ElementTree.fromstring((workplace / "runs/tiny/experts.svg").read_text())
    assert sum(part.get("class") == "cell" for part in picture.iter()) == 2 * 2 * 4
    assert "runs/tiny/experts.svg" in evaluated.stderr

    some = _run(workplace, "eval", "runs/tiny", "--tasks", "next,mood", "--json")
    chosen = json.loads(some.stdout)
    assert {key.split("/")[1] for key in chosen if "/" in key} == {"mood", "next"}
    assert all(numbers[key] == value for key, value in chosen.items())
    each = _run(workplace, "eval", "runs/tiny", "--experts-per-token", "1,2,4", "--json")
    assert each.returncode == 0, each.stderr
    of_k = json.loads(each.stdout)["experts_per_token"]
    held_out = {key: value for key, value in numbers.items() if key in of_k["2"]}
    assert "eval/loss" in held_out and held_out == {key: of_k["2"][key] for key in held_out}
    assert len({of_k[k]["eval/loss"] for k in "124"}) == 3
    more, most = (of_k[k]["active_parameters"] - of_k["1"]["active_parameters"] for k in "24")
    assert most == 3 * more == 3 * 2 * 3 * 32 * 32, "two layers' experts of three matrices"
    starred = [line.split()[0] for line in each.stderr.splitlines() if line.split()[1:2] == ["*"]]
    assert starred == ["2"]
    unknown = _run(workplace, "eval", "runs/tiny", "--tasks", "mod")
    assert (unknown.returncode, unknown.stderr) == (
        2,
        "--tasks: 'mod' is not a task of the config (eval.tasks); it has mood, next, echo\n",
    )


def test_two_ranks_that_share_the_experts_find_what_one_process_finds(workplace: Path) -> None:
    """Seven rows on two ranks in float64: the generated texts are identical."""
    assert _run(workplace, "train", "tiny.yaml", "name=alone").returncode == 0
    arguments = ["-m", "trainer", "train", "tiny.yaml", "name=two", "parallel.ep_size=2"]
    with launched(2, arguments, workplace) as started:
        started.wait_for([0, 1], seconds=150)
        assert started.codes([0, 1]) == [0, 0], started.said()
    alone, two = (_evaluations(workplace, name) for name in ("alone", "two"))
    assert alone.keys() == two.keys()
    for step, record in alone.items():
        assert two[step] == pytest.approx(record, rel=1e-9, abs=1e-9)
    written = [(workplace / f"runs/{name}/predictions/echo-step6.jsonl").read_text() for name in ("alone", "two")]
    assert written[0] == written[1]


def test_a_bad_row_is_found_before_the_first_step(workplace: Path) -> None:
    with (workplace / "rows.jsonl").open("a") as file:
        file.write('{"text": "x", "mood": 2, "items": ["x", "y", "z"]}\n')
    result = _run(workplace, "train", "tiny.yaml")
    assert (result.returncode, result.stderr) == (
        3,
        "rows.jsonl:8: 'mood' is 2; the 2 texts to choose from are numbered 0 to 1; correct or remove the row\n",
    )
    assert "step" not in result.stdout and not (workplace / "runs/tiny/checkpoints").exists()


def test_a_task_and_a_domain_of_the_rows_must_not_share_a_name(workplace: Path) -> None:
    """Domains that are named in the text, not in the config."""
    rows = [
        {"text": "some text that is long enough " * 9, "kind": name} for name in ("mood", "other") for _ in range(20)
    ]
    (workplace / "text.jsonl").write_text("".join(f"{json.dumps({**row, 'n': i})}\n" for i, row in enumerate(rows)))
    source = "data.sources=[{kind: jsonl, path: text.jsonl, domain_key: kind, text: '{n:d} {text}'}]"
    result = _run(workplace, "train", "tiny.yaml", source)
    assert (result.returncode, result.stderr) == (
        2,
        "eval.tasks: mood is a domain of the text; give the task another name\n",
    )


def test_options_that_need_lm_eval_say_so(workplace: Path) -> None:
    (workplace / "runs/tiny").mkdir(parents=True)
    (workplace / "runs/tiny/config.yaml").write_text(CONFIG)
    for arguments, message in (
        (["--limit", "3"], "eval: --include-path and --limit need --lm-eval; name its tasks with --lm-eval\n"),
        (
            ["--lm-eval", "a", "--tasks", "mood"],
            "eval: --tasks selects tasks of the config, --lm-eval other ones; use one of them\n",
        ),
        (
            ["--lm-eval", "a", "--limit", "0"],
            "turnout eval: argument --limit: must be a whole number of at least 1, got '0'; see turnout eval --help\n",
        ),
        (["--lm-eval", "a", "--include-path", "none"], "--include-path: none is not a folder; correct the path\n"),
    ):
        result = _run(workplace, "eval", "runs/tiny", *arguments)
        assert (result.returncode, result.stderr) == (2, message)


NOT_WHOLE = (
    "turnout eval: argument --experts-per-token: must be a whole number of at least 1, got {}; see turnout eval "
    "--help\n"
)


@pytest.mark.parametrize(
    ("router", "arguments", "message"),
    [
        ("{kind: top_k}", ["1,5"], "--experts-per-token: 5 is more than num_experts 4; use 1 to 4\n"),
        ("{kind: top_k}", ["1,"], NOT_WHOLE.format("''")),
        ("{kind: top_k}", ["0"], NOT_WHOLE.format("'0'")),
        ("{kind: dense}", ["1"], "--experts-per-token: dense has no top_k to change; leave the option out\n"),
        (
            "{kind: top_k}",
            ["1", "--tasks", "mood"],
            "--experts-per-token: evaluates held-out text only; leave out --tasks and --lm-eval\n",
        ),
    ],
)
def test_numbers_of_experts_that_cannot_be_are_refused(
    workplace: Path, router: str, arguments: list[str], message: str
) -> None:
    (workplace / "runs/tiny").mkdir(parents=True)
    config = CONFIG.replace("moe: {num_experts: 4,", f"moe: {{router: {router}, num_experts: 4,")
    (workplace / "runs/tiny/config.yaml").write_text(config)
    result = _run(workplace, "eval", "runs/tiny", "--experts-per-token", *arguments)
    assert (result.returncode, result.stderr) == (2, message)

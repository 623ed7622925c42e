"""The README and the library page work as printed, in a fresh folder."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests import imported_once
from tests.launched_ranks import ROOT
from tests.unit.test_docs import blocks_of, commands_in

SMALL = ["train.steps=20", "eval.every=10", "checkpoint.every=10", "metrics.log_every=5"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages use; its runs share one token cache."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("*.svg"))
    return folder


@pytest.fixture(scope="module")
def smoke(clone: Path) -> str:
    """What the first command of the README prints."""
    first, *_ = commands_below("Sixty seconds")
    return run(clone, *first, *SMALL)


def run(folder: Path, *arguments: str) -> str:
    done = imported_once.run(arguments, cwd=folder, environment={"HF_HUB_OFFLINE": "1"}, timeout=280)
    assert done.returncode == 0, f"{shlex.join(arguments)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def section(page: Path, title: str) -> str:
    """Return the text below a heading, up to the next one."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[1]


def commands_below(title: str) -> list[list[str]]:
    text = section(ROOT / "README.md", title)
    return [
        words[1:]
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.M)
        for words in commands_in(block)
    ]


def test_sixty_seconds_and_your_own_text_run_as_printed(clone, smoke):
    check_shape(smoke)
    for arguments in [*commands_below("Sixty seconds")[1:], *commands_below("Your own text")]:
        is_training = arguments[2:4] == ["train", "smoke"]
        output = run(clone, *arguments, *(SMALL if is_training else []))
        if is_training:
            check_shape(output)
    assert (clone / "runs/mine/checkpoints/step_00000020").is_dir()
    check_metrics_page(clone / "runs/smoke/metrics.jsonl")


def check_shape(output: str) -> None:
    """The lines that the README shows are of the kinds that a run prints."""
    shown = section(ROOT / "README.md", "Sixty seconds")
    for words in ("held out", "bits/byte", "tokens/s", "imbalance", "grad norm", "saved runs/"):
        assert words in shown
        assert words in output


def check_metrics_page(metrics: Path) -> None:
    """Every key that a run logs is explained."""
    text = (ROOT / "docs/metrics.md").read_text()
    explained = set(re.findall(r"`([^`]+)`", text))
    kinds = {"eval/DOMAIN/loss", "eval/DOMAIN/bits_per_byte", "data/DOMAIN/epochs"}
    logged = {key for line in metrics.read_text().splitlines() for key in json.loads(line)}
    general = {re.sub(r"^(eval|data)/\w+/(loss|bits_per_byte|epochs)$", r"\1/DOMAIN/\2", key) for key in logged}
    assert {key for key in general if not key.startswith("time/")} <= explained | kinds
    assert {key.removeprefix("time/") for key in general if key.startswith("time/")} <= explained


def test_the_router_of_the_readme_trains_resumes_and_evaluates(clone):
    (block,) = [block.text for block in blocks_of(ROOT / "README.md") if block.language == "python"]
    (clone / "my_routers.py").write_text(block)
    check, arguments = commands_below("Add a router")
    assert "all checks passed" in run(clone, *check)
    run(clone, *arguments, *SMALL)
    run(clone, *arguments, *SMALL, "train.steps=30")
    assert (clone / "runs/threshold/checkpoints/step_00000030").is_dir()
    assert "held out" in run(clone, "-m", "trainer", "eval", "runs/threshold")


@pytest.mark.usefixtures("smoke")
def test_a_checkpoint_is_read_without_us_as_its_page_says(clone):
    (block,) = [block.text for block in blocks_of(ROOT / "docs/checkpoint.md") if block.language == "python"]
    assert "trainer" not in block
    script = f"{block}\nprint(len(read('runs/smoke/checkpoints/step_00000020')))"
    (clone / "read.py").write_text(script)
    assert int(run(clone, "read.py")) > 10


PARTS = {
    "ParagraphsConfig": ["path=text.txt"],
    "WideBytesConfig": [],
    "ExactAnswerConfig": ["name=exact", "rows={kind: jsonl, path: rows.jsonl}", 'prompt="{q} "'],
    "CsvTrackerConfig": [],
    "MeteredConfig": [],
    "RAdamConfig": [],
    "LinearConfig": [],
    "gathered_ffn": [],
}


@pytest.mark.parametrize("part", PARTS)
def test_every_example_of_the_extending_page_keeps_its_contract(tmp_path, part):
    blocks = [block.text for block in blocks_of(ROOT / "docs/extending.md") if block.language == "python"]
    assert len(blocks) == 1 + len(PARTS)
    (tmp_path / "my_parts.py").write_text("\n\n".join(blocks))
    (tmp_path / "text.txt").write_text("One paragraph.\n\nAnother one.\n")
    (tmp_path / "rows.jsonl").write_text('{"q": "is it?", "answer": "yes"}\n{"q": "was it?", "answer": "no"}\n')
    assert "all checks passed" in run(tmp_path, "-m", "trainer", "check-plugin", f"my_parts:{part}", *PARTS[part])

"""The documentation is true: its configs load, its commands parse, its files, links and keys exist."""

import ast
import configparser
import importlib
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from scripts import config_reference
from scripts.recipes import __main__ as recipes
from tests.launched_ranks import ROOT
from tests.unit.test_recipes import local_files
from trainer import errors
from trainer.checkpoint.tools.weight_map import WeightMapConfig
from trainer.cli import parse_command_line
from trainer.config.loader import load
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.heartbeat import Heartbeat, diagnose_lost_ranks
from trainer.experiment import ExperimentConfig
from trainer.status import Status
from trainer.sweep.sweep_config import SweepConfig

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "SECURITY", "tests/README")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LANGUAGES = {"bash", "json", "python", "text", "yaml"}
FILE = re.compile(r"\b(?:tests|docs|trainer|scripts|configs|requirements)/[\w./-]*\.(?:py|md|yaml|json|sh|svg|txt)\b")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str


def blocks_of(page: Path) -> Iterator[Block]:
    for language, text in re.findall(r"^```(\S*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        yield Block(page, language, text)


BLOCKS = {f"{page.relative_to(ROOT)} {number}": block for page in PAGES for number, block in enumerate(blocks_of(page))}


def of_language(*languages: str) -> pytest.MarkDecorator:
    found = {name: block for name, block in BLOCKS.items() if block.language in languages}
    return pytest.mark.parametrize("block", found.values(), ids=found.keys())


def every_page() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


@pytest.fixture
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of a reader's own, beside the shipped ones."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs/mine.yaml"


def test_every_block_has_a_language_so_that_none_escapes_these_tests():
    assert {name: block.language for name, block in BLOCKS.items() if block.language not in LANGUAGES} == {}


@of_language("yaml")
def test_yaml_is_a_config_whose_files_exist_or_are_made_by_a_command_of_the_page(block, own_config, monkeypatch):
    if block.text.startswith("weights:"):
        own_config.write_text(block.text)
        load(own_config, [], WeightMapConfig)
        return
    if re.search(r"^config: ", block.text, re.MULTILINE):
        own_config.write_text(block.text)
        load(own_config, [], SweepConfig)
        return
    own_config.write_text(block.text if "\nname:" in block.text else f"name: mine\n{block.text}")
    config = load(own_config, [], ExperimentConfig)
    makers = re.findall(r"^python -m scripts\.recipes (\w+)", block.page.read_text(), re.MULTILINE)
    if block.page.name not in ("README.md", "evaluation.md"):  # a reader's own files
        return
    for name in makers:
        monkeypatch.setattr("sys.argv", ["recipes", name])
        recipes.main()
    assert [file for file in local_files(config) if not Path(file).is_file()] == []
    for task in config.eval.tasks:
        assert task.build(ByteTokenizer(), seq_len=config.model.seq_len).num_examples


def test_the_config_page_shows_every_section_and_the_evaluation_page_tasks():
    whole = next(block.text for block in blocks_of(ROOT / "docs/config.md") if block.language == "yaml")
    sections = set(ExperimentConfig.model_fields) - {"runs_dir"}
    assert sections <= set(re.findall(r"^(\w+):", whole, re.MULTILINE))
    shown = [block.text for block in blocks_of(ROOT / "docs/evaluation.md") if block.language == "yaml"]
    assert len(shown) == 1
    assert "tasks:" in shown[0]


@of_language("json")
def test_json_parses(block):
    json.loads(block.text)


@of_language("python")
def test_python_compiles_and_what_it_imports_from_us_exists(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("trainer", "tests"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of each command line, without a prompt, environment variables and comments."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^\w+\$ ", "", line.strip())
        if not re.match(r"(\w+=\S* )*(\./launch\.sh|(\./)?scripts/|python |pytest |sbatch |torchrun |turnout )", line):
            continue
        line = re.sub(r"\s{2,}[^'\"#]*$", "", line) if "#" not in line else line  # words of explanation
        words = shlex.split(re.sub(r" > \S+", "", line), comments=True)
        while re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        yield words


@of_language("bash", "text")
def test_commands_parse_and_start_files_that_exist(block):
    for words in commands_in(block.text):
        check_command(words)


def check_command(words: list[str]) -> None:
    program, rest = words[0], words[1:]
    if program == "turnout" or rest[:2] == ["-m", "trainer"]:
        parse_command_line(rest if program == "turnout" else rest[2:])
    elif program == "./launch.sh":
        parse_command_line(["launch", *(rest or ["configs/quickstart.yaml"])])
    elif program == "torchrun":
        at = rest.index("-m") if "-m" in rest else len(rest) - 1
        check_command(["python", *rest[at:]])
    elif rest[:1] == ["-m"]:
        file = ROOT / rest[1].replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), rest[1]
    else:
        for file in FILE.findall(" ".join(words)):
            assert (ROOT / file).is_file(), file


@every_page()
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    missing = {file for file in FILE.findall(text) if not (ROOT / file).exists()}
    assert {file for file in missing if not re.search(r"NAME|data/small/|configs/(x|mine)\.yaml", file)} == set()
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"\btest_\w+\.py\b", text)) - tests - {"test_MODULE.py"} == set()


@every_page()
def test_modules_and_names_in_code_spans_exist(page):
    """`moe/layer.py: forward` is a file of the package, and has that name in it."""
    for file, name in re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)(?:: ([A-Za-z_]\w*))?`", page.read_text()):
        path = next((root / file for root in (ROOT, ROOT / "trainer") if (root / file).is_file()), None)
        assert path is not None, f"{file}: no such file"
        assert re.search(rf"\b{name}\b", path.read_text()), f"{file} has no {name}"


@every_page()
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in {slug(title) for title in re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)}, target


def slug(title: str) -> str:
    """Return the anchor that GitHub and mkdocs make of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md"])
def test_the_front_door_fits_into_120_columns(name):
    assert [line for line in (ROOT / name).read_text().splitlines() if len(line) > 120] == []


def test_the_readme_and_architecture_are_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 205
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 140


def test_architecture_draws_the_layers_that_are_enforced():
    contracts = configparser.ConfigParser(allow_no_value=True)
    contracts.read(ROOT / ".importlinter")
    enforced = contracts["importlinter:contract:layers"]["layers"].split("\n")
    drawn = next(block.text for block in blocks_of(ROOT / "ARCHITECTURE.md")).splitlines()
    assert [re.split(r"\s{2,}", line)[0] for line in drawn] == [layer for layer in enforced if layer]


def test_modules_of_a_run_that_architecture_names_exist():
    drawn = [block.text for block in blocks_of(ROOT / "ARCHITECTURE.md")][1]
    names = re.findall(r"^  ([a-z_]+\.[a-z_]+)  |-> ([a-z_]+\.[a-z_]+)", drawn, re.MULTILINE)
    assert len(names) >= 5
    for name in filter(None, (part for found in names for part in found)):
        assert (ROOT / "trainer" / name.replace(".", "/")).with_suffix(".py").is_file() or name == "engine.train_step"


def test_the_config_reference_is_current():
    text = config_reference.PAGE.read_text()
    assert config_reference.page(text) == text, "run `python -m scripts.config_reference`"


def test_the_operations_page_has_every_exit_code_and_every_key_of_a_status_file():
    text = (ROOT / "docs/operations.md").read_text()
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    assert {code for code in codes if f"\n| {code} |" not in text} == set()
    assert {field.name for field in fields(Status) if f"`{field.name}`" not in text} == set()


def test_the_operations_page_shows_the_message_about_a_lost_rank_as_it_is():
    survivor = Heartbeat(
        number=1,
        barriers=0,
        state="gave up",
        step=27,
        phase="forward",
        where="",
        count=164,
        operations=[
            "#162 all_reduce over world [1]",
            "#163 all_reduce over world [2]",
            "#164 all_to_all over ep [9, 7, 16]",
        ],
    )
    lost = replace(
        survivor,
        state="works",
        step=26,
        phase="backward",
        where="moe/layer.py:40",
        count=160,
        operations=["#160 all_to_all over ep [8, 8, 16]"],
    )
    message = diagnose_lost_ranks({0: survivor, 2: lost}, [2], silence_s=3, waited_s=4)
    assert f"```text\n{message}\n```" in (ROOT / "docs/operations.md").read_text()


def test_extras_that_pages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {found for page in PAGES for found in re.findall(r"turnout\[([\w-]+)\]", page.read_text())}
    assert named <= set(extras)


def test_every_page_is_in_the_navigation_of_the_site():
    shown = set(re.findall(r"[-:]\s+(\S+\.md)\s*$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} == shown

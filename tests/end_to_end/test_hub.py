"""Read data sets of the hub by name, with the library's real code and a local hub."""

import json
from pathlib import Path

import pytest

from tests import imported_once
from tests.fake_hub import Hub, serving

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from trainer.data.config import DataConfig
from trainer.data.corpus import build_corpus
from trainer.data.sources.registry import HfSourceConfig
from trainer.errors import DataError
try:
    corpus = build_corpus(DataConfig(sources=[HfSourceConfig(**json.loads(sys.argv[1]))], cache_dir="cache"))
except DataError as error:
    print(error)
else:
    files = [*corpus.train, *corpus.validation]
    print(json.dumps(sorted(text.decode() for file in files for text in bytes(file.tokens[:]).split(b"\\xff"))))
"""


def pairs(number: int) -> bytes:
    return b"".join(json.dumps({"en": f"dog {i}", "de": f"Hund {i}"}).encode() + b"\n" for i in range(number))


def run(hub: Hub, folder: Path, **options: str) -> str:
    """Build a corpus of a data set of the hub in a fresh process; return its stdout."""
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    (folder / "script.py").write_text(SCRIPT)
    arguments = ["script.py", json.dumps({"path": "someone/pairs", "text": "{en} = {de}", **options})]
    done = imported_once.run(arguments, cwd=folder, environment=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hub():
    files = {"README.md": b"---\n---\n", "data/train.jsonl": pairs(40), "data/test.jsonl": pairs(30)}
    with serving(Hub("someone/pairs", files, commit="a" * 40)) as hub:
        yield hub


def test_a_data_set_is_read_by_its_name_and_split(hub, tmp_path):
    assert json.loads(run(hub, tmp_path)) == sorted(f"dog {i} = Hund {i}" for i in range(40))
    assert len(json.loads(run(hub, tmp_path, split="test"))) == 30


def test_another_commit_is_another_text(hub, tmp_path):
    run(hub, tmp_path)
    hub.files["data/train.jsonl"], hub.commit = pairs(41), "b" * 40
    assert len(json.loads(run(hub, tmp_path))) == 41


def test_another_commit_behind_an_address_is_another_text(hub, tmp_path):
    address = {"path": "json", "data_files": "hf://datasets/someone/pairs/data/train.jsonl"}
    assert len(json.loads(run(hub, tmp_path, **address))) == 40
    hub.files["data/train.jsonl"], hub.commit = pairs(41), "b" * 40
    assert len(json.loads(run(hub, tmp_path, **address))) == 41


def test_a_name_that_nobody_has_is_one_line(hub, tmp_path):
    said = run(hub, tmp_path, path="someone/else")
    assert said.startswith("someone/else:train: cannot be read (Dataset 'someone/else' doesn't exist on the Hub")
    assert "\n" not in said

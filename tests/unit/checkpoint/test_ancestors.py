"""The chain of runs that a run was made from, read from small files that anyone may have written."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.ancestors import ancestors, describe
from trainer.checkpoint.run_folder import RunFolder


def _parent(run: Path, step: int) -> dict[str, Any]:
    return {"id": (run / "run_id").read_text().strip(), "name": run.name, "step": step, "folder": str(run)}


def _run(path: Path, *parents: dict[str, Any], how: str | None = None, source: Any = None) -> Path:
    path.mkdir(parents=True)
    run_id = f"{path.name:0>8}"
    (path / "run_id").write_text(run_id)
    (path / "origin.json").write_text(json.dumps({"id": run_id, "parent": parents[0] if parents else None}))
    if how is not None:
        (path / "made_from.json").write_text(json.dumps({"command": how, "parents": parents, "from": source}))
    return path


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    published = _run(tmp_path / "published", how="import", source={"family": "qwen3_moe", "folder": "/models/Qwen3"})
    pruned = _run(tmp_path / "pruned", _parent(published, 0), how="surgery prune")
    other = _run(tmp_path / "other")
    mean = _run(tmp_path / "mean", _parent(pruned, 9), _parent(other, 8), how="surgery average")
    return _run(tmp_path / "chat", _parent(mean, 300), how="init_from")


def test_a_chain_is_followed_to_the_published_model(chain: Path) -> None:
    assert describe(ancestors(RunFolder(chain))) == (
        "mean at step 300 (init_from), of pruned at step 9 and other at step 8 (surgery average), of "
        "published at step 0 (surgery prune), of Qwen3, qwen3_moe (import)"
    )
    assert ancestors(RunFolder(chain.with_name("other"))) == []


def test_a_chain_is_found_where_it_was_moved_and_ends_where_it_is_gone(chain: Path, tmp_path: Path) -> None:
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert len(ancestors(RunFolder(moved / "chat"))) == 4
    origin = json.loads((moved / "pruned/origin.json").read_text())
    (moved / "pruned/run_id").write_text("00another")  # another run of that name, with the same parent
    (moved / "pruned/origin.json").write_text(json.dumps({**origin, "id": "00another"}))
    assert [one.name for one in ancestors(RunFolder(moved / "chat"))] == ["mean", "pruned"]
    moved.rename(tmp_path)


def test_a_copied_run_is_a_copy_of_the_run_and_not_of_its_parents(chain: Path) -> None:
    copy = _run(chain.with_name("copy"), _parent(chain, 310))
    (copy / "made_from.json").write_bytes((chain / "made_from.json").read_bytes())
    assert [one.how for one in ancestors(RunFolder(copy))][:2] == ["copy", "init_from"]


def test_a_circle_ends(tmp_path: Path) -> None:
    a = _run(tmp_path / "a")
    b = _run(tmp_path / "b", _parent(a, 1), how="branch")
    (a / "origin.json").write_text(json.dumps({"id": "0000000a", "parent": _parent(b, 2)}))
    assert len(ancestors(RunFolder(a))) == 64


@pytest.mark.parametrize(
    "made", ["", "[]", "{", '{"command": "\\u001b[2J", "parents": 7}', '{"from": {"folder": 1}}', "9" * 9999]
)
def test_malformed_files_are_no_error(chain: Path, made: str) -> None:
    (chain / "made_from.json").write_text(made)
    assert ancestors(RunFolder(chain))[0].how == "copy"
    (chain / "origin.json").write_text(made)
    assert ancestors(RunFolder(chain)) == []

"""Law: a fold is held out alike under every layout, and a run goes on with its own fold only."""

import json
from pathlib import Path

import pytest

from tests.ranks import Ranks, mesh_here
from tests.tiny_training import config_of, final_files, kill_after, losses, train_here
from trainer.errors import DataError


def _train(folder: Path, name: str, index: int, world_size: int = 1) -> str:
    source = f"{{kind: jsonl, path: {folder}/lines.jsonl, domain: lines}}"
    overrides = [f"name={name}", f"data.sources=[{source}]", f"data.fold={{index: {index}, of: 2}}"]
    config = config_of(folder, *overrides, "train.steps=4", "checkpoint.every=2", f"parallel.ep_size={world_size}")
    return train_here(config, mesh_here(ep_size=world_size) if world_size > 1 else None)


def _held_out(run: Path) -> float:
    return next(
        record["eval/lines/loss"]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record.get("step") == 4 and "eval/lines/loss" in record
    )


def test_a_fold_is_learned_and_held_out_alike_on_two_ranks_and_resumes_with_itself_only(
    ranks: Ranks, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"{i} plus {i} is {2 * i}. "}) for i in range(80)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    one, pair, other = (tmp_path / "runs" / name for name in ("one", "pair", "other"))
    ranks.run(2, _train, tmp_path, pair.name, 0, 2)  # both find an empty cache: one builds, the other waits
    _train(tmp_path, one.name, 0)
    _train(tmp_path, other.name, 1)
    assert [loss for _, loss in losses(pair)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)
    assert _held_out(pair) == pytest.approx(_held_out(one), rel=1e-5) and _held_out(other) != _held_out(one)

    whole = final_files(one)
    kill_after(one, 2)
    with pytest.raises(DataError, match=r"other text than data\.sources, data\.split and data\.fold give now"):
        _train(tmp_path, one.name, 1)
    _train(tmp_path, one.name, 0)
    assert final_files(one) == whole

"""A checkpoint's record of its run is validated as untrusted input."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_helpers import save
from tests.unit.checkpoint.tools.test_verify import RUN
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import check_model, check_record, check_tokenizer
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find
from trainer.checkpoint.state import Slice, TrainState
from trainer.errors import CheckpointError

FLOOD = "\x1b[2J\n" * 10_000


def _found(path: Path, values: dict[str, Any] | None = None, **run: Any) -> CheckpointHandle:
    state = TrainState(slices={"model.a": Slice.whole(torch.ones(2))}, values={"optimizer_steps": 1, **(values or {})})
    save(path, 1, state, {**RUN, **run})
    return find(CheckpointFolder(path), 1)


def test_a_complete_record_is_accepted(tmp_path: Path) -> None:
    found = _found(tmp_path, config={"model": {"d_model": 16}}, tokenizer_fingerprint="b")
    check_record(found)
    check_model(found, {"d_model": 16, "younger_than_it": 1})
    check_tokenizer(found, fingerprint="b")


@pytest.mark.parametrize("config", [None, [1], {}, {"model": "x"}])
def test_a_checkpoint_without_a_model_config_is_refused(tmp_path: Path, config: Any) -> None:
    with pytest.raises(CheckpointError, match="does not say which model it is of"):
        check_model(_found(tmp_path, config=config), {})


@pytest.mark.parametrize("model", [{"d_model": FLOOD}, {FLOOD: 1}, {"moe": {"router": [FLOOD] * 3}}])
def test_a_malformed_model_is_refused_in_one_line(tmp_path: Path, model: Any) -> None:
    with pytest.raises(CheckpointError, match="was written by a different model") as caught:
        check_model(_found(tmp_path, config={"model": model}), {"d_model": 16, "moe": None})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_malformed_fingerprint_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another tokenizer") as caught:
        check_tokenizer(_found(tmp_path, tokenizer_fingerprint=FLOOD), fingerprint="b")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("values", "run"),
    [
        ({}, {"position": -1}),
        ({}, {"position": True}),
        ({}, {"position": 1 << 60}),
        ({}, {"skipped_steps": [1]}),
        ({}, {"data_fingerprint": None}),
        ({}, {"spikes": [1]}),
        ({}, {"spikes": {"losses": ["x"]}}),
        ({}, {"spikes": {"losses": [], "count": -1}}),
        ({"optimizer_steps": 2}, {}),
        ({"optimizer_steps": FLOOD}, {}),
    ],
)
def test_an_invalid_record_is_refused_in_one_line(tmp_path: Path, values: dict[str, Any], run: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"is invalid: (run|values)\.") as caught:
        check_record(_found(tmp_path, values, **run))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("updates", [-1, "two", 1.5])
def test_a_number_of_updates_of_an_average_that_is_none_is_refused(tmp_path: Path, updates: Any) -> None:
    with pytest.raises(CheckpointError, match=r"values\.ema\.updates is"):
        check_record(_found(tmp_path, {"ema.updates": updates}))

"""Checkpoints that a run must not resume from, and their messages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_helpers import save
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import check_fits, check_model, check_tokenizer
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find
from trainer.checkpoint.state import Slice, TrainState
from trainer.errors import CheckpointError

TENSORS = {"model.a": torch.ones(3, 2), "model.b": torch.arange(5)}
MODEL = {"num_layers": 2, "moe": {"num_experts": 8, "router": {"kind": "top_k", "top_k": 2}}}


def _state(tensors: dict[str, torch.Tensor]) -> TrainState:
    return TrainState(slices={name: Slice.whole(tensor) for name, tensor in tensors.items()})


@pytest.fixture
def found(tmp_path: Path) -> CheckpointHandle:
    save(tmp_path, 5, _state(TENSORS), {"config": {"model": MODEL}, "tokenizer_fingerprint": "a" * 64})
    return find(CheckpointFolder(tmp_path), 5)


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        ({**TENSORS, "model.a": torch.ones(3, 4)}, "model.a is [3, 2] in it and [3, 4] in this model"),
        ({"model.a": TENSORS["model.a"]}, "it has model.b, which this model does not"),
        ({**TENSORS, "model.c": torch.ones(1)}, "model.c is not in it"),
        (
            {**TENSORS, "model.a": TENSORS["model.a"].double()},
            "model.a is float32 in it and float64 in this model (train.dtype)",
        ),
        ({}, "it has model.a, which this model does not (and 1 more differences)"),
    ],
)
def test_other_tensors_are_refused_by_name_shape_and_dtype(
    found: CheckpointHandle, mine: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_fits(found, _state(mine))
    assert str(caught.value) == (
        f"{found.path}: was written by a different model: {message}; use the run's own config, or a new name=..."
    )


def test_equal_tensors_are_accepted(found: CheckpointHandle) -> None:
    check_fits(found, _state(TENSORS))


def _learning(*, is_frozen: bool, has_moments: bool) -> TrainState:
    """Return a state with a weight that is frozen or not, with or without its moments."""
    slices = {"model.a": replace(Slice.whole(TENSORS["model.a"]), is_frozen=is_frozen)}
    moments = ["optim.exp_avg.a", "optim.exp_avg_sq.a"] if has_moments else []
    return TrainState(slices=slices | {name: Slice.whole(TENSORS["model.a"]) for name in moments})


def test_what_other_ranks_have_may_be_missing(tmp_path: Path) -> None:
    names = ["model.a", "optim.exp_avg.a", "optim.exp_avg_sq.a", "ema.a", "model.b"]
    save(tmp_path, 5, _state(dict.fromkeys(names, torch.ones(3))), {})
    found, mine = find(CheckpointFolder(tmp_path), 5), _state({"model.b": torch.ones(3)})
    check_fits(found, mine, elsewhere={"a"})
    with pytest.raises(CheckpointError, match=r"it has model\.a, which this model does not"):
        check_fits(found, mine, elsewhere={"b"})


def test_moments_may_be_missing_only_where_the_weight_is_frozen(tmp_path: Path) -> None:
    learning, frozen = _learning(is_frozen=False, has_moments=True), _learning(is_frozen=True, has_moments=False)
    lost = _learning(is_frozen=False, has_moments=False)
    handles = {}
    for name, state in (("learning", learning), ("frozen", frozen), ("lost", lost)):
        save(tmp_path / name, 5, state)
        handles[name] = find(CheckpointFolder(tmp_path / name), 5)
    for mine in (learning, frozen):
        check_fits(handles["learning"], mine)
        check_fits(handles["frozen"], mine)
    with pytest.raises(CheckpointError, match=r"optim.exp_avg.a is not in it \(and 1 more differences\)"):
        check_fits(handles["lost"], learning)
    with pytest.raises(CheckpointError, match=r"it has optim.exp_avg.a, which this model does not"):
        check_fits(handles["learning"], lost)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({**MODEL, "num_layers": 3}, "model.num_layers is 2 in it and 3 in the config"),
        ({**MODEL, "moe": None}, "model.moe is {num_experts: 8, router: {kind: top_k, top_k: 2}} in it and null"),
        (
            {**MODEL, "moe": {"num_experts": 8, "router": {"kind": "top_k", "top_k": 1}}},
            "model.moe.router.top_k is 2 in it and 1 in the config",
        ),
    ],
)
def test_another_model_is_refused_by_key_and_values(
    found: CheckpointHandle, model: dict[str, Any], message: str
) -> None:
    """Even if all tensors have the same shapes."""
    with pytest.raises(CheckpointError) as caught:
        check_model(found, model)
    assert message in str(caught.value) and "use the run's own config, or a new name=..." in str(caught.value)


def test_the_same_model_and_one_with_newer_keys_are_accepted(found: CheckpointHandle) -> None:
    check_model(found, MODEL)
    check_model(found, {**MODEL, "a_later_option": 1})


def test_another_tokenizer_is_refused_with_both_fingerprints(found: CheckpointHandle) -> None:
    check_tokenizer(found, fingerprint="a" * 64)
    with pytest.raises(CheckpointError, match=r"another tokenizer .*fingerprint aaaaaaaaaaaa, now bbbbbbbbbbbb"):
        check_tokenizer(found, fingerprint="b" * 64)

"""Tests for the rules between a model and the recording and replay of its routing."""

from typing import Any

import pytest
from pydantic import ValidationError

from trainer.experiment import ExperimentConfig

REPLAY = {"path": "r"}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a dense model": (
        {"model": {"moe": None}, "metrics": {"routing_record": {}}},
        "metrics.routing_record: the model is dense (model.moe: null), so there is no routing to record; use null",
    ),
    "a router of many numbers": (
        {"model": {"moe": {"router": {"kind": "top_p"}}}, "metrics": {"routing_record": {}}},
        "metrics.routing_record: a record has the same number of experts for every token, and top_p gives tokens "
        "different numbers; use null",
    ),
    "a router that draws k": (
        {"model": {"moe": {"router": {"kind": "top_k", "top_k_choices": [1, 2]}}}, "train": {"routing_replay": REPLAY}},
        "train.routing_replay: a record has the same number of experts for every token, and top_k draws another number "
        "in each step; leave it out",
    ),
    "a router that cannot": (
        {"model": {"moe": {"router": {"kind": "hash"}}}, "train": {"routing_replay": REPLAY}},
        "train.routing_replay: the experts of hash cannot be given; use top_k, or a router built on it; leave it out",
    ),
    "sequences that see each other": (
        {"train": {"routing_replay": {**REPLAY, "rows": "sequences"}}},
        "train.routing_replay.rows: sequences share rows, and model.document_mask is false, so they would see each "
        "other; set it to true",
    ),
}


@pytest.mark.parametrize(("values", "message"), CASES.values(), ids=CASES.keys())
def test_what_cannot_be_recorded_or_replayed_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ExperimentConfig.model_validate({"name": "a", **values})
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["hash", "random", "round_robin"])
def test_routers_of_a_fixed_k_are_recorded(kind: str) -> None:
    values = {"model": {"moe": {"router": {"kind": kind}}}, "metrics": {"routing_record": {}}}
    assert ExperimentConfig.model_validate({"name": "a", **values}).metrics.routing_record is not None

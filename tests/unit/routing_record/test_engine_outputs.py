"""Tests for reading what inference engines return: what is missing or strange is refused by line, token and layer."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import tiny_model_config
from trainer.errors import DataError
from trainer.routing_record.engine_outputs import import_engine_outputs
from trainer.routing_record.record_reader import RoutingRecord

CONFIG = tiny_model_config({"first_dense_layers": 1}, num_layers=3)  # layers 1 and 2 have 4 experts, of which 2


def _line() -> dict[str, Any]:
    """Return a sequence of 5 tokens, the last of which was not read."""
    experts = [[[0, 0], [token % 4, (token + 1) % 4], [3, 1]] for token in range(4)]
    return {"prompt_token_ids": [1, 2, 3], "token_ids": [4, 5], "routed_experts": experts}


def _imported(folder: Path, *lines: dict[str, Any]) -> RoutingRecord:
    (folder / "out.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    import_engine_outputs([folder / "out.jsonl"], folder / "record", CONFIG, made_by="a test")
    return RoutingRecord(folder / "record")


def test_sequences_keep_their_numbers_and_masks(tmp_path: Path) -> None:
    given = _line() | {"loss_mask": [0, 1, 0, 1, 1], "sample_id": 70}
    record = _imported(tmp_path, _line(), given, _line() | {"token_ids": [4]})  # the last with experts of all tokens
    assert record.index.sample_id.tolist() == [0, 70, 2]
    found = [record.sequence(number).is_learned for number in range(2)]
    masks = [[False, False, False, True, True], [False, True, False, True, True]]
    assert [each.tolist() for each in found if each is not None] == masks
    assert [len(record.sequence(number).experts) for number in range(3)] == [4, 4, 4]
    assert record.sequence(0).experts[1].tolist() == [[1, 2], [3, 1]], "without the dense layer"
    assert record.manifest.vocab_size == 6 and record.manifest.origin == "engine"


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda line: line.pop(name)


def _flat(count: int) -> str:
    return base64.b64encode(np.zeros(count, np.int32).tobytes()).decode()


def _npy(header: str) -> str:
    return base64.b64encode(b"\x93NUMPY\x01\x00v\x00" + header.ljust(117).encode() + b"\n").decode()


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no experts": (_without("routed_experts"), "has no routed_experts; start the engine with"),
    "a small file that asks for much memory": (
        lambda v: v.update(
            routed_experts=_npy("{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999, 3, 2), }")
        ),
        "its header says 2399999999976 bytes, and there are 0",
    ),
    "no ids": (_without("token_ids"), "has no token_ids or output_ids; add the ids"),
    "text for ids": (lambda v: v.update(token_ids="it was"), "token_ids is no list of token ids; give ids, not text"),
    "no token": (lambda v: v.update(token_ids=[], prompt_token_ids=[]), "has no token; remove it"),
    "fewer tokens than the sequence": (
        lambda v: v["routed_experts"].pop(),
        "has 5 tokens and the experts of 3; a sequence has those of all tokens or of all but the last",
    ),
    "more tokens than the sequence": (
        lambda v: v.update(routed_experts=v["routed_experts"] * 2),
        "has 5 tokens and the experts of 8",
    ),
    "another number of layers": (
        lambda v: v.update(routed_experts=[[*token, token[0]] for token in v["routed_experts"]]),
        "has 4 layers, and the model has 2 with experts, of 3",
    ),
    "fused shared experts": (
        lambda v: v.update(routed_experts=[[[*layer, 9] for layer in token] for token in v["routed_experts"]]),
        "has 3 experts per token, and the model has 2; further ones are shared experts that the engine has fused",
    ),
    "fewer experts": (
        lambda v: v.update(routed_experts=[[layer[:1] for layer in token] for token in v["routed_experts"]]),
        "has 1 experts per token, and the model has 2$",
    ),
    "an expert that does not exist": (
        lambda v: v["routed_experts"][2][1].__setitem__(0, 4),
        "token 2, layer 1: expert 4, and there are 4",
    ),
    "a negative expert": (lambda v: v["routed_experts"][1][2].__setitem__(1, -1), "token 1, layer 2: expert -1"),
    "zeros of a prefix cache": (
        lambda v: v["routed_experts"][0].__setitem__(1, [0, 0]),
        r"token 0, layer 1: has an expert twice \(\[0, 0\]\), as where an engine has recorded nothing",
    ),
    "ragged lists": (lambda v: v["routed_experts"][0].pop(), "routed_experts cannot be read"),
    "fractions": (lambda v: v["routed_experts"][0][0].__setitem__(0, 0.5), "is float64 of shape .4, 3, 2., not whole"),
    "no base64": (lambda v: v.update(routed_experts="no!"), "routed_experts cannot be read"),
    "a flat array of another size": (
        lambda v: v.update(routed_experts=_flat(23)),
        "23 numbers are not those of 4 or 5 tokens in 2 or 3 layers, 2 each",
    ),
    "a pickle": (
        lambda v: v.update(routed_experts=base64.b64encode(b"\x93NUMPY" + bytes(20)).decode()),
        "routed_experts cannot be read",
    ),
    "a prefix left out": (
        lambda v: v.update(meta_info={"routed_experts_start_len": 3}),
        "routed_experts_start_len leaves out the experts of a prefix",
    ),
    "a mask of another length": (lambda v: v.update(loss_mask=[1, 1]), "loss_mask is no list of 5 zeros and ones"),
    "a number that is none": (lambda v: v.update(sample_id="a"), "sample_id is no whole number"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_output_is_refused_by_its_place(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    line = _line()
    change(line)
    with pytest.raises(DataError, match=message) as caught:
        _imported(tmp_path, _line(), line)
    assert str(caught.value).startswith(f"{tmp_path}/out.jsonl:2: ") and "\n" not in str(caught.value)
    assert not (tmp_path / "record").exists(), "nothing half-written"

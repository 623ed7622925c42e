"""Law: 20 steps are 10 steps, a checkpoint, a new process and 10 more, bit for bit."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests import imported_once
from tests.builders import make_batch, make_engine, make_packed_batch, rows_of, tiny_model_config
from tests.checkpoint_helpers import load, resume, save
from trainer.checkpoint.state import Slice, TrainState
from trainer.engine.native import NativeEngine

ROWS, SEQ_LEN = 8, 8

CASES = {
    "top_k": ({}, torch.float32, 1),
    "accumulated, exact counts": ({"balance": {"coef": 0.1}}, torch.float32, 4),
    "accumulated, counts of the previous step": (
        {"balance": {"coef": 0.1, "counts": "previous_step"}},
        torch.float32,
        4,
    ),
    "bias_balanced": ({"router": {"kind": "bias_balanced", "bias_update_rate": 0.05, "jitter": 0.2}}, torch.float32, 1),
    "bias_balanced, accumulated, capacity": (
        {"router": {"kind": "bias_balanced", "bias_update_rate": 0.05}, "capacity": {"factor": 1.0, "min": 1}},
        torch.float32,
        4,
    ),
    "bfloat16": ({}, torch.bfloat16, 2),
    "fused experts": ({}, torch.float32, 1),
    "packed documents": ({"balance": {"coef": 0.1}}, torch.float32, 4),
}


def _train(engine: NativeEngine, first: int, last: int, num_pieces: int) -> list[str]:
    """Take steps first .. last - 1 and return every loss and gradient norm as exact text."""
    curve, size = [], ROWS // num_pieces
    for step in range(first, last):
        make = make_packed_batch if engine.model.config.document_mask else make_batch
        batch = make(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step)
        pieces = [rows_of(batch, i * size, (i + 1) * size) for i in range(num_pieces)]
        result = engine.train_step(pieces, lr=1e-2 / (1 + step))
        curve.append(f"{result.loss.hex()} {result.grad_norm.hex()} {result.balance_loss}")
    return curve


def _engine(case: str) -> NativeEngine:
    moe, dtype, _ = CASES[case]
    config = tiny_model_config(moe, document_mask=case == "packed documents")
    return make_engine(config, dtype=dtype, kernel="fused" if case == "fused experts" else "loop")


def _hash(engine: NativeEngine) -> str:
    digest = hashlib.sha256()
    for name, part in sorted(engine.state().slices.items()):
        digest.update(name.encode() + part.tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _second_half(case: str, folder: Path, answer: Path) -> None:
    torch.set_num_threads(1)
    engine = _engine(case)
    resume(engine, folder, 10)
    curve = _train(engine, 10, 20, CASES[case][2])
    answer.write_text(json.dumps({"curve": curve, "hash": _hash(engine)}))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_continues_bit_for_bit_in_a_new_process(case: str, tmp_path: Path) -> None:
    num_pieces = CASES[case][2]
    whole = _engine(case)
    curve = _train(whole, 0, 20, num_pieces)

    first_half = _engine(case)
    assert _train(first_half, 0, 10, num_pieces) == curve[:10]
    save(tmp_path / "c", 10, first_half.state())
    answer = tmp_path / "answer.json"
    process = imported_once.CONTEXT.Process(target=_second_half, args=(case, tmp_path / "c", answer))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    resumed = json.loads(answer.read_text())
    assert resumed["curve"] == curve[10:]
    assert resumed["hash"] == _hash(whole)


@pytest.mark.parametrize("forgotten", ["optim.exp_avg_sq", "engine.previous_counts", "bias"])
def test_a_state_that_forgets_something_is_noticed(forgotten: str, tmp_path: Path) -> None:
    """The law's control: leave one thing out of the checkpoint, and the curves must part."""
    router = {"kind": "bias_balanced", "bias_update_rate": 0.05}
    config = tiny_model_config({"router": router, "balance": {"coef": 0.5, "counts": "previous_step"}})
    whole, resumed = make_engine(config), make_engine(config)
    _train(whole, 0, 10, 2)
    save(tmp_path, 10, whole.state())
    stored, fresh = load(tmp_path, 10), make_engine(config).state()
    kept = {name: Slice.whole(t) for name, t in stored.items() if forgotten not in name}
    resumed.load_state(TrainState(slices={**fresh.slices, **kept}, values=whole.state().values))
    assert _train(resumed, 10, 14, 2) != _train(whole, 10, 14, 2)

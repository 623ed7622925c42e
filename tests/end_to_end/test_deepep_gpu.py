"""Dispatchers by libraries on two GPUs: the canary of a start compares them with all experts in one process."""

from pathlib import Path

import pytest
import torch

from tests.end_to_end.tiny import make_workplace, torchrun
from trainer.packages import is_installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs with NVLink"),
]
LIBRARIES = {
    "{kind: deepep, tokens_per_rank: 1024}": "deep_ep",
    "{kind: nccl_ep, tokens_per_rank: 1024}": "nccl",
    "{kind: symmetric_memory}": "torch",
    "{kind: symmetric_memory, row_budget: 2}": "torch",
}
"""The package of each section `parallel.dispatcher`."""


@pytest.mark.parametrize("overlap", ["none", "micro_batches"])
@pytest.mark.parametrize("dispatcher", LIBRARIES)
def test_a_run_whose_rows_travel_by_a_library(tmp_path: Path, dispatcher: str, overlap: str) -> None:
    if not is_installed(LIBRARIES[dispatcher]):
        pytest.skip(f"needs {LIBRARIES[dispatcher]}")
    folder = make_workplace(tmp_path, dtype="bfloat16")
    changes = ["model.moe.num_experts=4", "parallel.device=cuda", "parallel.ep_size=2", "parallel.micro_batch_size=2"]
    given = f"parallel.dispatcher={dispatcher}"
    result = torchrun(folder, 2, "train", "tiny.yaml", *changes, given, f"parallel.overlap={overlap}")
    assert result.returncode == 0, result.stderr

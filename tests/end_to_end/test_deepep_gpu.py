"""DeepEP itself on two GPUs: the canary of a start compares it with all experts in one process, and a run trains."""

from pathlib import Path

import pytest
import torch

from tests.end_to_end.tiny import make_workplace, torchrun
from trainer.packages import is_installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or not is_installed("deep_ep"), reason="needs two GPUs with NVLink, and DeepEP"
    ),
]


@pytest.mark.parametrize("overlap", ["none", "micro_batches"])
def test_a_run_whose_rows_travel_by_deepep(tmp_path: Path, overlap: str) -> None:
    folder = make_workplace(tmp_path, dtype="bfloat16")
    changes = ["model.moe.num_experts=4", "parallel.device=cuda", "parallel.ep_size=2", "parallel.micro_batch_size=2"]
    dispatcher = "parallel.dispatcher={kind: deepep, tokens_per_rank: 1024}"
    result = torchrun(folder, 2, "train", "tiny.yaml", *changes, dispatcher, f"parallel.overlap={overlap}")
    assert result.returncode == 0, result.stderr

"""Operations of a step."""

import pytest
import torch

from trainer.config.loader import load
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.ops.fused_ffn import has_onednn_product
from trainer.plan.step_probe import ProbeOptions, WindowRecorder, probe_step, random_batches

SHAPE = [  # 64 rows for each expert, which oneDNN takes as they are
    *("model.num_layers=1", "model.d_model=16", "model.num_heads=2", "model.seq_len=32", "model.moe.d_ff=16"),
    *("model.moe.router={kind: round_robin, top_k: 2}", "train.global_batch_size=8"),
]


def config_of(*overrides: str) -> ExperimentConfig:
    return load("configs/quickstart.yaml", [*SHAPE, *overrides], ExperimentConfig)


def products(kernel: str) -> int:
    config = config_of(f"parallel.experts_kernel={kernel}")
    step = probe_step(config, Mesh.of_one(WindowRecorder()), torch.device("cpu"), ProbeOptions(num_ids=256, seed=1))
    return step.operations.flops


@pytest.mark.parametrize("kernel", ["grouped", "fused", "fused_onednn"])
def test_every_kernel_computes_the_products_of_the_plain_loop(kernel: str) -> None:
    if kernel == "fused_onednn" and not has_onednn_product():
        pytest.skip("torch is built without oneDNN")
    assert products(kernel) == products("loop") > 0


def test_rows_of_a_step_have_the_memory_of_rows_that_are_read() -> None:
    (batch,) = random_batches(config_of(), Mesh.of_one(), ProbeOptions(num_ids=256, seed=1))
    tensors = batch.tensors().values()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(batch.tensors())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)

"""Contract of an evaluation task: the same questions at every reading, and metrics that are numbers.

Metrics are those of a small untrained model, since no answer needs to be right.
"""

import math

import torch

from trainer.contracts.ensure import ensure
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.mesh import Mesh
from trainer.engine.numerics import NumericsConfig
from trainer.engine.registry import NativeEngineConfig
from trainer.evaluation.context import EvalContext
from trainer.evaluation.tasks.base import TaskResult
from trainer.evaluation.tasks.registry import TaskConfig
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT
from trainer.optim.registry import AdamWConfig
from trainer.parallel.config import ParallelConfig
from trainer.parallel.parallelize import parallelize

_SEQ_LEN = 128


def questions_are_the_same_every_time(config: TaskConfig) -> None:
    """Two readings ask the same questions."""
    one, other = (config.build(ByteTokenizer(), seq_len=_SEQ_LEN) for _ in range(2))
    ensure(one.num_examples > 0, "there are no questions")
    ensure(one.fingerprint == other.fingerprint, "a second reading has another fingerprint")


def metrics_are_finite_and_repeatable(config: TaskConfig) -> None:
    """A model gets finite metrics, and the same ones again."""
    task, context = config.build(ByteTokenizer(), seq_len=_SEQ_LEN), _untrained()
    result = task.evaluate(context)
    ensure(isinstance(result, TaskResult) and result.metrics, "evaluate gives no metrics")
    for name, value in result.metrics.items():
        ensure(math.isfinite(value), f"{name} is {value}")
    ensure(dict(task.evaluate(context).metrics) == dict(result.metrics), "a second evaluation has other metrics")


CHECKS = [questions_are_the_same_every_time, metrics_are_finite_and_repeatable]


def _untrained() -> EvalContext:
    config = ModelConfig(num_layers=1, d_model=16, num_heads=2, d_ff=16, seq_len=_SEQ_LEN, moe=None)
    with torch.device("meta"):
        whole = GPT(config, ByteTokenizer().vocab_size)
    mesh, device, dtype = Mesh.of_one(), torch.device("cpu"), torch.float32
    model = parallelize(whole, ParallelConfig(), mesh, device, seed=0, dtype=dtype, can_compile=False)
    numerics = NumericsConfig(seed=0, dtype=dtype, grad_clip=None)
    engine = NativeEngineConfig().build(model, AdamWConfig(), numerics, mesh)
    return EvalContext(engine=engine, world=mesh.world, tokens_per_pass=1024)

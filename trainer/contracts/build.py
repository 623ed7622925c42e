"""Check that `build` works, before all other checks."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.config.build_plugin import build_plugin
from trainer.config.plugins import KindConfig
from trainer.data.sources.base import Source
from trainer.data.sources.registry import SourceOptions
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.data.tokenizers.registry import TokenizerOptions
from trainer.distributed.mesh import Mesh
from trainer.evaluation.tasks.base import Task
from trainer.evaluation.tasks.registry import TaskConfig
from trainer.moe.build_router import build_router
from trainer.moe.dispatch.base import Dispatcher
from trainer.moe.dispatch.registry import DispatcherOptions
from trainer.moe.routers.config.options import RouterOptions
from trainer.optim.registry import OptimizerOptions, WarmupOptions


def build_returns_its_kind(config: KindConfig, num_experts: int = 4) -> None:
    """`build` returns an object of the class that its kind stands for."""
    match config:
        case RouterOptions():
            build_router(config, d_model=6, num_experts=num_experts, layer=0, key="")
        case DispatcherOptions():
            build_plugin(config, Dispatcher, "", Mesh.of_one(), num_experts)
        case SourceOptions():
            build_plugin(config, Source, "")
        case TokenizerOptions():
            build_plugin(config, Tokenizer, "")
        case TaskConfig():
            build_plugin(config, Task, "", ByteTokenizer(), seq_len=128)
        case OptimizerOptions():
            build_plugin(config, Optimizer, "", decayed=[nn.Parameter(torch.ones(2, 2))], not_decayed=[])
        case WarmupOptions():
            build_plugin(config, Callable, "", total_steps=10)  # type: ignore[arg-type]

"""Steps of tiny models, in which a rank does little but start operations: the time that its host takes for these."""

import torch

from trainer.data.batches.batch import Batch
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.lab.costs.step_operations import StepOperations
from trainer.training.model import build_parallel_model, numerics, resolve_kernel

_TOKENS, _WIDTH = 16, 16
_LR = 1e-4


class TinyStep:
    """Step of a tiny model on every rank; collective."""

    def __init__(self, num_layers: int, mesh: Mesh, device: torch.device, *, sharded: bool) -> None:
        """Build the model and its engine, take a step, and count another one."""
        config = resolve_kernel(_config(num_layers, mesh, device, sharded=sharded), device)
        model = build_parallel_model(config, ByteTokenizer(), mesh, device, warn=lambda _: None)
        self._engine = config.engine.build(model, config.optim, numerics(config), mesh)
        ids = torch.arange(_TOKENS + 1)[None]
        self._batch = Batch.of_whole_rows(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        self.run()
        self.operations = StepOperations()
        with self.operations:
            self.run()

    def run(self) -> None:
        """Take a step."""
        self._engine.train_step([self._batch], lr=_LR)

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    @property
    def num_operations(self) -> int:
        """Operations that the host starts."""
        return sum(work.number for work in self.operations.work.values())

    def num_collectives(self, name: str) -> int:
        """Return the number of collectives of torch's name."""
        return sum(number for call, number in self.operations.collectives.items() if call.name == name)


def _config(num_layers: int, mesh: Mesh, device: torch.device, *, sharded: bool) -> ExperimentConfig:
    moe = {"num_experts": 4, "d_ff": _WIDTH, "router": {"kind": "top_k", "top_k": 2}}
    model = {"num_layers": num_layers, "d_model": _WIDTH, "num_heads": 2, "d_ff": _WIDTH, "seq_len": _TOKENS}
    data = {"data": "shard", "shard_keeps": "nothing"} if sharded else {"data": "replicate"}
    return ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "model": {**model, "moe": moe},
            "data": {"sources": [{"kind": "installed"}]},
            "schedule": {"kind": "warmup_cosine", "peak_lr": _LR},
            "train": {"steps": 1, "global_batch_size": mesh.world.size},
            "parallel": {"micro_batch_size": 1, "device": device.type, **data},
        }
    )

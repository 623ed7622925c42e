"""DeepSpeed's own MoE layer in our transformer, trained by DeepSpeed's own loop.

It computes the same function as ours (tests/laws/test_deepspeed_moe.py) but for z-loss and noise.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.batches.batch import Batch
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.mesh import Mesh
from trainer.engine.deepspeed.start import join, load_deepspeed
from trainer.experiment import ExperimentConfig
from trainer.lab.costs.cost_options import moe_of
from trainer.lab.costs.interleaved import Entry
from trainer.lab.costs.message_counter import MessageCounter
from trainer.lab.costs.saved_bytes import peak_bytes
from trainer.lab.costs.step_entries import batches_of
from trainer.lab.costs.transformers_peer import why_not_plain
from trainer.models.block import Block
from trainer.models.gpt import GPT
from trainer.models.rotary_embedding import rotary_embedding
from trainer.packages import is_installed
from trainer.training.model import build_parallel_model, resolve_kernel

_LR = 1e-4
_FACT_TURN = 1000


def why_not_deepspeed(config: ExperimentConfig) -> str | None:
    """Return why DeepSpeed's layer cannot train a config; None if it can."""
    if not is_installed("deepspeed"):
        return "needs deepspeed, which is not installed; pip install deepspeed"
    if config.train.dtype != "float32":
        return f"its loop trains in float32 here, not {config.train.dtype}"
    return why_not_plain(config)


class _Expert(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Linear(d_model, 2 * d_ff, bias=False), nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(F.silu(gate) * up)


class _TheirModel(nn.Module):
    """Our transformer with DeepSpeed's MoE layers."""

    def __init__(self, model: GPT, config: ExperimentConfig, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        moe = moe_of(config)
        for block in cast(Iterable[Any], model.blocks):
            block.ffn = MoE(
                config.model.d_model,
                _Expert(config.model.d_model, moe.d_ff),
                moe.num_experts,
                ep_size,
                k=int(moe.experts_per_token),
                drop_tokens=False,
                top2_2nd_expert_sampling=False,
                use_rts=False,
            )
        self.model, self.config = model, config

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        model, c = self.model, self.config.model
        x = model.embedding(tokens)
        rotary = rotary_embedding(c, torch.arange(tokens.shape[1]), x.dtype)
        balance = torch.zeros(())
        for block in cast(Iterable[Block], model.blocks):
            x, normed = block.attend(x, rotary, None, None)
            out, mine, _ = cast(Any, block.ffn)(normed)
            balance, x = balance + mine, x + out
        loss = F.cross_entropy(F.linear(model.norm(x), self._head()).flatten(0, 1), targets.flatten())
        return loss + moe_of(self.config).balance.coef * balance / c.num_layers

    def _head(self) -> Tensor:
        return self.model.embedding.weight if self.model.head is None else self.model.head.weight


class DeepSpeedStep:
    """A step of DeepSpeed's own loop, ZeRO 1."""

    def __init__(self, config: ExperimentConfig, mesh: Mesh, device: torch.device) -> None:
        deepspeed = load_deepspeed(device)
        join(deepspeed, mesh, device)
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        alone = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ep_size": 1})})
        whole = build_parallel_model(resolve_kernel(alone, device), ByteTokenizer(), Mesh.of_one(), device, warn=print)
        model = _TheirModel(whole, config, mesh.layout.ep_size)
        parameters = [p for p in model.parameters() if p.requires_grad]
        described = split_params_into_different_moe_groups_for_optimizer({"params": parameters, "name": "parameters"})
        self.config, self.mesh, self.device = config, mesh, device
        self.batches: list[Batch] = batches_of(config, mesh, 0)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(described, lr=_LR, fused=True),
            config={
                "train_micro_batch_size_per_gpu": len(self.batches[0].tokens),
                "gradient_accumulation_steps": len(self.batches),
                "gradient_clipping": config.train.grad_clip or 0.0,
                "zero_optimization": {"stage": 1, "reduce_bucket_size": sum(p.numel() for p in model.parameters())},
                "zero_allow_untested_optimizer": True,
            },
        )

    def prepare(self, turn: int) -> None:
        """Draw the batches."""
        self.batches = [batch.to(self.device) for batch in batches_of(self.config, self.mesh, turn)]

    def run(self) -> None:
        """Take a step."""
        for batch in self.batches:
            self.engine.backward(self.engine(batch.tokens, batch.targets))
            self.engine.step()

    def facts(self) -> dict[str, Any]:
        """Return the peak of a step, and what was sent."""
        tokens = sum(batch.tokens.numel() for batch in self.batches)
        self.prepare(_FACT_TURN)
        with MessageCounter(self.config.model.d_model) as counter:
            self.run()
        peak = peak_bytes(self.run, self.device)
        return {"tokens": tokens, "peak_bytes": peak, **counter.sent.facts(tokens)}


def build_deepspeed_step(mesh: Mesh, device: torch.device, config: ExperimentConfig) -> Mapping[str, Entry]:
    """Return DeepSpeed's step, for a team."""
    return {"step": DeepSpeedStep(config, mesh, device)}

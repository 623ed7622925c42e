"""Entries that `bench step` and `bench scaling` time: whole optimizer steps, built as the trainer builds them.

# S tokens in a row, V vocabulary.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.lab.costs.cost_options import LayerShape, moe_of
from trainer.lab.costs.given_routing import GivenLogits, GivenRouter, given_router
from trainer.lab.costs.interleaved import Entry
from trainer.lab.costs.layer_entries import DTYPES
from trainer.lab.costs.message_counter import MessageCounter
from trainer.lab.costs.saved_bytes import counting_saved_bytes, peak_bytes
from trainer.lab.costs.transformers_peer import give_logits, mixtral_config
from trainer.metrics.device_waits import DeviceWaits
from trainer.models.flops import model_size
from trainer.models.gpt import GPT
from trainer.training.model import build_parallel_model, numerics, resolve_kernel

_LR = 1e-4
_BYTES = 256  # tokens are random bytes
_FACT_TURN = 1000


def dense_twin(config: ExperimentConfig) -> ExperimentConfig:
    """Return the dense model of the same active size: each block as wide as the experts of a token together."""
    moe = moe_of(config)
    width = round(moe.d_ff * moe.experts_per_token) + moe.shared_width
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"moe": None, "d_ff": width}),
            "parallel": config.parallel.model_copy(update={"ep_size": 1}),
        }
    )


def batches_of(config: ExperimentConfig, mesh: Mesh, turn: int) -> list[Batch]:
    """Return this rank's micro-batches of a step, of random tokens: the same global batch under every layout."""
    rows, S = config.train.global_batch_size // mesh.world.size, config.model.seq_len
    first = mesh.world.index * rows
    draw = torch.Generator().manual_seed(turn)
    text = torch.randint(0, _BYTES, (config.train.global_batch_size, S + 1), generator=draw)[first : first + rows]
    whole = Batch.of_whole_rows(text[:, :-1].contiguous(), text[:, 1:].contiguous(), first_sample=first)
    size = min(config.parallel.micro_batch_size, rows)
    return [
        Batch(**{name: tensor[start : start + size] for name, tensor in whole.tensors().items()})
        for start in range(0, rows, size)
    ]


class OurStep:
    """A step of one of our engines."""

    def __init__(
        self, config: ExperimentConfig, mesh: Mesh, device: torch.device, given: GivenLogits | None = None
    ) -> None:
        """Create model and engine; with `given` logits its routers choose by them."""
        config = resolve_kernel(config, device)
        self.config, self.mesh, self.device, self.given = config, mesh, device, given
        self.model = build_parallel_model(config, ByteTokenizer(), mesh, device, warn=print)
        self.routers = [] if given is None else _give_routers(self.model, config, device)
        self.engine = config.engine.build(self.model, config.optim, numerics(config), mesh)
        self.batches: list[Batch] = []

    def prepare(self, turn: int) -> None:
        """Draw the batches, and the routers' logits."""
        self.batches = [batch.to(self.device) for batch in batches_of(self.config, self.mesh, turn)]
        for layer, router in enumerate(self.routers):
            assert self.given is not None
            router.given = self.given.draw(self.batches[0].tokens.numel(), turn, layer=layer).to(self.device)

    def run(self) -> None:
        """Take a step."""
        self.engine.train_step(self.batches, lr=_LR)

    def facts(self) -> dict[str, Any]:
        """Return sizes, the bytes saved by a micro-batch, the peak of a step, what it sent, and its waits."""
        size = model_size(self.model)
        self.prepare(_FACT_TURN)
        # Before anything is counted: after a step under a dispatch mode torch no longer runs compiled code.
        peak = peak_bytes(self.run, self.device)
        facts: dict[str, Any] = {
            "parameters": size.total_parameters,
            "active_parameters": size.active_parameters,
            "kernel": self.config.parallel.experts_kernel,
            "threads": torch.get_num_threads(),
            "saved_bytes_per_token": _saved_per_token(self),
            "peak_bytes": peak,
        }
        self.prepare(_FACT_TURN)
        with MessageCounter(self.config.model.d_model) as counter:
            self.run()
        if self.mesh.world.size > 1:
            facts |= counter.sent.facts(sum(batch.tokens.numel() for batch in self.batches))
        self.prepare(_FACT_TURN)
        with DeviceWaits() as counted:
            self.run()
        return {**facts, "waits": len(counted.waits)}


def _give_routers(model: GPT, config: ExperimentConfig, device: torch.device) -> list[GivenRouter]:
    moe, routers = moe_of(config), []
    for layer in model.moe_layers():
        top_k = max(1, round(moe.experts_per_token))
        layer.router = given_router(config.model.d_model, num_experts=moe.num_experts, top_k=top_k).to(device)
        routers.append(layer.router)
    return routers


class MixtralStep:
    """A step of transformers' Mixtral of the same shape: AdamW, clipping and autocast as ours."""

    def __init__(
        self,
        config: ExperimentConfig,
        mesh: Mesh,
        device: torch.device,
        implementation: str,
        given: GivenLogits | None = None,
    ) -> None:
        from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

        model, moe = config.model, moe_of(config)
        shape = LayerShape(
            num_experts=moe.num_experts,
            top_k=round(moe.experts_per_token),
            d_model=model.d_model,
            d_ff=moe.d_ff,
            tokens=model.seq_len,
            dtype=config.train.dtype,
        )
        torch.manual_seed(0)
        theirs = mixtral_config(
            shape,
            implementation,
            vocab_size=ByteTokenizer().vocab_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads or model.num_heads,
            max_position_embeddings=model.seq_len,
            output_router_logits=True,
            router_aux_loss_coef=moe.balance.coef,
        )
        self.config, self.mesh, self.device, self.given = config, mesh, device, given
        model_here: Any = MixtralForCausalLM(theirs)
        self.model = model_here.to(device).train()
        self.model.set_experts_implementation(implementation)
        self.gates = [] if given is None else give_logits(self.model)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=_LR, betas=getattr(optim, "betas", (0.9, 0.95)), weight_decay=0.1, fused=True
        )
        self.batches: list[Batch] = []

    def prepare(self, turn: int) -> None:
        """Draw the batches, and the routers' logits."""
        self.batches = [batch.to(self.device) for batch in batches_of(self.config, self.mesh, turn)]
        for layer, gate in enumerate(self.gates):
            assert self.given is not None
            gate.given = self.given.draw(self.batches[0].tokens.numel(), turn, layer=layer).to(self.device)

    def run(self) -> None:
        """Take a step."""
        dtype, clip = DTYPES.get(self.config.train.dtype, torch.float32), self.config.train.grad_clip
        for batch in self.batches:
            autocast = torch.autocast(self.device.type, dtype) if dtype is torch.bfloat16 else nullcontext()
            with autocast:
                loss = self.model(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss
            (loss / len(self.batches)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def facts(self) -> dict[str, Any]:
        """Return sizes, the bytes saved by a micro-batch and the peak of a step."""
        saved = _saved_per_token(self)
        self.prepare(_FACT_TURN)
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "saved_bytes_per_token": saved,
            "peak_bytes": peak_bytes(self.run, self.device),
        }


def _saved_per_token(step: OurStep | MixtralStep) -> float:
    """Return the bytes a token that a step of a single micro-batch saves: with several, they are saved in turn."""
    step.prepare(_FACT_TURN)
    step.batches = step.batches[:1]
    with counting_saved_bytes(step.model.parameters()) as saved:
        step.run()
    return sum(saved.values()) / step.batches[0].tokens.numel()


def build_our_step(
    mesh: Mesh, device: torch.device, config: ExperimentConfig, given: GivenLogits | None = None
) -> Mapping[str, Entry]:
    """Return our step, for a team."""
    return {"step": OurStep(config, mesh, device, given)}


def build_step_apart(mesh: Mesh, device: torch.device, config: ExperimentConfig) -> Mapping[str, Entry]:
    """Return a rank's part of our step, for a team whose ranks exchange nothing: its rows, over its experts alone."""
    moe, train = moe_of(config), config.train
    experts = moe.model_copy(update={"num_experts": moe.num_experts // mesh.world.size})
    part = config.model_copy(
        update={
            "model": config.model.model_copy(update={"moe": experts}),
            "train": train.model_copy(update={"global_batch_size": train.global_batch_size // mesh.world.size}),
        }
    )
    return {"step": OurStep(part, Mesh.of_one(), device)}


def build_mixtral_step(
    mesh: Mesh, device: torch.device, config: ExperimentConfig, implementation: str, given: GivenLogits | None = None
) -> Mapping[str, Entry]:
    """Return Mixtral's step, for a team."""
    return {"step": MixtralStep(config, mesh, device, implementation, given)}


def logits_for(config: ExperimentConfig, kind: Any, seed: int, traced: tuple[Tensor, ...] = ()) -> GivenLogits | None:
    """Return what gives a model's routers their logits; None if they route by themselves."""
    return None if kind == "own" else GivenLogits(kind, moe_of(config).num_experts, seed, traced)

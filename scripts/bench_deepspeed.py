"""Steps of one model on local gloo ranks: the native engine, the DeepSpeed engine, and DeepSpeed's own MoE layer.

    OMP_NUM_THREADS=1 python scripts/bench_deepspeed.py configs/quickstart.yaml --rounds 6

Each contender has processes of its own, which wait while the others work: one block of steps each, by turns, on the
same tokens. The last contender is the same transformer with `deepspeed.moe.layer.MoE` in place of our MoE layer, run by
DeepSpeed's own loop; it computes the same function (tests/laws/test_deepspeed_moe.py) but for z-loss and noise.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.loader import load
from trainer.data.batches.batch import Batch
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.interface import use_loopback
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Layout
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.deepspeed.start import join, load_deepspeed
from trainer.engine.registry import NativeEngineConfig
from trainer.experiment import ExperimentConfig
from trainer.models.block import Block
from trainer.models.gpt import GPT
from trainer.ops.rotary import rotary_table
from trainer.training.model import build_parallel_model, numerics, resolve_kernel

CPU = torch.device("cpu")
CONTENDERS = ("native", "DeepSpeed engine, ZeRO 1", "DeepSpeed engine, ZeRO 2", "DeepSpeed's own MoE, ZeRO 1")


def make_batches(config: ExperimentConfig, rank: int, world_size: int) -> list[Batch]:
    """Return this rank's micro-batches of one step, of random tokens."""
    rows, size, S = config.train.global_batch_size // world_size, config.parallel.micro_batch_size, config.model.seq_len
    draw = torch.Generator().manual_seed(rank)
    text = torch.randint(0, 256, (rows, S + 1), generator=draw)
    column = torch.arange(S).expand(rows, S).contiguous()
    yes, zero = torch.ones(rows, S, dtype=torch.bool), torch.zeros(rows, S, dtype=torch.int64)
    whole = Batch(
        tokens=text[:, :-1].contiguous(),
        targets=text[:, 1:].contiguous(),
        loss_mask=yes,
        valid=yes,
        document_id=zero,
        position=column,
        domain=zero,
        sample_id=zero + torch.arange(rank * rows, (rank + 1) * rows)[:, None],
    )
    names = Batch.__dataclass_fields__
    return [Batch(**{n: getattr(whole, n)[i : i + size] for n in names}) for i in range(0, rows, size)]


class TheirExpert(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Linear(d_model, 2 * d_ff, bias=False), nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(F.silu(gate) * up)


class TheirModel(nn.Module):
    """Transformer of this project with DeepSpeed's MoE layers."""

    def __init__(self, model: GPT, config: ExperimentConfig, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        moe = config.model.moe
        assert moe is not None
        for block in model.blocks:
            if isinstance(block.ffn, MoE):
                expert = TheirExpert(config.model.d_model, moe.d_ff)
                block.ffn = MoE(
                    config.model.d_model,
                    expert,
                    moe.num_experts,
                    ep_size,
                    k=int(moe.experts_per_token),
                    drop_tokens=moe.capacity.factor is not None,
                    capacity_factor=moe.capacity.factor or 1.0,
                    top2_2nd_expert_sampling=False,
                    use_rts=False,
                )
        self.model, self.config = model, config

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        model, c = self.model, self.config.model
        x = model.embedding(tokens)
        rotary = rotary_table(torch.arange(tokens.shape[1]), c.head_dim, c.rope_theta, x.dtype)
        balance = torch.zeros(())
        for block in cast(Iterable[Block], model.blocks):
            x, normed = block.attend(x, rotary, None, None)
            out = block.ffn(normed)
            if isinstance(out, tuple):
                out, mine, _ = out
                balance = balance + mine
            x = x + out
        loss = F.cross_entropy(model._logits(x).flatten(0, 1), targets.flatten())
        assert c.moe is not None
        return loss + c.moe.balance.coef * balance / len(c.moe_layers)


def their_steps(config: ExperimentConfig, mesh: Mesh, batches: list[Batch]) -> Callable[[], object]:
    """Return a step of DeepSpeed's own loop."""
    deepspeed = load_deepspeed(CPU)
    join(deepspeed, mesh, CPU)
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    alone = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ep_size": 1})})
    whole = build_parallel_model(alone, ByteTokenizer(), Mesh.of_one(), CPU, warn=print)
    model = TheirModel(whole, config, mesh.layout.ep_size)
    described = split_params_into_different_moe_groups_for_optimizer(
        {"params": [p for p in model.parameters() if p.requires_grad], "name": "parameters"}
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(described, lr=1e-4, fused=True),
        config={
            "train_micro_batch_size_per_gpu": config.parallel.micro_batch_size,
            "gradient_accumulation_steps": len(batches),
            "gradient_clipping": config.train.grad_clip or 0.0,
            "zero_optimization": {"stage": 1, "reduce_bucket_size": sum(p.numel() for p in model.parameters())},
            "zero_allow_untested_optimizer": True,
        },
    )

    def step() -> None:
        for batch in batches:
            engine.backward(engine(batch.tokens, batch.targets))
            engine.step()

    return step


def our_steps(config: ExperimentConfig, mesh: Mesh, batches: list[Batch], stage: int) -> Callable[[], object]:
    """Return a step of one of our engines; stage 0 is the native one."""
    section = DeepSpeedEngineConfig(zero_stage=stage) if stage else NativeEngineConfig()
    model = build_parallel_model(config, ByteTokenizer(), mesh, CPU, warn=print)
    engine = section.build(model, config.optim, numerics(config), mesh)
    return lambda: engine.train_step(batches, lr=1e-4)


def contend(pipe: Connection, config: ExperimentConfig, contender: str, rank: int, world_size: int, store: str) -> None:
    """Run one rank of a contender: take the requested number of steps and report their seconds."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    use_loopback()
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    layout = Layout(world_size=world_size, rank=rank, ep_size=config.parallel.ep_size, ranks_per_node=world_size)
    mesh = build_mesh(layout, FlightRecorder())
    batches = make_batches(config, rank, world_size)
    if contender.startswith("DeepSpeed's"):
        step = their_steps(config, mesh, batches)
    else:
        step = our_steps(config, mesh, batches, CONTENDERS.index(contender))
    while True:
        steps = pipe.recv()
        if steps == 0:
            return
        dist.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        pipe.send(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="of each block")
    options = parser.parse_args()
    overrides = [f"parallel.ep_size={options.ranks}", *options.overrides]
    config = resolve_kernel(load(options.config, overrides, ExperimentConfig), CPU)
    if config.train.dtype != "float32":
        parser.error("train.dtype: only float32, as DeepSpeed's loop trains here")
    context, seconds = multiprocessing.get_context("spawn"), {name: [] for name in CONTENDERS}
    pipes: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(CONTENDERS):
            pipes[name] = []
            for rank in range(options.ranks):
                here, there = context.Pipe()
                store = str(Path(folder) / str(number))
                arguments = (there, config, name, rank, options.ranks, store)
                context.Process(target=contend, args=arguments, daemon=True).start()
                pipes[name].append(here)
        for turn in range(options.rounds + 1):
            for name in CONTENDERS:
                for pipe in pipes[name]:
                    pipe.send(options.steps)
                took = max(pipe.recv() for pipe in pipes[name])
                if turn > 0:  # the first block is to warm up
                    seconds[name].append(took / options.steps)
            if turn > 0:
                print(f"round {turn}: " + ", ".join(f"{seconds[name][-1]:.2f} s" for name in CONTENDERS), flush=True)
        for pipe in [pipe for name in CONTENDERS for pipe in pipes[name]]:
            pipe.send(0)
    tokens = config.train.global_batch_size * config.model.seq_len
    print(f"{tokens} tokens a step, {options.ranks} ranks, ep {options.ranks}, {config.train.dtype}")
    for name in CONTENDERS:
        ratio = median(mine / native for mine, native in zip(seconds[name], seconds["native"], strict=True))
        print(f"{name:30} {tokens / median(seconds[name]):8.0f} tokens/s, {ratio:.3f} of the native engine's time")


if __name__ == "__main__":
    main()

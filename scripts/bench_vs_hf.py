"""Training throughput against Hugging Face's Mixtral of the same shape and a dense model of the same active size.

    python scripts/bench_vs_hf.py [--rounds 12] [--dtype float32 bfloat16]

One process for each contestant, all alive at once; in every round each takes one optimizer step in turn while the
others wait, so that a drift of the machine's speed reaches all of them. Every contestant trains float32 weights with
AdamW on new random tokens each step (routing changes, as in real training), clips its gradient, and uses the same
memory allocator settings and threads. The first steps, which compile, are not counted. Printed: the median of each, and
the median over rounds of the ratio to ours in the same round.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

SHAPE = {"layers": 6, "d_model": 256, "heads": 8, "kv_heads": 4, "experts": 8, "top_k": 2, "d_ff": 512, "seq_len": 256}
ROWS, VOCAB, WARMUP = 16, 256, 3
CONTESTANTS = ("turnout", "turnout, not compiled", "hf grouped_mm", "hf eager", "turnout dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), metavar="NAME", help="also: turnout by KERNEL")
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, {ROWS * SHAPE['seq_len']} tokens a step, shape {SHAPE}")
    for dtype in options.dtype:
        report(dtype, run(dtype, options.only, options.rounds))


def run(dtype: str, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every counted step of every contestant."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(name, dtype, there), daemon=True)
        process.start()
        workers[name] = (process, here)
        print(f"  {name}: {here.recv()}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARMUP + rounds):
        for name, (_, pipe) in workers.items():
            pipe.send("step")
            took = pipe.recv()
            if number >= WARMUP:
                seconds[name].append(took)
            time.sleep(0.05)  # idle threads of the one before have stopped spinning
    for process, pipe in workers.values():
        pipe.send("stop")
        process.join()
    return seconds


def report(dtype: str, seconds: dict[str, list[float]]) -> None:
    """Print medians and ratios."""
    tokens = ROWS * SHAPE["seq_len"]
    print(f"\n{dtype:24} {'ms, median':>10} {'[min - max]':>15} {'tokens/s':>9}   time over ours, per round")
    ours = seconds.get("turnout")
    for name, samples in seconds.items():
        ms = [1e3 * s for s in samples]
        line = f"{name:24} {statistics.median(ms):10.0f} {f'[{min(ms):.0f} - {max(ms):.0f}]':>15}"
        line += f" {tokens / statistics.median(samples):9.0f}"
        if ours and name != "turnout":
            ratios = sorted(a / b for a, b in zip(samples, ours, strict=True))
            quarter = len(ratios) // 4
            line += f"   {statistics.median(ratios):.2f}  [{ratios[quarter]:.2f} - {ratios[-1 - quarter]:.2f}]"
        print(line)
    best = [name for name in seconds if name.startswith("hf")]
    if ours and best:
        ratios = [min(seconds[name][i] for name in best) / ours[i] for i in range(len(ours))]
        fastest = min(best, key=lambda name: statistics.median(seconds[name]))
        ratio = statistics.median(a / b for a, b in zip(seconds[fastest], ours, strict=True))
        print(f"=> {dtype}: {ratio:.2f} times the throughput of the fastest Hugging Face one ({fastest});", end=" ")
        print(f"against the faster of them in each round {statistics.median(ratios):.2f}")


def worker(name: str, dtype: str, pipe: Connection) -> None:
    """Take a step on request and report its seconds."""
    import torch

    from trainer.distributed.runtime import keep_freed_memory

    keep_freed_memory()
    generator = torch.Generator().manual_seed(1)
    step, facts = (hugging_face if name.startswith("hf") else turnout)(name, dtype)
    pipe.send(f"{facts}, {torch.get_num_threads()} threads")
    while pipe.recv() == "step":
        tokens = torch.randint(0, VOCAB, (ROWS, SHAPE["seq_len"] + 1), generator=generator)
        start = time.perf_counter()
        step(tokens)
        pipe.send(time.perf_counter() - start)


def turnout(name: str, dtype: str) -> tuple[Callable, str]:
    """Return our training step, through the same composition as the command line's."""
    import torch

    from trainer.data.batches.batch import Batch
    from trainer.data.tokenizers.byte import ByteTokenizer
    from trainer.distributed import runtime
    from trainer.distributed.mesh import Mesh
    from trainer.experiment import ExperimentConfig
    from trainer.models.flops import model_size
    from trainer.training.model import build_parallel_model, numerics, resolve_kernel

    moe = {"num_experts": SHAPE["experts"], "d_ff": SHAPE["d_ff"], "router": {"kind": "top_k", "top_k": SHAPE["top_k"]}}
    config = ExperimentConfig.model_validate(
        {
            "name": "bench",
            "model": {
                "num_layers": SHAPE["layers"],
                "d_model": SHAPE["d_model"],
                "num_heads": SHAPE["heads"],
                "num_kv_heads": SHAPE["kv_heads"],
                "d_ff": SHAPE["d_ff"] * SHAPE["top_k"],
                "seq_len": SHAPE["seq_len"],
                "moe": None if name == "turnout dense" else moe,
            },
            "train": {"dtype": dtype, "grad_clip": 1.0},
            "parallel": {
                "device": "cpu",
                "compile": "not compiled" not in name,
                "experts_kernel": name.partition(" by ")[2] or "auto",
            },
        }
    )
    device = runtime.start("cpu")
    config = resolve_kernel(config, device)
    mesh = Mesh.of_one()
    model = build_parallel_model(config, ByteTokenizer(), mesh, device, warn=print)
    engine = config.engine.build(model, config.optim, numerics(config), mesh)
    real = torch.ones(ROWS, SHAPE["seq_len"], dtype=torch.bool)
    column = torch.arange(SHAPE["seq_len"]).expand(ROWS, -1)
    zero = torch.zeros_like(column)

    def step(tokens: torch.Tensor) -> None:
        engine.train_step(
            [
                Batch(
                    tokens=tokens[:, :-1],
                    targets=tokens[:, 1:],
                    loss_mask=real,
                    valid=real,
                    document_id=zero,
                    position=column,
                    domain=zero,
                    sample_id=zero,
                )
            ],
            lr=1e-3,
        )

    return (
        step,
        f"{model_size(model).total_parameters / 1e6:.2f}M parameters, experts by {config.parallel.experts_kernel}",
    )


def hugging_face(name: str, dtype: str) -> tuple[Callable, str]:
    """Return the training step of transformers' Mixtral: same shape, losses and optimizer, autocast for bfloat16."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=SHAPE["d_model"],
        intermediate_size=SHAPE["d_ff"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        num_local_experts=SHAPE["experts"],
        num_experts_per_tok=SHAPE["top_k"],
        max_position_embeddings=SHAPE["seq_len"],
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation(name.removeprefix("hf "))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens: torch.Tensor) -> None:
        inputs = tokens[:, :-1].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parameters = sum(p.numel() for p in model.parameters())
    return step, f"{parameters / 1e6:.2f}M parameters, attention by {model.config._attn_implementation}"


if __name__ == "__main__":
    main()

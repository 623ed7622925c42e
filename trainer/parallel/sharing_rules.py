"""Rules between ranks that share rows and heads and the rest of an experiment. Imports no torch."""

from collections.abc import Iterator

from trainer.config.base import Problem
from trainer.models.config import ModelConfig
from trainer.parallel.config import ParallelConfig
from trainer.parallel.heads_of_ranks import fewest_queries


def sharing_problems(model: ModelConfig, parallel: ParallelConfig, *, engine: str) -> Iterator[Problem]:
    """Check that the ranks that share rows can split them and their heads, and that all else can work on parts."""
    cp, tp, S = parallel.cp_size, parallel.tp_size, model.seq_len
    if cp * tp == 1:
        return
    key = "cp_size" if tp == 1 else "tp_size"
    if S % (chunks := 2 * cp * tp):
        product = "" if 1 in (cp, tp) else f" (tp_size times cp_size {cp})"
        given = (
            f"{cp * tp} ranks{product} share rows in chunks, two of each rank, and model.seq_len {S} is no multiple of"
        )
        longer = -(-S // chunks) * chunks
        yield Problem(f"parallel.{key}", f"{given} {chunks}; use another size, or model.seq_len: {longer}")
    heads = fewest_queries(model.num_heads, model.num_kv_heads or model.num_heads, tp)
    if cp > 1 and parallel.cp == "ulysses" and 0 < heads < cp:
        given = f"ulysses gives each of {cp} ranks a head, and model.num_heads is {model.num_heads}"
        of_tp = "" if tp == 1 else f", of which a tensor-parallel rank has {heads} (tp_size {tp})"
        yield Problem("parallel.cp_size", f"{given}{of_tp}; use at most {heads}")
    if tp > 1:
        yield from _cut_problems(model, tp, engine=engine)


def _cut_problems(model: ModelConfig, tp: int, *, engine: str) -> Iterator[Problem]:
    heads, key_heads = model.num_heads, model.num_kv_heads or model.num_heads
    most = key_heads * model.head_dim
    if heads < tp:
        given = f"each of {tp} ranks needs a head of queries, and model.num_heads is {heads}"
        yield Problem("parallel.tp_size", f"{given}; use at most {heads}")
    elif most < tp and model.attention.latent is None:
        keys = f"the {key_heads} heads of keys and values of width {model.head_dim} (model.num_kv_heads)"
        yield Problem("parallel.tp_size", f"{tp} ranks cannot each have a part of {keys}; use at most {most}")
    has_dense = model.moe is None or len(model.moe_layers) < model.num_layers
    if has_dense and model.d_ff < tp:
        yield Problem("parallel.tp_size", f"{tp} ranks cut model.d_ff {model.d_ff}; use at most {model.d_ff}")
    refused = {
        "model.attention.qk_norm_over": model.qk_norm and model.attention.qk_norm_over == "all_heads",
        "engine.kind": engine != "native",
    }
    remedies = {"model.attention.qk_norm_over": "use head", "engine.kind": "use native"}
    for key in (key for key, is_on in refused.items() if is_on):
        yield Problem(key, f"it does not go with parallel.tp_size {tp} yet; {remedies[key]}, or tp_size: 1")

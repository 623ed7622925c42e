"""Small real objects for tests: batches, contexts, models, configs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.data.batches.assemble import pad_rows
from trainer.data.batches.batch import Batch
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import Layout, even_slice
from trainer.engine.config import EMAConfig
from trainer.engine.native import NativeEngine
from trainer.engine.numerics import NumericsConfig
from trainer.engine.registry import EngineConfig, NativeEngineConfig
from trainer.engine.step import StepEngine
from trainer.models.config import ModelConfig
from trainer.models.freeze import check_rate_factors, freeze_parameters, frozen_names
from trainer.models.gpt import GPT
from trainer.models.initialize import initialize
from trainer.moe.config import MoEConfig
from trainer.moe.routing import RoutingContext
from trainer.optim.registry import AdamWConfig
from trainer.parallel.config import ParallelConfig
from trainer.parallel.parallelize import parallelize


def make_context(num_sequences: int, seq_len: int, valid: Tensor | None = None, **fields: Any) -> RoutingContext:
    """Return a context of B sequences of S tokens, all valid by default."""
    tokens = num_sequences * seq_len
    return RoutingContext(
        token_ids=torch.zeros(tokens, dtype=torch.int64),
        valid=torch.ones(tokens, dtype=torch.bool) if valid is None else valid,
        position=torch.arange(seq_len).repeat(num_sequences),
        sequence_index=torch.arange(num_sequences).repeat_interleave(seq_len),
        num_sequences=num_sequences,
        num_valid=tokens if valid is None else int(valid.sum()),
        **fields,
    )


def make_batch(
    num_rows: int,
    seq_len: int,
    *,
    vocab_size: int = 32,
    seed: int = 0,
    first_sample: int = 0,
    ragged: bool = False,
    repeats: bool = False,
) -> Batch:
    """Return a batch of random tokens; `ragged` adds padding at the ends of sequences and masks some targets.

    `repeats`: of every eight rows one is a single token all along, one that but for its beginning, one a block again
    and again, one has one valid token and one none.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, vocab_size, (num_rows, seq_len + 1), generator=generator)
    kind = (torch.arange(num_rows) + seed) % 8
    if repeats:
        text[kind == 3] = text[kind == 3, :1]
        text[kind == 4, 2:] = text[kind == 4, 1:2]
        text[kind == 5] = text[kind == 5, :3].repeat(1, seq_len)[:, : seq_len + 1]
    column = torch.arange(seq_len).expand(num_rows, seq_len)
    valid = torch.ones(num_rows, seq_len, dtype=torch.bool)
    loss_mask = torch.ones_like(valid)
    if ragged:
        lengths = torch.randint(1, seq_len + 1, (num_rows, 1), generator=generator)
        valid = column < lengths
        loss_mask = torch.rand(num_rows, seq_len, generator=generator) < 0.7
        loss_mask[:, 0] = True
    if repeats:
        valid = valid & (column < torch.where(kind == 6, 1, torch.where(kind == 7, 0, seq_len))[:, None])
    zero = torch.zeros(num_rows, seq_len, dtype=torch.int64)
    return Batch(
        tokens=text[:, :-1].contiguous(),
        targets=text[:, 1:].contiguous(),
        loss_mask=loss_mask,
        valid=valid,
        document_id=zero,
        position=column.contiguous(),
        domain=zero,
        sample_id=zero + torch.arange(first_sample, first_sample + num_rows)[:, None],
    )


def make_packed_batch(
    num_rows: int, seq_len: int, *, vocab_size: int = 32, seed: int = 0, first_sample: int = 0, longest: int = 5
) -> Batch:
    """Return sequences of whole documents of random lengths, padded; only the end of each is a target."""
    generator = torch.Generator().manual_seed(seed)
    batch = make_batch(num_rows, seq_len, vocab_size=vocab_size, seed=seed, first_sample=first_sample)
    document, loss_mask = torch.full_like(batch.tokens, -1), torch.zeros_like(batch.loss_mask)
    number = 0
    for row in range(num_rows):
        column = 0
        while (end := column + int(torch.randint(1, longest + 1, (), generator=generator))) <= seq_len:
            document[row, column:end] = number
            loss_mask[row, int(torch.randint(column, end, (), generator=generator)) : end] = True
            number, column = number + 1, end
    return replace(batch, document_id=document, loss_mask=loss_mask, valid=document >= 0)


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Return a range of sequences of a batch."""
    return Batch(**{name: tensor[start:stop] for name, tensor in batch.tensors().items()})


def share_of(whole: Batch, layout: Layout, num_pieces: int) -> list[Batch]:
    """Return a rank's rows of a step, in the same number of micro-batches of the same size on every rank."""
    rows = len(whole.tokens)
    size = -(-rows // layout.data_size // num_pieces)
    mine = pad_rows(rows_of(whole, *even_slice(rows, layout.data_size, layout.data_rank)), size * num_pieces)
    return [rows_of(mine, i * size, (i + 1) * size) for i in range(num_pieces)]


def tiny_model_config(moe: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    """Return a config with two layers and four experts, small enough to print."""
    moe = {"num_experts": 4, "d_ff": 12, **(moe or {})}
    sizes = {"num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24, "seq_len": 8}
    return ModelConfig.model_validate({**sizes, "init_std": 0.3, **fields, "moe": moe})


def latent_attention(*, biases: bool = False, window: int | None = None, **fields: Any) -> dict[str, Any]:
    """Return keys of `model` for latent attention with widths that all differ, as fields of `tiny_model_config`."""
    own: dict[str, Any] = {"qkv_bias": biases, "out_bias": biases, "window": window}
    own |= {} if window is None else {"window_pattern": ["sliding", "full"]}
    widths = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 14}
    return {"num_kv_heads": None, "attention": {"latent": {**widths, **fields}, **own}}


def make_model(
    config: ModelConfig,
    *,
    vocab_size: int = 32,
    seed: int = 0,
    kernel: Any = "loop",
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """Return an initialised model."""
    model = GPT(config, vocab_size, experts_kernel=kernel).to(dtype)
    initialize(model, seed)
    return model


def make_engine(config: ModelConfig, **options: Any) -> NativeEngine:
    """Return a native engine; options are those of `make_engine_of`."""
    engine = make_engine_of(NativeEngineConfig(), config, **options)
    assert isinstance(engine, NativeEngine)
    return engine


def make_engine_of(
    section: EngineConfig,
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    kernel: Any = "loop",
    grad_clip: float = 1.0,
    mesh: Mesh | None = None,
    parallel: ParallelConfig | None = None,
    vocab_size: int = 32,
    folder: Path | None = None,
    freeze: Sequence[str] = (),
    lr_scale: Mapping[str, float] | None = None,
    ema: EMAConfig | None = None,
    **optim: Any,
) -> StepEngine:
    """Return the engine of one process or of a rank of a mesh; in bfloat16 the parameters are float32."""
    mesh, parallel = mesh or Mesh.of_one(), parallel or ParallelConfig()
    with torch.device("meta"):
        whole = GPT(config, vocab_size, experts_kernel=kernel).to(
            torch.float64 if dtype is torch.float64 else torch.float32
        )
    freeze_parameters(whole, frozen_names(whole, freeze))
    check_rate_factors(whole, lr_scale or {})
    model = parallelize(whole, parallel, mesh, torch.device("cpu"), seed=seed, dtype=dtype, can_compile=True)
    numerics = NumericsConfig(seed=seed, dtype=dtype, grad_clip=grad_clip, lr_scale=lr_scale or {}, ema=ema)
    engine = section.build(model, AdamWConfig(**optim), numerics, mesh, folder=folder)
    assert isinstance(engine, StepEngine)
    return engine


def moe_config(**fields: Any) -> MoEConfig:
    """Return a MoE section made from plain values."""
    return MoEConfig.model_validate({"num_experts": 4, "d_ff": 12, **fields})

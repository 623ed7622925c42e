"""A config with a small model and batch, in which a proof is quick. Imports no torch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from trainer.experiment import ExperimentConfig
from trainer.families.config import ExportConfig
from trainer.models.parameter_patterns import in_fewer_layers


def _small_heads(attention: dict[str, Any], default: int) -> dict[str, Any]:
    """Return a dumped attention section with narrow heads, of which about the same share is rotated."""
    head_dim, latent = attention["head_dim"], attention["latent"]
    if latent is not None:  # widths that differ
        most = dict(q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
        latent = latent | {key: min(latent[key], width) for key, width in most.items() if latent[key] is not None}
    small = default if head_dim is None else min(head_dim, 16)
    fraction, rotated = attention["rotary_fraction"], max(2, int(small * attention["rotary_fraction"]) // 2 * 2)
    return attention | {
        "head_dim": None if head_dim is None else small,
        "latent": latent,
        "rotary_fraction": fraction if fraction == 1 else min(1.0, (rotated + 0.5) / small),  # the half is not counted
    }


def _small_window(attention: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return a dumped attention section whose window is narrower than a small row, in a layer of each kind."""
    kinds = [kind for kind in ("sliding", "full") if kind in attention["window_pattern"]]
    window = attention["window"] and min(attention["window"], 8)
    return attention | {"window": window, "window_pattern": kinds[:num_layers]}


def _few_layers(moe_layers: Sequence[int]) -> tuple[int, list[int]]:
    """Return how many layers remain, and which are MoE: the first two that are, and the one before each."""
    kept = sorted({layer for moe in moe_layers[:2] for layer in (moe - 1, moe) if layer >= 0})
    return len(kept), [number for number, layer in enumerate(kept) if layer in moe_layers]


def _only_training(config: ExperimentConfig) -> dict[str, Any]:
    """Return a dumped config without what takes no part in a step, and may need longer rows or a larger model."""
    values = config.model_dump()
    values["eval"]["tasks"], values["checkpoint"]["best"], values["train"]["early_stopping"] = [], None, None
    return values | {"export": ExportConfig().model_dump()}


def shrink(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with a small model and batch, and unchanged routing."""
    values = _only_training(config)
    model, moe = values["model"], values["model"]["moe"]
    d_model, heads = min(model["d_model"], 64), min(model["num_heads"], 4)
    kv_heads = model["num_kv_heads"]
    model |= {
        "num_layers": min(model["num_layers"], 2 if moe is None else moe["first_dense_layers"] + 2 * moe["every"]),
        "d_model": d_model,
        "num_heads": heads,
        "attention": _small_heads(model["attention"], d_model // heads),
        "num_kv_heads": None if kv_heads is None else max(1, heads * kv_heads // model["num_heads"]),
        "d_ff": min(model["d_ff"], 64),
        # A conversation that fits into a row must still do so.
        "seq_len": model["seq_len"] if config.data.has_chats else min(model["seq_len"], 32),
        "init_std": 0.1,
    }
    if moe is not None:
        moe["d_ff"] = min(moe["d_ff"], 32)
        moe["shared_d_ff"] = None if moe["shared_d_ff"] is None else min(moe["shared_d_ff"], 48)
        if moe["layers"] is not None:
            model["num_layers"], moe["layers"] = _few_layers(moe["layers"])
    model["attention"] = _small_window(model["attention"], model["num_layers"])
    # Heads, layers and rows may be too few to share.
    values["parallel"] |= {"cp_size": 1, "tp_size": 1, "pp_size": 1, "pp_layers": None}
    if isinstance(again := values["parallel"]["recompute"], dict):
        again["every"] = min(again["every"], model["num_layers"])
    train, small = values["train"], partial(in_fewer_layers, before=config.model.num_layers, after=model["num_layers"])
    train["global_batch_size"] = min(train["global_batch_size"], 7)  # not divisible by any number of ranks
    train["freeze"] = [small(entry) for entry in train["freeze"]]
    train["lr_scale"] = {small(entry): factor for entry, factor in train["lr_scale"].items()}
    return ExperimentConfig.model_validate(values)

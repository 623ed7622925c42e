"""Evaluate held-out text at several numbers of experts per token."""

from collections.abc import Mapping, Sequence

from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.distributed.rank_layout import Layout
from trainer.engine.base import Engine
from trainer.evaluation.held_out import evaluate_held_out
from trainer.models.flops import model_size


def sweep_top_k(
    engine: Engine,
    corpus: Corpus,
    top_ks: Sequence[int],
    *,
    packing: Packing,
    batch_size: int,
    max_tokens_per_domain: int | None,
) -> dict[int, dict[str, float]]:
    """Evaluate every domain's held-out text with each k, as `evaluate_held_out` does, without capacity, in one process.

    Returns:
        For each k the keys of an evaluation, and the parameters that a token uses (`active_parameters`).

    Raises:
        ValueError: if the router does not allow one of `top_ks`.
    """
    records: dict[int, dict[str, float]] = {}
    for top_k in top_ks:
        active_parameters = model_size(engine.model, top_k=top_k).active_parameters
        result = evaluate_held_out(
            engine,
            corpus,
            packing=packing,
            batch_size=batch_size,
            max_tokens_per_domain=max_tokens_per_domain,
            at_capacity=False,
            layout=Layout(),
            top_k=top_k,
        )
        records[top_k] = {"active_parameters": active_parameters, **result.record()}
    return records


def sweep_table(records: Mapping[int, Mapping[str, float]], *, trained: Sequence[int]) -> str:
    """Return a table with one line per k; a star marks the values that the router was trained with."""
    lines = [
        "experts per token   active parameters   bits per byte      loss   expert-domain mutual information (bits)"
    ]
    for top_k, record in records.items():
        star = "*" if top_k in trained else " "
        information = record.get("eval/expert_domain_mi")
        lines.append(
            f"{top_k:15} {star} {record['active_parameters'] / 1e6:18.2f}M {record['eval/bits_per_byte']:15.4f} "
            f"{record['eval/loss']:9.4f}   {'-' if information is None else f'{information:.4f}'}"
        )
    return "\n".join([*lines, "* trained with this k"])

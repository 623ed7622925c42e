"""Evaluate held-out text at several numbers of experts per token."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.distributed.rank_layout import Layout
from trainer.engine.base import Engine
from trainer.evaluation.held_out import EvalResult, evaluate_held_out
from trainer.models.flops import model_size


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKResult:
    """Result at one number of experts per token."""

    top_k: int
    active_parameters: int
    """Parameters that a token uses at this k."""
    result: EvalResult

    def record(self) -> dict[str, float]:
        """Return the keys of an evaluation and the active parameters."""
        return {"active_parameters": self.active_parameters, **self.result.record()}


def sweep_top_k(
    engine: Engine,
    corpus: Corpus,
    top_ks: Sequence[int],
    *,
    packing: Packing,
    batch_size: int,
    max_tokens_per_domain: int | None,
) -> list[TopKResult]:
    """Evaluate every domain's held-out text with each k, without capacity, in one process.

    Args:
        engine: a model whose router has the option `top_k`.
        corpus: the text.
        top_ks: numbers of experts per token.
        packing: how documents become rows.
        batch_size: rows per forward pass.
        max_tokens_per_domain: token budget of a domain, spent on evenly spaced rows; None: the whole text.

    Raises:
        ValueError: if the router does not allow one of `top_ks`.
    """
    return [
        TopKResult(
            top_k=top_k,
            active_parameters=model_size(engine.model, top_k=top_k).active_parameters,
            result=evaluate_held_out(
                engine,
                corpus,
                packing=packing,
                batch_size=batch_size,
                max_tokens_per_domain=max_tokens_per_domain,
                at_capacity=False,
                layout=Layout(),
                top_k=top_k,
            ),
        )
        for top_k in top_ks
    ]


def sweep_table(results: Sequence[TopKResult], *, trained: Sequence[int]) -> str:
    """Return a table with one line per k; a star marks the values that the router was trained with."""
    lines = [
        "experts per token   active parameters   bits per byte      loss   expert-domain mutual information (bits)"
    ]
    for result in results:
        record = result.record()
        star = "*" if result.top_k in trained else " "
        information = record.get("eval/expert_domain_mi")
        lines.append(
            f"{result.top_k:15} {star} {result.active_parameters / 1e6:18.2f}M {record['eval/bits_per_byte']:15.4f} "
            f"{record['eval/loss']:9.4f}   {'-' if information is None else f'{information:.4f}'}"
        )
    return "\n".join([*lines, "* trained with this k"])

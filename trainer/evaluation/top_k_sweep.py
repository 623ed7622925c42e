"""Held-out text at several numbers of experts for a token: what fewer of them cost, and what more are worth."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.distributed.layout import Layout
from trainer.engine.base import Engine
from trainer.evaluation.held_out import EvalResult, evaluate
from trainer.models.flops import model_size


@dataclass(frozen=True, slots=True, kw_only=True)
class AtK:
    """One model with one number of experts for a token."""

    top_k: int
    active_parameters: int
    """Parameters that a token meets then."""
    result: EvalResult

    def record(self) -> dict[str, float]:
        """Return the keys of an evaluation, and what a token costs."""
        return {"active_parameters": self.active_parameters, **self.result.record()}


def evaluate_each_k(
    engine: Engine,
    corpus: Corpus,
    top_ks: Sequence[int],
    *,
    packing: Packing,
    batch_size: int,
    max_tokens_per_domain: int | None,
) -> list[AtK]:
    """Evaluate every domain's held-out text with each k, without capacity, in one process.

    Args:
        engine: of a model whose router has the option `top_k`.
        corpus: whose validation text.
        top_ks: numbers of experts for a token.
        packing: how text becomes rows.
        batch_size: rows in a forward pass.
        max_tokens_per_domain: evenly spaced rows of at most so many tokens; None: the whole text.

    Raises:
        ValueError: if the router cannot give so many.
    """
    return [
        AtK(
            top_k=top_k,
            active_parameters=model_size(engine.model, top_k=top_k).active_parameters,
            result=evaluate(
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


def table(found: Sequence[AtK], *, trained: Sequence[int]) -> str:
    """Return a line for each k; a star is at those that the router was trained with."""
    lines = [
        "experts of a token   active parameters   bits per byte      loss   bits that an expert tells of the domain"
    ]
    for at in found:
        record = at.record()
        star = "*" if at.top_k in trained else " "
        told = record.get("eval/expert_domain_mi")
        lines.append(
            f"{at.top_k:16} {star} {at.active_parameters / 1e6:18.2f}M {record['eval/bits_per_byte']:15.4f} "
            f"{record['eval/loss']:9.4f}   {'-' if told is None else f'{told:.4f}'}"
        )
    return "\n".join([*lines, "* trained with it"])

"""Rules between a model and the recording and replay of its routing. Imports no torch."""

from collections.abc import Iterator

from trainer.config.base import Problem
from trainer.models.config import ModelConfig
from trainer.moe.config import MoEConfig


def record_problem(moe: MoEConfig | None) -> str | None:
    """Return why a model's routing cannot be recorded; None if it can."""
    if moe is None:
        return "the model is dense (model.moe: null), so there is no routing to record"
    if moe.router.recorded_k is None:
        why = "draws another number in each step" if moe.router.has_fixed_k else "gives tokens different numbers"
        return f"a record has the same number of experts for every token, and {moe.router.kind} {why}"
    return None


def replay_problems(model: ModelConfig, rows: str) -> Iterator[Problem]:
    """Check whether a model can replay; keys are below `train.routing_replay`."""
    problem = record_problem(model.moe)
    if problem is None and model.moe is not None and not model.moe.router.replays_experts:
        problem = f"the experts of {model.moe.router.kind} cannot be given; use top_k, or a router built on it"
    if problem is not None:
        yield Problem("", f"{problem}; leave it out")
    if rows == "sequences" and not model.document_mask:
        yield Problem(
            "rows",
            "sequences share rows, and model.document_mask is false, so they would see each other; set it to true",
        )

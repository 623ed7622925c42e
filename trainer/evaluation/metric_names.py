"""Names of the numbers that an evaluation has, as far as a config tells. Imports no torch."""

from collections.abc import Sequence
from typing import Final

from trainer.evaluation.config import EvalConfig

_HELD_OUT: Final = ("loss", "bits_per_byte", "loss_capacity", "expert_domain_mi", "expert_domain_mi_share")
_OF_A_DOMAIN: Final = ("loss", "bits_per_byte")


def unknown_metric(metric: str, config: EvalConfig, domains: Sequence[str], *, has_average: bool) -> str | None:
    """Return why no evaluation of a run has a metric; None if one may have it.

    `domains` may be empty, where the text that is installed names them; what a task measures only it knows.
    """
    name = metric.removeprefix("eval/")
    if name.startswith("ema/"):
        if not has_average:
            return f"{metric} is of the average of the weights, and there is none; set train.ema, or use another metric"
        name = name.removeprefix("ema/")
    elif any(name.startswith(f"{task.name}/") for task in config.tasks):
        return None
    allowed = [*_HELD_OUT, *(f"{domain}/{key}" for domain in domains for key in _OF_A_DOMAIN)]
    if name in allowed:
        return None
    shown = ", ".join(f"eval/{key}" for key in (*_HELD_OUT[:3], *allowed[len(_HELD_OUT) :][:4]))
    return f"{metric} is not among the results of an evaluation, such as {shown}, or eval/TASK/... of eval.tasks"

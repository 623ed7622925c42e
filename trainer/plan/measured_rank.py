"""Fake steps of the rank of a stage that has most rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trainer.distributed.rank_layout import Layout
from trainer.experiment import ExperimentConfig
from trainer.plan.fake_step import fake_step, load_of
from trainer.plan.step_probe import ProbedStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Ranks to measure for, and what is assumed about their load."""

    world_size: int
    per_node: int
    device: str
    imbalance: float = 1.0
    """Rows of the busiest rank, times the mean."""
    shares: Sequence[float] = ()
    """(E,) recorded shares of the experts; empty: skewed by the imbalance."""


def fake_rank(
    config: ExperimentConfig,
    ranks: Ranks,
    *,
    pp_rank: int = 0,
    micro_batches: tuple[int | None, int | None] = (None, None),
) -> ProbedStep:
    """Take a fake step as the rank of a stage that has most rows; see `fake_step`."""
    own = config.parallel
    load = load_of(config, own.ep_size, ranks.imbalance, ranks.shares)
    busiest = 0 if load is None else load.busiest_rank(own.ep_size)
    layout = Layout(
        world_size=ranks.world_size,
        rank=pp_rank * (ranks.world_size // own.pp_size) + busiest,
        ranks_per_node=ranks.per_node,
        **asdict(own.degrees),
    )
    return fake_step(config, layout, load, device=ranks.device, micro_batches=micro_batches)

"""Router logits of trained runs, read once, for benchmarks with traced routing."""

from collections.abc import Sequence

from torch import Tensor

from trainer.errors import ConfigError
from trainer.lab.costs.cost_options import Routing, TracedRun
from trainer.lab.run_logits import logits_of_run

_ROWS = 16  # of held-out text


def read_traces(runs: Sequence[TracedRun], *, experts: Sequence[int], seed: int) -> dict[Routing, tuple[Tensor, ...]]:
    """Return the router logits (T, E) of each layer of the traced runs, by their routing.

    Raises:
        CheckpointError: if a run has no checkpoint.
        ConfigError: if its routers compute no logits, or have another number of experts.
    """
    traces = {}
    for run in runs:
        logits = logits_of_run(run.config, run.folder, sequences=_ROWS, seed=seed)
        if others := [count for count in experts if count != logits.num_experts]:
            raise ConfigError(
                f"--routing: {run.routing.run} has {logits.num_experts} experts, not {others[0]}; use --experts "
                f"{logits.num_experts}"
            )
        traces[run.routing] = tuple(layer.measured for layer in logits.layers)
    return traces

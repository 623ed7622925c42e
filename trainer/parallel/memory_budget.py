"""A limit on what compiled code keeps for the backward pass."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

BUDGET = 0.5
"""Share of what torch.compile keeps by default: without the softmax weights of attention in blocks, which are most of
it. Measured in docs/benchmarks.md."""


def inductor_within_budget(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """Compile a graph by torch's own compiler, as a `backend` of `torch.compile`.

    What is over the budget is computed again in the backward pass, the cheapest for its size first.
    """
    from torch._functorch import config  # takes a second with what it imports
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=BUDGET):
        return compile_fx(graph, inputs)

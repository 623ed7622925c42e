"""Facts of a trace: a routing record from which other capacities, k and layouts can be computed. Imports no torch.

# n tokens, L MoE layers, k experts per token, m experts listed for each token.
"""

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from pydantic import Field

from trainer.config.base import Config, Problem
from trainer.config.numbers import Experts, Length, Whole
from trainer.moe.layer_options import CapacityConfig

Split = Literal["held-out", "train"]
_MAX_TOKENS: Final = 1 << 27


class TraceFacts(Config):
    """What a trace has beside the experts, and what the traced model computes with them.

    A file has further tensors of n rows: `is_counted` (n,), the tokens that an evaluation counts; and for a ranking
    router `further_experts` (n, L, m - k), the next best after `expert_ids`, and `scores` (n, L, m) of all m in that
    order; for any other router `combine_weights` (n, L, k).
    """

    split: Split
    rows_per_pass: Length
    """Rows of a forward pass, which rows of a domain fill in their order; padding rows fill up the last one."""
    row_length: Length
    """Positions of a row, with padding."""
    num_ranked: Annotated[int, Field(ge=0, le=2**20)]
    """m; 0: the router lists only the experts that it chose."""
    largest_top_k: Experts
    """The largest k that the listed experts, and the router's own rules, allow."""
    normalize: bool
    """Combine weights are the scores of a token's experts divided by their sum."""
    scale: float
    """Factor of the combine weights."""
    score_dtype: Literal["float32", "float64"]
    capacity: CapacityConfig
    """Of the traced model; the trace itself was dropless."""
    d_model: Length
    value_bytes: Annotated[int, Field(ge=1, le=8)]
    """Bytes of a communicated number."""
    expert_flops: Whole
    """FLOPs of an expert for one row, forward."""
    other_flops: Whole
    """FLOPs of all else for one token, forward."""

    def problems(self) -> Iterator[Problem]:
        """Refuse passes that no machine has made: their tensors would not fit into its memory."""
        if self.rows_per_pass * self.row_length > _MAX_TOKENS:
            what = f"{self.rows_per_pass} rows of {self.row_length} positions are more than {_MAX_TOKENS} tokens"
            yield Problem("rows_per_pass", f"{what} in a pass")


def trace_tensors(trace: TraceFacts, *, num_layers: int, top_k: int) -> dict[str, tuple[list[int], str]]:
    """Return shape, without the first dimension, and numpy's type of each further tensor; "experts" as `expert_ids`."""
    floats = {"float32": "<f4", "float64": "<f8"}[trace.score_dtype]
    if not trace.num_ranked:
        return {"is_counted": ([], "bool"), "combine_weights": ([num_layers, top_k], floats)}
    return {
        "is_counted": ([], "bool"),
        "further_experts": ([num_layers, trace.num_ranked - top_k], "experts"),
        "scores": ([num_layers, trace.num_ranked], floats),
    }

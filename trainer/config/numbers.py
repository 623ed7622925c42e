"""The ranges of a configuration's numbers, by what they count.

Each range is wider than anybody trains with, and ends before what a machine can count or hold. A number beyond it is a
slip, and is said to be one before anything is computed with it: no list of 10^9 layers is made to find that out.
"""

from typing import Annotated, Final

from pydantic import Field

MAX_INT: Final = 2**63 - 1
"""Largest whole number of a tensor, and of a configuration."""
MAX_STEPS: Final = 10**9

Whole = Annotated[int, Field(ge=0, le=MAX_INT)]
"""Only compared or hashed: seeds, lengths of strings."""
Count = Annotated[int, Field(gt=0, le=MAX_INT)]
"""Only compared: intervals and limits, which may be large enough to mean never."""
Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]
"""Optimizer steps: a thousand of the longest runs, one after the other."""
Layers = Annotated[int, Field(gt=0, le=10**4)]
"""Transformer blocks: ten times the deepest ones that were ever trained (DeepNet, arXiv 2203.00555)."""
Width = Annotated[int, Field(gt=0, le=2**24)]
"""Width of a residual stream or a hidden layer; at most hundreds of times the widest known."""
Length = Annotated[int, Field(gt=0, le=2**27)]
"""Tokens of a row: above the longest contexts (10^8)."""
Experts = Annotated[int, Field(gt=0, le=2**20)]
"""Experts, or groups of them: a million (PEER, arXiv 2407.04153)."""
ExtraExperts = Annotated[int, Field(ge=0, le=2**20)]
"""Experts that there need not be."""
Rows = Annotated[int, Field(gt=0, le=2**24)]
"""Sequences that are computed in one step."""
Coefficient = Annotated[float, Field(ge=0, le=1e6)]
"""Weight of a loss or of a decay: what it multiplies stays finite in float32."""
Factor = Annotated[float, Field(gt=0, le=1e6)]
"""Multiple of something finite."""
Epsilon = Annotated[float, Field(ge=1e-30, le=1e6)]
"""Added before a division: float32 still has it, and its reciprocal too."""
Seconds = Annotated[float, Field(ge=0, le=1e9)]
"""A waiting time: up to thirty years."""

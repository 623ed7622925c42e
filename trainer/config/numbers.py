"""Number types of a configuration, with the range of each quantity.

Each range is wider than any real run needs and ends before a machine can no longer count or hold the result, so a typo
such as 10^9 layers is refused before anything is computed with it.
"""

from typing import Annotated, Final

from pydantic import Field

MAX_INT: Final = 2**63 - 1
"""Largest whole number of a tensor, and of a configuration."""
MAX_STEPS: Final = 10**9

Whole = Annotated[int, Field(ge=0, le=MAX_INT)]
"""Only compared or hashed: seeds, lengths of text."""
Count = Annotated[int, Field(gt=0, le=MAX_INT)]
"""Only compared: intervals and limits, which may be so large that they mean never."""
Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]
"""Optimizer steps; about 1000 times the longest known runs."""
Layers = Annotated[int, Field(gt=0, le=10**4)]
"""Transformer blocks; 10 times the deepest known model (DeepNet, arXiv 2203.00555)."""
Width = Annotated[int, Field(gt=0, le=2**24)]
"""Width of the residual stream or a hidden layer; hundreds of times the widest known."""
Length = Annotated[int, Field(gt=0, le=2**27)]
"""Tokens of a row; longer than the longest known contexts (10^8)."""
VocabSize = Annotated[int, Field(gt=0, le=2**24)]
"""Rows of an embedding; about 60 times the largest known."""
Experts = Annotated[int, Field(gt=0, le=2**20)]
"""Experts or groups of experts; PEER (arXiv 2407.04153) has a million."""
MAX_RANKS: Final = 2**20
"""More than the largest known clusters have GPUs."""
Ranks = Annotated[int, Field(gt=1, le=MAX_RANKS)]
"""Several ranks."""
ExtraExperts = Annotated[int, Field(ge=0, le=2**20)]
"""Optional experts: shared or null ones."""
Rows = Annotated[int, Field(gt=0, le=2**24)]
"""Sequences per step or micro-batch."""
Coefficient = Annotated[float, Field(ge=0, le=1e6)]
"""Weight of a loss term or of weight decay; the product stays finite in float32."""
Factor = Annotated[float, Field(gt=0, le=1e6)]
"""Positive multiplier."""
Epsilon = Annotated[float, Field(ge=1e-30, le=1e6)]
"""Term added before a division; float32 holds it and its reciprocal."""
Seconds = Annotated[float, Field(ge=0, le=1e9)]
"""Waiting time; up to 30 years."""

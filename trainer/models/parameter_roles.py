"""Roles of a GPT's parameters, derived from their names; weight decay and initialization depend on them."""

import math
from typing import Final, Literal

from torch import Tensor

FACTOR_A: Final = "lora_a"
"""End of the names of an adapter's first factors, of r rows."""
FACTOR_B: Final = "lora_b"
"""End of the names of its second ones, which are 0 at first."""

Role = Literal["embedding", "head", "norm", "router", "expert", "matrix"]


def parameter_role(name: str) -> Role:
    """Return the role of the parameter with this name in a GPT."""
    parts = name.split(".")
    if any(part == "norm" or part.endswith("_norm") for part in parts):
        return "norm"
    for part, role in (("embedding", "embedding"), ("head", "head"), ("router", "router"), ("experts", "expert")):
        if part in parts:
            return role  # type: ignore[return-value]
    return "matrix"


def is_adapter(name: str) -> bool:
    """Return whether a parameter is a factor of a low-rank adapter (`model.lora`)."""
    return name.endswith((FACTOR_A, FACTOR_B))


def factor_names(weight: str) -> tuple[str, str]:
    """Return the names of both factors of the adapter of a weight, if it has one."""
    prefix = weight.removesuffix("weight") if weight.endswith(".weight") else f"{weight}_"
    return prefix + FACTOR_A, prefix + FACTOR_B


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a matrix, not a bias, scale or temperature; experts' are stacked: one more dim."""
    return parameter.dim() >= (3 if parameter_role(name) == "expert" else 2)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: to all matrices but the embedding."""
    return is_matrix(name, parameter) and parameter_role(name) not in ("norm", "embedding")


def initial_std(name: str, *, init_std: float, num_layers: int) -> float:
    """Return the standard deviation of a weight's initial values; residual outputs get init_std / sqrt(2 L) (GPT-2)."""
    writes_to_residual = name.endswith(("attention.out.weight", "w_out", "w_out.weight"))
    return init_std / math.sqrt(2 * num_layers) if writes_to_residual else init_std

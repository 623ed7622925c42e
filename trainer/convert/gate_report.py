"""Result of a gate, which compares an exported model with ours before it gets its name."""

from dataclasses import dataclass
from typing import Final, Literal

from trainer.errors import CheckpointError

Gate = Literal["logits", "tensors"]
LIMIT: Final = 1e-5
"""Largest difference of logits in float32, in units of the largest logit if that is above 1."""


class GateError(CheckpointError):
    """The exported model is not ours."""


class SplittingError(GateError):
    """transformers splits texts for this family by its own rule, which is not the tokenizer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """Report of a gate: the tensors and logits that it compared."""

    gate: Gate
    num_tensors: int
    num_tokens: int = 0
    """Tokens whose logits were compared."""
    worst: float = 0.0
    """Largest difference of logits."""
    tokens: str = ""
    """Where the tokens come from."""
    num_rows: int = 0
    """Rows whose logits were compared."""
    rows_left_out: int = 0
    """Rows in which rounding alone chooses between two experts, so that no two programs have the same logits."""

    def line(self) -> str:
        """Describe it in one line."""
        if self.gate == "tensors":
            return (
                f"gate tensors: {self.num_tensors} tensors on disk equal the checkpoint bit for bit; names, shapes and "
                "config are transformers'; logits were not compared"
            )
        ties = f"; in {self.rows_left_out} of {self.num_rows} rows two experts score alike, and those were left out"
        return (
            f"gate logits: loaded by transformers, {self.num_tensors} tensors equal ours, logits of {self.num_tokens} "
            f"tokens of {self.tokens} within {self.worst:.1g}{ties if self.rows_left_out else ''}"
        )

"""The experts' kernels that compute low-rank additions to the weights. Imports no torch."""

from typing import Final

LORA_KERNELS: Final = ("loop", "padded", "grouped", "fused", "fused_onednn")
"""Names of the kernels."""

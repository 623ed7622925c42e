"""The `parallel` section: where and in which pieces the model is computed, never what is learned. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Config
from trainer.config.numbers import Count, Experts, Rows
from trainer.config.plugins import PluggableFunction
from trainer.moe.dispatch.registry import AllToAllDispatcherConfig, DispatcherConfig


class ParallelConfig(Config):
    """Placement of the computation. Nothing here may change what is learned beyond floating-point reordering."""

    micro_batch_size: Rows = 8
    """Most sequences in one forward pass; the global batch is accumulated from pieces of one size."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU if there is one."""
    ep_size: Experts = 1
    """Ranks that share the experts; each holds a part of them. Divides the number of ranks."""
    data: Literal["replicate", "shard"] = "replicate"
    """Weights that several ranks share: replicated, or (for models that fill the memory) sharded by FSDP2."""
    dispatcher: DispatcherConfig = AllToAllDispatcherConfig()
    """Dispatcher, which moves rows to their experts."""
    timeout_s: Annotated[float, Field(ge=0.1, le=1e8)] = 60.0
    """Seconds that one exchange may take before a rank counts as lost; reading text and saving may take longer."""
    check_copies_every: Count | None = 100
    """Steps between comparisons of what several ranks hold copies of; there is one before each save as well. Null: only
    then."""
    experts_kernel: Annotated[
        Literal["auto", "loop", "padded", "grouped", "fused", "fused_onednn"], PluggableFunction("experts_kernels")
    ] = "auto"
    """Kernel of the experts. `auto` is resolved from a table of measurements and recorded in the run folder.
    `my_package.module:function` is a kernel of your own, called as those in trainer/ops/expert_ffn.py are."""
    compile: bool = False
    """Compile what runs between the matrix products with torch.compile; needs a C++ compiler on the CPU."""

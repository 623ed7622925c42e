"""The `parallel` section: the layout of the computation, never what is learned. Imports no torch."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config.base import Config, expand_home
from trainer.config.numbers import Count, Experts, Layers, Ranks, Rows
from trainer.config.plugins import PluggableFunction
from trainer.distributed.rank_layout import Degrees, ScheduleName
from trainer.models.config import Recompute, ShardKeeps
from trainer.moe.dispatch.registry import AllToAllDispatcherConfig, DispatcherConfig

PlacementFile = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,1000}\.json$"), AfterValidator(expand_home)]
"""Path of a JSON file."""


class RecomputeEveryConfig(Config):
    """Recomputation of some blocks."""

    every: Layers
    """Every n-th block is computed again, as by `block`; the others are saved whole."""


class ParallelConfig(Config):
    """Layout of the computation. Nothing here changes what is learned beyond floating-point reordering."""

    micro_batch_size: Rows = 8
    """Maximum sequences per forward pass; the global batch is accumulated from micro-batches of equal size."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses a GPU if there is one."""
    ep_size: Experts = 1
    """Expert-parallel size: ranks over which the experts are split. Divides the number of ranks."""
    placement: Literal["contiguous", "round_robin", "auto"] | PlacementFile = "contiguous"
    """Which of the `ep_size` ranks have which experts, each an even share of them; checkpoints do not depend on it.
    `contiguous`: consecutive ones; `round_robin`: neighbours on different ranks; `auto`: by the load of experts in the
    last step before the checkpoint that a start resumes from, heavy ones apart, in each layer; contiguous at first.
    Or a JSON file, of `turnout what-if TRACE --ep-size N --write-placement FILE`."""
    replicas: Annotated[int, Field(ge=0, le=1024)] = 0
    """Copies of other ranks' experts on each of the `ep_size` ranks, in each MoE layer: an expert on several ranks has
    its rows split evenly among them. The busiest ones with `auto`, those in a file, else the first ones of the next
    ranks. Copies have no state: weights are sent in every forward pass, and gradients back."""
    data: Literal["replicate", "shard"] = "replicate"
    """Weights that several ranks share are replicated, or sharded by FSDP2 to save memory."""
    shard_size: Ranks | None = None
    """With `data: shard`: shard inside groups of N neighbouring ranks, such as those of a node, and replicate between
    them; experts over the ranks of such a group that hold the same ones. Null: over all ranks. Divides the number of
    ranks; divides `ep_size`, and `tp_size`, or is a multiple of it."""
    pp_size: Ranks | Literal[1] = 1
    """Pipeline-parallel size: groups of consecutive ranks, each of which has some consecutive layers, a stage; the
    micro-batches of a step pass through all of them. For models whose weights are too many for the ranks that their
    rows would fill. Divides the number of ranks; `ep_size`, `shard_size`, `cp_size` and `tp_size` then divide that of a
    stage."""
    pp_schedule: ScheduleName = "1f1b"
    """Order of the passes, by torch.distributed.pipelining. `1f1b`: one forward, one backward, so that a stage keeps
    few micro-batches. `gpipe`: all forward, then all backward. `interleaved_1f1b`: each rank has two stages, which
    halves the time that ranks wait. `zbv` and `dualpipe_v`: two stages per rank, there and back; gradients of weights
    are computed with those of activations, so they wait as long as `interleaved_1f1b` does."""
    pp_layers: Annotated[tuple[Layers, ...], Field(strict=False)] | None = None
    """Layers of each stage, in order. Null: of about the same FLOPs, the head included."""
    cp_size: Ranks | Literal[1] = 1
    """Context-parallel size: neighbouring ranks that share rows, each with 1 / N of the tokens of every row: for rows
    too long for the memory of one. Divides the number of ranks; twice it divides model.seq_len. `ep_size` need not fit
    it."""
    cp: Literal["ulysses", "ring"] = "ulysses"
    """How the ranks that share rows attend to all of them. `ulysses`: each has all tokens for some of the heads, of
    which there must be as many as ranks. `ring`: each has its tokens for all heads, and keys travel round; any number
    of heads, and no rank ever has a whole row; on GPUs it has no fused kernel yet."""
    tp_size: Ranks | Literal[1] = 1
    """Tensor-parallel size: neighbouring ranks that hold one copy of the matrices of attention and of dense
    feed-forward blocks together, each some heads and hidden units, and share rows as those of `cp_size` do: for models
    whose dense part is too large for one rank. Divides the number of ranks; twice its product with `cp_size` divides
    model.seq_len. Experts stay whole: spread them by `ep_size`, which need not fit it."""
    shard_keeps: ShardKeeps = "gradients"
    """With `data: shard`, what stays whole between the micro-batches of a step. `nothing`: least memory; weights are
    gathered twice and gradients reduced once for every micro-batch. `gradients`: reduced once a step, and 4 bytes per
    weight while several micro-batches are accumulated. `weights`: also gathered once a step, and 2 (bfloat16) or 4
    bytes more per weight."""
    dispatcher: DispatcherConfig = AllToAllDispatcherConfig()
    """Dispatcher, which sends rows to their experts."""
    overlap: Literal["none", "micro_batches"] = "none"
    """Computation that hides exchanges of rows, beside the shared experts, which always do. `micro_batches`: pairs of
    a step's micro-batches pass through the layers together, and attention and experts of one are computed while rows of
    the other travel, forward and backward (DualPipe, Megatron-Core's 1F1B overlap, vLLM's DBO). Activations of two are
    alive. With `ep_size: 1` nothing is exchanged, and they run one by one. With `pp_size` a pass of the schedule is
    that of a pair. For the native engine."""
    timeout_s: Annotated[float, Field(ge=0.1, le=1e8)] = 60.0
    """Seconds that a collective may take before a rank counts as lost; reading data and saving may take longer."""
    check_copies_every: Count | None = 100
    """Check every N steps, and before each save, that replicated tensors are bitwise equal across ranks. Null: only
    before saves."""
    experts_kernel: Annotated[
        Literal[
            "auto", "loop", "padded", "grouped", "fused", "fused_onednn", "triton", "mxfp8", "sonicmoe", "scattermoe"
        ],
        PluggableFunction("experts_kernels"),
    ] = "auto"
    """Kernel of the experts. `auto` is resolved from a table of measurements and recorded in the run folder. It never
    chooses `triton`, for GPUs, float32 and bfloat16, which needs the extra `triton`; nor `mxfp8`, an experiment that
    changes what is learned: products of float8 numbers in blocks of 32, on a GPU of compute capability 10.0 in
    bfloat16, emulated on a CPU; nor `sonicmoe` (swiglu) and `scattermoe`, in bfloat16 on GPUs, which are packages that
    you install.
    `my_package.module:function` is a custom kernel, with the signature of those in trainer/ops/expert_ffn.py."""
    kernel_canary: Literal["auto", "fall_back", "refuse", "off"] = "auto"
    """At the start, kernel and dispatcher are compared with a plain loop on this device. If the kernel is wrong,
    `fall_back` warns and trains with the next one, `refuse` ends the run; `auto` falls back from a kernel that
    `experts_kernel: auto` chose and refuses one that you named. A wrong dispatcher is always refused."""
    loss_chunk: Count | None = 1024
    """Tokens whose logits exist at once, in the loss and its gradient. Lower saves memory if the vocabulary is large.
    Null: those of the whole micro-batch, by torch's cross-entropy."""
    deterministic: bool = False
    """Use only GPU kernels whose results are the same bits in every run on the same layout; they are slower. On the CPU
    all are."""
    recompute: Recompute | RecomputeEveryConfig = "none"
    """What is computed again in the backward pass instead of being saved: first products of the `experts`;
    `norms_and_activations`, without any product; all of a `block` but routers, exchanges and experts' second products;
    or `{every: n}`, that of every n-th block. Nothing is exchanged or routed twice."""
    compile: bool = False
    """Compile the operations between matrix products with torch.compile; on the CPU this needs a C++ compiler."""

    @property
    def degrees(self) -> Degrees:
        """Sizes of the groups that ranks are divided into."""
        return Degrees.of(self)

    @property
    def overlaps(self) -> bool:
        """Whether two micro-batches pass through the layers together."""
        return self.overlap == "micro_batches" and self.ep_size > 1

    @property
    def at_once(self) -> int:
        """Micro-batches that pass through the layers together."""
        return 1 + self.overlaps

    @property
    def row_size(self) -> int:
        """Number of ranks that share rows."""
        return self.cp_size * self.tp_size

    def recompute_of(self, layer: int) -> Recompute:
        """Return what is recomputed of block `layer`."""
        if isinstance(self.recompute, RecomputeEveryConfig):
            return "block" if (layer + 1) % self.recompute.every == 0 else "none"
        return self.recompute

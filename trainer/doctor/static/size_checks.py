"""Checks of widths, batch and ranks against the device: what is right, but slow. Import no torch."""

import math
from collections.abc import Iterator

from trainer.distributed.rank_layout import check_layout
from trainer.doctor.finding import Sign
from trainer.doctor.static.config_on_host import ConfigCheck, ConfigOnHost
from trainer.errors import ConfigError
from trainer.moe.dispatch.registry import AllToAllDispatcherConfig
from trainer.packages import is_installed
from trainer.parallel.expert_placement import named_placement

_TILE = 128
"""Rows and columns of a tile of grouped products on Hopper and Blackwell."""
_ALIGNED = 64
"""Width of a multiple of 128 bytes in bfloat16."""
_MOST_LOGIT_BYTES = 4 << 30
_SPARE_SHARE, _SPARE_IDS = 1.25, 1024
_IDLE = 0.1


def _small_experts(subject: ConfigOnHost) -> Iterator[Sign]:
    moe = subject.config.model.moe
    if subject.on_gpu and moe is not None and moe.d_ff < _TILE:
        yield Sign(f"model.moe.d_ff: {moe.d_ff}, a tile has {_TILE} columns", f"use fewer experts of at least {_TILE}")


def _few_rows(subject: ConfigOnHost) -> Iterator[Sign]:
    rows, size = subject.rows_per_expert, subject.config.parallel.micro_batch_size
    if subject.on_gpu and 0 < rows < _TILE:
        yield Sign(
            f"an expert gets {rows:.0f} rows of a micro-batch, a tile has {_TILE}",
            f"raise parallel.micro_batch_size to {math.ceil(size * _TILE / rows)}, with parallel.recompute: block if "
            "memory does not allow it, or raise parallel.ep_size",
        )


def _unaligned_widths(subject: ConfigOnHost) -> Iterator[Sign]:
    model, moe = subject.config.model, subject.config.model.moe
    if not subject.on_gpu or moe is None or subject.config.train.dtype != "bfloat16":
        return
    for key, width in (("model.d_model", model.d_model), ("model.moe.d_ff", moe.d_ff)):
        if width % _ALIGNED:
            up = -(-width // _ALIGNED) * _ALIGNED
            yield Sign(f"{key}: {width} is no multiple of {_ALIGNED}", f"use {up}")


def _spare_ids(subject: ConfigOnHost) -> Iterator[Sign]:
    rows, ids = subject.config.model.vocab_size, subject.num_ids
    is_plan = subject.config.data.tokenizer.kind == "byte"  # rows of another tokenizer; a step in earnest finds them
    if rows is not None and ids is not None and not is_plan and rows > _SPARE_SHARE * ids + _SPARE_IDS:
        yield Sign(
            f"model.vocab_size: {rows} rows for the {ids} ids of data.tokenizer: {rows - ids} are never trained",
            f"use {-(-ids // _ALIGNED) * _ALIGNED}, or null",
        )


def _large_logits(subject: ConfigOnHost) -> Iterator[Sign]:
    config = subject.config
    vocabulary = config.model.vocab_size or subject.num_ids or 0
    size = 4 * config.parallel.micro_batch_size * config.model.seq_len * vocabulary
    if config.parallel.loss_chunk is None and size > _MOST_LOGIT_BYTES:
        yield Sign(
            f"parallel.loss_chunk: null: the logits of a micro-batch take {size / 1e9:.0f} GB, and their gradient the "
            "same",
            "use 1024",
        )


def _unchecked_kernel(subject: ConfigOnHost) -> Iterator[Sign]:
    if subject.on_gpu and subject.config.parallel.kernel_canary == "off" and subject.config.model.moe is not None:
        yield Sign("parallel.kernel_canary: off", "use auto: it takes seconds at the start")


def _unfit_ranks(subject: ConfigOnHost) -> Iterator[Sign]:
    parallel, ranks = subject.config.parallel, subject.host.world_size
    moe, layers = subject.config.model.moe, len(subject.config.model.moe_layers)
    if moe is not None and parallel.ep_size > 1:
        try:
            sizes = layers, moe.num_experts, parallel.ep_size
            named_placement(parallel.placement, *sizes, num_copies=parallel.replicas)
        except ConfigError as error:
            yield Sign(str(error), "name a file that fits, or use parallel.placement: auto")
    if ranks == 1:
        return  # started alone, or not known yet
    try:
        check_layout(parallel.degrees, world_size=ranks)
    except ConfigError as error:
        problem, _, remedy = str(error).partition("; ")
        yield Sign(problem, remedy)


def _idle_ranks(subject: ConfigOnHost) -> Iterator[Sign]:
    rows, sharing = subject.config.train.global_batch_size, subject.config.parallel.row_size
    ranks = max(1, subject.host.world_size // sharing)  # those that share rows count as one
    most = -(-rows // ranks)
    idle = 1 - rows / (ranks * most)
    if rows < ranks:
        yield Sign(
            f"train.global_batch_size: {rows} rows for {ranks} ranks: {ranks - rows} have none",
            f"use at least {ranks}, or fewer ranks",
            "severe",
        )
    elif idle > _IDLE:
        yield Sign(
            f"train.global_batch_size: {rows} rows over {ranks} ranks: some have {most}, and {idle:.0%} of the time is "
            "waiting",
            f"use a multiple of {ranks}, such as {ranks * most}",
        )


def _crosses_nodes(subject: ConfigOnHost) -> Iterator[Sign]:
    parallel, host = subject.config.parallel, subject.host
    is_plain = isinstance(parallel.dispatcher, AllToAllDispatcherConfig)
    if subject.on_gpu and host.num_nodes > 1 and parallel.ep_size > host.ranks_here and is_plain:
        library = ", or deepep, which is installed" if is_installed("deep_ep") else ""
        yield Sign(
            f"parallel.ep_size: {parallel.ep_size} ranks on machines of {host.ranks_here}: every copy of a token "
            "crosses the slow network by itself",
            f"use ep_size {host.ranks_here}, with data: shard for the memory; or dispatcher.kind: hierarchical or "
            f"deduplicated_all_to_all{library}",
        )


SIZE_CHECKS: tuple[ConfigCheck, ...] = (
    ConfigCheck(
        name="small_experts",
        severity="warning",
        find=_small_experts,
        why="most of a tile is padding, and reading weights takes longer than computing",
        source="arXiv 2512.14080; karpathy/nanochat#798",
    ),
    ConfigCheck(
        name="few_rows_per_expert",
        severity="warning",
        find=_few_rows,
        why="most of a tile is padding: the GPU computes zeros",
        source="arXiv 2512.14080; pytorch/torchtitan#1993",
    ),
    ConfigCheck(
        name="unaligned_widths",
        severity="warning",
        find=_unaligned_widths,
        why="grouped kernels are slow there, and have been wrong: a gradient off by 0.17 to 0.55",
        source="marin-community/marin#8339",
    ),
    ConfigCheck(
        name="spare_ids",
        severity="warning",
        find=_spare_ids,
        why="rows that no text uses cost time in every step and break tools that expect the tokenizer's size",
        source="arXiv 2405.05417; unslothai/unsloth-zoo#923",
    ),
    ConfigCheck(
        name="large_logits",
        severity="warning",
        find=_large_logits,
        why="the largest tensor of the step is one that need not exist: out of memory at the loss",
        source="arXiv 2410.10989",
    ),
    ConfigCheck(
        name="unchecked_kernel",
        severity="warning",
        find=_unchecked_kernel,
        why="torch's grouped products returned gradients for experts without tokens on Blackwell, silently",
        source="pytorch/pytorch#172439; huggingface/transformers#48205",
    ),
    ConfigCheck(
        name="unfit_ranks",
        severity="severe",
        find=_unfit_ranks,
        why="the run ends before its first step, once the machines are paid for",
        source="pytorch/torchtitan#4258",
    ),
    ConfigCheck(
        name="idle_ranks",
        severity="warning",
        find=_idle_ranks,
        why="ranks wait for the one with most rows in every step",
        source="mosaicml/examples#41; deepspeedai/DeepSpeed#5118",
    ),
    ConfigCheck(
        name="experts_across_nodes",
        severity="warning",
        find=_crosses_nodes,
        why="between machines a GPU has a tenth of the bandwidth that it has inside one",
        source="arXiv 2412.19437, section 3.2.2",
    ),
)

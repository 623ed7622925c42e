"""Checks of the folder that checkpoints go to. Import no torch."""

from collections.abc import Iterator

from trainer.console import formatting
from trainer.doctor.finding import Sign
from trainer.doctor.static.config_on_host import ConfigCheck, ConfigOnHost

_NO_RENAME = ("s3fs", "gcsfuse", "goofys", "mountpoint-s3", "blobfuse", "rclone", "s3ql")
"""File systems over object stores: a rename copies, file by file."""
_LOST = {
    "tmpfs": "is memory: lost when the machine restarts",
    "ramfs": "is memory: lost when the machine restarts",
    "overlay": "belongs to the container: lost with it",
}
_RUSHED = 0.9
"""Share of the free space from which it counts as full."""


def _disk_space(subject: ConfigOnHost) -> Iterator[Sign]:
    checkpoint, free, each = subject.config.checkpoint, subject.host.free_bytes, subject.checkpoint_bytes
    count = checkpoint.keep + 1  # the one that is being written
    count += checkpoint.best is not None
    every = checkpoint.every
    if checkpoint.keep_every is not None and every is not None:
        count += subject.config.train.steps // max(checkpoint.keep_every, every)
    if free is None or count * each <= _RUSHED * free:
        return
    yield Sign(
        f"checkpoint: {count} at a time of {formatting.size(each)} each are {formatting.size(count * each)}, and "
        f"{formatting.size(free)} are free in runs_dir {subject.config.runs_dir}",
        "name another runs_dir, free space, or lower checkpoint.keep or raise keep_every",
    )


def _unsafe_rename(subject: ConfigOnHost) -> Iterator[Sign]:
    kind = subject.host.file_system or ""
    if any(name in kind for name in _NO_RENAME):
        yield Sign(
            f"runs_dir {subject.config.runs_dir} is on {kind}, where a rename is not atomic and fsync promises nothing",
            "train on a local or a parallel file system, and copy finished checkpoints",
        )


def _lost_storage(subject: ConfigOnHost) -> Iterator[Sign]:
    kind = subject.host.file_system or ""
    if kind in _LOST:
        yield Sign(f"runs_dir {subject.config.runs_dir} is on {kind}, which {_LOST[kind]}", "mount a disk there")


def _single_save(subject: ConfigOnHost) -> Iterator[Sign]:
    every, steps = subject.config.checkpoint.every, subject.config.train.steps
    tokens = subject.config.train.global_batch_size * subject.config.model.seq_len
    is_long = steps * tokens >= 1e9
    if is_long and (every is None or every > steps / 4):
        given = "null" if every is None else f"{every}"
        yield Sign(
            f"checkpoint.every: {given} of {steps} steps over {steps * tokens:.1e} tokens: a failure costs most of the "
            "run",
            f"use {max(1, steps // 100)}",
        )


STORAGE_CHECKS: tuple[ConfigCheck, ...] = (
    ConfigCheck(
        name="disk_space",
        severity="severe",
        find=_disk_space,
        why="the run ends when it saves, after hours",
        source="mlfoundations/open_lm#154; facebookresearch/metaseq#53",
    ),
    ConfigCheck(
        name="unsafe_rename",
        severity="severe",
        find=_unsafe_rename,
        why="a checkpoint that is half there looks complete",
        source="s3fs-fuse/s3fs-fuse#1453; GoogleCloudPlatform/gcsfuse#11; google/orbax#3537",
    ),
    ConfigCheck(
        name="lost_storage",
        severity="warning",
        find=_lost_storage,
        why="checkpoints are there to outlive the machine's next restart",
        source="arXiv 2407.21783, table 5: 419 interruptions in 54 days",
    ),
    ConfigCheck(
        name="rare_checkpoints",
        severity="warning",
        find=_single_save,
        why="machines fail: on 16,384 GPUs every three hours",
        source="arXiv 2407.21783, section 3.3.4",
    ),
)

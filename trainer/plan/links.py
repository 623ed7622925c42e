"""Measured speeds of this cluster, as `doctor --cluster` writes them. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.config.nodes import shown, shown_path
from trainer.config.numbers import MAX_RANKS
from trainer.doctor.cluster.timed_rounds import COLLECTIVES
from trainer.errors import ConfigError
from trainer.plan.gpus import Gpu

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Times of collectives by the bytes of the tensor that each rank passes, on so many ranks, and speeds of a rank."""

    ranks: int
    all_reduce: Sequence[tuple[float, float]]
    """(bytes, seconds), ascending."""
    all_to_all: Sequence[tuple[float, float]]
    all_gather: Sequence[tuple[float, float]] = ()
    """By the bytes that each rank gets; not in files of older versions."""
    reduce_scatter: Sequence[tuple[float, float]] = ()
    beside: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """The same curves by name, of ranks that compute in between; not in files of older versions."""
    operation_s: float | None = None
    """Host seconds of an operation; None: not measured."""
    shard_call_s: float = 0.0
    """Host seconds of FSDP2 around a gather or a reduction of shards."""
    flops: float
    bandwidth: float

    def curve(self, name: str) -> Sequence[tuple[float, float]]:
        """Return the times of a collective in a step; empty: it was not measured."""
        return self.beside.get(name) or getattr(self, name)

    def of(self, gpu: Gpu) -> Gpu:
        """Return a device with the measured speeds, which are reached."""
        reached = replace(gpu.reached, products=1.0, memory=1.0, shard_call_s=self.shard_call_s)
        if self.operation_s is not None:
            reached = replace(reached, operation_s=self.operation_s)
        return replace(gpu, flops=dict.fromkeys(gpu.flops, self.flops), bandwidth=self.bandwidth, reached=reached)


def read_links(path: Path) -> Links:
    """Read a file of measurements.

    Raises:
        ConfigError: if it is none.
    """
    where = f"--links: {shown_path(path)}"
    advice = "; write one by turnout doctor --cluster"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}{advice}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON: {error}{advice}") from None
    try:
        if found["schema"] != SCHEMA:
            raise ConfigError(f"{where}: has schema {shown(found['schema'])}, and this version reads {SCHEMA}{advice}")
        ranks = _ranks(found["ranks"])
        needs = ("all_reduce", "all_to_all") if ranks > 1 else ()  # one rank has no links
        curves = {name: _curve(found[name]) if name in needs or found.get(name) else () for name in COLLECTIVES}
        return Links(
            ranks=ranks,
            **curves,
            beside={name: _curve(found["beside_computation"][name]) for name in found.get("beside_computation", ())},
            operation_s=_positive(found["operation_s"]) if "operation_s" in found else None,
            shard_call_s=_seconds(found.get("shard_call_s", 0.0)),
            flops=_positive(found["matmul_flops_per_s"]),
            bandwidth=_positive(found["memory_bytes_per_s"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: is not a measurement of links: {error}{advice}") from None


def seconds_at(curve: Sequence[tuple[float, float]], num_bytes: float) -> float:
    """Return the time of a message of so many bytes: between measurements on a line, beyond the last in proportion."""
    (first, least), *_ = curve
    if num_bytes <= first:
        return least
    for (low, before), (high, after) in pairwise(curve):
        if num_bytes <= high:
            return before + (after - before) * (num_bytes - low) / (high - low)
    last, most = curve[-1]
    return most * num_bytes / last


def _curve(points: Any) -> list[tuple[float, float]]:
    curve = sorted((_positive(point["bytes"]), _positive(point["seconds"])) for point in points)
    if not curve:
        raise ValueError("a collective has no measurement")
    return curve


def _ranks(value: Any) -> int:
    if type(value) is not int or not 0 < value <= MAX_RANKS:
        raise ValueError(f"ranks is {shown(value)}, not 1 to {MAX_RANKS}")
    return value


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{shown(value)} is not a positive number")
    return float(value)


def _seconds(value: Any) -> float:
    return 0.0 if value == 0 else _positive(value)

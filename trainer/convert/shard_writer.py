"""Write safetensors shards and their index as transformers names them, a part at a time."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from trainer.checkpoint.tensor_files import safetensors_header
from trainer.convert.exported_model import ExportedModel
from trainer.families.link import Link

INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file, and the tensors in it."""

    file: str
    links: tuple[Link, ...]


def plan_shards(model: ExportedModel, shard_bytes: int) -> list[Shard]:
    """Distribute the tensors, in order, over files of at most `shard_bytes`; a larger tensor gets a file of its own."""
    groups = list(_groups(model, shard_bytes))
    if len(groups) == 1:
        return [Shard(file="model.safetensors", links=groups[0])]
    return [
        Shard(file=f"model-{number:05d}-of-{len(groups):05d}.safetensors", links=links)
        for number, links in enumerate(groups, 1)
    ]


def num_bytes(model: ExportedModel, links: Sequence[Link]) -> int:
    """Return the size of tensors on disk."""
    return sum(link.num_elements * model.dtype_of(link).itemsize for link in links)


def write_shards(folder: Path, model: ExportedModel, shards: Sequence[Shard]) -> None:
    """Write every shard, and the index if there are several. In memory is a part of one tensor."""
    for shard in shards:
        _write_shard(folder / shard.file, model, shard.links)
    if len(shards) > 1:
        weight_map = {link.theirs: shard.file for shard in shards for link in shard.links}
        total = num_bytes(model, model.links)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _groups(model: ExportedModel, shard_bytes: int) -> Iterator[tuple[Link, ...]]:
    group: list[Link] = []
    size = 0
    for link in model.links:
        link_bytes = num_bytes(model, [link])
        if group and size + link_bytes > shard_bytes:
            yield tuple(group)
            group, size = [], 0
        group.append(link)
        size += link_bytes
    yield tuple(group)


def _write_shard(path: Path, model: ExportedModel, links: Sequence[Link]) -> None:
    links = sorted(links, key=lambda link: -model.dtype_of(link).itemsize)  # so that all are aligned
    entries = {link.theirs: (_name(model.dtype_of(link)), link.shape) for link in links}
    with path.open("xb") as file:
        file.write(safetensors_header(entries, {"format": "pt"}))  # type: ignore[arg-type]
        for link in links:
            for _, part in model.parts(link):
                file.write(part.reshape(-1).view(torch.uint8).numpy().data)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

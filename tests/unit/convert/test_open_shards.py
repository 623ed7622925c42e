"""Files that stay open are few, are the right ones, and do not stay open for ever."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.open_shards import OpenShards


def _num_open(folder: Path) -> int:
    links = list(Path("/proc/self/fd").iterdir())
    return sum(link.is_symlink() and link.readlink().is_relative_to(folder) for link in links)


def test_many_files_are_read_and_few_are_open(tmp_path: Path) -> None:
    for number in range(40):
        save_file({"x": torch.full((2,), float(number))}, tmp_path / f"{number}.safetensors")
    shards = OpenShards(ForeignFolder(tmp_path))
    for number in (*range(40), *range(0, 40, 7)):
        assert shards.shard(f"{number}.safetensors").read("x").tolist() == [number, number]
        assert _num_open(tmp_path) <= 16
    assert shards.shard("35.safetensors") is shards.shard("35.safetensors"), "its header is read once"
    assert _num_open(tmp_path) > 1
    del shards
    assert _num_open(tmp_path) == 0

"""Quantized weights of a published model, read as the numbers that they stand for.

fp8      NAME.weight in float8_e4m3 times NAME.weight_scale_inv, one float32 for each block (DeepSeek-V3)
mxfp4    NAME_blocks: two 4-bit numbers a byte, low half first, times 2^(NAME_scales - 127), one for 32 (GPT-OSS)

# E experts, R rows, C columns, G groups of 32 in a row.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from trainer.config.nodes import shown
from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.safetensors_folder import SafetensorsFolder
from trainer.convert.shard_file import ShardEntry
from trainer.errors import CheckpointError

_FP4: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_GROUP_BYTES, _BIAS = 16, 127
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"


class BlockSize(NamedTuple):
    """Rows and columns that share a scale."""

    rows: int
    columns: int


class DequantizedFolder(SafetensorsFolder):
    """A folder whose quantized tensors have the name, shape and values of those that they stand for."""

    def __init__(self, folder: ForeignFolder, quantization: Mapping[str, Any]) -> None:
        """Open a folder; `quantization` is the section of its config.json, which `quantization_problem` accepts.

        Raises:
            CheckpointError: as `SafetensorsFolder`, and if numbers and scales do not fit together.
        """
        super().__init__(folder)
        self._stored = dict(self.entries)
        self._block = BlockSize(*quantization.get("weight_block_size", (1, 1)))
        for name, entry in self._stored.items():
            if entry.dtype is torch.float8_e4m3fn:
                self._add_fp8(name, entry)
            elif name.endswith(_BLOCKS):
                self._add_mxfp4(name.removesuffix(_BLOCKS), entry)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows first .. last - 1 of dimension 0 of a tensor, by default all."""
        last = self.entries[name].shape[0] if last is None and self.entries[name].shape else last
        if name + _BLOCKS in self._stored:
            return _from_mxfp4(super().read(name + _BLOCKS, first, last), super().read(name + _SCALES, first, last))
        if self._stored[name].dtype is not torch.float8_e4m3fn or last is None:
            return super().read(name, first, last)
        scales = super().read(name + _SCALE, first // self._block.rows, -(-last // self._block.rows))
        by_row = scales.repeat_interleave(self._block.rows, 0)[first % self._block.rows :][: last - first]
        columns = self.entries[name].shape[1]
        by_element = by_row.repeat_interleave(self._block.columns, 1)[:, :columns]
        return super().read(name, first, last).float() * by_element

    def _add_fp8(self, name: str, entry: ShardEntry) -> None:
        scales = self._take(name, name + _SCALE)
        grid = [-(-size // block) for size, block in zip(entry.shape, self._block, strict=False)]
        if len(entry.shape) != 2 or scales.dtype is not torch.float32 or list(scales.shape) != grid:
            raise self._unfit(name, entry, scales)
        self.entries[name] = entry._replace(dtype=torch.float32)

    def _add_mxfp4(self, name: str, entry: ShardEntry) -> None:
        scales = self._take(name + _BLOCKS, name + _SCALES)
        is_bytes = entry.dtype is scales.dtype is torch.uint8
        if not is_bytes or len(entry.shape) != 4 or entry.shape != (*scales.shape, _GROUP_BYTES):
            raise self._unfit(name, entry, scales)
        experts, rows, groups, _ = entry.shape
        del self.entries[name + _BLOCKS]
        self.entries[name] = ShardEntry(torch.bfloat16, (experts, groups * 2 * _GROUP_BYTES, rows), entry.start)

    def _take(self, name: str, scales: str) -> ShardEntry:
        if scales not in self._stored:
            raise self._error(f"{shown(name)} is quantized, and {shown(scales)} is missing")
        return self.entries.pop(scales)

    def _unfit(self, name: str, entry: ShardEntry, scales: ShardEntry) -> CheckpointError:
        kind = str(scales.dtype).removeprefix("torch.")
        sizes = f"{list(entry.shape)} with scales {list(scales.shape)} of {kind}"
        return self._error(f"{shown(name)} is quantized as {sizes}, which do not fit")


def open_published(folder: ForeignFolder, quantization: Mapping[str, Any] | None) -> SafetensorsFolder:
    """Open the tensors of a published model as numbers, whether or not its config.json has a section on quantization.

    Raises:
        CheckpointError: if they are damaged or incomplete.
    """
    return SafetensorsFolder(folder) if quantization is None else DequantizedFolder(folder, quantization)


def _from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return (E, C, R) in bfloat16, which holds every such number, from (E, R, G, 16) and (E, R, G)."""
    numbers = torch.tensor(_FP4)
    halves = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2).long()  # (E, R, G, 32)
    values = torch.ldexp(numbers[halves], scales.int()[..., None] - _BIAS)
    return values.flatten(-2).transpose(-2, -1).bfloat16()

"""Our tensors, read from a published model by the links of its family, a few rows at a time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.streamed import GlobalTensor
from trainer.convert.link_tensors import to_ours
from trainer.convert.safetensors_folder import SafetensorsFolder
from trainer.families.link import Link

_BLOCK_BYTES: Final = 32 << 20


class LinkedWeights:
    """Tensors that `save_streamed` reads: weights by their links, everything else as it is before the first step."""

    def __init__(
        self,
        source: SafetensorsFolder,
        links: Iterable[Link],
        tensors: Mapping[str, GlobalTensor],
        initial: Mapping[str, Tensor],
    ) -> None:
        """Create a reader of `tensors`, by name in a checkpoint; `initial` has those without a link."""
        self._source, self._tensors, self._initial = source, tensors, initial
        self._links: dict[str, list[Link]] = {name: [] for name in tensors}
        for link in links:
            self._links[WEIGHT + link.ours].append(link)
        for found in self._links.values():
            found.sort(key=lambda link: link.at)

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return indices start .. start + length - 1 of dimension 0 of one of our tensors."""
        if name in self._initial:
            return self._initial[name][start : start + length]
        stored = self._tensors[name]
        rows = torch.empty((length, *stored.shape[1:]), dtype=getattr(torch, stored.dtype))
        for link in self._links[name]:
            (begin, end), *inner = region(link, stored.shape)
            first, last = max(start, begin), min(start + length, end)
            if first < last:
                where = (slice(first - start, last - start), *(slice(*span) for span in inner))
                rows[where] = read_region(self._source, link, stored.shape, first - begin, last - begin)
        return rows


def region(link: Link, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the range of each dimension of our tensor, of this shape, that a link is about."""
    return [*link.at, *((0, size) for size in shape[len(link.at) :])]


def read_region(source: SafetensorsFolder, link: Link, shape: tuple[int, ...], first: int, last: int) -> Tensor:
    """Return indices first .. last - 1 of dimension 0 of a link's region, in the dtype of theirs.

    Of theirs no more is read than that needs, except where two dimensions are exchanged: then all of it.
    """
    lengths = [end - begin for begin, end in region(link, shape)]
    step = independent_rows(link, lengths)
    if step is None:
        return to_ours(source.read(link.theirs), link, tuple(lengths))[first:last]
    begin, end = first // step * step, -(-last // step) * step
    rows = to_ours(source.read(link.theirs, begin, end), link, (end - begin, *lengths[1:]))
    return rows[first - begin : last - begin]


def independent_rows(link: Link, lengths: list[int]) -> int | None:
    """Return the number of rows of theirs that, from a multiple of it, are as many rows of ours; None: all of them."""
    if not link.shape or link.shape[0] != lengths[0] or (link.transposed and len(link.shape) == 2):
        return None
    order = link.interleaved
    return order.block if order is not None and order.dim % len(lengths) == 0 else 1


def parts_of(link: Link, shape: tuple[int, ...], *, index_bytes: int) -> Iterator[tuple[tuple[int, int], Link]]:
    """Yield ranges of dimension 0 of a link's region that fit into memory, and the link of each alone.

    `shape` is that of our tensor, of which an index of dimension 0 has `index_bytes`. Theirs is made from all of the
    region at once, in one part, where one of its rows needs several of ours that are far apart.
    """
    lengths = [end - begin for begin, end in region(link, shape)]
    step = independent_rows(link, lengths)
    if step is None:
        yield (0, lengths[0]), link
        return
    most = max(1, _BLOCK_BYTES // (index_bytes * step)) * step
    for first in range(0, lengths[0], most):
        last = min(first + most, lengths[0])
        yield (first, last), replace(link, shape=(last - first, *link.shape[1:]))

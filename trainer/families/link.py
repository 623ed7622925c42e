"""Links between tensors here and in a published checkpoint. Imports no torch.

A link says that their tensor is a region of ours, in another order of its elements. Export and import walk the same
links, one the opposite way of the other.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod

Range = tuple[int, int]
"""First index of a dimension, and last + 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaved:
    """Order of a dimension in which two halves alternate: theirs is a0 b0 a1 b1 ... where ours is a0 a1 ... b0 b1 ...

    The dimension consists of blocks of equal length, of which only one range has this order.
    """

    dim: int
    """Dimension of our region, -1 is the last."""
    block: int
    """Length of a block: the whole dimension, or one head."""
    within: Range
    """Range of each block in this order; the rest is the same in both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One tensor of theirs, and where it is in ours."""

    theirs: str
    """Name on disk."""
    shape: tuple[int, ...]
    """Shape of theirs."""
    ours: str
    """Name of our parameter or buffer."""
    at: tuple[Range, ...] = ()
    """Ranges of the leading dimensions of ours; the others are whole. An expert is a range of dimension 0."""
    interleaved: Interleaved | None = None
    """Order of theirs, if it differs."""
    transposed: bool = False
    """Theirs has the last two dimensions exchanged, after reordering."""
    is_float32: bool = False
    """Theirs stays in float32 whatever the dtype of the checkpoint."""

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def coverage_problems(links: Iterable[Link], ours: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield what keeps links from covering every element of ours (name -> shape), and every tensor of theirs, once."""
    regions: dict[str, list[tuple[Range, ...]]] = {name: [] for name in ours}
    seen: set[str] = set()
    for link in links:
        if link.theirs in seen:
            yield f"{link.theirs} is linked twice"
        seen.add(link.theirs)
        if link.ours not in ours:
            yield f"{link.theirs} is linked to {link.ours}, which is not in this model"
            continue
        shape = ours[link.ours]
        region = link.at + tuple((0, size) for size in shape[len(link.at) :])
        regions[link.ours].append(region)
        if prod(end - start for start, end in region) != link.num_elements:
            yield f"{link.theirs} {list(link.shape)} has another size than its region {list(region)} of {link.ours}"
    for name, found in regions.items():
        if not _is_tiled(found, ours[name]):
            yield f"{name} {list(ours[name])} is not covered once by {len(found)} tensors"


def _is_tiled(regions: list[tuple[Range, ...]], shape: tuple[int, ...]) -> bool:
    """Return whether regions fill a box of this shape without overlap, in slabs along its dimensions, first to last."""
    if not shape:
        return len(regions) == 1
    end = 0
    for (first, last), slab in groupby(sorted(regions), key=lambda region: region[0]):
        if first != end or last <= first or not _is_tiled([region[1:] for region in slab], shape[1:]):
            return False
        end = last
    return end == shape[0]

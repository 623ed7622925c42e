"""Parts of a tensor that torch's generator fills, made alone: the same values, without the tensor in memory.

What comes before a part is drawn and forgotten, a block at a time. `normal_` takes one number of the generator for each
element, and makes 16 values of 16 numbers; the last 16 elements of a tensor of another length are drawn once more.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

_UNIT = 16
_BLOCK = 1 << 16
"""Elements that are drawn at a time; a multiple of _UNIT."""
Pieces = Callable[[torch.Generator, int, int, int], Iterator[Tensor]]
"""Yields consecutive pieces of elements start .. stop - 1, given a generator, the tensor's length, start and stop."""


def normal_pieces(std: float) -> Pieces:
    """Return the pieces of a tensor that `normal_` fills."""
    return partial(_normal_pieces, std)


def uniform_pieces(bound: float) -> Pieces:
    """Return the pieces of a tensor that `uniform_` fills, from -bound to bound."""
    return partial(_uniform_pieces, bound)


def fill(part: Tensor, pieces: Pieces, seed: int, *, shape: Sequence[int], index: Sequence[slice]) -> None:
    """Overwrite part (rows, columns) of a matrix, which is at `index` of it, with the values that the whole one has.

    They are drawn on the CPU in float32, so that every device and dtype starts from the same values.
    """
    (rows, columns), width = index, shape[1]
    start, stop = rows.start * width, rows.stop * width
    flat = part.view(-1)
    for piece in pieces(torch.Generator().manual_seed(seed), shape[0] * width, start, stop):
        place = slice(start - rows.start * width, start - rows.start * width + len(piece))
        if columns.stop - columns.start == width:
            flat[place].copy_(piece)
        else:
            element = torch.arange(place.start, place.stop)
            column = element % width
            is_here = (column >= columns.start) & (column < columns.stop)
            to = element // width * (columns.stop - columns.start) + column - columns.start
            flat[to[is_here].to(flat.device)] = piece[is_here].to(flat)
        start += len(piece)
    assert start == stop


def _normal_pieces(std: float, generator: torch.Generator, length: int, start: int, stop: int) -> Iterator[Tensor]:
    if length < _UNIT:  # drawn in another way
        yield torch.empty(length).normal_(0.0, std, generator=generator)[start:stop]
        return
    in_units = length - length % _UNIT
    last = length if length == in_units else length - _UNIT  # from here on, elements are those that are drawn again
    position, end = min(start, last) // _UNIT * _UNIT, min(stop, last)
    _skip(generator, position)
    while position < end:
        size = min(_BLOCK, in_units - position, -(-(end - position) // _UNIT) * _UNIT)
        block = torch.empty(size).normal_(0.0, std, generator=generator)
        yield block[max(0, start - position) : end - position]
        position += size
    if stop > last:
        _skip(generator, length - position)
        again = torch.empty(_UNIT).normal_(0.0, std, generator=generator)
        yield again[max(0, start - last) : stop - last]


def _uniform_pieces(bound: float, generator: torch.Generator, length: int, start: int, stop: int) -> Iterator[Tensor]:
    assert stop <= length
    _skip(generator, start)
    for position in range(start, stop, _BLOCK):
        yield torch.empty(min(_BLOCK, stop - position)).uniform_(-bound, bound, generator=generator)


def _skip(generator: torch.Generator, length: int) -> None:
    """Draw a number for each of `length` elements."""
    forgotten = torch.empty(min(length, _BLOCK))
    for position in range(0, length, _BLOCK):
        forgotten[: length - position].uniform_(generator=generator)

"""Flat partitions and the rows of a checkpoint, for every position of partition boundaries."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.engine.deepspeed.partition import ParameterSpan, Partition


class Room:
    """Ranks as threads of this process that exchange tensors."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=20)
        self.sent: list[list[Tensor]] = [[] for _ in range(size)]

    def run(self, function: Callable[["Seat"], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def at(index: int) -> None:
            try:
                results[index] = function(Seat(self, index))
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=at, args=(index,)) for index in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


class Seat:
    """The part of `Group` that a partition uses."""

    def __init__(self, room: Room, index: int) -> None:
        self.room, self.index, self.size, self.device = room, index, room.size, torch.device("cpu")

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        assert sum(send) == len(x)
        self.room.sent[self.index] = list(x.split(list(send)))
        self.room.barrier.wait()
        parts = [self.room.sent[rank][self.index].clone() for rank in range(self.size)]
        self.room.barrier.wait()
        assert [len(part) for part in parts] == list(receive), "both sides must know the sizes"
        return torch.cat(parts)


def _laid_out(shapes: Sequence[tuple[int, ...]], paddings: Sequence[int]) -> tuple[list[ParameterSpan], int]:
    span, offset = [], 0
    for number, (shape, padding) in enumerate(zip(shapes, paddings, strict=True)):
        span.append(ParameterSpan(f"p{number}", shape, offset))
        offset = span[-1].end + padding
    return span, span[-1].end


def _check(shapes: Sequence[tuple[int, ...]], paddings: Sequence[int], num_ranks: int, spare: int) -> None:
    span, end = _laid_out(shapes, paddings)
    size = -(-end // num_ranks) + spare
    line = torch.full((size * num_ranks,), -1.0)
    whole = {p.name: torch.arange(p.offset, p.end, dtype=torch.float32).view(p.shape) for p in span}
    for p in span:
        line[p.offset : p.end] = whole[p.name].view(-1)

    def rank(seat: Seat) -> Any:
        partition = Partition(span, size, seat)  # type: ignore[arg-type]
        mine = line[seat.index * size : (seat.index + 1) * size].clone()
        fragments = {name: part.clone() for name, part in partition.fragments(mine).items()}
        for length in (1, 3, size + 1):  # in pieces, which may end anywhere
            pieces = partition.pieces_of({p.name for p in span}, mine.split(length))
            assert pieces.keys() == fragments.keys()
            assert all(torch.equal(torch.cat(pieces[name]), part) for name, part in fragments.items())
        rows = {name: (first, part.clone()) for name, (first, part) in partition.rows(mine).items()}
        back = torch.full_like(mine, -1.0)
        for name, (first, last) in partition.wanted().items():
            partition.fill(back, name, whole[name][first:last])
        return fragments, rows, back

    results = Room(num_ranks).run(rank)
    for name, tensor in whole.items():
        parts = [rows[name] for _, rows, _ in results]
        assert all(part.shape[1:] == tensor.shape[1:] for _, part in parts)
        at = 0
        for start, part in parts:  # in the order of the ranks, each row once
            if len(part):
                assert start == at
            at += len(part)
        assert torch.equal(torch.cat([part for _, part in parts]), tensor)
        pieces = [fragments[name] for fragments, _, _ in results if name in fragments]
        assert torch.equal(torch.cat(pieces), tensor.view(-1))
    back = torch.cat([back for _, _, back in results])
    for p in span:
        assert torch.equal(back[p.offset : p.end], line[p.offset : p.end])


@pytest.mark.parametrize(
    ("shapes", "num_ranks", "spare"),
    [
        ([(4, 5)], 1, 0),
        ([(4, 5)], 2, 0),  # a boundary between rows
        ([(4, 5)], 3, 0),  # boundaries within them
        ([(1, 2, 50)], 4, 1),  # one row over all ranks: the others own no row
        ([(2, 2, 50), (3,)], 4, 0),  # two rows over four ranks, then single elements
        ([(7,)], 3, 0),
        ([(2, 3)], 4, 8),  # ranks with padding only
        ([(3, 1), (1, 30), (5, 2)], 4, 0),
    ],
)
def test_every_row_is_on_one_rank_and_comes_back(shapes: list[tuple[int, ...]], num_ranks: int, spare: int) -> None:
    _check(shapes, [0] * len(shapes), num_ranks, spare)


_SHAPES = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5)


@settings(max_examples=200)
@given(shapes=_SHAPES, data=st.data(), num_ranks=st.integers(1, 5), spare=st.integers(0, 9))
def test_it_does_so_wherever_boundaries_fall(shapes: Any, data: st.DataObject, num_ranks: int, spare: int) -> None:
    paddings = data.draw(st.lists(st.integers(0, 4), min_size=len(shapes), max_size=len(shapes)))
    _check(shapes, paddings, num_ranks, spare)


def test_what_is_whole_here_is_not_copied() -> None:
    span, _ = _laid_out([(2, 3), (4,)], [0, 0])
    flat = torch.arange(10.0)
    rows = Partition(span, 10, Seat(Room(1), 0)).rows(flat)  # type: ignore[arg-type]
    assert rows["p1"][1].data_ptr() == flat[6:].data_ptr()

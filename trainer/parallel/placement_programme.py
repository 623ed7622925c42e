"""Place the experts of one MoE layer on ranks so that the busiest rank has the fewest rows: greedily, and exactly.

    minimise    the largest sum of loads on a rank
    subject to  each expert on one rank, and as many experts on a rank as when they are contiguous

It is the partition of numbers into parts of given sizes, which is NP-hard, but easy where it matters: with many experts
on a rank an even split exists and is soon found, and with few there are few ways. Ranks are filled one after the other,
each with the heaviest expert that is left (bin completion, Korf 2003). The work is limited by a count, never by a
clock, so that the same loads have the same placement everywhere. Imports no torch.

# E experts, G ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

_MAX_NODES = 20_000
"""Partial ranks that the exact search looks at, in each layer."""
CLOSE_ENOUGH = 1e-3
"""Gap to the bound, as a share of it, below which no better placement is sought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlacement:
    """Ranks of the experts of one layer, and how far from the best they can be."""

    owner: list[int]
    """(E,) rank of each expert."""
    busiest: int
    """Sum of loads on the busiest rank."""
    bound: int
    """No placement has a less busy rank than that; equal to `busiest` if this one is the best."""
    copies: list[list[int]] = field(default_factory=list)
    """(G, n) experts of other ranks that each rank has a copy of; empty: none."""


def solve_placement(loads: Sequence[int], room: Sequence[int], *, max_nodes: int = _MAX_NODES) -> LayerPlacement:
    """Return the best placement, or one that may be above `bound` if the search had to be given up.

    Args:
        loads: (E,) rows of each expert.
        room: (G,) number of experts on each rank; together E.
        max_nodes: partial ranks to look at.
    """
    found, bound = greedy_placement(loads, room), _lower_bound(loads, room)
    search = _Search(loads, room, max_nodes)
    while found.busiest > bound * (1 + CLOSE_ENOUGH):
        better = search.below(found.busiest)
        if better is None:
            bound = bound if search.has_given_up else found.busiest
            break
        found = better
    return LayerPlacement(owner=found.owner, busiest=found.busiest, bound=bound)


def greedy_placement(loads: Sequence[int], room: Sequence[int]) -> LayerPlacement:
    """Return the better of two starts after exchanges of two experts, as long as one makes the busiest rank less busy.

    The starts are the contiguous placement, so that the result is never above it, and the heaviest expert first, each
    to the least loaded rank that has room.
    """
    contiguous = [rank for rank, number in enumerate(room) for _ in range(number)]
    heaviest_first, busy, left = [0] * len(loads), [0] * len(room), list(room)
    for expert in sorted(range(len(loads)), key=lambda e: (-loads[e], e)):
        rank = min((r for r in range(len(room)) if left[r]), key=lambda r: (busy[r], r))
        heaviest_first[expert], busy[rank], left[rank] = rank, busy[rank] + loads[expert], left[rank] - 1
    starts = [_exchanged(loads, owner, len(room)) for owner in (contiguous, heaviest_first)]
    return min(starts, key=lambda placed: placed.busiest)


def _placed(loads: Sequence[int], owner: list[int], num_ranks: int) -> LayerPlacement:
    return LayerPlacement(owner=owner, busiest=max(rank_loads(loads, owner, num_ranks)), bound=0)


def rank_loads(loads: Sequence[int], owner: Sequence[int], num_ranks: int) -> list[int]:
    """Return (G,) the sum of loads on each rank."""
    busy = [0] * num_ranks
    for load, rank in zip(loads, owner, strict=True):
        busy[rank] += load
    return busy


def _exchanged(loads: Sequence[int], owner: list[int], num_ranks: int) -> LayerPlacement:
    """Exchange experts of the busiest rank with lighter ones of others, each time the two that lower both most."""
    busy = rank_loads(loads, owner, num_ranks)
    while True:
        top = max(range(num_ranks), key=lambda r: (busy[r], -r))
        pairs = (
            (max(busy[top] - gain, busy[owner[theirs]] + gain), ours, theirs)
            for ours in range(len(owner))
            if owner[ours] == top
            for theirs in range(len(owner))
            if owner[theirs] != top and (gain := loads[ours] - loads[theirs]) > 0
        )
        highest, ours, theirs = min(pairs, default=(busy[top], 0, 0))
        if highest >= busy[top]:
            return _placed(loads, owner, num_ranks)
        gain, other = loads[ours] - loads[theirs], owner[theirs]
        busy[top], busy[other] = busy[top] - gain, busy[other] + gain
        owner[ours], owner[theirs] = other, top


def _lower_bound(loads: Sequence[int], room: Sequence[int]) -> int:
    """Return a load that the busiest rank has at least, in every placement.

    With c the fewest experts on a rank, of the i heaviest experts, i = 1 .. G: their ranks, of which there are i at
    most, have i (c - 1) others, so one rank has the mean of all these, the others being the lightest. And one of them
    has beside it the lightest but i (c - 1) - 1, or a heavier one. (If two of the i share a rank, it has more.) And c
    of the G (c - 1) + 1 heaviest are on one rank.
    """
    heavy, num_ranks, fewest = sorted(loads, reverse=True), len(room), min(room)
    most, light = [0, *accumulate(heavy)], [0, *accumulate(reversed(heavy))]
    found = -(-most[-1] // num_ranks)
    if fewest == 0:
        return max(found, heavy[0])
    for i in range(1, num_ranks + 1):
        beside = i * (fewest - 1)
        found = max(found, -(-(most[i] + light[beside]) // i))
        if beside:
            found = max(found, heavy[i - 1] + heavy[-beside] + light[fewest - 2])
    last = num_ranks * (fewest - 1) + 1  # that many do not fit if no rank has more than c - 1 of them
    return max(found, most[last] - most[last - fewest])


class _GivenUp(Exception):
    """The search looked at as many partial ranks as it may."""


class _Search:
    """Search for a placement below a load: rank by rank, each with the heaviest expert that is left."""

    def __init__(self, loads: Sequence[int], room: Sequence[int], max_nodes: int) -> None:
        self._loads, self._room = loads, room
        self._order = sorted(range(len(loads)), key=lambda e: (-loads[e], e))
        self._nodes_left, self._limit = max_nodes, 0
        self.has_given_up = False

    def below(self, busiest: int) -> LayerPlacement | None:
        """Return a placement whose busiest rank is below `busiest`; None if there is none, or it has given up."""
        self._limit = busiest - 1
        sizes = sorted(self._room, reverse=True)
        try:
            parts = self._filled(self._order, [size for size in sizes if size])
        except _GivenUp:
            self.has_given_up = True
            return None
        if parts is None:
            return None
        owner, left = [0] * len(self._loads), list(range(len(self._room)))
        for part in parts:
            rank = next(rank for rank in left if self._room[rank] == len(part))
            left.remove(rank)
            for expert in part:
                owner[expert] = rank
        return _placed(self._loads, owner, len(self._room))

    def _filled(self, experts: list[int], sizes: list[int]) -> list[list[int]] | None:
        """Return the experts of each rank, given those that are left, heaviest first, and the sizes of ranks left."""
        if not sizes:
            return []
        total, (first, *others) = sum(self._loads[e] for e in experts), experts
        least = total - (len(sizes) - 1) * self._limit  # the ranks after this one take no more than the limit each
        mine = self._loads[first]
        for size in dict.fromkeys(sizes):
            after = list(sizes)
            after.remove(size)
            for chosen in self._chosen(others, size - 1, least - mine, self._limit - mine):
                taken = set(chosen)
                rest = self._filled([e for e in others if e not in taken], after)
                if rest is not None:
                    return [[first, *chosen], *rest]
        return None

    def _chosen(self, experts: list[int], number: int, least: int, most: int) -> Iterator[list[int]]:
        """Yield every choice of `number` of the experts, heaviest first, whose sum is `least` to `most`.

        Of experts with equal loads the first ones are taken, since others would only repeat it.
        """
        loads = [self._loads[e] for e in experts]
        sums = [0, *accumulate(loads)]

        def choose(start: int, number: int, least: int, most: int) -> Iterator[list[int]]:
            self._nodes_left -= 1
            if self._nodes_left < 0:
                raise _GivenUp
            if number == 0:
                if least <= 0 <= most:
                    yield []
                return
            end = len(loads)
            if sums[end] - sums[end - number] > most:
                return
            for at in range(start, end - number + 1):
                if sums[at + number] - sums[at] < least:
                    return
                if loads[at] > most or (at > start and loads[at] == loads[at - 1]):
                    continue
                for rest in choose(at + 1, number - 1, least - loads[at], most - loads[at]):
                    yield [experts[at], *rest]

        return choose(0, number, least, most)

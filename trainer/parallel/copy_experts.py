"""Place the experts of one MoE layer on ranks with copies of busy ones on further ranks, which share their rows.

An expert on c ranks has its load in c equal parts. Every rank has as many copies of other ranks' experts. No exact
programme, but a local search: from the contiguous placement and two by the programme, with copies where DeepSeek's EPLB
makes them, two ranks exchange experts or copies, or one copies another expert, as long as the busiest rank gets less
busy; and over and over after some drawn changes. Imports no torch.

# E experts, G ranks.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from trainer.parallel.placement_programme import CLOSE_ENOUGH, LayerPlacement

Place = Callable[[Sequence[int], Sequence[int]], LayerPlacement]
"""`solve_placement` or `greedy_placement`."""
_Edit = tuple[int, int, int, int]
"""0 for an own expert or 1 for a copy, the rank, the expert that it gives, and the one that it gets."""
_MAX_LOOKS = 20_000
"""Changes that are looked at in each layer, or `_LOOKS_FOR_EACH` for each expert and copy if those are more."""
_LOOKS_FOR_EACH = 500
_MOST_DRAWN = 6
_UNIT = 1 << 32
"""Parts of a row in which loads are counted, as whole numbers, so that every machine finds the same placement."""


def place_with_copies(loads: Sequence[int], room: Sequence[int], num_copies: int, place: Place) -> LayerPlacement:
    """Return a placement with `num_copies` copies on each rank.

    Args:
        loads: (E,) rows of each expert.
        room: (G,) number of experts on each rank, without copies; together E.
        num_copies: at most the number of experts of all other ranks, whichever the rank.
        place: what places the experts themselves.
    """
    if num_copies == 0:
        return place(loads, room)
    parts = _least_parts(loads, len(room), num_copies)
    bound = max(-(-sum(loads) * _UNIT // len(room)), *parts)
    contiguous = [rank for rank, number in enumerate(room) for _ in range(number)]
    found = [_Arrangement(loads, contiguous, copies_of_neighbours(contiguous, len(room), num_copies))]
    owners = [place(weights, room).owner for weights in (parts, loads)]
    found += [_Arrangement(loads, owner, _copies(loads, owner, len(room), num_copies)) for owner in owners]
    best = _search(found, enough=int(bound * (1 + CLOSE_ENOUGH)))
    busiest = -(-best.busiest // _UNIT)
    return LayerPlacement(owner=best.owners(), copies=best.copies, busiest=busiest, bound=-(-bound // _UNIT))


def _search(starts: "list[_Arrangement]", *, enough: int) -> "_Arrangement":
    """Return the best that changes of starts lead to, and then changes of it after some drawn ones, over and over."""
    starts.sort(key=lambda one: one.busiest)
    drawn, looks = random.Random(0), max(_MAX_LOOKS, _LOOKS_FOR_EACH * starts[0].num_places)
    for one in starts[:2]:
        looks -= one.improve(enough=enough)
    best = min(starts, key=lambda one: one.busiest)
    while best.busiest > enough and looks > 0:
        other = deepcopy(best)
        for _ in range(drawn.randint(1, _MOST_DRAWN)):
            changes = list(other.changes(*(drawn.randrange(len(other.busy)) for _ in range(2))))
            if changes:
                other.apply(*drawn.choice(changes))
        looks -= 1 + other.improve(enough=enough)
        if other.busiest <= best.busiest:
            best = other
    return best


def copies_of_neighbours(owner: Sequence[int], num_ranks: int, num_copies: int) -> list[list[int]]:
    """Return (G, num_copies) the first experts of the ranks after each: copies that need no loads."""
    own = [[expert for expert, rank in enumerate(owner) if rank == this] for this in range(num_ranks)]
    after = [[e for step in range(1, num_ranks) for e in own[(rank + step) % num_ranks]] for rank in range(num_ranks)]
    return [experts[:num_copies] for experts in after]


def _least_parts(loads: Sequence[int], num_ranks: int, num_copies: int) -> list[int]:
    """Return (E,) units of each expert on each of its ranks, with copies in turn of the one that has most there.

    No other numbers of copies have a smaller largest part.
    """
    counts = [1] * len(loads)
    for _ in range(num_ranks * num_copies):
        able = [e for e in range(len(loads)) if counts[e] < num_ranks]
        counts[max(able, key=lambda e: (loads[e] / counts[e], -e))] += 1
    return [load * _UNIT // count for load, count in zip(loads, counts, strict=True)]


def _copies(loads: Sequence[int], owner: Sequence[int], num_ranks: int, num_copies: int) -> list[list[int]]:
    """Return (G, num_copies) experts: in turn the one with the largest part, to the least busy rank without it."""
    copies: list[list[int]] = [[] for _ in range(num_ranks)]
    counts, busy = [1] * len(loads), [0.0] * num_ranks
    for expert, rank in enumerate(owner):
        busy[rank] += loads[expert]
    for _ in range(num_ranks * num_copies):
        open_ranks = [rank for rank in range(num_ranks) if len(copies[rank]) < num_copies]
        for expert in sorted(range(len(loads)), key=lambda e: (-loads[e] / counts[e], e)):
            able = [rank for rank in open_ranks if owner[expert] != rank and expert not in copies[rank]]
            if able:
                break
        else:
            raise AssertionError("a rank has copies of all experts of others")
        holders = [owner[expert], *(rank for rank in range(num_ranks) if expert in copies[rank])]
        rank = min(able, key=lambda r: (busy[r], r))
        before, now = loads[expert] / counts[expert], loads[expert] / (counts[expert] + 1)
        for holder in holders:
            busy[holder] -= before - now
        copies[rank].append(expert)
        busy[rank] += now
        counts[expert] += 1
    return copies


@dataclass(slots=True)
class _Arrangement:
    """Experts and copies on ranks, and the load of each rank."""

    loads: Sequence[int]
    owner: Sequence[int]
    """(E,) rank of each expert at the start."""
    copies: list[list[int]]
    """(G, n) experts of other ranks."""
    own: list[list[int]] = field(init=False)
    holders: list[set[int]] = field(init=False)
    """(E,) ranks that have an expert or a copy of it."""
    busy: list[int] = field(init=False)
    """(G,) units."""

    def __post_init__(self) -> None:
        """Sum up the loads."""
        self.own, self.holders = [[] for _ in self.copies], [{rank} for rank in self.owner]
        for expert, rank in enumerate(self.owner):
            self.own[rank].append(expert)
        for rank, held in enumerate(self.copies):
            for expert in held:
                self.holders[expert].add(rank)
        both = zip(self.own, self.copies, strict=True)
        self.busy = [sum(map(self._part, (*own, *held))) for own, held in both]

    def owners(self) -> list[int]:
        """Return (E,) the rank of each expert."""
        found = {expert: rank for rank, experts in enumerate(self.own) for expert in experts}
        return [found[expert] for expert in range(len(found))]

    @property
    def busiest(self) -> int:
        """Units of the busiest rank."""
        return max(self.busy)

    @property
    def num_places(self) -> int:
        """Number of experts and copies."""
        return sum(map(len, self.holders))

    def improve(self, *, enough: int) -> int:
        """Make the busiest rank less busy as long as a change does, until none has more than `enough`.

        Returns the number of changes that were looked at.
        """
        looks = 0
        while self.busiest > enough:
            top = max(range(len(self.busy)), key=lambda r: (self.busy[r], -r))
            lowest, best = self.busy[top], None
            for rank in sorted(range(len(self.busy)), key=self.busy.__getitem__):  # the first with a change is enough
                for gains, edits in self.changes(top, rank):
                    looks += 1
                    if gains.get(top, 0) < 0:
                        highest = max(self.busy[other] + gain for other, gain in gains.items())
                        if highest < lowest:
                            lowest, best = highest, (gains, edits)
                if best is not None:
                    break
            if best is None:
                break
            self.apply(*best)
        return looks

    def apply(self, gains: Mapping[int, int], edits: Sequence[_Edit]) -> None:
        """Make a change."""
        for rank, gain in gains.items():
            self.busy[rank] += gain
        for held, rank, given, got in edits:
            of = self.copies if held else self.own
            of[rank][of[rank].index(given)] = got
            self.holders[given].remove(rank)
            self.holders[got].add(rank)

    def _part(self, expert: int, more: int = 0) -> int:
        """Return an expert's units on each of its ranks, if it were on `more`."""
        return self.loads[expert] * _UNIT // (len(self.holders[expert]) + more)

    def changes(self, top: int, rank: int) -> Iterator[tuple[dict[int, int], list[_Edit]]]:
        """Yield changes of two ranks for the load of `top`, no expert twice on one: gains of ranks, edits."""
        if rank != top:
            yield from self._exchanges(top, rank)
        yield from self._other_copies(top, rank)

    def _exchanges(self, top: int, rank: int) -> Iterator[tuple[dict[int, int], list[_Edit]]]:
        for is_copy, held in enumerate((self.own, self.copies)):
            for ours in held[top]:
                if rank in self.holders[ours]:
                    continue
                for theirs in held[rank]:
                    if top not in self.holders[theirs]:
                        gain = self._part(theirs) - self._part(ours)
                        yield {top: gain, rank: -gain}, [(is_copy, top, ours, theirs), (is_copy, rank, theirs, ours)]

    def _other_copies(self, top: int, rank: int) -> Iterator[tuple[dict[int, int], list[_Edit]]]:
        """Yield what another copy on a rank does: of an expert of `top`, or of any if the rank is that one."""
        experts = range(len(self.loads)) if rank == top else (*self.own[top], *self.copies[top])
        for given in self.copies[rank]:
            part, more = self._part(given), self._part(given, -1) - self._part(given)
            for got in experts:
                if rank in self.holders[got]:
                    continue
                less = self._part(got, 1) - self._part(got)
                gains = dict.fromkeys(self.holders[got], less)
                for other in self.holders[given]:
                    gains[other] = gains.get(other, 0) + more
                gains[rank] = self._part(got, 1) - part
                yield gains, [(1, rank, given, got)]

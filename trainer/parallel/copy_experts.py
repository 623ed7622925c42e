"""Place the experts of one MoE layer on ranks with copies of busy ones on further ranks, which share their rows.

An expert on c ranks has its load in c equal parts. Every rank has as many copies of other ranks' experts. A heuristic:
who is copied as in DeepSeek's EPLB, own places by the programme, copies to the least busy ranks, then exchanges of two
of a kind as long as the busiest rank gets less busy. No torch.

# E experts, G ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from math import lcm

from trainer.parallel.placement_programme import CLOSE_ENOUGH, LayerPlacement

Place = Callable[[Sequence[int], Sequence[int]], LayerPlacement]
"""`solve_placement` or `greedy_placement`."""


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
    counts = [1] * len(loads)
    for _ in range(len(room) * num_copies):  # one rank more, in turn, for the expert with the largest part
        able = [e for e in range(len(loads)) if counts[e] < len(room)]
        counts[max(able, key=lambda e: (loads[e] / counts[e], -e))] += 1
    owner = place(_parts(loads, counts)[0], room).owner
    copies = _copies(loads, owner, len(room), num_copies)
    parts, scale = _parts(loads, [1 + sum(e in held for held in copies) for e in range(len(loads))])
    bound = -(-sum(loads) // len(room))
    busiest = max(_exchange_all(parts, owner, copies, enough=int(scale * bound * (1 + CLOSE_ENOUGH))))
    return LayerPlacement(owner=owner, copies=copies, busiest=-(-busiest // scale), bound=bound)


def _parts(loads: Sequence[int], counts: Sequence[int]) -> tuple[list[int], int]:
    """Return (E,) the load of an expert on each of its ranks in whole numbers, and how many of these are a row."""
    scale = lcm(*counts)
    return [load * scale // count for load, count in zip(loads, counts, strict=True)], scale


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


def _exchange_all(parts: Sequence[int], owner: list[int], copies: list[list[int]], *, enough: int) -> list[int]:
    """Exchange experts, or copies, of the busiest rank and of another as long as that lowers both; return (G,) loads.

    In place, until no rank has more than `enough`.
    """
    busy = [sum(parts[expert] for expert in held) for held in copies]
    own: list[list[int]] = [[] for _ in copies]
    for expert, rank in enumerate(owner):
        busy[rank] += parts[expert]
        own[rank].append(expert)
    while max(busy) > enough:
        top = max(range(len(busy)), key=lambda r: (busy[r], -r))
        lowest, best = busy[top], None
        for rank in range(len(busy)):
            for held, ours, theirs in _pairs(own, copies, top, rank):
                gain = parts[ours] - parts[theirs]
                highest = max(busy[top] - gain, busy[rank] + gain)
                if gain > 0 and highest < lowest:
                    lowest, best = highest, (held, rank, ours, theirs)
        if best is None:
            break
        held, rank, ours, theirs = best
        held[top][held[top].index(ours)], held[rank][held[rank].index(theirs)] = theirs, ours
        gain = parts[ours] - parts[theirs]
        busy[top], busy[rank] = busy[top] - gain, busy[rank] + gain
    for rank, experts in enumerate(own):
        for expert in experts:
            owner[expert] = rank
    return busy


def _pairs(
    own: list[list[int]], copies: list[list[int]], top: int, rank: int
) -> Iterator[tuple[list[list[int]], int, int]]:
    """Yield what two ranks can exchange without having an expert twice: from where, this one's and that one's."""
    if rank == top:
        return
    here, there = {*own[top], *copies[top]}, {*own[rank], *copies[rank]}
    for held in (own, copies):
        for ours in held[top]:
            if ours not in there:
                yield from ((held, ours, theirs) for theirs in held[rank] if theirs not in here)

"""Heads of attention that are in one place where several places hold them together."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Names heads of keys and values, or a part of one head that several places share with its queries.

    # 2 heads of keys, 4 queries each, in 4 places: each has a whole number of queries, and half of a head's keys
    """

    first: int
    last: int
    """Last head + 1."""
    part: int = 0
    parts: int = 1
    """Into how many parts a head is cut, if there is one; heads are whole where it is 1."""

    def range_of(self, per_head: int, *, unit: int = 1) -> tuple[int, int]:
        """Return where a dimension begins and ends that has `per_head` indices for each head; units stay whole."""
        units = per_head // unit
        begin, end = units * self.part // self.parts, units * (self.part + 1) // self.parts
        return self.first * per_head + begin * unit, (self.last - 1) * per_head + end * unit

"""Compare what all ranks must share, before a difference shows as other numbers or as a hang."""

import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.config.dump import changed_values, short
from trainer.distributed.collective_errors import barrier_gather
from trainer.distributed.collectives import Group
from trainer.distributed.rank_layout import format_ranks

_SHOWN = 8
"""Keys, ranks and hosts that a message names; more are counted."""


def differences_across_ranks(group: Group, values: Mapping[str, Any]) -> list[str]:
    """Compare plain values with those of the group's first rank; every rank must call it.

    Returns:
        A line for each key whose value is not the same everywhere, with values, ranks and hosts; the same on all ranks.
    """
    if group.size == 1:
        return []
    reports = barrier_gather(group, (socket.gethostname(), dict(values)))
    first = reports[0][1]
    others: dict[str, dict[str, list[int]]] = {}  # key: value: who has it
    olds: dict[str, str] = {}
    for index, (_, mine) in enumerate(reports):
        for key, old, new in changed_values(first, mine):
            olds[key] = short(old)
            others.setdefault(key, {}).setdefault(short(new), []).append(index)
    hosts = [host for host, _ in reports]
    lines = [
        f"{key}: {olds[key]} on {_who(group, hosts, [0])}, "
        + ", ".join(f"{value} on {_who(group, hosts, who)}" for value, who in by_value.items())
        for key, by_value in others.items()
    ]
    more = [f"and {len(lines) - _SHOWN} more keys"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more


def _who(group: Group, hosts: Sequence[str], who: Sequence[int]) -> str:
    ranks = [group.ranks[index] for index in who]
    shown = format_ranks(ranks) if len(ranks) <= _SHOWN else f"{len(ranks)} ranks from {ranks[0]} on"
    return f"{shown} ({_listed(hosts[index] for index in who)})"


def _listed(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - _SHOWN} more hosts" if len(unique) > _SHOWN else ""
    return f"host{'s' * (len(unique) > 1)} {', '.join(unique[:_SHOWN])}{more}"

"""Compare values that must be equal on all ranks, before a difference causes wrong results or a hang."""

import socket
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config.dump import changed_values, short
from trainer.distributed.collective_errors import wait_for_all
from trainer.distributed.collectives import Group
from trainer.distributed.rank_layout import format_ranks
from trainer.distributed.wire_format import from_json, to_json

_SHOWN = 8  # most keys, ranks and hosts named in a message; further ones are only counted


def differences_across_ranks(group: Group, values: Mapping[str, Any]) -> list[str]:
    """Compare JSON values with those of the group's first rank; collective.

    Return a line for each key whose value differs, with values, ranks and hosts; the same on all ranks. Equal values
    are compared by their hashes.
    """
    if group.size == 1:
        return []
    values = dict(values)
    wait_for_all(group)
    if group.agrees(values):
        return []
    first = group.broadcast_object(values)
    changes = [(key, short(old), short(new)) for key, old, new in changed_values(first, from_json(to_json(values)))]
    reports = group.all_gather_objects((socket.gethostname(), changes))
    others: dict[str, dict[str, list[int]]] = {}  # key: value: members that have it
    olds: dict[str, str] = {}
    for index, (_, mine) in enumerate(reports):
        for key, old, new in mine:
            olds[key] = old
            others.setdefault(key, {}).setdefault(new, []).append(index)
    hosts = [host for host, _ in reports]
    lines = [
        f"{key}: {olds[key]} on {_members(group, hosts, [0])}, "
        + ", ".join(f"{value} on {_members(group, hosts, members)}" for value, members in by_value.items())
        for key, by_value in others.items()
    ]
    more = [f"and {len(lines) - _SHOWN} more keys"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more


def _members(group: Group, hosts: Sequence[str], members: Sequence[int]) -> str:
    ranks = [group.ranks[index] for index in members]
    shown = format_ranks(ranks) if len(ranks) <= _SHOWN else f"{len(ranks)} ranks from {ranks[0]} on"
    names = list(dict.fromkeys(hosts[index] for index in members))
    more = f" and {len(names) - _SHOWN} more hosts" if len(names) > _SHOWN else ""
    return f"{shown} (host{'s' * (len(names) > 1)} {', '.join(names[:_SHOWN])}{more})"

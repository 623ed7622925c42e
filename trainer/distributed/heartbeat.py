"""Heartbeats that ranks send, and the diagnosis of silent ranks from them. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

_OPERATIONS_SHOWN = 3
_RANKS_SHOWN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """One rank's state, as it published it."""

    number: int
    """Grows with every beat: a rank whose number stands still is silent."""
    state: Literal["works", "waits", "gave up", "left"]
    """`waits`: in an exchange. `gave up`: its exchange failed. `left`: its run ended, at its end or by an error."""
    step: int
    phase: str
    where: str
    """File and line of this project that it was in."""
    count: int
    """Exchanges begun so far."""
    operations: Sequence[str]
    """The last of them."""
    meetings: int
    """Meetings it has come to (see `Watchdog.barrier_gather`)."""
    error: str | None = None
    """Reason why the rank left, if not at the end."""
    exit_code: int = 0
    has_said: bool = False
    """It shows its error itself."""
    home: str = ""
    """The machine on which `pid` is its process."""
    pid: int = 0

    def to_json(self) -> str:
        """Return the beat as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def place(self) -> str:
        """Say where the rank was."""
        at = f" at {self.where}" if self.where else ""
        return f"step {self.step}, {self.phase}{at}"


def silent_ranks(before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat]) -> list[int]:
    """Return the ranks that should have been heard of between two readings and were not."""
    return [
        rank for rank, beat in after.items() if beat.number == before[rank].number and beat.state in ("works", "waits")
    ]


def verdict(beats: Mapping[int, Heartbeat], silent: Sequence[int], *, silence_s: float, waited_s: float) -> str:
    """Say who is missing, where it was, and what every rank did last.

    Args:
        beats: the last word of every rank.
        silent: ranks that are not heard of any more.
        silence_s: for how long at least.
        waited_s: how long this rank had waited.
    """
    lines = [f"{_accusation(beats, silent, silence_s)}; the exchange had gone on for {waited_s:.0f} s"]
    shown = sorted(beats, key=lambda rank: (rank not in silent, beats[rank].count, rank))
    for rank in sorted(shown[:_RANKS_SHOWN]):
        beat = beats[rank]
        state = "is silent, said last that it was" if rank in silent else beat.state
        last = " ".join(beat.operations[-_OPERATIONS_SHOWN:]) or "none"
        lines.append(f"  rank {rank} {state} in {beat.place()}; last exchanges: {last}")
    if len(shown) > _RANKS_SHOWN:
        lines.append(f"  and {len(shown) - _RANKS_SHOWN} ranks that came as far or farther")
    return "\n".join(lines)


def diagnose_lost_store(address: str, lost: Sequence[int], *, silence_s: float, step: int, phase: str) -> str:
    """Say what it means that the store is silent, in which everybody's beats are.

    Args:
        address: of the store.
        lost: ranks of its machine; none if this rank is one of them, and so it is a process that is frozen.
        silence_s: for how long it has not answered.
        step: of this rank.
        phase: of this rank.
    """
    silence = f"the store of all ranks at {address} has not answered for {silence_s:.0f} s"
    if not lost:
        return f"lost at step {step} in {phase}: {silence}: the process that hosts it (torchrun, or rank 0) is frozen"
    return f"{_ranks(lost)} lost at step {step} in {phase}: {silence}, and their machine is frozen or cut off"


def _accusation(beats: Mapping[int, Heartbeat], silent: Sequence[int], silence_s: float) -> str:
    if silent:
        left = [beat for rank, beat in beats.items() if rank not in silent]
        at = max(left, key=lambda beat: beat.count) if left else beats[silent[0]]
        return (
            f"{_ranks(silent)} lost at step {at.step} in {at.phase}: not heard of for {silence_s:.0f} s or more "
            "(killed, frozen or cut off)"
        )
    gone = [rank for rank, beat in beats.items() if beat.state == "left"]
    if gone:
        return (
            f"{_ranks(gone)} at its end at step {beats[gone[0]].step} while the others go on: ranks do not do the same"
        )
    most = max(beat.count for beat in beats.values())
    late = [rank for rank, beat in beats.items() if beat.state == "works" and beat.count < most]
    if late:
        beat = beats[late[0]]
        return f"{_ranks(late)} alive, but never came to exchange #{beat.count + 1} (step {beat.step}, {beat.phase})"
    busy = [rank for rank, beat in beats.items() if beat.state == "works"]
    if busy and len(busy) < len(beats):  # FSDP's exchanges have no number
        beat = beats[busy[0]]
        return f"{_ranks(busy)} alive, but not in the exchange: at {beat.place()}"
    kinds = {rank: _kind(beat) for rank, beat in beats.items()}
    usual = max(set(kinds.values()), key=list(kinds.values()).count)
    others = [rank for rank, kind in kinds.items() if kind != usual]
    if others:
        beat = beats[others[0]]
        return (
            f"{_ranks(others)} in another exchange than the others at step {beat.step} in {beat.phase}: "
            "ranks do not do the same"
        )
    return f"no rank is missing at step {max(beat.step for beat in beats.values())}: the network between them failed"


def _kind(beat: Heartbeat) -> str:
    """Return name and group of a rank's last operation, without number and sizes."""
    return beat.operations[-1].partition(" ")[2].partition(" [")[0] if beat.operations else ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"

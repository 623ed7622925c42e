"""Heartbeat of a rank, and the diagnosis of lost ranks from the heartbeats of all. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

MAX_OPERATIONS_SHOWN = 3
_MAX_RANKS_SHOWN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Published state of one rank."""

    number: int
    """Increases with every heartbeat; a rank whose number does not change is silent."""
    state: Literal["works", "waits", "gave up", "left"]
    """`waits`: for a collective. `gave up`: its collective failed. `left`: its run has ended, with or without error."""
    step: int
    phase: str
    where: str
    count: int
    operations: Sequence[str]
    barriers: int
    error: str | None = None
    """Error that ended the rank's run; None at its regular end."""
    exit_code: int = 0
    is_reported: bool = False
    pid_namespace: str = ""
    """Host and container in which `pid` is its process."""
    pid: int = 0

    def to_json(self) -> str:
        """Return the heartbeat as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        """Parse the result of `to_json`."""
        return cls(**json.loads(text))

    def position(self) -> str:
        """Return the rank's step, phase and source line in words."""
        return f"step {self.step}, {self.phase}{f' at {self.where}' if self.where else ''}"


def silent_ranks(before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat]) -> list[int]:
    """Return the ranks that were running but sent no heartbeat between two readings."""
    return [
        rank for rank, beat in after.items() if beat.number == before[rank].number and beat.state in ("works", "waits")
    ]


def diagnose_lost_ranks(
    beats: Mapping[int, Heartbeat], silent: Sequence[int], *, silence_s: float, waited_s: float
) -> str:
    """Return a message: which rank is missing, where it was, and the last collectives of each rank.

    `beats` has the last heartbeat of every rank. The `silent` ones have sent none for at least `silence_s`; this rank
    had waited for the collective for `waited_s`.
    """
    lines = [f"{_cause(beats, silent, silence_s)}; the collective had taken {waited_s:.0f} s"]
    shown = sorted(beats, key=lambda rank: (rank not in silent, beats[rank].count, rank))
    for rank in sorted(shown[:_MAX_RANKS_SHOWN]):
        beat = beats[rank]
        state = "is silent, last seen" if rank in silent else beat.state
        last = " ".join(beat.operations[-MAX_OPERATIONS_SHOWN:]) or "none"
        lines.append(f"  rank {rank} {state} in {beat.position()}; last collectives: {last}")
    if len(shown) > _MAX_RANKS_SHOWN:
        lines.append(f"  and {len(shown) - _MAX_RANKS_SHOWN} ranks that came as far or farther")
    return "\n".join(lines)


def diagnose_lost_store(address: str, lost: Sequence[int], *, silence_s: float, step: int, phase: str) -> str:
    """Return a message about a store that has not answered for `silence_s`, so that no heartbeats can be read.

    `lost` are the ranks on its host; empty if this rank, at `step` in `phase`, is one of them, so that only the store's
    process can be frozen.
    """
    silence = f"the store of all ranks at {address} has not answered for {silence_s:.0f} s"
    if not lost:
        return f"lost at step {step} in {phase}: {silence}: the process that hosts it (torchrun, or rank 0) is frozen"
    return f"{_ranks(lost)} lost at step {step} in {phase}: {silence}, and their host is frozen or cut off"


def _cause(beats: Mapping[int, Heartbeat], silent: Sequence[int], silence_s: float) -> str:
    if silent:
        alive = [beat for rank, beat in beats.items() if rank not in silent]
        at = max(alive, key=lambda beat: beat.count) if alive else beats[silent[0]]
        where = f"{_ranks(silent)} lost at step {at.step} in {at.phase}"
        return f"{where}: no heartbeat for {silence_s:.0f} s or more (killed, frozen or cut off)"
    gone = [rank for rank, beat in beats.items() if beat.state == "left"]
    if gone:
        return f"{_ranks(gone)} at its end at step {beats[gone[0]].step} while the others continue: ranks have diverged"
    most = max(beat.count for beat in beats.values())
    late = [rank for rank, beat in beats.items() if beat.state == "works" and beat.count < most]
    if late:
        beat = beats[late[0]]
        return f"{_ranks(late)} alive, but never came to collective #{beat.count + 1} (step {beat.step}, {beat.phase})"
    busy = [rank for rank, beat in beats.items() if beat.state == "works"]
    if busy and len(busy) < len(beats):  # FSDP's collectives are not recorded
        beat = beats[busy[0]]
        return f"{_ranks(busy)} alive, but not in the collective: at {beat.position()}"
    kinds = {rank: _kind(beat) for rank, beat in beats.items()}
    usual = max(set(kinds.values()), key=list(kinds.values()).count)
    others = [rank for rank, kind in kinds.items() if kind != usual]
    if others:
        at = f"at step {beats[others[0]].step} in {beats[others[0]].phase}"
        return f"{_ranks(others)} in another collective than the others {at}: ranks have diverged"
    return f"no rank is missing at step {max(beat.step for beat in beats.values())}: the network between them failed"


def _kind(beat: Heartbeat) -> str:
    return beat.operations[-1].partition(" ")[2].partition(" [")[0] if beat.operations else ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"

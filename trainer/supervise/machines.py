"""Signs of life of the machines of a run, in files that all of them see. Imports no torch.

    runs/NAME/machines/machine-00002    what machine 2 does, written once a second

Written in place, since a network file system shows what is written into a file sooner than one that was renamed. Only
changes count, by the reader's own clock: clocks of two machines need not agree. `launch --spares` needs this; without
spares, machines do not talk to each other.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer.atomic_io import open_regular

BEAT_S = 1.0
_MAX_BYTES = 4096
_ADDRESS = re.compile(r"[0-9A-Za-z.:%_-]{0,255}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """State of one machine's `launch`."""

    number: int
    """NODE_RANK as it was started with: the node that it would be first, or a spare."""
    start: str
    """Names this start of `launch`."""
    address: str
    """At which the others reach it."""
    host: str
    round: int
    """The start of all ranks that it takes part in, or is ready for; from 1."""
    state: Literal["ready", "running", "ended"]
    code: int = 0
    """With which it has ended."""
    beat: int = 0
    """Increases with every sign of life."""

    @classmethod
    def of_json(cls, text: str | bytes) -> "Machine | None":
        """Parse a sign of life; None if it is not one, or only half of it was written yet."""
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            machine = cls(**json.loads(text))
            numbers = machine.number, machine.round, machine.code, machine.beat
            texts = machine.start, machine.address, machine.host
            if all(type(x) is int for x in numbers) and all(type(x) is str for x in texts):
                is_known = machine.state in ("ready", "running", "ended") and _ADDRESS.fullmatch(machine.address)
                return machine if is_known else None
        return None

    def is_ready_for(self, round_: int) -> bool:
        """Return whether it waits for this start of all ranks."""
        return self.state == "ready" and self.round == round_

    def has_left(self, round_: int) -> bool:
        """Return whether it takes part in this start no more: it failed, and waits for the next one or has given up."""
        return self.round > round_ or (self.round == round_ and self.state == "ended" and self.code != 0)


@dataclass(frozen=True, slots=True)
class Seen:
    """What was last seen of another machine."""

    machine: Machine
    silent_s: float
    """Since it changed, or since the first look at it."""
    has_changed: bool
    """Since the first look: it is not left over from an earlier run."""


class Machines:
    """Writes the sign of life of this machine, and watches those of others, in a thread of its own."""

    def __init__(self, folder: Path, *, number: int, address: str, round_: int) -> None:
        """Prepare; nothing is written before `open`."""
        self.folder = folder
        self.own = Machine(
            number=number,
            start=uuid.uuid4().hex,
            address=address,
            host=f"{socket.gethostname()} process {os.getpid()}",
            round=round_,
            state="ready",
        )
        self.watched: Collection[int] = ()
        """Numbers of the machines to look at."""
        self._seen: dict[int, tuple[Machine | None, float, bool]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="machines", daemon=True)

    def twin(self, seconds: float) -> Machine | None:
        """Return another `launch` that runs with this machine's number, if it shows itself within some seconds."""
        first, end = self.read(self.own.number), time.monotonic() + seconds
        while first is not None and first.state != "ended" and time.monotonic() < end:
            time.sleep(BEAT_S / 10)
            now = self.read(self.own.number)
            if now is not None and now != first:
                return now
        return None

    def open(self) -> None:
        """Begin to send signs of life."""
        self._write()
        self._thread.start()

    def say(self, state: Literal["ready", "running", "ended"], *, round_: int, code: int = 0) -> None:
        """Say at once what this machine does from now on."""
        with self._lock:
            self.own = replace(self.own, state=state, round=round_, code=code)
        self._write()

    def close(self) -> None:
        """Send no more signs of life."""
        self._ended.set()
        self._thread.join(2 * BEAT_S)  # not for ever: the file system may hang

    def seen(self) -> dict[int, Seen]:
        """Return what was last seen of the machines that are watched, this one included, and left a file."""
        now = time.monotonic()
        others = {n: Seen(m, now - since, changed) for n, (m, since, changed) in self._seen.copy().items() if m}
        return others | {self.own.number: Seen(self.own, 0.0, True)}

    def silent_s(self, number: int) -> float:
        """Return for how long a machine that is watched has given no sign of life, file or no file."""
        if number == self.own.number:
            return 0.0
        return time.monotonic() - self._seen[number][1] if number in self._seen else 0.0

    def read(self, number: int) -> Machine | None:
        """Read a machine's file; None without one."""
        with contextlib.suppress(OSError), os.fdopen(open_regular(self._path(number), os.O_RDONLY), "rb") as file:
            return Machine.of_json(file.read(_MAX_BYTES))
        return None

    def _path(self, number: int) -> Path:
        return self.folder / f"machine-{number:05d}"

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._write()
            self.look()

    def look(self) -> None:
        """Look at the machines that are watched."""
        for number in self.watched:
            if number != self.own.number:
                self._look(number)

    def _look(self, number: int) -> None:
        now, last = time.monotonic(), self._seen.get(number)
        machine = self.read(number)
        if last is None:
            self._seen[number] = (machine, now, False)
        elif machine is not None and machine != last[0]:
            self._seen[number] = (machine, now, True)

    def _write(self) -> None:
        """Write the sign of life; a full or slow disk makes this machine seem lost, which costs it its node at most."""
        with self._lock:
            self.own = replace(self.own, beat=self.own.beat + 1)
            content: dict[str, Any] = asdict(self.own)
            with contextlib.suppress(OSError):
                descriptor = open_regular(self._path(self.own.number), os.O_WRONLY | os.O_CREAT)
                try:
                    text = json.dumps(content).encode()
                    os.pwrite(descriptor, text.ljust(512), 0)
                    os.ftruncate(descriptor, max(512, len(text)))
                finally:
                    os.close(descriptor)

"""Which machine has which node in each start of all ranks, so that a spare takes the place of a lost one.

    runs/NAME/machines/round-00000004    machines of the nodes in the fourth start, in order; address of the first

A round file is made once, by whichever machine sees first that all nodes have a machine that is ready; what it says
holds for all. It is made by a hard link, which one of several makers gets. Nothing listens, so that the first machine
may be lost like any other, and nothing is decided while ranks run: a machine that only seems lost loses its node at
most, and waits as a spare. Imports no torch.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trainer.atomic_io import open_regular
from trainer.distributed.interface import address_towards
from trainer.distributed.rank_layout import format_ranks
from trainer.errors import CommError, ConfigError, ResourceError, TurnoutError
from trainer.supervise.launch import Launch
from trainer.supervise.machines import Machine, Machines
from trainer.supervise.stop_signals import StopSignals
from trainer.terminal import print_error

_POLL_S = 0.2
_LOST_S, _START_S = 6.0, 60.0
"""Silence after which a machine is lost: at most, and before its first sign of life, since machines start apart."""
_MEET_S = 600.0  # as long as torchrun waits for the other nodes
_TWIN_S = 3.0
_MAX_BYTES = 1 << 20
_NAME = re.compile(r"round-(\d{8})", re.ASCII)
_NUM_DECIDING = 2  # machines with the first nodes, beside spares: others only ask for the next round


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Who has the nodes in one start of all ranks."""

    number: int
    machines: Sequence[int]
    """Of node 0, 1, ..."""
    address: str
    """Of the first node's machine."""


class RunIsOver(Exception):
    """A machine with a node has ended, so that this one has nothing to wait for."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(f"machine {machine.number} ({machine.host}) has ended with {machine.code}")
        self.code = machine.code


def assign_nodes(last: Sequence[int], *, ready: Collection[int], lost: Collection[int]) -> list[int] | None:
    """Return the machines of the next start: who had a node keeps it, spares take those of lost machines.

    None as long as a machine is neither ready nor lost, or there are too few spares.
    """
    spares, machines = sorted(set(ready) - set(last)), list[int]()
    for machine in last:
        if machine in lost and spares:
            machines.append(spares.pop(0))
        elif machine in ready:
            machines.append(machine)
        else:
            return None
    return machines


class Seats:
    """This machine's part in the rounds of a run: `take` a node for the next one, `leave` at the end."""

    def __init__(self, folder: Path, launch: Launch, *, lost_s: float) -> None:
        """Read the rounds so far.

        Args:
            folder: of the signs of life and rounds, which all machines see.
            launch: as this machine was started; its node_rank is the machine's number.
            lost_s: silence after which a machine is lost.
        """
        self.launch, self._folder, self._lost_s = launch, folder, min(lost_s, _LOST_S)
        self._make_folder()
        self._round = self._newest()
        address = address_towards(launch.master_addr, os.environ) if launch.node_rank else launch.master_addr
        next_round = self._round.number + 1
        self._machines = Machines(folder, number=launch.node_rank, address=address, round_=next_round)
        self._has_begun = False

    def open(self) -> None:
        """Begin to send signs of life; a spare imports what the ranks will, first.

        Raises:
            ConfigError: if another `launch` has the same number.
        """
        twin = self._machines.twin(_TWIN_S)
        if twin is not None:
            raise ConfigError(
                f"NODE_RANK={twin.number}: {twin.host} is this run's machine of that number; give every machine one of "
                "its own, nodes first and then spares, or end that one"
            )
        self._watch()
        self._machines.look()  # before the import: who has ended by its end has then changed
        if self.launch.is_spare:
            _import_torch()
            print_error(f"machine {self.launch.node_rank} is a spare: it has imported torch, and waits")
        self._machines.open()

    def take(self, requests: StopSignals) -> Launch | None:
        """Wait for a node in the next start of all ranks; None if a stop is requested.

        Raises:
            RunIsOver: if the run has ended on another machine.
            CommError: if too few machines are ready for too long, or, for a spare, no machine with a node is there.
        """
        self._make_folder()  # a run folder that was removed is made anew by the ranks
        number, end = self.launch.node_rank, time.monotonic() + _MEET_S
        self._machines.say("ready", round_=self._round.number + 1)
        said = False
        while not requests.count:
            newest = self._newest()
            if newest.number > self._round.number:
                if number in newest.machines:
                    return self._begin(newest)
                if number in self._round.machines and self._has_begun:
                    print_error(f"machine {number} was silent, and another one has its node: it waits as a spare")
                self._round, said = newest, False
                self._watch()
                self._machines.say("ready", round_=newest.number + 1)
            self._check_is_on()
            self._decide()
            seated = set(self._round.machines)
            missing = self._lost() & seated
            if number not in seated and missing != seated:
                end = time.monotonic() + _MEET_S
            if missing and not said:
                said = True
                print_error(
                    f"{_named(missing)} lost: no sign of life for {self._lost_s:g} s; waiting for a machine instead"
                )
            if time.monotonic() > end:
                raise CommError(f"{_named(missing or self._round.machines)} not ready after {_MEET_S:g} s")
            requests.sleep(_POLL_S)
        return None

    def lost_since(self) -> str | None:
        """Return who has left the start that this machine takes part in, as far as it can see; None if nobody has.

        For the time before ranks run and watch each other: torchrun would wait ten minutes.
        """
        lost, seen = self._lost(), self._machines.seen()
        for number in self._round.machines:
            left = number in seen and seen[number].has_changed and seen[number].machine.has_left(self._round.number)
            if number in lost or left:
                return f"machine {number} {'is lost' if number in lost else 'has failed'}"
        return None

    def leave(self, code: int) -> None:
        """Say to the others that this machine has ended."""
        self._machines.say("ended", round_=self._round.number, code=code)
        self._machines.close()

    def _begin(self, newest: Round) -> Launch:
        """Return the launch of this machine's node."""
        before, number = self._round.machines, self.launch.node_rank
        for node, (old, new) in enumerate(zip(before, newest.machines, strict=True)):
            if old != new:
                print_error(f"machine {new} takes node {node} in place of machine {old}")
        self._round, self._has_begun = newest, True
        self._watch()
        self._machines.say("running", round_=newest.number)
        return replace(self.launch, node_rank=newest.machines.index(number), master_addr=newest.address)

    def _watch(self) -> None:
        """Look at all machines if this one decides; else at those that do."""
        seated, number = self._round.machines, self.launch.node_rank
        decides = number in seated[:_NUM_DECIDING] or number not in seated
        self._machines.watched = range(self.launch.num_machines) if decides else seated[:_NUM_DECIDING]

    def _check_is_on(self) -> None:
        for machine in (seen.machine for seen in self._machines.seen().values() if seen.has_changed):
            is_of_round = machine.number in self._round.machines and machine.round == self._round.number
            if machine.state == "ended" and is_of_round and machine.number != self.launch.node_rank:
                raise RunIsOver(machine)

    def _lost(self) -> set[int]:
        seen = self._machines.seen()

        def limit_s(number: int) -> float:
            return self._lost_s if number in seen and seen[number].has_changed else max(self._lost_s, _START_S)

        return {n for n in self._machines.watched if self._machines.silent_s(n) > limit_s(n)}

    def _decide(self) -> None:
        """Make the next round if all its nodes have a machine, and no other machine has made it."""
        number, seen, lost = self._round.number + 1, self._machines.seen(), self._lost()
        if len(self._machines.watched) < self.launch.num_machines:
            return
        ready = {n for n, one in seen.items() if one.has_changed and one.machine.is_ready_for(number)} - lost
        machines = assign_nodes(self._round.machines, ready=ready, lost=lost)
        if machines is not None:
            address = seen[machines[0]].machine.address
            self._make(Round(number=number, machines=machines, address=address))

    def _make(self, round_: Round) -> None:
        made = self._folder / f".round-{self.launch.node_rank:05d}"
        try:
            made.unlink(missing_ok=True)
            made.write_text(json.dumps(asdict(round_)))
            with contextlib.suppress(FileExistsError):
                os.link(made, self._path(round_.number))
            made.unlink(missing_ok=True)
            self._path(round_.number - 2).unlink(missing_ok=True)
        except OSError as error:
            raise ResourceError(f"{self._folder}: the next start cannot be written: {error.strerror}") from None

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{self._folder}: cannot be made: {error.strerror}") from None

    def _newest(self) -> Round:
        """Return the newest round; a round 0 with the machines as they were started if there is none of this size."""
        names = list[str]()
        with contextlib.suppress(OSError):
            names = [path.name for path in self._folder.iterdir()]  # so that a network file system looks again
        number = max((int(found[1]) for name in names if (found := _NAME.fullmatch(name))), default=0)
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            with os.fdopen(open_regular(self._path(number), os.O_RDONLY), "rb") as file:
                content = json.loads(file.read(_MAX_BYTES))
            machines, address = [int(machine) for machine in content["machines"]], str(content["address"])
            is_of_size = len(machines) == len(set(machines)) == self.launch.nnodes
            if is_of_size and set(machines) <= set(range(self.launch.num_machines)):
                return Round(number=number, machines=machines, address=address)
        return Round(number=number, machines=range(self.launch.nnodes), address="")

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number:08d}"


def _import_torch() -> None:
    """Import all that a rank does, in another process: later it is in this machine's memory, and known to work."""
    done = subprocess.run([sys.executable, "-m", "trainer.training.main"], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise TurnoutError(f"this machine cannot be a spare: importing torch ended with {done.returncode}: {last}")


def _named(machines: Collection[int]) -> str:
    return format_ranks(sorted(machines)).replace("rank", "machine") + (" is" if len(machines) == 1 else " are")

"""Teams of processes that are timed in turn: each team is one or several ranks, and waits while another works."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.interface import use_loopback
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Layout
from trainer.distributed.runtime import keep_freed_memory
from trainer.errors import ResourceError, first_line
from trainer.lab.costs.interleaved import Entry, LocalRunner

Builder = Callable[..., Mapping[str, Entry]]
"""A module-level function: mesh and device, then its own arguments, to the entries of one rank by name."""
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ("trainer.lab.costs.bench_scaling", "torch._dynamo", "transformers.models.mixtral.modeling_mixtral")
"""Imported once, by the server process that all ranks are forked from, if they are installed. It computes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamPlan:
    """Processes of a team and what they build."""

    build: Builder
    arguments: tuple[Any, ...] = ()
    num_ranks: int = 1
    threads: int
    """Of each rank."""
    ep_size: int = 1
    ranks_per_node: int = 1
    device: str = "cpu"


class Team:
    """Running processes of a plan."""

    def __init__(self, pipes: list[Connection], names: list[str]) -> None:
        self._pipes, self.names = pipes, names

    def ask(self, *request: Any) -> list[Any]:
        """Send a request to every rank; return their answers.

        Raises:
            ResourceError: if a rank is lost.
            RuntimeError: the first error of a rank.
        """
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(request)
        return _answers(self._pipes)

    def runner(self, name: str) -> "TeamRunner":
        """Return the runner of one entry."""
        return TeamRunner(self, name)


@dataclass(frozen=True, slots=True)
class TeamRunner:
    """Runs one entry on all ranks of a team."""

    team: Team
    name: str

    def seconds(self, turn: int) -> float:
        """Run the entry once; return the time of the slowest rank."""
        return max(self.team.ask("seconds", self.name, turn))

    def facts(self) -> dict[str, Any]:
        """Return the facts of the first rank, and the mean over ranks of numbers."""
        of_ranks = self.team.ask("facts", self.name)
        return {
            key: sum(facts[key] for facts in of_ranks) / len(of_ranks) if isinstance(value, int | float) else value
            for key, value in of_ranks[0].items()
        }


@contextmanager
def started(plans: Mapping[str, TeamPlan]) -> Iterator[dict[str, Team | str]]:
    """Start the teams of all plans, one after the other, and yield them; for one that fails, the line of its error.

    All processes end with the context.
    """
    _CONTEXT.set_forkserver_preload([*_PRELOAD])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        teams: dict[str, Team | str] = {}
        for number, (name, plan) in enumerate(plans.items()):
            pipes = []
            for rank in range(plan.num_ranks):
                here, there = _CONTEXT.Pipe()
                process = _CONTEXT.Process(
                    target=_work, args=(there, plan, rank, str(folder / str(number))), daemon=True
                )
                process.start()
                there.close()
                stack.callback(_end, process, here)
                pipes.append(here)
            try:
                teams[name] = Team(pipes, _answers(pipes)[0])
            except RuntimeError as error:
                teams[name] = first_line(error)
        yield teams


def _end(process: Any, pipe: Connection) -> None:
    with suppress(OSError):
        pipe.send(None)
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()


def _answers(pipes: list[Connection]) -> list[Any]:
    answers = []
    for rank, pipe in enumerate(pipes):
        try:
            is_well, answer = pipe.recv()
        except (EOFError, OSError):
            raise ResourceError(f"rank {rank} of a benchmark ended; it may have been out of memory") from None
        if not is_well:
            raise RuntimeError(answer)
        answers.append(answer)
    return answers


def _work(pipe: Connection, plan: TeamPlan, rank: int, store: str) -> None:
    """Run one rank: build the entries, then answer requests."""
    os.environ["OMP_NUM_THREADS"] = str(plan.threads)  # for libraries that are loaded later
    torch.set_num_threads(plan.threads)
    keep_freed_memory()
    try:
        mesh = _join(plan, rank, store)
        device = torch.device(plan.device)
        entries = plan.build(mesh, device, *plan.arguments)
        pipe.send((True, list(entries)))
        while (request := pipe.recv()) is not None:
            what, name, *rest = request
            runner = LocalRunner(entries[name], device)
            if plan.num_ranks > 1:
                runner = _TogetherRunner(entries[name])
            pipe.send((True, runner.seconds(*rest) if what == "seconds" else runner.facts()))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException as error:
        reason = f"{type(error).__name__}: {first_line(error)}" if str(error) else traceback.format_exc()
        with suppress(OSError):
            pipe.send((False, reason))


@dataclass(frozen=True, slots=True)
class _TogetherRunner:
    """Runs an entry on several ranks that start together."""

    entry: Entry

    def seconds(self, turn: int) -> float:
        self.entry.prepare(turn)
        dist.barrier()
        start = time.perf_counter()
        self.entry.run()
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        return self.entry.facts()


def _join(plan: TeamPlan, rank: int, store: str) -> Mesh:
    if plan.num_ranks == 1:
        return Mesh.of_one()
    # DeepSpeed reads these.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(plan.num_ranks)}
    use_loopback()
    dist.init_process_group("gloo", store=dist.FileStore(store, plan.num_ranks), rank=rank, world_size=plan.num_ranks)
    layout = Layout(world_size=plan.num_ranks, rank=rank, ep_size=plan.ep_size, ranks_per_node=plan.ranks_per_node)
    return build_mesh(layout, FlightRecorder())

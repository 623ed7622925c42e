"""This rank's groups: all ranks, those that share its experts, those that hold the same experts."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from trainer.distributed.collectives import Group, backend_reason, is_collective_error
from trainer.distributed.consistency import differences_across_ranks
from trainer.distributed.deadline import exit_after
from trainer.distributed.device_clock import clock_of
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.interface import interface_towards, is_loopback, use_loopback
from trainer.distributed.rank_layout import Layout, local_world_size
from trainer.distributed.store import connect_store
from trainer.distributed.watchdog import Watchdog
from trainer.errors import CommError, ConfigError, first_line
from trainer.step_timer import StepTimer

_START_S = 300.0
"""Processes import and start for different times: nobody is given up earlier."""
_LATE_S = 10.0
_NCCL_MARGIN_S = 15.0
_SAVING = timedelta(hours=6)
"""Files may take long; a rank that is lost is noticed elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Process groups of this rank."""

    layout: Layout
    world: Group
    """All ranks: they have different tokens and the same dense weights."""
    ep: Group
    """Ranks with different experts, which send each other tokens."""
    ep_inside: Group
    """Ranks of `ep` on this rank's node."""
    ep_between: Group
    """Ranks of `ep` with this rank's place on the other nodes."""
    edp: Group
    """Ranks with the same experts."""
    saving: Group
    """All ranks once more, for a thread of its own: what is written in the background is agreed on there."""

    @classmethod
    def of_one(cls, recorder: FlightRecorder | None = None) -> "Mesh":
        """Return the mesh of a single process."""
        one = Group.of_one(recorder)
        return cls(layout=Layout(), world=one, ep=one, ep_inside=one, ep_between=one, edp=one, saving=one)


@contextmanager
def joined(layout: Layout, device: torch.device, *, timeout_s: float) -> Iterator[Mesh]:
    """Join the other ranks that torchrun started, and leave them at the end; alone, there is nobody to join.

    Args:
        layout: this rank's place.
        device: CPU ranks talk by gloo, GPUs by NCCL.
        timeout_s: how long one exchange may take before a rank counts as lost.
    """
    recorder, on_gpu = FlightRecorder(step_timer=StepTimer(clock_of(device))), device.type != "cpu"
    if layout.world_size == 1:
        yield Mesh.of_one(recorder)
        return
    _choose_interface(layout)
    try:
        watch, store = _meet(layout, recorder, timeout_s=timeout_s, on_gpu=on_gpu)
    except RuntimeError as error:
        raise _cannot_join(layout, error) from error
    try:
        # NCCL's own watchdog kills the process at its timeout, without a word on who is missing: the watch goes first.
        timeout = timedelta(seconds=timeout_s + (_NCCL_MARGIN_S if on_gpu else 0))
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=layout.rank,
                world_size=layout.world_size,
                timeout=timeout,
            )
            mesh = build_mesh(layout, recorder, watch)
        except RuntimeError as error:  # of the network, or because a rank has left meanwhile, which the watch knows
            raise _cannot_join(layout, error) from error
        yield mesh
    except CommError as error:
        raise watch.explain(error) from error
    except BaseException as error:
        if is_collective_error(error):
            where = f"rank {layout.rank}: an exchange of torch's or DeepSpeed's own failed at step {recorder.step}"
            raise watch.explain(CommError(f"{where}: {backend_reason(error)}")) from error
        watch.leave(error)
        raise
    watch.leave()
    dist.destroy_process_group()


def _meet(layout: Layout, recorder: FlightRecorder, *, timeout_s: float, on_gpu: bool) -> tuple[Watchdog, dist.Store]:
    """Find the other ranks, and begin to watch over each other; return the store that they meet in as well."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:  # the store would try again and again
        raise RuntimeError(f"MASTER_ADDR: {error.strerror}") from error
    start_s = max(timeout_s, _START_S)
    silent = CommError(f"the store there has not answered for {start_s:.0f} s")
    # The store's clients know timeouts for some of what they do.
    with exit_after(start_s + _LATE_S, str(_cannot_join(layout, silent)), CommError.exit_code):
        try:
            store = connect_store(address, int(port), rank=layout.rank, world_size=layout.world_size, timeout_s=start_s)
        except OSError as error:  # another process listens there
            raise RuntimeError(str(error)) from error
        # Under torchrun the store outlives the ranks: without a name of its own, a restarted attempt reads the
        # addresses of the dead ones (pytorch #135712).
        attempt = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        first = range(layout.ranks_per_node)
        watch = Watchdog(
            attempt,
            rank=layout.rank,
            world_size=layout.world_size,
            recorder=recorder,
            timeout_s=timeout_s,
            on_gpu=on_gpu,
            store_address=f"{address}:{port}",
            beside_store=() if layout.rank in first else first,
        )
    watch.start(wait_s=start_s)
    return watch, attempt


def _cannot_join(layout: Layout, error: Exception) -> CommError:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return CommError(
        f"rank {layout.rank}: cannot join the other {layout.world_size - 1} ranks through {address}:{port}: "
        f"{first_line(error)}; check that every node was started, with the same MASTER_ADDR and "
        "MASTER_PORT, and that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, if set, names the interface between them"
    )


def _choose_interface(layout: Layout) -> None:
    """Tell gloo the interface that the other ranks are behind, unless the user has."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    if local_world_size() == layout.world_size or is_loopback(master):
        use_loopback()
        return
    if layout.ranks_per_node == layout.world_size or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = interface_towards(master)
    if name not in (None, "lo"):  # the first node may know itself by a loopback address only
        os.environ["GLOO_SOCKET_IFNAME"] = name


def build_mesh(layout: Layout, recorder: FlightRecorder, watch: Watchdog | None = None) -> Mesh:
    """Make this rank's groups; with more than one rank, torch's default process group must exist.

    Raises:
        ConfigError: if the ranks would make different groups.
    """
    if layout.world_size == 1:
        return Mesh.of_one()
    everyone = list(range(layout.world_size))
    handles: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(everyone): dist.group.WORLD}

    def group(name: str, members: list[list[int]]) -> Group:
        """Make all groups of a kind, as every rank must, and return the one that this rank is in."""
        for ranks in members:
            if tuple(ranks) not in handles:  # kinds that are the same ranks are the same group
                handles[tuple(ranks)] = cast(dist.ProcessGroup, dist.new_group(ranks)) if len(ranks) > 1 else None
        mine = next(ranks for ranks in members if layout.rank in ranks)
        return Group(name, mine, me=layout.rank, handle=handles[tuple(mine)], recorder=recorder, watch=watch)

    # With a journal of its own: the run's begins with what the run exchanges.
    starting = Group("start", everyone, me=layout.rank, handle=dist.group.WORLD, recorder=FlightRecorder(), watch=watch)
    different = differences_across_ranks(starting, {"parallel": {"ep_size": layout.ep_size}})
    if different:  # now, since ranks that make different groups wait for each other
        raise ConfigError(f"{different[0]}; all ranks need the same config")
    # On the CPU whatever the ranks compute on, with its own journal: another thread uses it.
    saving = cast(dist.ProcessGroup, dist.new_group(everyone, backend="gloo", timeout=_SAVING))
    return Mesh(
        layout=layout,
        saving=Group("saving", everyone, me=layout.rank, handle=saving, recorder=FlightRecorder()),
        world=group("world", [everyone]),
        ep=group("ep", layout.ep_ranks()),
        ep_inside=group("ep inside a node", layout.ep_inside_ranks()),
        ep_between=group("ep between nodes", layout.ep_between_ranks()),
        edp=group("edp", layout.edp_ranks()),
    )

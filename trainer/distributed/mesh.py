"""Process groups of this rank: all ranks, those with its experts' other shards, those with the same experts.

Likewise with attention and dense feed-forward: those with the other cuts of its matrices (tp), and the same cut (tdp).
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from trainer.distributed.backend_errors import backend_reason, is_collective_error
from trainer.distributed.collectives import Group
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

_MIN_START_S = 300.0  # at least, for the rendezvous: import and start-up times differ between ranks
_RENDEZVOUS_GRACE_S = 10.0
_NCCL_MARGIN_S = 15.0
_MAX_MESHED = 64  # ranks, beyond which gloo does not connect every two of them
_SAVING_TIMEOUT = timedelta(hours=6)  # writing files may take long; the watchdog detects lost ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Process groups of this rank."""

    layout: Layout
    world: Group
    """All ranks."""
    stage: Group
    """Ranks with the same layers, which see all tokens together and have the same dense weights; `world` without a
    pipeline."""
    pp: Group
    """Ranks that hold one copy of the layers together, in the order of these, for the same tokens."""
    tied: Group
    """The ranks of `pp` with the first and the last layer, on these, for an embedding that is also the head."""
    ep: Group
    """Ranks that shard one copy of the experts and send each other tokens."""
    ep_inside: Group
    """Ranks of `ep` on this node."""
    ep_between: Group
    """Ranks of `ep` with this local rank, one per node."""
    edp: Group
    """Ranks with the same experts."""
    rows: Group
    """Ranks with the same rows, each with other columns of them."""
    cp: Group
    """Ranks of `rows` that attend together, with the same heads."""
    tp: Group
    """Ranks of `rows` that hold one copy of attention and dense feed-forward together, each a cut of their matrices."""
    tdp: Group
    """Ranks with the same cut."""
    host: Group
    """All ranks, for small values that are on the host: gloo, so that nothing waits for a GPU; `world` on CPUs."""
    shard: Group
    """Ranks that together hold one copy of the dense weights, if these are sharded."""
    shard_copies: Group
    """Ranks with the same shard of the dense weights."""
    edp_shard: Group
    """Ranks of `edp` that together hold one copy of these experts, if they are sharded."""
    edp_shard_copies: Group
    """Ranks of `edp` with the same shard of these experts."""
    tdp_shard: Group
    """Ranks of `tdp` that together hold one copy of this cut, if it is sharded."""
    tdp_shard_copies: Group
    """Ranks of `tdp` with the same shard of this cut."""
    saving: Group
    """All ranks again, as a separate gloo group for the thread that saves in the background."""

    @classmethod
    def of_one(cls, recorder: FlightRecorder | None = None) -> "Mesh":
        """Return the mesh of a single process."""
        one = Group.of_one(recorder)
        kinds = [field.name for field in fields(cls) if field.name != "layout"]
        return cls(layout=Layout(), **dict.fromkeys(kinds, one))


@contextmanager
def joined(layout: Layout, device: torch.device, *, timeout_s: float) -> Iterator[Mesh]:
    """Connect to the other ranks and yield this rank's groups; leave the groups at the end.

    `device` selects gloo for CPUs and NCCL for GPUs. `timeout_s` is the longest time for one collective before a rank
    counts as lost.
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
        # NCCL's own watchdog kills the process at its timeout without naming the lost rank, so ours must be earlier.
        timeout = timedelta(seconds=timeout_s + (_NCCL_MARGIN_S if on_gpu else 0))
        try:
            start_groups(layout, store, device, timeout)
            mesh = build_mesh(layout, recorder, watch, timeout=timeout)
        except RuntimeError as error:  # from the network, or since a rank has left meanwhile
            raise _cannot_join(layout, error) from error
        yield mesh
    except CommError as error:
        raise watch.explain(error) from error
    except BaseException as error:
        if is_collective_error(error):
            where = f"rank {layout.rank}: a collective of torch or DeepSpeed failed at step {recorder.step}"
            raise watch.explain(CommError(f"{where}: {backend_reason(error)}")) from error
        watch.leave(error)
        if (shown := watch.as_shown(error)) is not error:
            raise shown from error
        raise
    watch.leave()
    dist.destroy_process_group()


def _meet(layout: Layout, recorder: FlightRecorder, *, timeout_s: float, on_gpu: bool) -> tuple[Watchdog, dist.Store]:
    """Connect to the store of all ranks and start the watchdog; return both."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:  # the store's client would retry until its timeout
        raise RuntimeError(f"MASTER_ADDR: {error.strerror}") from error
    start_s = max(timeout_s, _MIN_START_S)
    silent = CommError(f"the store there has not answered for {start_s:.0f} s")
    # The store's timeout does not cover all of its client's requests.
    with exit_after(start_s + _RENDEZVOUS_GRACE_S, str(_cannot_join(layout, silent)), CommError.exit_code):
        try:
            store = connect_store(address, int(port), rank=layout.rank, world_size=layout.world_size, timeout_s=start_s)
        except OSError as error:  # another process listens there
            raise RuntimeError(str(error)) from error
        # Under torchrun the store outlives the ranks: without a prefix, a restarted attempt would read the addresses of
        # dead ranks (pytorch #135712).
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
            store_node_ranks=() if layout.rank in first else first,
            ranks_per_node=layout.ranks_per_node,
        )
    watch.start(wait_s=start_s)
    return watch, attempt


def start_groups(layout: Layout, store: dist.Store, device: torch.device, timeout: timedelta) -> None:
    """Create torch's default group: over gloo on CPUs, over NCCL on GPUs.

    NCCL is not told the device, which the process has set: with it, each group of a mesh is split from all ranks at
    once, used or not; without, a group connects at its first collective, and its members only. Its kernels go before
    those that compute, unless the user has said otherwise: other ranks wait for them. Gloo, which connects every two
    ranks by default, is told to do so at their first message where that would be too many connections.
    """
    is_cpu = device.type == "cpu"
    if layout.world_size > _MAX_MESHED:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if not is_cpu:
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    dist.init_process_group(
        "gloo" if is_cpu else "nccl",
        store=store,
        rank=layout.rank,
        world_size=layout.world_size,
        timeout=timeout,
    )


def _cannot_join(layout: Layout, error: Exception) -> CommError:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return CommError(
        f"rank {layout.rank}: cannot join the other {layout.world_size - 1} ranks through {address}:{port}: "
        f"{first_line(error)}; check that every node was started, with the same MASTER_ADDR and "
        "MASTER_PORT, and that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, if set, names the interface between them"
    )


def _choose_interface(layout: Layout) -> None:
    """Select the network interface that gloo uses to reach the other ranks, unless the user has set it."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    if local_world_size() == layout.world_size or is_loopback(master):
        use_loopback()
        return
    if layout.ranks_per_node == layout.world_size or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = interface_towards(master)
    if name not in (None, "lo"):  # the first node may resolve its own name to loopback
        os.environ["GLOO_SOCKET_IFNAME"] = name


def build_mesh(
    layout: Layout, recorder: FlightRecorder, watch: Watchdog | None = None, *, timeout: timedelta | None = None
) -> Mesh:
    """Create this rank's groups from torch's default one; a ConfigError if ranks would create different ones.

    A group meets its members alone, so a rank's work does not grow with the groups of other ranks. Torch names a group
    by its ranks and the number of groups that a member has already: all ranks create the kinds in one order, and have a
    group of a kind either all or none, as all groups of a kind have one size. `timeout` is that of the default group.
    """
    if layout.world_size == 1:
        return Mesh.of_one(recorder)
    everyone = list(range(layout.world_size))
    handles: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(everyone): dist.group.WORLD}

    def group(name: str, members: list[list[int]]) -> Group:
        """Create this rank's group of a kind; those with the same ranks are created once."""
        mine = tuple(next(ranks for ranks in members if layout.rank in ranks))
        if mine not in handles:
            handles[mine] = _new_group(mine, timeout) if len(mine) > 1 else None
        return Group(name, mine, me=layout.rank, handle=handles[mine], recorder=recorder, watch=watch)

    # With a flight recorder of its own: that of the run starts with the run's own collectives.
    starting = Group("start", everyone, me=layout.rank, handle=dist.group.WORLD, recorder=FlightRecorder(), watch=watch)
    different = differences_across_ranks(starting, {"parallel": asdict(layout.degrees)})
    if different:  # checked first: ranks that create different groups wait for each other
        raise ConfigError(f"{different[0]}; all ranks need the same config")
    # On the CPU for every device, with a flight recorder of its own, since another thread uses it.
    saving = cast(dist.ProcessGroup, dist.new_group(everyone, backend="gloo", timeout=_SAVING_TIMEOUT))
    world = group("world", [everyone])
    host = world
    if world.device.type != "cpu":
        gloo = cast(dist.ProcessGroup, dist.new_group(everyone, backend="gloo"))
        host = Group("host", everyone, me=layout.rank, handle=gloo, recorder=recorder, watch=watch)
    saver = Group("saving", everyone, me=layout.rank, handle=saving, recorder=FlightRecorder())
    return mesh_of_groups(layout, group, world=world, host=host, saving=saver)


def _new_group(ranks: Sequence[int], timeout: timedelta | None) -> dist.ProcessGroup:
    made = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
    return cast(dist.ProcessGroup, made)


def mesh_of_groups(
    layout: Layout, group: Callable[[str, list[list[int]]], Group], *, world: Group, host: Group, saving: Group
) -> Mesh:
    """Return the mesh of a rank; `group` makes its group of a kind, given a name and the ranks of all of that kind."""
    return Mesh(
        layout=layout,
        host=host,
        saving=saving,
        world=world,
        stage=group("stage", layout.stage_ranks()),
        pp=group("pp", layout.pp_ranks()),
        tied=group("tied", layout.tied_ranks()),
        ep=group("ep", layout.ep_ranks()),
        ep_inside=group("ep inside a node", layout.ep_inside_ranks()),
        ep_between=group("ep between nodes", layout.ep_between_ranks()),
        edp=group("edp", layout.edp_ranks()),
        rows=group("rows", layout.row_ranks()),
        cp=group("cp", layout.cp_ranks()),
        tp=group("tp", layout.tp_ranks()),
        tdp=group("tdp", layout.tdp_ranks()),
        shard=group("shard", layout.shard_ranks()),
        shard_copies=group("copies of a shard", layout.shard_copy_ranks()),
        edp_shard=group("edp shard", layout.edp_shard_ranks()),
        edp_shard_copies=group("copies of an edp shard", layout.edp_shard_copy_ranks()),
        tdp_shard=group("tdp shard", layout.tdp_shard_ranks()),
        tdp_shard_copies=group("copies of a tdp shard", layout.tdp_shard_copy_ranks()),
    )

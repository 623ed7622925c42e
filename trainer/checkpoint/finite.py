"""Check that a state is finite before it is saved: one bad number spoils every later step.

# W ranks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.state import Slice
from trainer.distributed.collective_errors import barrier_gather
from trainer.distributed.collectives import Group
from trainer.distributed.rank_layout import format_ranks
from trainer.errors import NumericsError


def check_finite(slices: Mapping[str, Slice], group: Group, folder: CheckpointFolder, *, step: int) -> None:
    """See that every number of a state is finite, on all ranks together. Every rank must call it.

    Args:
        slices: of the state, what this rank answers for; each part is on one rank at least.
        group: all ranks.
        folder: of the run's checkpoints, of which the newest sound one is named.
        step: completed steps.

    Raises:
        NumericsError: if any is not; on every rank, with the same message.
    """
    mine = not_finite({name: part.tensor for name, part in slices.items()})
    if not int(group.all_reduce_(torch.tensor([len(mine)], device=group.device))):
        return
    newest = folder.newest_intact() if group.index == 0 else None
    found = {name: _described(name, slices[name]) for name in mine}
    reports: list[tuple[dict[str, str], str | None]] = barrier_gather(
        group, (found, None if newest is None else str(newest))
    )
    raise NumericsError(_in_words([report[0] for report in reports], group, reports[0][1], step=step))


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors in which a number is not finite."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floats:
        return []
    # What is not finite makes a sum not finite: one pass at the speed of memory, where `isfinite` takes a hundred times
    # as long. A sum may overflow by itself, so a suspect is looked at closely. Waits for the device, once.
    sums = torch.stack([tensor.sum().double() for tensor in floats.values()]).isfinite().tolist()
    return [n for (n, tensor), is_fine in zip(floats.items(), sums, strict=True) if not is_fine and _is_ill(tensor)]


def _is_ill(tensor: Tensor) -> bool:
    return not bool(tensor.isfinite().all())


def _described(name: str, part: Slice) -> str:
    """Write a tensor's name, with the experts that are ill where it is of experts."""
    if not part.is_of_experts or part.tensor.dim() < 2:
        return name
    ill = (~part.tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    return f"{name} (expert {ill[0] + part.start}{f' and {len(ill) - 1} more' if len(ill) > 1 else ''})"


def _in_words(everyone: list[dict[str, str]], group: Group, newest: str | None, *, step: int) -> str:
    names = dict.fromkeys(name for mine in everyone for name in mine)
    first = min(names, key=_order)
    ranks = [rank for rank, mine in enumerate(everyone) if first in mine]
    where = f" on {format_ranks([group.ranks[rank] for rank in ranks])}" if group.size > 1 else ""
    more = f" (and {len(names) - 1} more tensor{'s' * (len(names) > 2)})" if len(names) > 1 else ""
    if newest is None:
        back = "there is no good checkpoint: lower schedule.peak_lr and start again"
    else:
        back = f"the last good checkpoint is {newest}: lower schedule.peak_lr and start again to go on from it"
    return f"step {step}: {everyone[ranks[0]][first]} is not finite{where}{more}; nothing of it is saved; {back}"


def _order(name: str) -> bool:
    """Sort weights before moments, which are ill because of them or before them."""
    return not name.startswith("model.")

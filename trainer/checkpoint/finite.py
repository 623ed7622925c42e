"""Check that a state is finite before it is saved: one NaN or Inf spoils every later step.

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
    """Check that every value of a state is finite, on all ranks together; collective.

    `slices` are those that this rank checks; the ranks together check all of them. `folder` has the run's checkpoints,
    of which the message names the newest intact one.

    Raises:
        NumericsError: if a value is not finite; on every rank, with the same message.
    """
    local = not_finite({name: part.tensor for name, part in slices.items()})
    if not int(group.all_reduce_(torch.tensor([len(local)], device=group.device))):
        return
    newest = folder.newest_intact() if group.index == 0 else None
    found = {name: _describe(name, slices[name]) for name in local}
    reports = barrier_gather(group, (found, None if newest is None else str(newest)))
    raise NumericsError(_message([report[0] for report in reports], group, reports[0][1], step=step))


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors with a value that is not finite."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floats:
        return []
    # A value that is not finite makes the sum not finite. Summing is one pass at memory bandwidth; `isfinite` takes a
    # hundred times as long. A sum of finite values may overflow, so suspects are checked again. One device sync.
    sums = torch.stack([tensor.sum().double() for tensor in floats.values()]).isfinite().tolist()
    suspects = [item for item, is_fine in zip(floats.items(), sums, strict=True) if not is_fine]
    return [name for name, tensor in suspects if not tensor.isfinite().all()]


def _describe(name: str, part: Slice) -> str:
    """Return a tensor's name, with the affected experts if dimension 0 counts experts."""
    if not part.is_of_experts or part.tensor.dim() < 2:
        return name
    experts = (~part.tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    more = f" and {len(experts) - 1} more" if len(experts) > 1 else ""
    first = experts[0] + part.start if part.numbers is None else part.numbers[experts[0]]
    return f"{name} (expert {first}{more})"


def _message(by_rank: list[dict[str, str]], group: Group, newest: str | None, *, step: int) -> str:
    names = dict.fromkeys(name for found in by_rank for name in found)
    first = min(names, key=lambda name: not name.startswith("model."))  # weights before moments
    ranks = [rank for rank, found in enumerate(by_rank) if first in found]
    where = f" on {format_ranks([group.ranks[rank] for rank in ranks])}" if group.size > 1 else ""
    more = f" (and {len(names) - 1} more tensor{'s' * (len(names) > 2)})" if len(names) > 1 else ""
    if newest is None:
        back = "there is no good checkpoint: lower schedule.peak_lr and start again"
    else:
        back = f"the last good checkpoint is {newest}: lower schedule.peak_lr and start again to resume from it"
    return f"step {step}: {by_rank[ranks[0]][first]} is not finite{where}{more}; nothing of it is saved; {back}"

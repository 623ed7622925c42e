"""Shards of tensors on this rank: which part of the whole each is, as checkpoints and norms need it.

# E_local experts here, N ranks that share a copy.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.distributed.sharded_tensor import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_first_copy(tensor: Tensor) -> bool:
    """Return whether no earlier rank has this shard; of a tensor that is not sharded, True."""
    return not is_sharded(tensor) or tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_local_rank(0) == 0


def shard_dimension(tensor: Tensor) -> int:
    """Return the dimension along which a tensor is sharded; 0 if it is not."""
    return tensor.placements[-1].dim if is_sharded(tensor) else 0  # pyrefly: ignore[missing-attribute]


def shard_start(tensor: Tensor) -> int:
    """Return the first index of this rank's shard along the dimension of the shards; 0 if it is not sharded."""
    dim = shard_dimension(tensor)
    if dim == 0 or not is_sharded(tensor):
        return first_row(tensor)
    return local(tensor).shape[dim] * tensor.device_mesh.get_local_rank(-1)


def shard_index(tensor: Tensor) -> tuple[slice, ...]:
    """Return where this rank's shard is in the tensor: a range of every dimension, with beginning and end."""
    dim, mine, start = shard_dimension(tensor), local(tensor), shard_start(tensor)
    return tuple(
        slice(start, start + mine.shape[d]) if d == dim else slice(0, size) for d, size in enumerate(tensor.shape)
    )


@torch.no_grad()
def rows(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor along dimension 0, which begins at `first_row`.

    It shares memory unless the tensor is sharded along another dimension. Then this is collective, has the whole tensor
    in memory meanwhile, and some ranks have no rows if these are fewer than the ranks.
    """
    if not is_sharded(tensor) or shard_dimension(tensor) == 0:
        return local(tensor)
    return tensor.full_tensor()[first_row(tensor) :][: _rows_per_rank(tensor)].clone()


def first_row(tensor: Tensor) -> int:
    """Return the first index of this rank's `rows`; all parts but the last have equal length."""
    if not is_sharded(tensor):
        return 0
    return min(tensor.shape[0], _rows_per_rank(tensor) * tensor.device_mesh.get_local_rank(-1))


def _rows_per_rank(tensor: "DTensor") -> int:
    return -(-tensor.shape[0] // tensor.device_mesh.size(-1))


@torch.no_grad()
def copy_from_rows(tensor: Tensor, rows: Tensor) -> None:
    """Overwrite this rank's shard.

    `rows` are its `rows`; or all rows (E_local, ...) of a tensor that is sharded along another dimension.
    """
    if is_sharded(tensor) and shard_dimension(tensor) != 0:
        rows = rows[shard_index(tensor)]
    local(tensor).copy_(rows)

"""Hierarchical all-to-all: one hop inside the node, one between nodes, for fewer and larger inter-node messages."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll
from trainer.distributed.mesh import Mesh
from trainer.moe.dispatch.all_to_all import AllToAllDispatcher
from trainer.moe.dispatch.exchanging import Wire

# G ranks of the expert-parallel group, on N nodes of L ranks; rank = node * L + local_rank.


class HierarchicalDispatcher(AllToAllDispatcher):
    """Sends a row to the rank of its own node with the receiver's local rank, which forwards it to the receiver's node.

    #  2 nodes of 2 ranks, from rank 0 (node 0, local rank 0)    to 1: hop to local rank 1
    #                                                            to 2: hop to node 1
    #                                                            to 3: hop to local rank 1 = rank 1, then to rank 3

    A rank exchanges messages with L - 1 ranks of its node and N - 1 ranks of other nodes instead of G - 1. Rows arrive
    in the same order as with `all_to_all`.
    """

    def __init__(self, mesh: Mesh, num_experts: int, wire: Wire, num_chunks: int) -> None:
        """Create the dispatcher; the expert-parallel ranks must fill whole nodes."""
        super().__init__(mesh.ep, num_experts, wire, num_chunks)
        self.inside, self.between = mesh.ep_inside, mesh.ep_between

    def depart(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> AllToAll:
        """Run the hop inside the node, and start the slow one between nodes."""
        per_node, nodes = self.inside.size, self.between.size
        node, local_rank = self.between.index, self.inside.index
        table = np.array(sizes).reshape(nodes, per_node, nodes, per_node)  # [node, local rank of sender][of receiver]
        device = rows.device
        # By receiving local rank, then node: rows for one neighbour are contiguous.
        mine = table[node, local_rank].reshape(-1)  # (G,)
        rows = rows.index_select(0, _reorder(mine, np.arange(nodes * per_node).reshape(nodes, per_node).T, device))
        to_inside = table[node, local_rank].sum(0).tolist()
        from_inside = table[node, :, :, local_rank].sum(1).tolist()
        rows = self.inside.all_to_all(rows, to_inside, from_inside)
        # Now ordered by (sender's local rank, receiver's node); sent by (receiver's node, sender's local rank).
        held = table[node, :, :, local_rank]  # (L, N)
        by_node = np.arange(per_node * nodes).reshape(per_node, nodes).T
        rows = rows.index_select(0, _reorder(held.reshape(-1), by_node, device))
        to_node = held.sum(0).tolist()
        from_node = table[:, :, node, local_rank].sum(1).tolist()
        return self.between.start_all_to_all(rows, to_node, from_node)


def _reorder(lengths: np.ndarray, order: np.ndarray, device: torch.device) -> Tensor:
    """Return the row indices that put blocks of these lengths (n,) into a new order: n block indices, of any shape."""
    starts = lengths.cumsum() - lengths
    blocks = [np.arange(starts[b], starts[b] + lengths[b]) for b in order.reshape(-1)]
    return torch.from_numpy(np.concatenate(blocks)).to(device, non_blocking=True)

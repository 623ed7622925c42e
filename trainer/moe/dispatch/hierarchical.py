"""Rows travel in two hops, inside the node and then between nodes: fewer and larger messages over the slow wires."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll
from trainer.distributed.mesh import Mesh
from trainer.moe.dispatch.all_to_all import AllToAllDispatcher, Wire
from trainer.ops.permute import permute

# G ranks that share the experts, on N nodes of L ranks; rank = node * L + place.


class HierarchicalDispatcher(AllToAllDispatcher):
    """Sends a row to the rank of its own node that has the receiver's place, which sends it on to the receiver's node.

    #  2 nodes of 2, from rank 0 (node 0, place 0)      to 1: hop to place 1
    #                                                   to 2: hop to node 1
    #                                                   to 3: hop to place 1 = rank 1, from there to node 1 = rank 3

    A rank talks to L - 1 neighbours and to N - 1 ranks of other nodes instead of to G - 1. What arrives, and in which
    order, is what `all_to_all` brings.
    """

    def __init__(self, mesh: Mesh, num_experts: int, wire: Wire, num_chunks: int) -> None:
        """Prepare the sending; the ep ranks must fill whole nodes."""
        super().__init__(mesh.ep, num_experts, wire, num_chunks)
        self.inside, self.between = mesh.ep_inside, mesh.ep_between

    def depart(self, rows: Tensor, sizes: Sequence[Sequence[int]]) -> AllToAll:
        """Make the hop inside the node, and begin the one between nodes, which is the slow one."""
        places, nodes = self.inside.size, self.between.size
        node, place = self.between.index, self.inside.index
        table = torch.tensor(sizes).view(nodes, places, nodes, places)  # [node, place of sender][of receiver]
        device = rows.device
        # By receiving place, then node: what goes to one neighbour lies together.
        mine = table[node, place].reshape(-1)  # (G,)
        rows = permute(rows, _reorder(mine, torch.arange(nodes * places).view(nodes, places).T, device))
        to_place = table[node, place].sum(0).tolist()
        from_place = table[node, :, :, place].sum(1).tolist()
        rows = self.inside.all_to_all(rows, to_place, from_place)
        # Here by (sender's place, receiver's node); to be sent by (receiver's node, sender's place).
        held = table[node, :, :, place]  # (L, N)
        rows = permute(rows, _reorder(held.reshape(-1), torch.arange(places * nodes).view(places, nodes).T, device))
        to_node = held.sum(0).tolist()
        from_node = table[:, :, node, place].sum(1).tolist()
        return self.between.start_all_to_all(rows, to_node, from_node)


def _reorder(lengths: Tensor, order: Tensor, device: torch.device) -> Tensor:
    """Return the row numbers that put blocks of these lengths into another order.

    Args:
        lengths: (n,) rows of each block as they lie.
        order: n block numbers, any shape, in the order that is wanted.
        device: of the result.
    """
    starts = (lengths.cumsum(0) - lengths).tolist()
    sizes = lengths.tolist()
    blocks = [torch.arange(starts[b], starts[b] + sizes[b]) for b in order.reshape(-1).tolist()]
    return torch.cat(blocks).to(device)

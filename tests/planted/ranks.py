"""Faults of process groups and of communication."""

from tests.planted.fault import in_package

FAULTS = [
    in_package(
        "experts are spread over copies",
        "distributed/rank_layout.py",
        "self.rank % self.ep_size",
        "self.rank // self.ep_size",
        "distributed/test_rank_layout.py",
    ),
    in_package(
        "ranks of one place are counted by nodes",
        "distributed/rank_layout.py",
        "ep[local::size]",
        "ep[local :: self.nodes_of_ep]",
        "distributed/test_rank_layout.py",
    ),
    in_package(
        "what even parts leave over is lost",
        "distributed/rank_layout.py",
        "total * (index + 1) // parts",
        "total // parts * (index + 1)",
        "distributed/test_rank_layout.py",
    ),
    in_package(
        "chunks are numbered by place and not by expert",
        "moe/dispatch/chunks.py",
        "torch.tensor(order).argsort()",
        "torch.tensor(order)",
        "moe/test_chunks.py",
    ),
    in_package(
        "a group's first member is taken for rank 0",
        "distributed/collectives.py",
        "dist.broadcast(x, self.ranks[source]",
        "dist.broadcast(x, source",
        "distributed/test_collectives.py",
    ),
    in_package(
        "sharded gradients are averaged",
        "parallel/shard.py",
        "set_gradient_divide_factor(1.0)",
        "set_gradient_divide_factor(float(group.size))",
        "parallel/test_shard.py",
    ),
    in_package(
        "parts of a sharded weight begin too early",
        "parallel/shard.py",
        "-(-tensor.shape[0] // tensor.device_mesh.size())",
        "tensor.shape[0] // tensor.device_mesh.size()",
        "parallel/test_shard.py",
    ),
    in_package(
        "a rank's own share is added to the sum again",
        "parallel/replicate.py",
        "_gradient(parameter).copy_(",
        "_gradient(parameter).add_(",
        "parallel/test_replicate.py",
    ),
    in_package(
        "a gradient departs before its bucket is full",
        "parallel/replicate.py",
        "self._missing[self._launched] == 0",
        "self._missing[self._launched] < len(self._buckets[self._launched])",
        "parallel/test_replicate.py",
    ),
    in_package(
        "the second hop expects what is sent",
        "moe/dispatch/hierarchical.py",
        "table[:, :, node, local_rank].sum(1).tolist()",
        "table[node, local_rank, :, :].sum(1).tolist()",
        "tests/contracts/test_dispatchers.py",
    ),
    in_package(
        "the first hop's rows stay by sender",
        "moe/dispatch/hierarchical.py",
        "torch.arange(per_node * nodes).view(per_node, nodes).T",
        "torch.arange(per_node * nodes).view(per_node, nodes)",
        "tests/contracts/test_dispatchers.py",
    ),
    in_package(
        "the wire is always bfloat16",
        "moe/dispatch/all_to_all.py",
        'rows.bfloat16() if self.wire == "bfloat16" else rows',
        "rows.bfloat16()",
        "tests/contracts/test_dispatchers.py",
    ),
    in_package(
        "null experts are renumbered",
        "moe/dispatch/chunks.py",
        "torch.where(expert < len(new_number), new_number[expert.clamp(max=len(new_number) - 1)], expert)",
        "new_number[expert.clamp(max=len(new_number) - 1)]",
        "moe/test_chunks.py",
    ),
    in_package(
        "all gathered tokens are numbered from the first rank",
        "moe/dispatch/all_gather.py",
        "number + first for number, first",
        "number for number, first",
        "tests/contracts/test_dispatchers.py",
    ),
]

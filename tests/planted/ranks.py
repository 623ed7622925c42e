"""Faults of groups of ranks and of what travels between them."""

from tests.planted.fault import in_package

FAULTS = [
    in_package(
        "experts are spread over copies",
        "distributed/layout.py",
        "self.rank % self.ep_size",
        "self.rank // self.ep_size",
        "distributed/test_layout.py",
    ),
    in_package(
        "ranks of one place are counted by nodes",
        "distributed/layout.py",
        "ep[place::size]",
        "ep[place :: self.nodes_of_ep]",
        "distributed/test_layout.py",
    ),
    in_package(
        "what even parts leave over is lost",
        "distributed/layout.py",
        "total * (index + 1) // parts",
        "total // parts * (index + 1)",
        "distributed/test_layout.py",
    ),
    in_package(
        "chunks are numbered by place and not by expert",
        "moe/dispatch/chunks.py",
        "torch.tensor(order).argsort()",
        "torch.tensor(order)",
        "moe/test_chunks.py",
    ),
]

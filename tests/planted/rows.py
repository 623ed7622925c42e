"""Faults of rows that several ranks share."""

from tests.planted.fault import Fault

LAW = "tests/laws/test_context_parallel.py::test_ranks_that_share_rows_learn_the_same"
NOISY, RING, DENSE = (
    f"{LAW}[noise, losses of rows, capacity-experts over both]",
    f"{LAW}[three heads of two ranks, windows, sinks, caps-ring of 2]",
    f"{LAW}[dense, one key head-2 ranks]",
)


def _fault(name: str, file: str, old: str, new: str, test: str) -> Fault:
    return Fault(name=f"shared rows: {name}", file=f"trainer/{file}", old=old, new=new, tests=(test,))


FAULTS = [
    _fault(
        "the keys' gradient counts a rank's own queries twice",
        "parallel/ring_attention.py",
        "+= part  # a front",
        "+= part * (2 if pending is None else 1)  # a front",
        RING,
    ),
    _fault(
        "the keys' gradient does not travel with them",
        "parallel/ring_attention.py",
        "if pending is None else pending.wait()\n            for",
        "if pending is None else travelling\n            for",
        RING,
    ),
    _fault(
        "back chunks are in the order of ranks",
        "ops/zigzag.py",
        "back for _, back in reversed(halves)",
        "back for _, back in halves",
        "tests/unit/ops/test_zigzag.py",
    ),
    _fault(
        "the chunks of a rank are neighbours",
        "data/batches/row_parts.py",
        "part_of(tensor, layout.row_rank, layout.row_size)",
        "tensor.chunk(layout.row_size, 1)[layout.row_rank]",
        DENSE,
    ),
    _fault(
        "a row's statistics are those of its part",
        "engine/global_stats.py",
        "all_reduce_packed(here.tensors(), self._sharing_rows)",
        "here.tensors()",
        NOISY,
    ),
    _fault(
        "noise by the position in the part",
        "models/routing_context.py",
        "token_keys(seed, batch.sample_id, batch.position)",
        "token_keys(seed, batch.sample_id, torch.arange(S).expand_as(batch.position))",
        NOISY,
    ),
    _fault(
        "rotary positions in the part",
        "models/gpt.py",
        "context.row_parts.attended(batch.position[0])",
        "torch.arange(batch.tokens.shape[1])",
        DENSE,
    ),
    _fault(
        "capacity of the part",
        "moe/capacity.py",
        'context.row_parts is not None and capacity.scope == "sequence"',
        "False",
        NOISY,
    ),
    _fault(
        "documents of another rank's keys",
        "parallel/ring_attention.py",
        "part_of(of_rows, source, n)[:, seen]",
        "part_of(of_rows, me, n)[:, seen]",
        f"{LAW}[latents, documents-ring of 4 with experts]",
    ),
    _fault(
        "every rank has the first heads' sinks",
        "parallel/ulysses.py",
        "rule.sinks[first:last]",
        "rule.sinks[: last - first]",
        f"{LAW}[three heads of two ranks, windows, sinks, caps-2 ranks]",
    ),
]

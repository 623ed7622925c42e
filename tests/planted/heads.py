"""Faults of heads and hidden units that several ranks hold together."""

from tests.planted.fault import Fault

LAW = "tests/laws/test_tensor_parallelism.py::test_ranks_that_share_heads_learn_the_same"
GROUPED, SHARDED, LATENT, NOISY, ONE_KEY = (
    f"{LAW}[dense, grouped queries, biases, sinks-2 ranks]",
    f"{LAW}[dense, grouped queries, biases, sinks-sharded, no experts]",
    f"{LAW}[latents of keys only-4 ranks]",
    f"{LAW}[noise, losses of rows, capacity-4 ranks, experts over all]",
    f"{LAW}[two heads of keys-4 ranks]",
)
ELASTIC = "tests/laws/test_elastic.py::test_a_run_goes_on_with_heads_on_other_ranks"


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name=f"heads: {name}", file=f"trainer/{file}", old=old, new=new, tests=tests)


FAULTS = [
    _fault(
        "the gradient of a norm is that of a rank's own tokens",
        "engine/native.py",
        "(self._dense, self.mesh.stage)",
        "(self._dense, self.mesh.tdp)",
        GROUPED,
    ),
    _fault(
        "the gradient of a cut is summed over ranks with other cuts",
        "engine/native.py",
        "(self._cut, self.mesh.tdp)",
        "(self._cut, self.mesh.stage)",
        GROUPED,
    ),
    _fault(
        "every rank counts the cuts of all for the norm",
        "engine/native.py",
        "self.mesh.tdp.index == 0",
        "self.mesh.stage.index == 0",
        GROUPED,
    ),
    _fault(
        "copies of a cut count twice in the norm",
        "engine/native.py",
        "self.mesh.tdp.index == 0",
        "True",
        NOISY,
    ),
    _fault(
        "every rank adds the bias of the outputs",
        "models/token_exchange.py",
        "product(linear, y), is_part=is_part)\n    return out if linear.bias is None else out + linear.bias",
        "linear(y), is_part=is_part)\n    return out",
        GROUPED,
    ),
    _fault(
        "sums go to the ranks in the order of the row",
        "parallel/tensor_parallel.py",
        "[part_of(y, index, n) for index in range(n)]",
        "list(y.chunk(n, 1))",
        GROUPED,
    ),
    _fault(
        "the gradient of gathered tokens is a rank's own share",
        "parallel/tensor_parallel.py",
        "self.group, _gathered, _summed)",
        "self.group, _gathered, lambda grad, group: part_of(grad, group.index, group.size))",
        GROUPED,
    ),
    _fault(
        "queries of other heads than the keys",
        "models/self_attention.py",
        "(start + begin, start + end)",
        "(start + share.first * d, start + share.first * d + end - begin)",
        GROUPED,
    ),
    _fault(
        "every rank has the queries of the first heads",
        "models/latent_attention.py",
        "slice(*share.range_of(self.latent.qk_head_dim))",
        "slice(0, self.num_heads * self.latent.qk_head_dim)",
        LATENT,
    ),
    _fault(
        "the gradient of a shared head of keys is that of a rank's own queries",
        "parallel/tensor_parallel.py",
        "shares.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))",
        "shares[sum(width > 0 for width in parts[: group.index])]",
        ONE_KEY,
    ),
    _fault(
        "the gradient of a shared head of keys counts twice",
        "parallel/tensor_parallel.py",
        "shares.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))",
        "shares.sum(0).mul(2)",
        ONE_KEY,
    ),
    _fault(
        "a shared head of keys is made of its first part",
        "parallel/heads_of_ranks.py",
        "HeadShare(head, head + 1, part, parts)",
        "HeadShare(head, head + 1, 0, parts)",
        ONE_KEY,
    ),
    _fault(
        "the gate of other units than what it multiplies",
        "models/feed_forward.py",
        "(at + first, at + last) for at",
        "(at + first * (at > 0), at + last - first * (at == 0)) for at",
        GROUPED,
    ),
    _fault(
        "rotary positions of a rank's own tokens",
        "parallel/shared_rows.py",
        "part_of(columns, self._attending.index, self._attending.size, dim=0)",
        "columns[: len(positions) * (self._group.size // self._attending.size)]",
        f"{LAW}[dense, grouped queries, biases, sinks-rows shared by heads, no experts]",
    ),
    _fault(
        "a cut is sharded over ranks with other cuts",
        "distributed/rank_layout.py",
        "[run for tdp in self.tdp_ranks() for run in _runs(tdp, self.num_cut_shards)]",
        "_runs(list(range(self.world_size)), self.num_cut_shards)",
        SHARDED,
        "tests/unit/distributed/test_rank_layout.py",
    ),
    _fault(
        "initial values of a cut are those of the first rows",
        "ops/cut.py",
        "slice(first + begin - at, first + end - at)",
        "slice(begin, end)",
        GROUPED,
    ),
    _fault(
        "columns in files are in the order of another rank",
        "parallel/tensor_parallel.py",
        "return first, torch.cat(columns, 1)",
        "return first, torch.cat(columns[::-1], 1)",
        ELASTIC,
    ),
    _fault(
        "a block is compiled whole, exchanges included",
        "parallel/compile_glue.py",
        "if model.row_parts is not None:",
        "if model.row_parts is None:",
        "tests/laws/test_compiled_exchanges.py::test_blocks_traced_between_exchanges_learn_the_same[heads]",
    ),
    _fault(
        "a run goes on with the first columns",
        "engine/state_slices.py",
        "found.own.of(part))",
        "part[:, : found.own.width])",
        ELASTIC,
    ),
]

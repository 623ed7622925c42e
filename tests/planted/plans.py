"""Faults of fake steps, and of what a plan makes of them."""

from tests.planted.fault import in_package

FAULTS = [
    in_package(
        "freed tensors count on",
        "plan/tensor_bytes.py",
        "self.live -= self._sizes.pop(key)[1]",
        "self._sizes.pop(key)",
        "plan/test_tensor_bytes.py",
    ),
    in_package(
        "a plan forgets a micro-batch",
        "plan/step_cost.py",
        "(wanted - taken) / unit + 1)",
        "(wanted - taken) / unit)",
        "plan/test_step_cost.py",
    ),
    in_package(
        "an all-reduce is looked up by what a rank sends",
        "plan/step_time.py",
        'seconds_at(links.curve("all_reduce"), sent * size / (2 * (size - 1)))',
        'seconds_at(links.curve("all_reduce"), sent)',
        "plan/test_step_time.py",
    ),
    in_package(
        "products of oneDNN are not counted",
        "lab/costs/step_operations.py",
        "return 2 * x.numel() * weight.shape[0]",
        "return 0",
        "lab/costs/test_step_operations.py",
    ),
    in_package(
        "a CPU starts operations while it computes",
        "plan/step_time.py",
        "if gpu.reached.starts_ahead else seconds + started",
        "if gpu.reached.starts_ahead else max(seconds, started)",
        "plan/test_step_time.py",
    ),
    in_package(
        "collectives of a step take the time of those of idle ranks",
        "plan/links.py",
        "return self.beside.get(name) or getattr(self, name)",
        "return getattr(self, name)",
        "plan/test_step_time.py",
    ),
    in_package(
        "gathers of shards are counted, and reductions are not",
        "lab/costs/step_operations.py",
        '"fsdp::chunk_cat")',
        '"fsdp::none")',
        "doctor/test_several_ranks.py",
    ),
    in_package(
        "what is around shards includes its collectives",
        "doctor/cluster/step_overheads.py",
        "seconds -= calls * self.beside[name][0].rounds.median",
        "seconds -= 0 * calls",
        "doctor/test_step_overheads.py",
    ),
    in_package(
        "rows of a fake step share their memory",
        "plan/step_probe.py",
        "{name: tensor.clone() for",
        "{name: tensor for",
        "lab/costs/test_step_operations.py",
    ),
    in_package(
        "reductions of shards take the time of a gather",
        "plan/step_time.py",
        'links.curve("reduce_scatter") if key.of.startswith("reduce_scatter") else curve',
        "curve",
        "plan/test_step_time.py",
    ),
    in_package(
        "a choice of experts repeats one",
        "plan/assumed_load.py",
        "expert.view(self.top_k, num_tokens).T.contiguous()",
        "expert.view(num_tokens, self.top_k)",
        "plan/test_assumed_load.py",
    ),
]

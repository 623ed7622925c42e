"""Faults of the experts' kernels and of uninitialised weights."""

from tests.planted.fault import Fault

KERNELS = "tests/unit/ops/test_expert_ffn.py"
BY_HAND = "tests/unit/moe/test_by_hand.py"
_EXPERTS = "trainer/moe/experts.py"


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name=name, file=file, old=old, new=new, tests=tests)


FAULTS = [
    _fault(
        "idle experts keep what a kernel leaves",
        "trainer/ops/expert_ffn.py",
        "return grad.masked_fill(idle[:, None, None], 0), None",
        "return grad, None",
        KERNELS,
    ),
    _fault(
        "busy experts get the zeros of idle ones",
        "trainer/ops/expert_ffn.py",
        "idle = rows_per_expert == 0",
        "idle = rows_per_expert > 0",
        KERNELS,
    ),
    _fault(
        "no kernel's idle experts are looked after",
        "trainer/ops/kernels.py",
        "expert_ffn.without_idle_gradients(w.to(x.dtype), rows_per_expert) for w",
        "w for w",
        KERNELS,
    ),
    _fault(
        "a fused kernel does not write an idle expert's gradient",
        "trainer/ops/fused_ffn.py",
        "        grad[e] = 0\n",
        "        pass\n",
        KERNELS,
    ),
    _fault(
        "without a row all weights are multiplied by 0",
        "trainer/ops/expert_ffn.py",
        "return x + (w_in[:, :0].sum() + w_out[:, :0].sum()).to(x.dtype)",
        "return x + 0.0 * (w_in.sum() + w_out.sum()).to(x.dtype)",
        KERNELS,
    ),
    _fault(
        "without a row weights have no gradient",
        "trainer/ops/expert_ffn.py",
        "return x + (w_in[:, :0].sum() + w_out[:, :0].sum()).to(x.dtype)",
        "return x.clone()",
        KERNELS,
    ),
    _fault("experts start as memory is", _EXPERTS, "nn.init.uniform_(weight, -bound, bound)", "pass", BY_HAND),
    _fault(
        "experts start wider than linear layers",
        _EXPERTS,
        "bound = weight.shape[-1] ** -0.5",
        "bound = weight.shape[1] ** -0.5",
        BY_HAND,
    ),
    _fault(
        "experts that are kept are the first ones",
        _EXPERTS,
        "weight.detach()[first:end].clone()",
        "weight.detach()[: end - first].clone()",
        BY_HAND,
    ),
    _fault(
        "experts that are kept forget their values",
        _EXPERTS,
        "weight.detach()[first:end].clone()",
        "weight.new_zeros(end - first, *weight.shape[1:])",
        BY_HAND,
    ),
    _fault(
        "norms start as memory is",
        "trainer/models/block.py",
        "nn.Parameter(torch.ones(width))",
        "nn.Parameter(torch.empty(width))",
        BY_HAND,
    ),
    _fault(
        "the directions of a cosine router start as memory is",
        "trainer/moe/routers/cosine.py",
        "torch.randn(num_columns, self.d_proj)",
        "torch.empty(num_columns, self.d_proj)",
        BY_HAND,
    ),
    _fault(
        "the scale of a cosine router starts as memory is",
        "trainer/moe/routers/cosine.py",
        "torch.zeros(1)",
        "torch.empty(1)",
        BY_HAND,
    ),
]

"""Faults of the experts' kernels and of uninitialised weights."""

from tests.planted.fault import Fault

KERNELS = "tests/unit/ops/test_expert_ffn.py"
NODE = "tests/unit/ops/test_routed_ffn.py"
LOW_RANK = "tests/unit/ops/test_low_rank.py"
FORMAT, PRODUCTS = "tests/unit/ops/test_mx_format.py", "tests/unit/ops/test_mxfp8_products.py"
BY_HAND = "tests/unit/moe/test_by_hand.py"
_EXPERTS = "trainer/moe/experts.py"


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name=name, file=file, old=old, new=new, tests=tests)


FAULTS = [
    _fault(
        "idle experts keep what a kernel leaves",
        "trainer/ops/grouped_kernel.py",
        "return out.masked_fill_(idle[:, None, None], 0)",
        "return out",
        KERNELS,
    ),
    _fault(
        "busy experts get the zeros of idle ones",
        "trainer/ops/grouped_kernel.py",
        "idle = self.rows_per_expert == 0",
        "idle = self.rows_per_expert > 0",
        KERNELS,
    ),
    _fault(
        "a fused kernel does not write an idle expert's gradient",
        "trainer/ops/fused_ffn.py",
        "                    gradient[e] = 0\n",
        "                    pass\n",
        KERNELS,
    ),
    _fault(
        "combine weights get the gradient of the weighted activation",
        "trainer/ops/weighted_activation.py",
        "    d_scale = (da * a).sum(-1, dtype=scale.dtype)\n    da.mul_(factor)\n",
        "    da.mul_(factor)\n    d_scale = (da * a).sum(-1, dtype=scale.dtype)\n",
        NODE,
    ),
    _fault(
        "the gradient of w_out lacks the combine weights",
        "trainer/ops/weighted_activation.py",
        "return a.mul_(factor), dh, d_scale",
        "return a, dh, d_scale",
        NODE,
    ),
    _fault(
        "hidden values are saved although they are computed again",
        "trainer/ops/routed_ffn.py",
        "h = None if how.recompute else h",
        "h = h",
        NODE,
    ),
    _fault(
        "the scale of a block is rounded down, so that its largest numbers saturate",
        "trainer/ops/mx_format.py",
        "exponent - (mantissa == 0.5).to(exponent.dtype)",
        "exponent - 1",
        FORMAT,
    ),
    _fault(
        "an infinite number is hidden by its block",
        "trainer/ops/mx_format.py",
        ".masked_fill(~largest.isfinite(), _NAN - _BIAS)",
        "",
        FORMAT,
    ),
    _fault(
        "weights are rounded along the dimension that is not summed",
        "trainer/ops/mxfp8_products.py",
        "_rounded(x), _rounded(w.mT)",
        "_rounded(x), _rounded(w).mT",
        PRODUCTS,
    ),
    _fault(
        "the scales of all groups of rows lie together",
        "trainer/ops/mxfp8_products.py",
        "by_group[place.flatten()] = ",
        "by_group[:] = ",
        PRODUCTS,
    ),
    _fault(
        "sonicmoe gets gates and ups one after the other",
        "trainer/ops/package_experts.py",
        "w_in.unflatten(1, (2, -1)).transpose(1, 2)",
        "w_in.unflatten(1, (-1, 2))",
        "tests/unit/ops/test_package_experts.py",
    ),
    _fault(
        "scattermoe gets sizes of groups in place of their ends",
        "trainer/ops/package_experts.py",
        "ends = order.rows_per_expert.cumsum(0)",
        "ends = order.rows_per_expert",
        "tests/unit/ops/test_package_experts.py",
    ),
    _fault(
        "a proof runs an exact kernel in place of the coarse one that is named",
        "trainer/prove/cases.py",
        'kernel if ":" in kernel or kernel in _COARSE_KERNELS else "auto"',
        'kernel if ":" in kernel else "auto"',
        "tests/laws/test_labels.py::test_a_kernel_that_rounds_rows_together_is_labelled",
    ),
    _fault(
        "biases are added without the combine weight",
        "trainer/ops/routed_ffn.py",
        ".scatter_add_(0, _cells(rows), rows.scale)",
        ".scatter_add_(0, _cells(rows), (rows.scale != 0).to(rows.scale))",
        NODE,
    ),
    _fault(
        "combine weights get no gradient from biases",
        "trainer/ops/routed_ffn.py",
        "d_scale = d_scale + (dy @ b_out.to(dy.dtype).T).view(-1)[_cells(rows)]",
        "pass",
        NODE,
    ),
    _fault(
        "what is clamped gets a gradient",
        "trainer/ops/weighted_activation.py",
        "slope * glu * up_gets_gradient",
        "slope * glu",
        NODE,
    ),
    _fault(
        "groups are not padded to a multiple",
        "trainer/ops/expert_order.py",
        "(counts + multiple - 1) // multiple * multiple",
        "counts",
        "tests/unit/ops/test_expert_order.py",
    ),
    _fault("experts start as memory is", _EXPERTS, "nn.init.uniform_(weight, -bound, bound)", "pass", BY_HAND),
    _fault(
        "experts start wider than linear layers",
        _EXPERTS,
        'bound = (d_model if name.startswith("w_in") else d_ff) ** -0.5',
        "bound = weight.shape[1] ** -0.5",
        BY_HAND,
    ),
    _fault(
        "experts that are kept are the first ones",
        _EXPERTS,
        "weight.detach()[list(numbers)]",
        "weight.detach()[: len(numbers)].clone()",
        BY_HAND,
    ),
    _fault(
        "experts that are kept forget their values",
        _EXPERTS,
        "weight.detach()[list(numbers)]",
        "weight.new_zeros(len(numbers), *weight.shape[1:])",
        BY_HAND,
    ),
    _fault(
        "norms start as memory is",
        "trainer/models/norm.py",
        "nn.Parameter(torch.full((width,), NORM_START[kind]))",
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
    _fault(
        "the factor A of a low-rank addition gets a gradient without its scale",
        "trainer/ops/grouped_kernel.py",
        "products.rows(dz, low.b).mul_(low.scale)",
        "products.rows(dz, low.b)",
        LOW_RANK,
    ),
    _fault(
        "rows get no gradient through a low-rank addition of the fused kernel",
        "trainer/ops/fused_ffn.py",
        "        out += self._product(v, low.a[e].T)\n",
        "",
        LOW_RANK,
    ),
    _fault(
        "gradients of frozen weights are computed and thrown away",
        "trainer/ops/routed_ffn.py",
        "learns=ctx.needs_input_grad[4:7]",
        "learns=(True, True, True)",
        LOW_RANK,
    ),
]

"""The Triton kernels compile for Hopper, which needs no GPU, and use its tensor cores."""

import os
from typing import Any

import pytest
import torch

from trainer import packages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not packages.is_installed("triton"), reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
SHARED_BYTES = 227 * 1024
"""Shared memory that a program may use on Hopper."""
POINTERS = {
    **dict.fromkeys(("token_of_row", "tiles", "ends", "rows_per_expert"), "*i64"),
    **dict.fromkeys(("scale", "d_scale", "out"), "*fp32"),
    **dict.fromkeys(("x", "w_in", "bias", "w_out", "w", "h", "a", "dh", "y", "grad", "left", "right"), "*bf16"),
}
PLAIN, CLAMPED = {"ALPHA": 1.0, "LIMIT": 0.0}, {"ALPHA": 1.702, "LIMIT": 7.0}
KERNELS: list[tuple[str, bool, dict[str, Any]]] = [
    ("first_product", False, {"GATED": True, "WRITE_A": True, "HAS_BIAS": False, **PLAIN}),
    ("first_product", False, {"GATED": True, "WRITE_A": True, "HAS_BIAS": True, **CLAMPED}),
    ("hidden_gradient", False, {"GATED": True, **PLAIN}),
    ("hidden_gradient", False, {"GATED": True, **CLAMPED}),
    ("rows_product", True, {}),
    ("weights_product", True, {"GATHER_LEFT": True}),
]


@pytest.mark.parametrize(
    ("name", "is_wide", "flags"), KERNELS, ids=[f"{name} {flags.get('LIMIT', '')}" for name, _, flags in KERNELS]
)
def test_a_kernel_compiles_for_hopper(
    name: str, is_wide: bool, flags: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For tiles of 128 rows in bfloat16; pointers and sizes are multiples of 16, as in most models."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer.ops import triton_kernels
    from trainer.ops.triton_ffn import TileShape

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape = TileShape.of(128, torch.bfloat16, is_wide=is_wide)
    options = shape.options()
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    if name == "weights_product":
        options = {"BLOCK_LEFT": shape.rows, "BLOCK_RIGHT": shape.columns, "BLOCK_ROWS": shape.depth}
    constants = {**options, **flags, "INTERPRETED": False}
    kernel = getattr(triton_kernels, name)
    signature = {arg: "constexpr" if arg in constants else POINTERS.get(arg, "i32") for arg in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(arg),): value for arg, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, (arg, kind) in enumerate(signature.items())
            if kind != "constexpr" and arg != "num_tiles"
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    assert "wgmma" in compiled.asm["ptx"], "tensor cores"
    assert compiled.metadata.shared <= SHARED_BYTES // 2, "two programs on a multiprocessor"
    assert compiled.asm["cubin"]

"""Grouped products by Triton, with gathers and the activation inside: what `trainer.ops.triton_ffn` launches.

Every program writes one tile. A tile of rows has rows of one expert only; `tiles` (3, T) has each one's expert, first
row and end of rows, the last two equal for one without rows. Sums are float32, in one order for each element, whatever
else runs: no atomic additions, so results are the same bits in every run. Offsets are int64.

# N tokens, R rows, E experts, D d_model, F d_ff, H width before the activation (2 F if GATED: gate first, then up).
# ALPHA and LIMIT are of clamped SwiGLU; LIMIT 0: plain.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(left, right, total, INTERPRETED: tl.constexpr):
    """Add a product of tiles. Triton's interpreter multiplies the bits of bfloat16 as integers, so there it widens."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")  # never TensorFloat-32


@triton.jit
def _rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32 to the nearest, ties to even, as GPUs do. Triton's interpreter cuts bits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += ((bits >> 16) & 1) + 0x7FFF
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _tile(tiles, num_tiles, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Return whether this program has a row, its expert, rows and columns, and which of them exist.

    Neighbours share rows, for the cache.
    """
    per_tile = tl.cdiv(num_columns, BLOCK_COLUMNS)
    tile = tl.program_id(0) // per_tile
    first, stop = tl.load(tiles + num_tiles + tile), tl.load(tiles + 2 * num_tiles + tile)
    rows = first + tl.arange(0, BLOCK_ROWS)
    columns = (tl.program_id(0) % per_tile) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return first < stop, tl.load(tiles + tile), rows, rows < stop, columns, columns < num_columns


@triton.jit
def _rows_times_matrix(
    x,
    rows,
    is_row,
    w,
    columns,
    is_column,
    depth,
    stride_k,
    stride_n,
    total,
    BLOCK_DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the product of rows of x (..., K) and columns of w (K, N), which has these strides."""
    for start in range(0, depth, BLOCK_DEPTH):
        k = start + tl.arange(0, BLOCK_DEPTH)
        is_k = k < depth
        left = tl.load(x + rows[:, None] * depth + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
        at = k.to(tl.int64)[:, None] * stride_k + columns.to(tl.int64)[None, :] * stride_n
        right = tl.load(w + at, mask=is_k[:, None] & is_column[None, :], other=0.0)
        total = _dot(left, right, total, INTERPRETED)
    return total


@triton.jit
def _with_bias(total, bias, columns, is_column):
    """Add a bias (N,) to all rows of a sum."""
    return total + tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _clamped(gate, up, LIMIT: tl.constexpr):
    """Clamp the gate from above and up on both sides; what is not a number stays so."""
    gate = tl.where(gate > LIMIT, LIMIT, gate)
    return gate, tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))


@triton.jit
def first_product(
    x,  # (N, D)
    token_of_row,  # (R,)
    scale,  # (R,)
    w_in,  # (E, H, D)
    bias,  # (E, H), if HAS_BIAS
    h,  # (R, H), written
    a,  # (R, F), written: scale * act(h)
    tiles,
    num_tiles,
    d_model,
    d_ff,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE_A: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Gather tokens, multiply them by W_in^T, and apply activation and combine weight."""
    is_used, expert, rows, is_row, columns, is_column = _tile(tiles, num_tiles, d_ff, BLOCK_ROWS, BLOCK_COLUMNS)
    if not is_used:
        return
    tokens = tl.load(token_of_row + rows, mask=is_row, other=0).to(tl.int64)
    width = d_ff * 2 if GATED else d_ff
    w = w_in + expert * width * d_model
    zeros = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    at, mask = rows[:, None] * width + columns[None, :], is_row[:, None] & is_column[None, :]
    if GATED:
        gate, up = zeros, zeros
        w_up = w_in + (expert * width + d_ff) * d_model
        for start in range(0, d_model, BLOCK_DEPTH):  # one pass over x for both halves
            k = start + tl.arange(0, BLOCK_DEPTH)
            is_k = k < d_model
            left = tl.load(x + tokens[:, None] * d_model + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
            at_w, is_w = columns.to(tl.int64)[None, :] * d_model + k[:, None], is_k[:, None] & is_column[None, :]
            gate = _dot(left, tl.load(w + at_w, mask=is_w, other=0.0), gate, INTERPRETED)
            up = _dot(left, tl.load(w_up + at_w, mask=is_w, other=0.0), up, INTERPRETED)
        if HAS_BIAS:
            gate = _with_bias(gate, bias + expert * width, columns, is_column)
            up = _with_bias(up, bias + expert * width + d_ff, columns, is_column)
        gate, up = _rounded(gate, h.dtype.element_ty, INTERPRETED), _rounded(up, h.dtype.element_ty, INTERPRETED)
        tl.store(h + at, gate, mask=mask)
        tl.store(h + at + d_ff, up, mask=mask)
        gate, up = gate.to(tl.float32), up.to(tl.float32)
        if LIMIT > 0:
            gate, up = _clamped(gate, up, LIMIT)
            act = gate * tl.sigmoid(ALPHA * gate) * (up + 1.0)
        else:
            act = gate * tl.sigmoid(gate) * up
    else:
        hidden = _rows_times_matrix(
            x, tokens, is_row, w, columns, is_column, d_model, 1, d_model, zeros, BLOCK_DEPTH, INTERPRETED
        )
        if HAS_BIAS:
            hidden = _with_bias(hidden, bias + expert * width, columns, is_column)
        hidden = _rounded(hidden, h.dtype.element_ty, INTERPRETED)
        tl.store(h + at, hidden, mask=mask)
        hidden = hidden.to(tl.float32)
        act = hidden * 0.5 * (1.0 + tl.erf(hidden * 0.7071067811865476))
    if WRITE_A:
        act *= tl.load(scale + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
        tl.store(a + rows[:, None] * d_ff + columns[None, :], _rounded(act, a.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def rows_product(
    x,  # (R, K)
    w,  # (E, K, N), of any strides
    y,  # (R, N), written
    tiles,
    num_tiles,
    depth,
    num_columns,
    stride_e,
    stride_k,
    stride_n,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Multiply each row by its expert's matrix."""
    is_used, expert, rows, is_row, columns, is_column = _tile(tiles, num_tiles, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    if not is_used:
        return
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    w += expert * stride_e
    total = _rows_times_matrix(
        x, rows, is_row, w, columns, is_column, depth, stride_k, stride_n, total, BLOCK_DEPTH, INTERPRETED
    )
    at = rows[:, None] * num_columns + columns[None, :]
    tl.store(y + at, _rounded(total, y.dtype.element_ty, INTERPRETED), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def hidden_gradient(
    grad,  # (N, D), of the tokens' sums
    token_of_row,  # (R,)
    scale,  # (R,)
    w_out,  # (E, D, F)
    h,  # (R, H)
    a,  # (R, F), written: scale * act(h)
    dh,  # (R, H), written
    d_scale,  # (blocks of columns, R) float32, written: the sums of each block's columns
    tiles,
    num_tiles,
    num_rows,
    d_model,
    d_ff,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Gather output gradients, multiply them by W_out to dA', and derive a, dH and the gradient of the scale."""
    is_used, expert, rows, is_row, columns, is_column = _tile(tiles, num_tiles, d_ff, BLOCK_ROWS, BLOCK_COLUMNS)
    if not is_used:
        return
    tokens = tl.load(token_of_row + rows, mask=is_row, other=0).to(tl.int64)
    da = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    w = w_out + expert * d_model * d_ff
    da = _rows_times_matrix(grad, tokens, is_row, w, columns, is_column, d_model, d_ff, 1, da, BLOCK_DEPTH, INTERPRETED)
    factor = tl.load(scale + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
    mask = is_row[:, None] & is_column[None, :]
    width = d_ff * 2 if GATED else d_ff
    at = rows[:, None] * width + columns[None, :]
    if GATED:
        gate = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h + at + d_ff, mask=mask, other=0.0).to(tl.float32)
        if LIMIT > 0:
            is_gate, is_up = gate <= LIMIT, tl.abs(up) <= LIMIT  # of what is clamped the gradient is 0
            gate, up = _clamped(gate, up, LIMIT)
            up += 1.0
            sigmoid = tl.sigmoid(ALPHA * gate)
            slope = da * factor * sigmoid
            d_gate = tl.where(is_gate, slope * up * (1.0 + ALPHA * gate * (1.0 - sigmoid)), 0.0)
            d_up = tl.where(is_up, slope * gate, 0.0)
        else:
            sigmoid = tl.sigmoid(gate)
            slope = da * factor * sigmoid
            d_gate, d_up = slope * up * (1.0 + gate * (1.0 - sigmoid)), slope * gate
        act = gate * sigmoid * up
        tl.store(dh + at, _rounded(d_gate, dh.dtype.element_ty, INTERPRETED), mask=mask)
        tl.store(dh + at + d_ff, _rounded(d_up, dh.dtype.element_ty, INTERPRETED), mask=mask)
    else:
        hidden = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        below = 0.5 * (1.0 + tl.erf(hidden * 0.7071067811865476))
        act = hidden * below
        slope = below + hidden * tl.exp(-0.5 * hidden * hidden) * 0.3989422804014327
        tl.store(dh + at, _rounded(da * factor * slope, dh.dtype.element_ty, INTERPRETED), mask=mask)
    at = rows[:, None] * d_ff + columns[None, :]
    tl.store(a + at, _rounded(act * factor, a.dtype.element_ty, INTERPRETED), mask=mask)
    block = tl.program_id(0) % tl.cdiv(d_ff, BLOCK_COLUMNS)
    tl.store(d_scale + block.to(tl.int64) * num_rows + rows, tl.sum(da * act, 1), mask=is_row)


@triton.jit
def weights_product(
    left,  # (R, K), or (N, K) if GATHER_LEFT
    right,  # (R, N), or (N, N) if not
    token_of_row,  # (R,)
    ends,  # (E,) of the experts' rows
    rows_per_expert,  # (E,)
    out,  # (E, K, N), written
    num_left,
    num_right,
    GATHER_LEFT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Multiply over each expert's rows: left^T right, where one of the two is gathered; zeros without rows."""
    per_left = tl.cdiv(num_right, BLOCK_RIGHT)
    per_expert = tl.cdiv(num_left, BLOCK_LEFT) * per_left
    expert, block = tl.program_id(0) // per_expert, tl.program_id(0) % per_expert
    i = (block // per_left) * BLOCK_LEFT + tl.arange(0, BLOCK_LEFT)
    j = (block % per_left) * BLOCK_RIGHT + tl.arange(0, BLOCK_RIGHT)
    is_i, is_j = i < num_left, j < num_right
    stop, count = tl.load(ends + expert), tl.load(rows_per_expert + expert)
    total = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
    for start in range(stop - count, stop, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        is_row = rows < stop
        tokens = tl.load(token_of_row + rows, mask=is_row, other=0).to(tl.int64)
        of_left, of_right = (tokens, rows) if GATHER_LEFT else (rows, tokens)
        at = of_left[None, :] * num_left + i[:, None]
        one = tl.load(left + at, mask=is_i[:, None] & is_row[None, :], other=0.0)
        at = of_right[:, None] * num_right + j[None, :]
        other = tl.load(right + at, mask=is_row[:, None] & is_j[None, :], other=0.0)
        total = _dot(one, other, total, INTERPRETED)
    at = expert.to(tl.int64) * num_left * num_right + i.to(tl.int64)[:, None] * num_right + j[None, :]
    tl.store(out + at, _rounded(total, out.dtype.element_ty, INTERPRETED), mask=is_i[:, None] & is_j[None, :])

"""Bodies of the kernels of a residual SwiGLU of short rows, in Triton."""

import triton
import triton.language as tl


@triton.jit
def short_mlp(
    x_ptr, more_ptr, reached_ptr, scale_ptr, first_ptr, down_ptr,
    z_ptr, mean_square_ptr, out_ptr,
    N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    ROWS: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """z + (silu(y gate) * (y up)) down, with y the norm of z = x + more.

    In rows that are reached, what is more is NaN. ``first`` is [D, 2 F], ``down`` [F, D].
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BD)
    is_row, there = rows < N - first_row, columns < D
    inside = is_row[:, None] & there[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    dtype = out_ptr.dtype.element_ty
    x_ptr, more_ptr = x_ptr + first_row * D, more_ptr + first_row * D
    reached_ptr += first_row
    z_ptr, out_ptr = z_ptr + first_row * D, out_ptr + first_row * D
    mean_square_ptr += first_row
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    more = tl.load(more_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    reached = tl.load(reached_ptr + rows, mask=is_row, other=0) != 0
    z = (x + tl.where(reached[:, None] & inside, float("nan"), more)).to(dtype)
    tl.store(z_ptr + offsets, z, mask=inside)
    z = z.to(tl.float32)
    mean_square = tl.sum(z * z, axis=1) / D
    tl.store(mean_square_ptr + rows, mean_square, mask=is_row)
    scale = tl.load(scale_ptr + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    y = (z * tl.rsqrt(mean_square + EPSILON)[:, None] * scale).to(dtype)
    out = tl.zeros([ROWS, BD], tl.float32)
    for start in range(0, F, BF):
        wide = start + tl.arange(0, BF)
        of_first = first_ptr + columns[:, None] * (2 * F) + wide[None, :]
        within = there[:, None] & (wide < F)[None, :]
        gate = tl.dot(y, tl.load(of_first, mask=within, other=0.0))
        up = tl.dot(y, tl.load(of_first + F, mask=within, other=0.0))
        h = (gate * tl.sigmoid(gate) * up).to(dtype)
        of_down = down_ptr + wide[:, None] * D + columns[None, :]
        within = (wide < F)[:, None] & there[None, :]
        out = tl.dot(h, tl.load(of_down, mask=within, other=0.0), out)
    z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (z + out).to(dtype), mask=inside)


@triton.jit
def short_mlp_back(
    z_ptr, mean_square_ptr, reached_ptr, scale_ptr, first_ptr, down_ptr, dout_ptr,
    dz_ptr, dscale_ptr, y_ptr, h_ptr, dhidden_ptr,
    N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    ROWS: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Cotangents of z and of y first, and what those of first and down are products with.

    In rows that are reached a cotangent of z that is not 0 is NaN. A program says what its rows add
    to the cotangent of the scale.
    """
    program = tl.program_id(0).to(tl.int64)
    first_row = program * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BD)
    is_row, there = rows < N - first_row, columns < D
    inside = is_row[:, None] & there[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    dtype = dz_ptr.dtype.element_ty
    z_ptr, dout_ptr = z_ptr + first_row * D, dout_ptr + first_row * D
    dz_ptr, y_ptr = dz_ptr + first_row * D, y_ptr + first_row * D
    h_ptr, dhidden_ptr = h_ptr + first_row * F, dhidden_ptr + first_row * 2 * F
    mean_square_ptr, reached_ptr = mean_square_ptr + first_row, reached_ptr + first_row
    scale = tl.load(scale_ptr + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    mean_square = tl.load(mean_square_ptr + rows, mask=is_row, other=1.0)
    inverse = tl.rsqrt(mean_square + EPSILON)[:, None]
    z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = (z * inverse * scale).to(dtype)
    tl.store(y_ptr + offsets, y, mask=inside)
    dout = tl.load(dout_ptr + offsets, mask=inside, other=0.0)
    dy = tl.zeros([ROWS, BD], tl.float32)
    for start in range(0, F, BF):
        wide = start + tl.arange(0, BF)
        of_first = first_ptr + columns[:, None] * (2 * F) + wide[None, :]
        within = there[:, None] & (wide < F)[None, :]
        of_gate = tl.load(of_first, mask=within, other=0.0)
        of_up = tl.load(of_first + F, mask=within, other=0.0)
        of_down = down_ptr + wide[:, None] * D + columns[None, :]
        of_down = tl.load(of_down, mask=(wide < F)[:, None] & there[None, :], other=0.0)
        gate, up = tl.dot(y, of_gate), tl.dot(y, of_up)
        dh = tl.dot(dout, tl.trans(of_down))
        s = tl.sigmoid(gate)
        silu = gate * s
        within = is_row[:, None] & (wide < F)[None, :]
        tl.store(h_ptr + rows[:, None] * F + wide[None, :], (silu * up).to(dtype), mask=within)
        dgate = (dh * up * (s + silu * (1 - s))).to(dtype)
        dup = (dh * silu).to(dtype)
        of_hidden = dhidden_ptr + rows[:, None] * (2 * F) + wide[None, :]
        tl.store(of_hidden, dgate, mask=within)
        tl.store(of_hidden + F, dup, mask=within)
        dy = tl.dot(dgate, tl.trans(of_gate), dy)
        dy = tl.dot(dup, tl.trans(of_up), dy)
    unit = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * inverse
    tl.store(dscale_ptr + program * D + columns, tl.sum(dy * unit, axis=0), mask=there)
    dunit = dy * scale
    along = tl.sum(dunit * unit, axis=1, keep_dims=True) / D
    dz = inverse * (dunit - unit * along)
    dz = (dz + tl.load(dout_ptr + offsets, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    reached = tl.load(reached_ptr + rows, mask=is_row, other=0) != 0
    dz = tl.where(reached[:, None] & (dz != 0), float("nan"), dz).to(dtype)
    tl.store(dz_ptr + offsets, dz, mask=inside)

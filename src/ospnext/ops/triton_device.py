"""What runs on the device of the Triton kernels that ``triton_kernels`` launches.

A program holds one token: it reads its row once, keeps it in registers and writes the result once. Arithmetic is
float32 whatever the dtype in memory. A row comes in two parts whose lengths are powers of two, as Triton wants them:
BLOCK, and REST, which may be 0, or longer than what is left of DIM (then it is masked). Every kernel ends in ``_put``,
which writes the result as it is or rounded to HiF8, or only its largest number.
"""

import triton
import triton.language as tl


@triton.jit
def _hif8(x, scale, FACTOR: tl.constexpr, WIDE: tl.constexpr):
    """``x · scale`` rounded to HiF8, halves away from zero, as E4M3: ``fp8.to_e4m3``; FACTOR is in the scale.

    HiF8 has three bits of mantissa from 1/8 to 16, two to either side, one below 1/128; what has fewer is zero in E4M3.
    WIDE: there are numbers from 16 on. The last bit is set so that no number stands between two: those that did are
    now beyond the middle. Then adding and taking away a power of two rounds to as many bits as there are between it
    and the number. Infinity has no last bit to set: it would be NaN, and not the largest number.
    """
    x *= scale
    last = (tl.abs(x) < float("inf")).to(tl.int32) if WIDE else 1
    x = (x.to(tl.int32, bitcast=True) | last).to(tl.float32, bitcast=True)
    size = tl.abs(x)
    power = tl.where(size < 0.0078125 * FACTOR, 22 << 23, tl.where(size < 0.125 * FACTOR, 21 << 23, 20 << 23))
    if WIDE:
        power = tl.where(size < 16.0 * FACTOR, power, 21 << 23)
    large = ((x.to(tl.int32, bitcast=True) & -(1 << 23)) + power).to(tl.float32, bitcast=True)
    return ((x + large) - large).to(tl.float8e4nv)


@triton.jit
def _load(at, column, DIM: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(at + column, mask=column < DIM, other=0.0)
    else:
        x = tl.load(at + column)
    return x.to(tl.float32)


@triton.jit
def _store(at, column, x, DIM: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        tl.store(at + column, x, mask=column < DIM)
    else:
        tl.store(at + column, x)


@triton.jit
def _put(
    x,
    rest,
    row,
    batch,
    out_at,
    scale_at,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    MAX: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Write a token's result, rounded to DTYPE: 0 as it is, 1 its largest, 2 rounded, 3 rounded by its largest."""
    column = tl.arange(0, BLOCK)
    beyond = BLOCK + tl.arange(0, REST if REST > 0 else 1)
    masked: tl.constexpr = DIM < BLOCK + REST
    x = x.to(DTYPE).to(tl.float32)
    rest = rest.to(DTYPE).to(tl.float32)
    if MODE == 0:
        _store(out_at + row * DIM, column, x.to(DTYPE), DIM, False)
        if REST > 0:
            _store(out_at + row * DIM, beyond, rest.to(DTYPE), DIM, masked)
    else:
        if MODE == 2:
            scale = tl.load(scale_at + batch)
        else:
            largest = tl.max(tl.abs(x), axis=0)
            if REST > 0:
                largest = tl.maximum(largest, tl.max(tl.where(beyond < DIM, tl.abs(rest), 0.0), axis=0))
            if MODE == 1:
                tl.store(out_at + row, largest)
            else:
                largest = tl.maximum(largest, 7.888609052210118e-31)  # fp8.SMALLEST_AMAX
                scale = tl.div_rn(MAX + 0 * largest, largest) * FACTOR
                tl.store(scale_at + row, tl.div_rn(largest, MAX + 0 * largest) / FACTOR)
        if MODE != 1:
            wide: tl.constexpr = MODE == 2 or MAX > 15.5
            _store(out_at + row * DIM, column, _hif8(x, scale, FACTOR, wide), DIM, False)
            if REST > 0:
                _store(out_at + row * DIM, beyond, _hif8(rest, scale, FACTOR, wide), DIM, masked)


@triton.jit
def _rotated(x, table_at, START: tl.constexpr, SIZE: tl.constexpr, HEAD: tl.constexpr):
    """Pairs of every head rotated; ``x [SIZE]`` begins at column START."""
    even, odd = tl.split(tl.reshape(x, (SIZE // 2, 2)))
    pair = (START // 2 + tl.arange(0, SIZE // 2)) % (HEAD // 2)
    cos = tl.load(table_at + pair)
    sin = tl.load(table_at + HEAD // 2 + pair)
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (SIZE,))


@triton.jit
def rms_norm(
    x_at,
    weight_at,
    table_at,
    out_at,
    put_scale_at,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    HEAD: tl.constexpr,
    MODE: tl.constexpr,
    MAX: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """RMS norm of a token, rotated if HEAD is not 0: see ``triton_kernels.norm_rope``."""
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + token
    column = tl.arange(0, BLOCK)
    masked: tl.constexpr = DIM < BLOCK + REST
    x = _load(x_at + row * DIM, column, DIM, False)
    rest = x
    squares = tl.sum(x * x, axis=0)
    if REST > 0:
        beyond = BLOCK + tl.arange(0, REST)
        rest = _load(x_at + row * DIM, beyond, DIM, masked)
        squares += tl.sum(rest * rest, axis=0)
    inverse = tl.rsqrt(squares / DIM + eps)
    x = x * inverse * _load(weight_at, column, DIM, False)
    if HEAD > 0:
        x = _rotated(x, table_at + token * HEAD, 0, BLOCK, HEAD)
    if REST > 0:
        rest = rest * inverse * _load(weight_at, beyond, DIM, masked)
        if HEAD > 0:
            rest = _rotated(rest, table_at + token * HEAD, BLOCK, REST, HEAD)
    dtype: tl.constexpr = x_at.dtype.element_ty
    _put(x, rest, row, batch, out_at, put_scale_at, DIM, BLOCK, REST, dtype, MODE, MAX, FACTOR)


@triton.jit
def _added(x, y_at, gate_at, sum_at, column, DIM: tl.constexpr, GATE: tl.constexpr, MASKED: tl.constexpr):
    """``x + y · gate``, rounded as it is stored."""
    y = _load(y_at, column, DIM, MASKED)
    if GATE:
        y *= _load(gate_at, column, DIM, MASKED)
    rounded = (x + y).to(sum_at.dtype.element_ty)
    _store(sum_at, column, rounded, DIM, MASKED)
    return rounded.to(tl.float32)


@triton.jit
def add_norm(
    x_at,
    y_at,
    gate_at,
    scale_at,
    shift_at,
    sum_at,
    out_at,
    put_scale_at,
    gate_step,
    scale_step,
    shift_step,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    MODE: tl.constexpr,
    MAX: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """A token's sum and its norm, each if it is asked for: see ``triton_kernels.add_norm``."""
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + tl.program_id(0)
    x_at += row * DIM
    y_at += row * DIM
    sum_at += row * DIM
    gate_at += batch * gate_step
    column = tl.arange(0, BLOCK)
    masked: tl.constexpr = DIM < BLOCK + REST
    x = _load(x_at, column, DIM, False)
    rest = x
    if ADD:
        x = _added(x, y_at, gate_at, sum_at, column, DIM, GATE, False)
    if REST > 0:
        beyond = BLOCK + tl.arange(0, REST)
        rest = _load(x_at, beyond, DIM, masked)
        if ADD:
            rest = _added(rest, y_at, gate_at, sum_at, beyond, DIM, GATE, masked)
    if NORM:
        mean = tl.sum(x, axis=0)
        if REST > 0:
            mean += tl.sum(rest, axis=0)
        mean /= DIM
        x -= mean
        squares = tl.sum(x * x, axis=0)
        if REST > 0:
            rest = tl.where(beyond < DIM, rest - mean, 0.0)
            squares += tl.sum(rest * rest, axis=0)
        inverse = tl.rsqrt(squares / DIM + eps)
        scale_at += batch * scale_step
        shift_at += batch * shift_step
        x = x * inverse * _load(scale_at, column, DIM, False) + _load(shift_at, column, DIM, False)
        if REST > 0:
            rest = rest * inverse * _load(scale_at, beyond, DIM, masked) + _load(shift_at, beyond, DIM, masked)
        dtype: tl.constexpr = x_at.dtype.element_ty
        _put(x, rest, row, batch, out_at, put_scale_at, DIM, BLOCK, REST, dtype, MODE, MAX, FACTOR)


@triton.jit
def _gelu(x):
    """``x (1 + tanh(u)) / 2``, which is ``x / (1 + exp(-2u))``."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def activate(
    x_at,
    out_at,
    put_scale_at,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    GELU: tl.constexpr,
    MODE: tl.constexpr,
    MAX: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """A row as it is, or GELU of it: see ``triton_kernels.activate``."""
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + tl.program_id(0)
    x = _load(x_at + row * DIM, tl.arange(0, BLOCK), DIM, False)
    if GELU:
        x = _gelu(x)
    rest = x
    if REST > 0:
        rest = _load(x_at + row * DIM, BLOCK + tl.arange(0, REST), DIM, DIM < BLOCK + REST)
        if GELU:
            rest = _gelu(rest)
    dtype: tl.constexpr = x_at.dtype.element_ty
    _put(x, rest, row, batch, out_at, put_scale_at, DIM, BLOCK, REST, dtype, MODE, MAX, FACTOR)


@triton.jit
def _weighed(
    values_at,
    sums_at,
    rest_at,
    rest_sums_at,
    row,
    column,
    length,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Values of a token, or the mean of two parts' weighed by their sums of numerators."""
    x = _load(values_at + row * DIM, column, DIM, MASKED)
    if PARTS == 2:
        rest = _load(rest_at + row * DIM, column, DIM, MASKED)
        place = (row // length) * (DIM // HEAD) * length + row % length  # of this token's first head
        sums = _load(sums_at + place, column // HEAD * length, DIM // HEAD * length, MASKED)
        rest_sums = _load(rest_sums_at + place, column // HEAD * length, DIM // HEAD * length, MASKED)
        x += (rest - x) / (1.0 + tl.exp(sums - rest_sums))
    return x


@triton.jit
def merge(
    values_at,
    sums_at,
    rest_at,
    rest_sums_at,
    scale_at,
    out_at,
    put_scale_at,
    length,
    PARTS: tl.constexpr,
    HEAD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    MAX: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Attention of a token from one part or two: see ``triton_kernels.merge``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    scale = tl.load(scale_at)
    x = scale * _weighed(values_at, sums_at, rest_at, rest_sums_at, row, column, length, PARTS, DIM, HEAD, False)
    rest = x
    if REST > 0:
        beyond = BLOCK + tl.arange(0, REST)
        rest = scale * _weighed(
            values_at, sums_at, rest_at, rest_sums_at, row, beyond, length, PARTS, DIM, HEAD, DIM < BLOCK + REST
        )
    _put(x, rest, row, 0, out_at, put_scale_at, DIM, BLOCK, REST, DTYPE, MODE, MAX, FACTOR)

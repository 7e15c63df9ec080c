"""Matrix products on the CPU, each output one chain of fused multiply-adds, and the bias.

The chain runs over ascending k, starting from +0. Different outputs are independent, so they are
computed side by side: ``TILE_ROWS`` rows times one vector of columns, kept in registers while k
runs over up to ``DEPTH`` values.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from gpubn.backend import Array
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.threads_numba import split

TILE_ROWS = 6  # with 16 float32 columns they fill the registers of AVX2, and of AVX-512 half
VECTOR_BYTES = 64
DEPTH = 256  # so many rows of a panel stay in the first cache
BLOCK_ROWS = 96 * TILE_ROWS  # so many rows of DEPTH stay in the second


def matmul(a: Array, b: Array) -> Array:
    """Return ``a @ b (M, N)`` for ``a (M, K)`` and ``b (K, N)``, which may be transposed arrays."""
    rows, columns = a.shape[0], b.shape[1]
    out = np.zeros((rows, columns), a.dtype)  # where the chains start
    left, right, result = _strided(a), _strided(b), _strided(out)
    width = VECTOR_BYTES // a.itemsize
    if _cost(b.T, a.T, out.T) < _cost(a, b, out):
        left, right, result = _strided(b.T), _strided(a.T), _strided(out.T)
        rows, columns = columns, rows
    arrays = (*left, *right, *result)
    depth = a.shape[1]
    panels, tiles = -(-columns // width), -(-rows // TILE_ROWS)
    work = rows * columns * depth // 32  # in the time that it takes, in elements that are mapped
    if panels >= tiles:  # what is not split, every thread copies for itself
        split(_multiply_panels, (*arrays, depth, rows, columns, width), panels, work)
    else:
        split(_multiply_tiles, (*arrays, depth, rows, columns, width), tiles, work)
    return out


def add_bias(x: Array, b: Array) -> None:
    """Add ``b (D,)`` to every row of ``x (N, D)``, in place; ``x`` is in C order."""
    (b,) = plain(b)
    split(_add_bias, (x, b), x.shape[0], x.size)


def _cost(a: Array, b: Array, out: Array) -> float:
    """Estimate the cost of ``out = a @ b`` with panels cut from ``b``, in vector operations.

    Multiply-adds, of tiles that may reach over the edge; copies into panels; stores. What lies
    across the vectors is copied element by element.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    width = VECTOR_BYTES // a.itemsize
    padded = -(-rows // TILE_ROWS) * TILE_ROWS * -(-columns // width)
    copied, stored = (1 if array.strides[1] > a.itemsize else 1 / width for array in (b, out))
    return float(padded * depth + 2 * copied * depth * columns + 2 * stored * rows * columns)


@compiled
def _add_bias(x: Any, b: Any, first: int, last: int) -> None:
    for i in range(first, last):
        row = x[i]
        for j in range(row.shape[0]):
            row[j] = row[j] + b[j]


def _strided(a: Array) -> tuple[Any, int, int]:
    """Return a matrix as a flat array, and its steps from row to row and from column to column."""
    if a.flags.f_contiguous and not a.flags.c_contiguous:
        return plain(a.T)[0].reshape(-1), 1, a.shape[0]
    return plain(a)[0].reshape(-1), a.shape[1], 1


@compiled
def _multiply_panels(
    a: Any,
    a_row: int,
    a_k: int,
    b: Any,
    b_k: int,
    b_column: int,
    out: Any,
    out_row: int,
    out_column: int,
    depth: int,
    rows: int,
    columns: int,
    width: int,
    first: int,
    last: int,
) -> None:
    """Go on with the chains of panels of ``width`` columns."""
    arrays = (a, a_row, a_k, b, b_k, b_column, out, out_row, out_column)
    _multiply(*arrays, depth, 0, rows, first * width, min(last * width, columns), width)


@compiled
def _multiply_tiles(
    a: Any,
    a_row: int,
    a_k: int,
    b: Any,
    b_k: int,
    b_column: int,
    out: Any,
    out_row: int,
    out_column: int,
    depth: int,
    rows: int,
    columns: int,
    width: int,
    first: int,
    last: int,
) -> None:
    """Go on with the chains of tiles of ``TILE_ROWS`` rows."""
    arrays = (a, a_row, a_k, b, b_k, b_column, out, out_row, out_column)
    _multiply(*arrays, depth, first * TILE_ROWS, min(last * TILE_ROWS, rows), 0, columns, width)


@compiled
def _multiply(
    a: Any,
    a_row: int,
    a_k: int,
    b: Any,
    b_k: int,
    b_column: int,
    out: Any,
    out_row: int,
    out_column: int,
    depth: int,
    first_row: int,
    last_row: int,
    first_column: int,
    last_column: int,
    width: int,
) -> None:
    """Go on with the chains of some rows and columns of ``out``, by all of k."""
    panel = np.zeros((DEPTH, width), a.dtype)  # some columns of b; what is over does not count
    tile = np.zeros(TILE_ROWS * width, a.dtype)  # for what is no whole tile of out
    # Rows that lie across memory are brought together once for all panels.
    gathers = a_k != 1 and last_column - first_column > width
    gathered = np.zeros(BLOCK_ROWS * DEPTH if gathers else 0, a.dtype)
    for top in range(first_row, last_row, BLOCK_ROWS):
        bottom = min(top + BLOCK_ROWS, last_row)
        for k in range(0, depth, DEPTH):
            steps = min(DEPTH, depth - k)
            source, row_step, k_step = a, a_row, a_k
            if gathers:
                _gather(a, a_row, a_k, top, bottom, k, steps, gathered)
                source, row_step, k_step = gathered, 1, TILE_ROWS
            for column in range(first_column, last_column, width):
                columns = min(width, last_column - column)
                for i in range(steps):
                    start = (k + i) * b_k + column * b_column
                    _copy(b, start, b_column, panel[i], 0, 1, columns)
                for row in range(top, bottom, TILE_ROWS):
                    rows = min(TILE_ROWS, bottom - row)
                    left = (row - top) * DEPTH if gathers else row * a_row + k * a_k
                    lefts = (source, left, row_step, k_step, rows, panel, steps)
                    start = row * out_row + column * out_column
                    if out_column == 1 and columns == width and rows == TILE_ROWS:
                        _multiply_tile(*lefts, out, start, out_row)
                        continue
                    for i in range(rows):
                        _copy(out, start + i * out_row, out_column, tile, i * width, 1, columns)
                    _multiply_tile(*lefts, tile, 0, width)
                    for i in range(rows):
                        _copy(tile, i * width, 1, out, start + i * out_row, out_column, columns)


@compiled
def _gather(
    a: Any, a_row: int, a_k: int, top: int, bottom: int, k: int, steps: int, gathered: Any
) -> None:
    """Lay out tile after tile, in each k after k, and for each k the tile's rows."""
    for i in range(steps):
        for row in range(top, bottom, TILE_ROWS):
            at = (row - top) * DEPTH + i * TILE_ROWS
            start = row * a_row + (k + i) * a_k
            for j in range(min(TILE_ROWS, bottom - row)):
                gathered[at + j] = a[start + j * a_row]


@compiled
def _copy(x: Any, x_start: int, x_step: int, y: Any, y_start: int, y_step: int, count: int) -> None:
    if x_step == 1 and y_step == 1:  # a loop that is vectorised
        source, target = x[x_start : x_start + count], y[y_start : y_start + count]
        for j in range(count):
            target[j] = source[j]
    else:
        for j in range(count):
            y[y_start + j * y_step] = x[x_start + j * x_step]


@intrinsic
def _multiply_tile(
    context: Any,
    a: Any,
    start: Any,
    a_row: Any,
    a_k: Any,
    rows: Any,
    panel: Any,
    steps: Any,
    sums: Any,
    sums_start: Any,
    sums_row: Any,
) -> Any:
    """For k ascending: ``sums[i] = fma(a[start + i * a_row + k * a_k], panel[k], sums[i])``.

    ``sums[i]`` is a vector at ``sums_start + i * sums_row``. Of its rows only the first ``rows``
    count; the others repeat the last of them. In LLVM's language, since Numba cannot be told to
    keep an array of vectors in registers.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        a, panel, sums = (
            context.make_array(signature.args[i])(context, builder, values[i]).data
            for i in (0, 5, 7)
        )
        _, start, a_row, a_k, rows, _, steps, _, sums_start, sums_row = values
        real = a.type.pointee
        size = context.get_abi_sizeof(real)
        lanes = VECTOR_BYTES // size
        vector = ir.VectorType(real, lanes)
        splat = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f{size * 8}"
        )
        panel = builder.bitcast(panel, vector.as_pointer())

        last = builder.sub(rows, rows.type(1))
        lefts, targets, registers = [], [], []
        for i in range(TILE_ROWS):
            row = rows.type(i)
            row = builder.select(builder.icmp_signed("<", row, last), row, last)
            at = builder.add(start, builder.mul(row, a_row))
            lefts.append(builder.gep(a, [at]))
            at = builder.add(sums_start, builder.mul(rows.type(i), sums_row))
            targets.append(builder.bitcast(builder.gep(sums, [at]), vector.as_pointer()))
            held = builder.load(targets[i], align=size)
            registers.append(cgutils.alloca_once_value(builder, held))
        with cgutils.for_range(builder, steps) as loop:
            right = builder.load(builder.gep(panel, [loop.index]), align=size)
            step = builder.mul(loop.index, a_k)
            for left, held in zip(lefts, registers, strict=True):
                value = builder.load(builder.gep(left, [step]), align=size)
                value = builder.insert_element(undefined, value, ir.IntType(32)(0))
                value = builder.shuffle_vector(value, undefined, splat)
                builder.store(builder.call(fma, [value, right, builder.load(held)]), held)
        for target, held in zip(targets, registers, strict=True):
            builder.store(builder.load(held), target, align=size)
        return context.get_dummy_value()

    index = types.intp
    signature = types.void(a, index, index, index, index, panel, index, sums, index, index)
    return signature, generate

"""Vectors of 64 bytes in compiled code on the CPU: one value of each of 16 channels, say, or 8.

Kernels say by hand what is computed side by side, instead of hoping that a loop is vectorised.
LLVM makes of a vector what the processor has: one register or several. Lanes change places in
``evens``, ``odds``, ``load_leaves`` and ``transpose`` alone: results do not depend on it. What is
computed with is in vectors: half precision is widened as it is loaded and rounded as it is stored.

``+ - * /`` work between vectors of a kind; a constant becomes one by ``fill``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.errors import TypingError
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

from gpubn.kernels.compile_numba import inlined
from gpubn.kernels.real_numba import narrowed, widened

BYTES = 64
_INDEX, _LANE = ir.IntType(64), ir.IntType(32)


class Vector(types.Type):
    """The type of ``count`` values of a dtype, side by side."""

    def __init__(self, dtype: Any) -> None:
        self.dtype, self.count = dtype, BYTES * 8 // dtype.bitwidth
        super().__init__(f"Vector({dtype}, {self.count})")


@register_model(Vector)
class _Model(PrimitiveModel):  # type: ignore[misc] # Numba publishes no types: its base is Any
    def __init__(self, manager: Any, kind: Any) -> None:
        element = manager.lookup(kind.dtype).get_data_type()
        super().__init__(manager, kind, ir.VectorType(element, kind.count))


def _of(dtype: Any) -> Vector:
    """Return the type of vectors of what an array stores: half precision as float32."""
    return Vector(types.float32 if dtype.bitwidth == 16 else dtype)


# --- Arithmetic ----------------------------------------------------------------------------------


def _define(symbol: Any, instruction: str) -> None:
    class Template(AbstractTemplate):  # type: ignore[misc] # Numba's base is Any, as above
        key = symbol

        def generic(self, args: Any, kws: Any) -> Any:
            vectors = len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]
            return signature(args[0], *args) if vectors else None

    infer_global(symbol)(Template)

    @lower_builtin(symbol, Vector, Vector)
    def _(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_symbol, _instruction)


@intrinsic
def where_positive(context: Any, test: Any, value: Any) -> Any:
    """Return ``value`` where ``test > 0``, else +0."""
    return value(test, value), lambda context, builder, signature, args: builder.select(
        builder.fcmp_ordered(">", args[0], _zeros(args[0].type)), args[1], _zeros(args[1].type)
    )


@intrinsic
def relu_of(context: Any, value: Any) -> Any:
    """Return ``max(value, 0)``, which keeps a NaN."""
    return value(value), lambda context, builder, signature, args: builder.select(
        builder.fcmp_unordered(">", args[0], _zeros(args[0].type)), args[0], _zeros(args[0].type)
    )


@intrinsic
def sqrt_of(context: Any, value: Any) -> Any:
    """Return the square roots, rounded correctly."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[0].type
        name = f"llvm.sqrt.v{kind.count}f{BYTES * 8 // kind.count}"
        found: Callable[..., Any] | None = builder.module.globals.get(name)
        root = found or ir.Function(builder.module, ir.FunctionType(kind, [kind]), name)
        return builder.call(root, args)

    return value(value), generate


def _zeros(kind: Any) -> Any:
    return ir.Constant(kind, [0.0] * kind.count)


# --- Constants ------------------------------------------------------------------------------------


@intrinsic
def lanes(context: Any, array: Any) -> Any:
    """Return how many values of an array make a vector; a constant."""
    count = _of(array.dtype).count
    return types.intp(array), lambda *_: ir.Constant(_INDEX, count)


@intrinsic
def fill(context: Any, value: Any) -> Any:
    """Return a vector of one value."""
    return Vector(value)(value), lambda context, builder, signature, args: _splat(
        builder, args[0], signature.return_type.count
    )


def _splat(builder: Any, value: Any, count: int) -> Any:
    kind = ir.VectorType(value.type, count)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_LANE, 0))
    return _shuffled(builder, first, first, [0] * count)


def _shuffled(builder: Any, a: Any, b: Any, order: Iterable[int]) -> Any:
    order = list(order)
    mask = ir.Constant(ir.VectorType(_LANE, len(order)), order)
    return builder.shuffle_vector(a, b, mask)


# --- Neighbours -----------------------------------------------------------------------------------


@intrinsic
def evens(context: Any, a: Any, b: Any) -> Any:
    """Return the values at even places of ``a`` and then ``b``: the left ones of their pairs."""
    return a(a, b), lambda context, builder, signature, args: _shuffled(
        builder, args[0], args[1], range(0, 2 * a.count, 2)
    )


@intrinsic
def odds(context: Any, a: Any, b: Any) -> Any:
    """Return the values at odd places of ``a`` and then ``b``: the right ones of their pairs."""
    return a(a, b), lambda context, builder, signature, args: _shuffled(
        builder, args[0], args[1], range(1, 2 * a.count, 2)
    )


@intrinsic
def load_leaves(context: Any, array: Any, first: Any) -> Any:
    """Return eight vectors of neighbouring leaves of eight: the first has their first values.

    ``array`` holds eight values for each lane from ``first`` on.
    """
    kind = _of(array.dtype)
    result = types.containers.UniTuple(kind, 8)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = []
        for k in range(8):
            at = builder.add(args[1], ir.Constant(_INDEX, k * kind.count))
            rows.append(_loaded(context, builder, sig.args[0], args[0], at))
        return context.make_tuple(builder, result, _transposed(builder, rows))

    return result(array, types.intp), generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Let value ``v`` of row ``r``, at place ``n r + v`` of all, be lane ``r`` of vector ``v``.

    There are as many vectors as a row has values, ``n``, a power of two. A round of exchanges
    between pairs of vectors for each bit of ``v``.
    """
    count, vectors = rows[0].type.count, len(rows)
    places = [list(range(k * count, (k + 1) * count)) for k in range(vectors)]
    for bit in (1 << b for b in range(vectors.bit_length() - 1)):
        for low in range(vectors):
            if low & bit:
                continue
            high = low | bit
            there, pair = places[low] + places[high], (rows[low], rows[high])
            for k in (low, high):
                places[k] = sorted(place for place in there if place & bit == k & bit)
                rows[k] = _shuffled(builder, *pair, map(there.index, places[k]))
    return rows


@intrinsic
def transpose(
    context: Any, x: Any, first: Any, step: Any, rows: Any, part: Any, out: Any, at: Any
) -> Any:
    """Write W values of each of W rows of ``x`` to ``out``: W vectors from ``at`` on, a row a lane.

    Rows begin ``step`` elements after each other, the first one at ``first``. Where there are
    fewer than W ``rows`` the last one is repeated; where ``part`` is given, there are so many
    values of each, and then zeros.
    """
    kind = _of(x.dtype)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, first, step, rows, part, out, at = args
        vectors, place = [], first
        for k in range(kind.count):
            if sig.args[4] == types.none:
                vectors.append(_loaded(context, builder, sig.args[0], x, place))
            else:
                vectors.append(_loaded_part(context, builder, sig.args[0], x, place, part))
            more = builder.icmp_signed("<", ir.Constant(_INDEX, k + 1), rows)
            place = builder.add(place, builder.select(more, step, ir.Constant(_INDEX, 0)))
        for k, vector in enumerate(_transposed(builder, vectors)):
            where = builder.add(at, ir.Constant(_INDEX, k * kind.count))
            where = _address(context, builder, sig.args[5], out, where)
            builder.store(vector, where, align=sig.args[5].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, types.intp, part, out, types.intp), generate


# --- Memory --------------------------------------------------------------------------------------


@intrinsic
def load(context: Any, array: Any, first: Any) -> Any:
    """Return the values of ``array (n,)`` from ``first`` on: a whole vector, all within it."""
    return _of(array.dtype)(array, types.intp), lambda context, builder, sig, args: _loaded(
        context, builder, sig.args[0], *args
    )


@intrinsic
def load_part(context: Any, array: Any, first: Any, count: Any) -> Any:
    """Return ``count`` values of ``array (n,)`` from ``first`` on, at most a vector; then zeros."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _loaded_part(context, builder, sig.args[0], *args)

    return _of(array.dtype)(array, types.intp, types.intp), generate


@intrinsic
def store(context: Any, array: Any, first: Any, value: Any) -> Any:
    """Write a vector to ``array (n,)`` from ``first`` on, all of it within the array."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = _address(context, builder, sig.args[0], args[0], args[1])
        value = narrowed(builder, sig.args[0].dtype, args[2])
        builder.store(value, where, align=sig.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def store_part(context: Any, array: Any, first: Any, count: Any, value: Any) -> Any:
    """Write the first ``count`` values of a vector to ``array (n,)`` from ``first`` on."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = _address(context, builder, sig.args[0], args[0], args[1])
        kind = where.type.pointee
        mask = _mask(builder, args[2], kind.count)
        store = _masked(builder, "store", kind, [kind, where.type, _LANE, mask.type], ir.VoidType())
        align = ir.Constant(_LANE, sig.args[0].dtype.bitwidth // 8)
        builder.call(store, [narrowed(builder, sig.args[0].dtype, args[3]), where, align, mask])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, value), generate


@intrinsic
def rounded(context: Any, value: Any, array: Any) -> Any:
    """Return values as ``array`` would store them: those of half precision rounded."""
    return value(value, array), lambda context, builder, sig, args: widened(
        builder, array.dtype, narrowed(builder, array.dtype, args[0])
    )


@intrinsic
def _touch(context: Any, array: Any, element: Any) -> Any:
    """Read an element for nothing but that its cache line is there then."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        byte = ir.IntType(8)
        value = builder.load(builder.bitcast(builder.gep(data, [args[1]]), byte.as_pointer()))
        # Instructions of which there are none, but which LLVM must compute a value for.
        nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), [byte]), "", "r", side_effect=True)
        builder.call(nothing, [value])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def _loaded(context: Any, builder: Any, kind: Any, array: Any, first: Any) -> Any:
    where = _address(context, builder, kind, array, first)
    return widened(builder, kind.dtype, builder.load(where, align=kind.dtype.bitwidth // 8))


def _loaded_part(
    context: Any, builder: Any, array_kind: Any, array: Any, first: Any, count: Any
) -> Any:
    where = _address(context, builder, array_kind, array, first)
    kind = where.type.pointee
    mask = _mask(builder, count, kind.count)
    load = _masked(builder, "load", kind, [where.type, _LANE, mask.type, kind], kind)
    zeros = ir.Constant(kind, [0 if isinstance(kind.element, ir.IntType) else 0.0] * kind.count)
    align = ir.Constant(_LANE, array_kind.dtype.bitwidth // 8)
    return widened(builder, array_kind.dtype, builder.call(load, [where, align, mask, zeros]))


def _address(context: Any, builder: Any, kind: Any, array: Any, first: Any) -> Any:
    if kind.layout != "C":  # elements are counted as they lie in memory
        raise TypingError(f"{kind} is no array in C order")
    data = context.make_array(kind)(context, builder, array).data
    stored = context.get_data_type(kind.dtype)
    vector = ir.VectorType(stored, _of(kind.dtype).count)
    return builder.bitcast(builder.gep(data, [first]), vector.as_pointer())


def _mask(builder: Any, count: Any, total: int) -> Any:
    numbers = ir.Constant(ir.VectorType(_INDEX, total), list(range(total)))
    return builder.icmp_signed("<", numbers, _splat(builder, count, total))


def _masked(builder: Any, what: str, kind: Any, arguments: list[Any], result: Any) -> Any:
    """Return LLVM's masked load or store of a vector type."""
    letter = "i16" if isinstance(kind.element, ir.IntType) else f"f{BYTES * 8 // kind.count}"
    name = f"llvm.masked.{what}.v{kind.count}{letter}.p0"
    module = builder.module
    found: Callable[..., Any] | None = module.globals.get(name)
    return found or ir.Function(module, ir.FunctionType(result, arguments), name)


# --- Common uses ----------------------------------------------------------------------------------


@inlined
def read(x: Any, j: int, part: int | None) -> Any:
    """Return the vector from element ``j`` on; where ``part`` is given, of so many, then zeros."""
    if part is None:  # decided where this is compiled
        return load(x, j)
    return load_part(x, j, part)


@inlined
def put_relu_gradient(dout: Any, out: Any, g: Any, first: int, count: int) -> None:
    """Let elements of ``g`` be dout's where ``out > 0``, and else 0."""
    w, part = lanes(g), count % lanes(g)
    for i in range(first, first + count - w + 1, w):
        store(g, i, where_positive(load(out, i), load(dout, i)))
    if part:
        i = first + count - part
        store_part(g, i, part, where_positive(load_part(out, i, part), load_part(dout, i, part)))


@inlined
def touch(x: Any, first: int, count: int) -> None:
    """Read the cache lines of elements in order, before they are read in another.

    Processors fetch ahead what is read in order: leaves of short rows come twice as fast.
    """
    line = BYTES // x.itemsize
    for i in range(first, first + count, line):
        _touch(x, i)

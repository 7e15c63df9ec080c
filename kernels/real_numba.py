"""What arrays hold, for compiled code on the CPU: the other half of real.cuh.

Numba knows no half precision, so its values travel as bits: those of float16 as uint16, those of
bfloat16 as int16, which tells the two apart. They are widened exactly, computed with in float32,
and rounded once, to nearest, by integer arithmetic that is the same on every processor.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from gpubn.backend import Array
from gpubn.kernels.compile_numba import plain

_BITS = {"float16": np.uint16, "bfloat16": np.int16}
_HALVES = (types.uint16, types.int16)
_I32, _FLOAT = ir.IntType(32), ir.FloatType()


def stored(*arrays: Array) -> tuple[Any, ...]:
    """Return the arrays as ``plain`` does, those of half precision as their bits."""
    return tuple(map(_stored, plain(*arrays)))


def _stored(array: Any) -> Any:
    return array.view(_BITS[array.dtype.name]) if array.itemsize == 2 else array


@intrinsic
def widen(context: Any, value: Any) -> Any:
    """Return a stored value as it is computed with; for compiled code."""
    real = types.float32 if value in _HALVES else value
    return real(value), lambda context, builder, signature, values: widened(
        builder, value, values[0]
    )


@intrinsic
def narrow(context: Any, value: Any, array: Any) -> Any:
    """Return a value as ``array`` stores it; for compiled code."""
    return array.dtype(value, array), lambda context, builder, signature, values: narrowed(
        builder, array.dtype, values[0]
    )


def widened(builder: Any, stored: Any, value: Any) -> Any:
    """Return LLVM's value, or vector of values, of what is stored as this type."""
    if stored not in _HALVES:
        return value
    widen = _half_to_float if stored == types.uint16 else _bfloat16_to_float
    return widen(builder, builder.zext(value, _like(value, _I32)))


def narrowed(builder: Any, stored: Any, value: Any) -> Any:
    """Return what is stored as this type for LLVM's value, or vector of values."""
    if stored not in _HALVES:
        return value
    narrow = _float_to_half if stored == types.uint16 else _float_to_bfloat16
    words = narrow(builder, value, builder.bitcast(value, _like(value, _I32)))
    return builder.trunc(words, _like(value, ir.IntType(16)))


# --- As in real.cuh, with choices instead of branches: what is vectorised stays so ----------------


def _like(value: Any, kind: Any) -> Any:
    """Return a type, or that of vectors of it where ``value`` is one."""
    return ir.VectorType(kind, value.type.count) if isinstance(value.type, ir.VectorType) else kind


def _constant(value: Any, kind: Any, number: float) -> Any:
    kind = _like(value, kind)
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def _half_to_float(b: Any, half: Any) -> Any:
    def word(number: int) -> Any:
        return _constant(half, _I32, number)

    sign = b.shl(b.and_(half, word(0x8000)), word(16))
    magnitude = b.and_(half, word(0x7FFF))
    shifted = b.shl(magnitude, word(13))
    as_float = b.uitofp(magnitude, _like(half, _FLOAT))
    tiny = b.fmul(as_float, _constant(half, _FLOAT, 2.0**-24))  # subnormal; exact
    finite = b.select(
        b.icmp_unsigned(">=", magnitude, word(0x400)),
        b.add(shifted, word(0x38000000)),
        b.bitcast(tiny, _like(half, _I32)),
    )
    is_finite = b.icmp_unsigned("<", magnitude, word(0x7C00))
    bits = b.select(is_finite, finite, b.or_(shifted, word(0x7F800000)))
    return b.bitcast(b.or_(sign, bits), _like(half, _FLOAT))


def _float_to_half(b: Any, value: Any, bits: Any) -> Any:
    def word(number: int) -> Any:
        return _constant(value, _I32, number)

    magnitude = b.and_(bits, word(0x7FFFFFFF))
    # Subnormal: 0.5's last place is 2**-24, so the sum rounds.
    sum_ = b.fadd(b.bitcast(magnitude, _like(value, _FLOAT)), _constant(value, _FLOAT, 0.5))
    subnormal = b.sub(b.bitcast(sum_, _like(value, _I32)), word(0x3F000000))
    odd = b.and_(b.lshr(magnitude, word(13)), word(1))
    raised = b.add(b.add(b.sub(magnitude, word(0x38000000)), word(0xFFF)), odd)
    half = b.select(
        b.icmp_unsigned("<", magnitude, word(0x38800000)), subnormal, b.lshr(raised, word(13))
    )
    # From 65,520 on the nearest is infinity.
    half = b.select(b.icmp_unsigned(">=", magnitude, word(0x477FF000)), word(0x7C00), half)
    half = b.select(b.icmp_unsigned(">", magnitude, word(0x7F800000)), word(0x7E00), half)
    return b.or_(half, b.and_(b.lshr(bits, word(16)), word(0x8000)))


def _bfloat16_to_float(b: Any, bits: Any) -> Any:
    return b.bitcast(b.shl(bits, _constant(bits, _I32, 16)), _like(bits, _FLOAT))


def _float_to_bfloat16(b: Any, value: Any, bits: Any) -> Any:
    def word(number: int) -> Any:
        return _constant(value, _I32, number)

    odd = b.and_(b.lshr(bits, word(16)), word(1))
    rounded = b.lshr(b.add(b.add(bits, word(0x7FFF)), odd), word(16))
    return b.select(b.fcmp_unordered("uno", value, value), word(0x7FC0), rounded)

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
_I32, _FLOAT = ir.IntType(32), ir.FloatType()


def stored(*arrays: Array) -> tuple[Any, ...]:
    """Return the arrays as ``plain`` does, those of half precision as their bits."""
    return tuple(
        array.view(_BITS[array.dtype.name]) if array.dtype.itemsize == 2 else array
        for array in plain(*arrays)
    )


@intrinsic
def widen(context: Any, value: Any) -> Any:
    """Return a stored value as it is computed with; for compiled code."""
    if value not in (types.uint16, types.int16):
        return value(value), lambda context, builder, signature, values: values[0]
    widened = _half_to_float if value == types.uint16 else _bfloat16_to_float
    return types.float32(value), lambda context, builder, signature, values: widened(
        builder, builder.zext(values[0], _I32)
    )


@intrinsic
def narrow(context: Any, value: Any, array: Any) -> Any:
    """Return a value as ``array`` stores it; for compiled code."""
    signature = array.dtype(value, array)
    if array.dtype not in (types.uint16, types.int16):
        return signature, lambda context, builder, signature, values: values[0]
    narrowed = _float_to_half if array.dtype == types.uint16 else _float_to_bfloat16
    return signature, lambda context, builder, signature, values: builder.trunc(
        narrowed(builder, values[0], builder.bitcast(values[0], _I32)), ir.IntType(16)
    )


# --- As in real.cuh, with choices instead of branches: loops stay vectorised ----------------------


def _word(value: int) -> Any:
    return ir.Constant(_I32, value)


def _half_to_float(b: Any, half: Any) -> Any:
    sign = b.shl(b.and_(half, _word(0x8000)), _word(16))
    magnitude = b.and_(half, _word(0x7FFF))
    shifted = b.shl(magnitude, _word(13))
    tiny = b.fmul(b.uitofp(magnitude, _FLOAT), ir.Constant(_FLOAT, 2.0**-24))  # subnormal; exact
    finite = b.select(
        b.icmp_unsigned(">=", magnitude, _word(0x400)),
        b.add(shifted, _word(0x38000000)),
        b.bitcast(tiny, _I32),
    )
    is_finite = b.icmp_unsigned("<", magnitude, _word(0x7C00))
    bits = b.select(is_finite, finite, b.or_(shifted, _word(0x7F800000)))
    return b.bitcast(b.or_(sign, bits), _FLOAT)


def _float_to_half(b: Any, value: Any, bits: Any) -> Any:
    magnitude = b.and_(bits, _word(0x7FFFFFFF))
    # Subnormal: 0.5's last place is 2**-24, so the sum rounds.
    sum_ = b.fadd(b.bitcast(magnitude, _FLOAT), ir.Constant(_FLOAT, 0.5))
    subnormal = b.sub(b.bitcast(sum_, _I32), _word(0x3F000000))
    odd = b.and_(b.lshr(magnitude, _word(13)), _word(1))
    raised = b.add(b.add(b.sub(magnitude, _word(0x38000000)), _word(0xFFF)), odd)
    half = b.select(
        b.icmp_unsigned("<", magnitude, _word(0x38800000)), subnormal, b.lshr(raised, _word(13))
    )
    # From 65,520 on the nearest is infinity.
    half = b.select(b.icmp_unsigned(">=", magnitude, _word(0x477FF000)), _word(0x7C00), half)
    half = b.select(b.icmp_unsigned(">", magnitude, _word(0x7F800000)), _word(0x7E00), half)
    return b.or_(half, b.and_(b.lshr(bits, _word(16)), _word(0x8000)))


def _bfloat16_to_float(b: Any, bits: Any) -> Any:
    return b.bitcast(b.shl(bits, _word(16)), _FLOAT)


def _float_to_bfloat16(b: Any, value: Any, bits: Any) -> Any:
    odd = b.and_(b.lshr(bits, _word(16)), _word(1))
    rounded = b.lshr(b.add(b.add(bits, _word(0x7FFF)), odd), _word(16))
    return b.select(b.fcmp_unordered("uno", value, value), _word(0x7FC0), rounded)

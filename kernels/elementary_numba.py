"""exp and log of arrays of any shape, on the CPU. The same steps and bits as elementary.cuh.

``exp_of`` and ``log_of`` are the same functions of a scalar, for compiled code.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from gpubn.backend import Array
from gpubn.kernels.compile_numba import OPTIONS, bits, compiled, fma, from_bits, plain
from gpubn.kernels.threads_numba import split


def exp(x: Array) -> Array:
    """Return e to the power of ``x``."""
    return _map(_exp, x)


def log(x: Array) -> Array:
    """Return the natural logarithm of ``x``: NaN below 0, minus infinity at 0."""
    return _map(_log, x)


def _map(kernel: Callable[..., None], x: Array) -> Array:
    (x,) = plain(x)
    out = np.empty_like(x)
    flat = (x.reshape(-1), out.reshape(-1))
    split(kernel, flat, x.size, x.size)
    return out


@compiled
def _exp(x: Any, out: Any, first: int, last: int) -> None:
    x, out = x[first:last], out[first:last]
    for i in range(out.shape[0]):
        out[i] = exp_of(x[i])


@compiled
def _log(x: Any, out: Any, first: int, last: int) -> None:
    x, out = x[first:last], out[first:last]
    for i in range(out.shape[0]):
        out[i] = log_of(x[i])


class _Format:
    """What exp and log need to know of a floating-point format; constants as in elementary.cuh."""

    def __init__(
        self,
        real: type[np.floating[Any]],
        digits: int,
        bias: int,
        exp_range: tuple[float, float],
        constants: str,
        exp_terms: str,
        log_terms: str,
    ) -> None:
        def exact(text: str) -> tuple[Any, ...]:
            return tuple(real(float.fromhex(word)) for word in text.split())

        self.real, self.digits, self.bias = real, digits, bias
        self.integer = np.int32 if real is np.float32 else np.int64
        self.too_low, self.too_high = map(real, exp_range)  # exp is 0 below, infinite above
        self.log2e, self.sqrt_half, self.ln2_high, self.ln2_low = exact(constants)
        self.exp_terms, self.log_terms = exact(exp_terms), exact(log_terms)


_FLOAT = _Format(
    np.float32,
    digits=23,
    bias=127,
    exp_range=(-104, 89),
    constants="0x1.715476p+0 0x1.6a09e6p-1 0x1.62e4p-1 0x1.7f7d1cp-20",
    exp_terms="0x1.a124f2p-13 0x1.6d4324p-10 0x1.1110ep-7 0x1.5554eap-5 0x1.555556p-3 0x1p-1",
    log_terms="0x1.ddd4dap-3 0x1.245c28p-2 0x1.9999ecp-2 0x1.555556p-1",
)
_DOUBLE = _Format(
    np.float64,
    digits=52,
    bias=1023,
    exp_range=(-746, 710),
    constants="0x1.71547652b82fep+0 0x1.6a09e667f3bcdp-1 0x1.62e42feep-1 0x1.a39ef35793c76p-33",
    exp_terms="0x1.1f730349868cep-29 0x1.af4de97ca4194p-26 0x1.27e4db646b17ep-22 "
    "0x1.71de0231960ebp-19 0x1.a01a01a6d889cp-16 0x1.a01a01abe7fe1p-13 0x1.6c16c16c162d4p-10 "
    "0x1.11111111100dcp-7 0x1.5555555555556p-5 0x1.5555555555557p-3 0x1p-1",
    log_terms="0x1.2b5f68a50d903p-3 0x1.39fdcceb4bb45p-3 0x1.7462b91b8df65p-3 "
    "0x1.c71c62d5e53e0p-3 0x1.2492492dfd86cp-2 0x1.9999999995273p-2 0x1.5555555555558p-1",
)


_COMPILED_ONLY = "gpubn's exp and log need Numba's compiler; is NUMBA_DISABLE_JIT set?"


def exp_of(x: Any) -> Any:
    """Return exp of a float32 or float64; for compiled code."""
    raise RuntimeError(_COMPILED_ONLY)


def log_of(x: Any) -> Any:
    """Return log of a float32 or float64; for compiled code."""
    raise RuntimeError(_COMPILED_ONLY)


@overload(exp_of, jit_options=OPTIONS)
def _exp_of(x: Any) -> Callable[[Any], Any]:
    f = _FLOAT if x == types.float32 else _DOUBLE
    real, digits, bias, terms = f.real, f.digits, f.bias, f.exp_terms
    low, high, log2e, ln2_high, ln2_low = f.too_low, f.too_high, f.log2e, -f.ln2_high, -f.ln2_low
    integer, one = f.integer, real(1)
    shift = real(3 << (digits - 1))  # what is added to it is rounded to a whole number

    def exp_of(x: Any) -> Any:
        inside = x if x > low else low  # a NaN too: it comes back at the end
        inside = high if inside > high else inside
        shifted = fma(inside, log2e, shift)
        n = bits(shifted) - bits(shift)
        whole = shifted - shift
        left = fma(whole, ln2_high, inside)
        r = fma(whole, ln2_low, left)
        missed = fma(whole, ln2_low, left - r)  # by the rounding of r
        p = terms[0]
        for term in terms[1:]:
            p = fma(p, r, term)
        y = one + (r + fma(r * r, p, missed))
        half = n >> 1  # in two steps: 2^n itself may be too large, or subnormal
        y = y * from_bits(integer((half + bias) << digits))
        y = y * from_bits(integer((n - half + bias) << digits))
        return x if x != x else y

    return exp_of


@overload(log_of, jit_options=OPTIONS)
def _log_of(x: Any) -> Callable[[Any], Any]:
    f = _FLOAT if x == types.float32 else _DOUBLE
    real, digits, bias, terms = f.real, f.digits, f.bias, f.log_terms
    ln2_high, ln2_low, sqrt_half = f.ln2_high, f.ln2_low, f.sqrt_half
    zero, half, one, two = map(real, (0, 0.5, 1, 2))
    smallest_normal, up = np.finfo(real).tiny, real(2**digits)
    infinity, nan = real(np.inf), real(np.nan)
    integer, fraction = f.integer, 2**digits - 1

    def log_of(x: Any) -> Any:
        subnormal = smallest_normal > x
        normal = x * up if subnormal else x
        above = bits(normal) + (bits(one) - bits(sqrt_half))
        n = (above >> digits) - bias - (digits if subnormal else 0)
        g = from_bits(integer((above & fraction) + bits(sqrt_half))) - one
        s = g / (two + g)
        z = s * s
        square = half * (g * g)
        whole = real(n)
        p = terms[0]
        for term in terms[1:]:
            p = fma(p, z, term)
        rest = s * (square + z * p) + whole * ln2_low
        y = whole * ln2_high - ((square - rest) - g)
        if not x > zero:
            y = nan if x != zero else -infinity  # log of a NaN is one too
        return y if infinity > x else infinity if x > zero else y

    return log_of

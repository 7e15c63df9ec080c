"""Subnormal numbers count, also where another library let the processor take them for zero.

Compilers' ``-ffast-math`` does so when a library is loaded, ``torch.set_flush_denormal`` when it is
called: for the calling thread, and threads that it begins. The setting is one of the thread's, a
few bits of a register: MXCSR on x86, FPCR on 64-bit Arm.
"""

import platform
import warnings
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from gpubn.kernels.compile_numba import compiled

_WORD, _LONG = ir.IntType(32), ir.IntType(64)
_FLUSH_TO_ZERO, _DENORMALS_ARE_ZERO = 1 << 15, 1 << 6  # of MXCSR
_FZ, _FZ16, _FIZ = 1 << 24, 1 << 19, 1 << 0  # of FPCR
_MACHINE = platform.machine().lower()


def keep() -> None:
    """Let this thread's subnormal numbers count again, and warn that they did not."""
    restore()
    warnings.warn(
        "another library had set this thread to take subnormal numbers (in float32 below 1.2e-38) "
        "for zero; gpubn has set it back, for its results are the same everywhere. What the "
        "thread computed before may lack them",
        RuntimeWarning,
        stacklevel=5,
    )


@compiled
def restore() -> None:
    """Let this thread's subnormal numbers count."""
    change_flushing(False)


@intrinsic(prefer_literal=True)
def change_flushing(context: Any, flush: Any) -> Any:
    """Set the thread to flush subnormal numbers, or not; for compiled code, of a constant."""
    if not isinstance(flush, types.BooleanLiteral):
        return None
    chosen = bool(flush.literal_value)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if _MACHINE in ("x86_64", "amd64", "i386", "i686"):
            _change_mxcsr(builder, chosen)
        elif _MACHINE in ("aarch64", "arm64"):
            _change_fpcr(builder, chosen)
        return context.get_dummy_value()  # elsewhere nothing is known to set it

    return types.void(flush), generate


def _change_mxcsr(builder: Any, flush: bool) -> None:
    place = cgutils.alloca_once(builder, _WORD)
    pointer = builder.bitcast(place, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type])
    call = cgutils.get_or_insert_function
    builder.call(call(builder.module, kind, "llvm.x86.sse.stmxcsr"), [pointer])
    bits = _FLUSH_TO_ZERO | _DENORMALS_ARE_ZERO
    builder.store(_with(builder, builder.load(place), bits, flush), place)
    builder.call(call(builder.module, kind, "llvm.x86.sse.ldmxcsr"), [pointer])


def _change_fpcr(builder: Any, flush: bool) -> None:
    call = cgutils.get_or_insert_function
    read, write = ir.FunctionType(_LONG, []), ir.FunctionType(ir.VoidType(), [_LONG])
    word = builder.call(call(builder.module, read, "llvm.aarch64.get.fpcr"), [])
    word = _with(builder, word, _FZ | (0 if flush else _FZ16 | _FIZ), flush)
    builder.call(call(builder.module, write, "llvm.aarch64.set.fpcr"), [word])


def _with(builder: Any, word: Any, bits: int, on: bool) -> Any:
    if on:
        return builder.or_(word, ir.Constant(word.type, bits))
    return builder.and_(word, ir.Constant(word.type, ~bits))

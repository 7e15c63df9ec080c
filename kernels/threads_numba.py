"""A kernel's work in pieces, which several threads take one after the other.

The threads wait in compiled code, and take pieces there, without Python's lock: handing a piece
over takes about a microsecond, where Python takes fifty. Numba's own parallel loops are not used:
their default layer on Linux does not survive a fork, the one without dependencies ends the process
when two threads enter it at once, and both compile for seconds.

The calling thread begins at once, and others join it as they wake up: one that wakes late, or not
at all, costs nothing. It takes pieces from the front, the others from the back, so that each finds
in its caches what it had before. Who calls while others have the threads works alone. The numerics
contract lets work be split anywhere, so nothing of this shows in a result.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types.containers import UniTuple
from numba.extending import intrinsic

from gpubn.kernels.compile_numba import compiled, inlined
from gpubn.kernels.subnormals_numba import change_flushing
from gpubn.kernels.threads import get_num_threads, pieces_of

# The words of a crew's memory, int64. What different threads write lies in different cache lines.
_LINE = 8
_TAKEN = 0 * _LINE  # 1 while a caller has the crew
_POSTED = 1 * _LINE  # jobs so far: helpers wait for it to change
_OPEN = 2 * _LINE  # 1 while helpers may join
_PLACES = 3 * _LINE  # for helpers who may still join
_ACTIVE = 4 * _LINE  # helpers who are looking at the job
_LEFT = 5 * _LINE  # pieces that nobody has taken
_BACK = 6 * _LINE  # pieces that helpers have taken, counted from the last one
_JOB = 7 * _LINE  # the job: what to run and its arguments, how many units and pieces
_RUN, _ARGUMENTS, _COUNT, _PIECES, _FAILED = range(_JOB, _JOB + 5)
_HELD = _JOB + 5  # a lock that is never released, to sleep by
_HELPERS = 8 * _LINE  # then a line for each helper: whether it sleeps, and the lock that wakes it
_MOST_HELPERS = 256

_LOOKS = 300
"""How often an idle helper looks for work before it sleeps: some 100 µs where its core is free.

The next layer's call comes in that time, and finds it awake. Each look lets others have the core.
"""
_PATIENCE = 10_000  # looks of a caller who waits for helpers to finish, before it sleeps in between


# --- Python's side -------------------------------------------------------------------------------


class _Crew:
    """The helpers of a process, and the memory in which they are told what to do."""

    def __init__(self) -> None:
        self._memory = np.zeros(_HELPERS + (_MOST_HELPERS + 1) * _LINE, np.int64)
        # Never freed: helpers read it until the process is gone, after Python has let go of all.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._memory))
        start = -self._memory.ctypes.data % (8 * _LINE) // 8
        self._words = self._memory[start:]
        self.address = self._words.ctypes.data
        self._words[_HELD] = _held_lock()
        self._helpers = 0
        self._limit = _MOST_HELPERS
        self._starting = threading.Lock()

    def hire(self, count: int) -> int:
        """Let there be ``count`` helpers, who end with the process; return how many there are.

        Fewer where the system gives no more threads; then it is not asked again. At most
        ``_MOST_HELPERS``.
        """
        count = min(count, self._limit)
        if self._helpers < count and self._starting.acquire(blocking=False):
            try:
                # Here, not in the helper: a fork while it held the compiler's lock would leave the
                # child without.
                dispatcher: Any = _help
                dispatcher.compile(_HELP)
                while self._helpers < count:
                    helper = self._helpers
                    self._words[_HELPERS + helper * _LINE + 1] = _held_lock()
                    thread = threading.Thread(
                        target=_help, args=(self.address, helper), name="gpubn", daemon=True
                    )
                    self._helpers += 1  # before it starts: an interrupt must not hire it twice
                    try:
                        thread.start()
                    except RuntimeError:  # "can't start new thread": a limit, or Python ends
                        self._helpers = self._limit = helper
                        break
            finally:
                self._starting.release()
        return min(self._helpers, count)


def _held_lock() -> int:
    """Return the address of one of Python's locks that is taken already."""
    python = ctypes.pythonapi
    python.PyThread_allocate_lock.restype = ctypes.c_void_p
    lock: int | None = python.PyThread_allocate_lock()
    if lock is None:
        raise MemoryError("the system has no lock for another thread")
    python.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
    return lock


_crew = _Crew()


def _forget_helpers() -> None:
    global _crew
    _crew = _Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)  # a child has no threads but its own


def split(
    kernel: Callable[..., None], arguments: tuple[Any, ...], count: int, elements: int
) -> None:
    """Run ``kernel(*arguments, first, last)`` over ``range(count)``, in threads where that pays.

    Parameters
    ----------
    kernel : compiled function
        Does some units of the work; units must be independent.
    arguments : tuple
        All but the range.
    count : int
        How many units of work there are.
    elements : int
        How many array elements they touch in all.

    Raises
    ------
    MemoryError
        The kernel found no memory for its buffers.
    """
    pieces = min(count, pieces_of(elements))
    if pieces < 2:
        _entry(kernel)(count, 1, 0, 0, *arguments)
        return
    crew = _crew
    helpers = crew.hire(min(get_num_threads(), pieces) - 1)
    _entry(kernel)(count, pieces, helpers, crew.address, *arguments)


@cache
def _entry(kernel: Callable[..., None]) -> Callable[..., None]:
    """Return the compiled function that runs a kernel in pieces.

    One for each kernel, for what is called from compiled code must be known there. To Numba, which
    keeps it on disk by file, line and name, it is a function beside the kernel.
    """
    dispatcher: Any = kernel
    function = dispatcher.py_func
    at = {name: getattr(function.__code__, name) for name in ("co_filename", "co_firstlineno")}
    entry = FunctionType(_run.__code__.replace(**at), {**globals(), "_kernel": kernel})
    entry.__name__ = f"{function.__name__}_in_pieces"
    entry.__qualname__ = f"{function.__qualname__}_in_pieces"
    return compiled(entry)


def _run(count: int, pieces: int, helpers: int, crew: int, *arguments: Any) -> None:
    run, place = _outlined(_kernel, arguments)  # type: ignore[name-defined] # noqa: F821 # see _entry
    if _lead(crew, run, place, count, pieces, helpers):
        raise MemoryError("a kernel found no memory for its buffers")


# --- Compiled code -------------------------------------------------------------------------------


@compiled
def _lead(crew: int, run: int, arguments: int, count: int, pieces: int, helpers: int) -> Any:
    """Run a job with helpers; return 1 if it failed, else 0."""
    if helpers == 0 or _exchange(crew, _TAKEN, 1) == 1:
        return _call(run, arguments, 0, count)
    _write(crew, _RUN, run)
    _write(crew, _ARGUMENTS, arguments)
    _write(crew, _COUNT, count)
    _write(crew, _PIECES, pieces)
    _write(crew, _FAILED, 0)
    _write(crew, _LEFT, pieces)
    _write(crew, _BACK, 0)
    _write(crew, _PLACES, helpers)
    _write(crew, _OPEN, 1)
    _add(crew, _POSTED, 1)
    for i in range(helpers):
        if _exchange(crew, _HELPERS + i * _LINE, 0) == 1:
            _PyThread_release_lock(_read(crew, _HELPERS + i * _LINE + 1))
    front = 0
    while _add(crew, _LEFT, -1) > 0:
        _take(crew, front)
        front += 1
    # Whoever comes now finds it closed; whoever came before shows as active.
    _write(crew, _OPEN, 0)
    looks = 0
    while _read(crew, _ACTIVE) > 0:
        looks += 1
        if looks > _PATIENCE:
            _PyThread_acquire_lock_timed(_read(crew, _HELD), 50, 0)  # nobody releases it
        else:
            _give_way()
    failed = _read(crew, _FAILED)
    _write(crew, _TAKEN, 0)
    return failed


@compiled
def _help(crew: int, helper: int) -> None:
    """Take pieces of every job, for ever."""
    change_flushing(False)  # who began this thread may flush: helpers must not compute otherwise
    sleeps = _HELPERS + helper * _LINE
    done = 0
    while True:
        looks = 0
        while _read(crew, _POSTED) == done:
            looks += 1
            if looks <= _LOOKS:
                _give_way()
                continue
            _write(crew, sleeps, 1)
            # A job that was posted before that may not have seen it. Who sets it back wakes up.
            if _read(crew, _POSTED) == done or _exchange(crew, sleeps, 0) == 0:
                _PyThread_acquire_lock_timed(_read(crew, sleeps + 1), -1, 0)
        done = _read(crew, _POSTED)
        _add(crew, _ACTIVE, 1)
        if _read(crew, _OPEN) == 1 and _add(crew, _PLACES, -1) > 0:
            while _add(crew, _LEFT, -1) > 0:
                _take(crew, _read(crew, _PIECES) - 1 - _add(crew, _BACK, 1))
        _add(crew, _ACTIVE, -1)


@inlined
def _take(crew: int, piece: int) -> None:
    count, pieces = _read(crew, _COUNT), _read(crew, _PIECES)
    first, last = count * piece // pieces, count * (piece + 1) // pieces
    if _call(_read(crew, _RUN), _read(crew, _ARGUMENTS), first, last):
        _write(crew, _FAILED, 1)
        _write(crew, _LEFT, 0)


_HELP = (types.intp, types.intp)  # the types that _help is compiled for
_INT = ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()
_OUTLINED = ir.FunctionType(ir.IntType(32), [_BYTES, _INT, _INT])  # arguments, first, last


@intrinsic
def _outlined(context: Any, kernel: Any, arguments: Any) -> Any:
    """Return the addresses of a C function that calls the kernel, and of the arguments for it.

    They lie in the caller's frame, and hold no references: both live as long as its call.
    """
    if not isinstance(kernel, types.Dispatcher):
        return None
    given = (*arguments.types, types.intp, types.intp)
    called: Any = kernel.get_call_type(context, given, {})

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        compiled_kernel = kernel.dispatcher.overloads[called.args]
        place = cgutils.alloca_once_value(builder, values[1])
        module = builder.module
        function = ir.Function(module, _OUTLINED, module.get_unique_name("outlined"))
        function.linkage = "internal"
        inner = ir.IRBuilder(function.append_basic_block())
        packed = inner.load(inner.bitcast(function.args[0], place.type))
        unpacked = [*cgutils.unpack_tuple(inner, packed), *function.args[1:]]
        taken = [
            context.cast(inner, value, *kinds)
            for value, *kinds in zip(unpacked, given, called.args, strict=True)
        ]
        callee = context.declare_function(module, compiled_kernel.fndesc)
        status, _ = context.call_conv.call_function(
            inner, callee, called.return_type, called.args, taken
        )
        inner.ret(inner.zext(status.is_error, _OUTLINED.return_type))
        context.active_code_library.add_linking_library(compiled_kernel.library)
        addresses = [builder.ptrtoint(function, _INT), builder.ptrtoint(place, _INT)]
        return context.make_tuple(builder, signature.return_type, addresses)

    return UniTuple(types.intp, 2)(kernel, arguments), generate


@intrinsic
def _call(context: Any, run: Any, arguments: Any, first: Any, last: Any) -> Any:
    """Call an outlined function; return 0, or 1 if it failed."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = builder.inttoptr(values[0], _OUTLINED.as_pointer())
        failed = builder.call(function, [builder.inttoptr(values[1], _BYTES), *values[2:]])
        return builder.zext(failed, _INT)

    return types.intp(types.intp, types.intp, types.intp, types.intp), generate


# Every access to a crew's words is atomic, and all threads see all of them in one order.


@intrinsic
def _read(context: Any, crew: Any, word: Any) -> Any:
    return types.intp(
        types.intp, types.intp
    ), lambda context, builder, signature, values: builder.load_atomic(
        _word(builder, *values), "seq_cst", 8
    )


@intrinsic
def _write(context: Any, crew: Any, word: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store_atomic(values[2], _word(builder, *values[:2]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def _add(context: Any, crew: Any, word: Any, value: Any) -> Any:
    """Add to a word; return what it was."""
    return _changed("add")


@intrinsic
def _exchange(context: Any, crew: Any, word: Any, value: Any) -> Any:
    """Replace a word; return what it was."""
    return _changed("xchg")


def _changed(operation: str) -> Any:
    return types.intp(
        types.intp, types.intp, types.intp
    ), lambda c, builder, s, values: builder.atomic_rmw(
        operation, _word(builder, *values[:2]), values[2], "seq_cst"
    )


def _word(builder: Any, crew: Any, word: Any) -> Any:
    address = builder.add(crew, builder.mul(word, ir.Constant(_INT, 8)))
    return builder.inttoptr(address, _INT.as_pointer())


# Python's own locks, which ask for no hold of the interpreter, wherever Python runs; and the
# system's function by which a thread lets others have its core.
_PyThread_acquire_lock_timed: Any = types.ExternalFunction(
    "PyThread_acquire_lock_timed", types.int32(types.intp, types.int64, types.int32)
)
_PyThread_release_lock: Any = types.ExternalFunction(
    "PyThread_release_lock", types.void(types.intp)
)
_give_way: Any = types.ExternalFunction(
    "sched_yield" if os.name == "posix" else "SwitchToThread", types.int32()
)

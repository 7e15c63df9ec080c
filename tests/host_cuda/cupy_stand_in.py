"""A stand-in for CuPy: the CUDA modules run on the host, unchanged.

``install()`` puts it in the place of ``cupy``. Its arrays live in host memory but behave as if they
did not: they mix with no NumPy array, convert to none implicitly, and every copy to the host is
counted in ``device_to_host_copies``. Raw and elementwise kernels are compiled by the host's C++
compiler against ``cuda_host.h``. What CuPy or a GPU would refuse is refused here too, and so are
some things that they would take but that can only be mistakes: an argument of the wrong dtype, a
non-contiguous array as a raw kernel's argument, an empty grid. What differs in its bits there
differs here too: products add up in another order, a cast to float32 makes subnormals zero.

Kernels and copies on the null stream are done when the call returns. Copies on a stream of its own
(``non_blocking``) are done as late as CUDA may do them: when an event after them is waited for, or
the stream is. So a wait that is missing shows in what is computed.

``ndarray`` is no subclass of ``numpy.ndarray``, as CuPy's is none: code that asks with
``isinstance`` which device an array is on gets the same answer as on a GPU, and
``numpy.asarray(x)`` raises.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.machinery
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEADER = Path(__file__).with_name("cuda_host.h")

# -fno-strict-aliasing: device code reads float arrays as float4, as CUDA allows.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fno-fast-math",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
    "-w",
)

#: The order in which blocks and threads run, "ascending" or "reversed"; results may not show it.
thread_order = os.environ.get("HOST_CUDA_THREAD_ORDER", "ascending")

#: How many times an array has come to the host since this module was imported.
device_to_host_copies = 0

#: How many times an array has come from the host, on any stream.
host_to_device_copies = 0

#: How many kernels were launched, raw and elementwise ones.
launches = 0

#: How many times all work of the device, or of the null stream, was waited for.
synchronisations = 0

#: What streams and events were told, in order: ("record", stream, event), ("wait", stream, event),
#: ("copy", stream, address on the device), ("synchronize", None, event). A test empties it first.
stream_log: list[tuple[str, Any, Any]] = []

#: How many bytes runtime.memGetInfo() says are free; a test may set another number.
free_memory = 8 << 30

#: What runtime.getDeviceProperties() returns; a test may set another number of multiprocessors.
device_properties: dict[str, Any] = {
    "name": b"host stand-in",
    "major": 9,
    "minor": 0,
    "multiProcessorCount": 4,
    "warpSize": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerMultiProcessor": 2048,
    "sharedMemPerBlock": 48 << 10,
    "sharedMemPerBlockOptin": 227 << 10,
    "l2CacheSize": 50 << 20,
    "totalGlobalMem": 8 << 30,
}


class CUDARuntimeError(RuntimeError):
    """cupy.cuda.runtime.CUDARuntimeError."""


class CUDADriverError(RuntimeError):
    """cupy.cuda.driver.CUDADriverError: here, a launch that a GPU would refuse or never finish."""


class CompileException(Exception):
    """cupy.cuda.compiler.CompileException."""


@dataclasses.dataclass
class Source:
    """The text of one kernel module, for the tests that compile it with NVRTC."""

    kind: str  # "raw" or "elementwise"
    name: str
    options: tuple[str, ...]
    code: str = ""
    in_params: str = ""
    out_params: str = ""
    operation: str = ""
    preamble: str = ""
    loop_prep: str = ""
    after_loop: str = ""
    #: raw: the kernels, as name_expressions or as the extern "C" names that were asked for.
    #: elementwise: an Instance for each combination of arguments that it was called with.
    instances: list[Any] = dataclasses.field(default_factory=list)
    templated: bool = False  # raw: instances are name_expressions


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of an elementwise call; ndim is None for a scalar."""

    dtype: str
    ndim: int | None
    contiguous: bool = True


@dataclasses.dataclass(frozen=True)
class Instance:
    """The arguments of an elementwise call, and the number of axes that it loops over."""

    arguments: tuple[Argument, ...]
    ndim: int


#: Every module and elementwise kernel created since this module was imported.
sources: list[Source] = []


# ---------------------------------------------------------------------------------------------
# The array


def _count_copy() -> None:
    global device_to_host_copies
    device_to_host_copies += 1


def _count_launch() -> None:
    global launches
    launches += 1


def _count_upload() -> None:
    global host_to_device_copies
    host_to_device_copies += 1


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):  # noqa: N801 - CuPy's name
    """An array that stands for one in device memory."""

    __slots__ = ("_host",)

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        if memptr is not None or strides is not None:
            # No module of gpubn makes such arrays: one that did would be told, not run otherwise.
            raise NotImplementedError("the stand-in has no memptr and no strides")
        self._host = _poisoned(np.empty(shape, dtype, order))

    # To the host, each counted.

    def get(self, stream=None, order="C", out=None, blocking=True):
        _count_copy()
        if out is None:
            return self._host.copy(order)
        if type(out) is not np.ndarray or (out.shape, out.dtype) != (self.shape, self.dtype):
            raise ValueError(f"out must be a numpy.ndarray of {self.shape}, {self.dtype}")
        out[...] = self._host
        return out

    def item(self, *index):
        return self.get().item(*index)

    def tolist(self):
        return self.get().tolist()

    def tobytes(self, order="C"):
        return self.get().tobytes(order)

    def __bool__(self):
        return bool(self.get())

    def __float__(self):
        return float(self.get())

    def __int__(self):
        return int(self.get())

    def __index__(self):
        return self.get().__index__()

    def __complex__(self):
        return complex(self.get())

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __format__(self, spec):
        return format(self.get(), spec)

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    # From the host.

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray):
            raise TypeError(f"Only numpy.ndarray can be set to cupy.ndarray, not {type(arr)}")
        if (arr.shape, arr.dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"{arr.dtype} array of shape {arr.shape} set to {self.dtype} of {self.shape}"
            )
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        _count_upload()
        # What is not pinned is read before the call returns.
        source = arr if _is_pinned(arr) and arr.flags.c_contiguous else arr.copy()
        stream = Stream.null if stream is None else stream
        stream_log.append(("copy", stream, self.data.ptr))
        stream._do(lambda: np.copyto(self._host, source))

    # On the device.

    @property
    def __cuda_array_interface__(self):
        """By this, code that imports no CuPy tells an array on a GPU."""
        return {**self._host.__array_interface__, "version": 3}

    @property
    def device(self):
        return Device(0)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self._host.ctypes.data, device_id=0)

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        key = _index(key)
        value = self._host[key]
        if isinstance(value, np.generic):  # CuPy gives a 0-d view, not a scalar
            value = self._host[(*key, ...)]
        return _to_device(value)

    def __setitem__(self, key, value):
        self._host[_index(key)] = _to_host(value, {})

    def __getattr__(self, name):
        # No dunders: through them NumPy would read the host memory.
        if name.startswith("_") or name in ("ctypes", "base", "flat", "tofile", "dump", "dumps"):
            raise AttributeError(f"'cupy.ndarray' object has no attribute {name!r}")
        value = getattr(self._host, name)
        if not callable(value):
            return _to_device(value)
        return functools.partial(_call, value, owner=self)

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        result = _call(self._host.astype, dtype, order=order, copy=copy, owner=self)
        if self.dtype == np.float64 and result.dtype == np.float32:  # CuPy compiles with -ftz=true
            result._host[abs(result._host) < np.finfo(np.float32).tiny] *= 0
        return result

    def __matmul__(self, other):
        # Another order than NumPy's: a GPU's BLAS has its own.
        return super().__matmul__(other) if self.ndim != 2 else _backwards(self, other)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return _call(getattr(ufunc, method), *inputs, **kwargs)

    def __array_function__(self, func, types_, args, kwargs):
        return _call(func, *args, **kwargs)


def _backwards(a: ndarray, b: ndarray) -> ndarray:
    return _call(np.matmul, a[:, ::-1], b[::-1])


def _index(key: Any) -> tuple[Any, ...]:
    key = key if isinstance(key, tuple) else (key,)
    for part in key:
        # The size of the result of a mask is not known on the host.
        if isinstance(part, ndarray) and part.dtype == bool and part.ndim > 0:
            _count_copy()
    return tuple(part._host if isinstance(part, ndarray) else part for part in key)


def _poisoned(host: np.ndarray) -> np.ndarray:
    """Fill uninitialised memory so that reading it shows: NaN, or all bits set."""
    kind = "f" if _is_bfloat16(host.dtype) else host.dtype.kind
    host.fill(np.nan if kind in "fc" else np.iinfo(host.dtype).max if kind == "u" else -1)
    return host


def _is_bfloat16(dtype: np.dtype) -> bool:
    """Tell whether it is ml_dtypes.bfloat16, which CuPy 14 has in arrays."""
    return dtype.name == "bfloat16"


def _to_device(value: Any) -> Any:
    """Wrap what NumPy returned: arrays, scalars, and tuples and lists of them."""
    if isinstance(value, np.ndarray | np.generic):
        host = np.asarray(value)
        if host.dtype.kind not in "biufc" and not _is_bfloat16(host.dtype):
            raise ValueError(f"Unsupported dtype {host.dtype}")
        array = ndarray.__new__(ndarray)
        array._host = host
        return array
    if isinstance(value, tuple | list):
        wrapped = [_to_device(part) for part in value]
        if all(a is b for a, b in zip(wrapped, value, strict=True)):
            return value
        return type(value)(*wrapped) if hasattr(value, "_fields") else type(value)(wrapped)
    return value


def _to_host(value: Any, seen: dict[int, ndarray]) -> Any:
    """Unwrap arguments for NumPy, and refuse NumPy arrays among them."""
    if isinstance(value, ndarray):
        seen[id(value._host)] = value
        return value._host
    if isinstance(value, np.ndarray) and value.ndim > 0:
        raise TypeError(f"Unsupported type {type(value)}")
    if type(value) in (tuple, list):
        return type(value)(_to_host(part, seen) for part in value)
    return value


def _call(function: Callable[..., Any], *args: Any, owner: ndarray | None = None, **kwargs: Any):
    seen: dict[int, ndarray] = {} if owner is None else {id(owner._host): owner}
    host_args = [_to_host(arg, seen) for arg in args]
    host_kwargs = {name: _to_host(arg, seen) for name, arg in kwargs.items()}
    result = function(*host_args, **host_kwargs)
    if id(result) in seen:  # out=, or a function that returned its argument
        return seen[id(result)]
    if type(result) is bool and seen and function in (np.allclose, np.array_equal):
        result = np.bool_(result)  # CuPy leaves it on the device
    return _to_device(result)


# ---------------------------------------------------------------------------------------------
# Creating arrays and bringing them to the host


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    if isinstance(a, ndarray):
        return _call(np.asarray, a, dtype=dtype, order=order, copy=copy)
    return array(a, dtype, order=order or "K")


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    if isinstance(obj, ndarray):
        return _call(np.array, obj, dtype=dtype, copy=copy or None, order=order, ndmin=ndmin)
    _count_upload()
    if isinstance(obj, np.ndarray):  # the only way in for host memory, and always a copy
        return _to_device(np.array(obj, dtype=dtype, copy=True, order=order, ndmin=ndmin))
    return _call(np.array, obj, dtype=dtype, order=order, ndmin=ndmin)


def ascontiguousarray(a, dtype=None):
    if isinstance(a, ndarray):
        return _call(np.ascontiguousarray, a, dtype=dtype)
    return array(a, dtype, order="C", ndmin=1)


def empty(shape, dtype=float, order="C"):
    return ndarray(shape, dtype, order=order)


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    result = _call(np.empty_like, prototype, dtype=dtype, order=order, shape=shape)
    _poisoned(result._host)
    return result


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    if isinstance(a, ndarray):
        return a.get(order=order, out=out)
    return np.asarray(a, order=order)


def get_array_module(*args):
    return module if any(isinstance(arg, ndarray) for arg in args) else np


# ---------------------------------------------------------------------------------------------
# Compiling and loading


def compiler() -> list[str] | None:
    """Return the C++ compiler's command line, or None where there is none."""
    chosen = os.environ.get("CXX", "")
    for command in (chosen, "c++", "g++", "clang++"):
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    return None


@functools.cache
def _compiler_version(command: tuple[str, ...]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout


def _cache_folder() -> Path:
    """Return the folder of compiled kernels, shared by the test runs of one user."""
    folder = Path(tempfile.gettempdir()) / f"gpubn-host-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: set TMPDIR")
    return folder


#: A block's shared memory whose size the launch says.
_DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+([\w:]+)\s+(\w+)\s*\[\s*\]\s*;")


@functools.cache
def _compile(text: str, defines: tuple[str, ...], title: str) -> ctypes.PyDLL:
    """Compile C++ text that includes cuda_host.h, unless an equal one has been, and load it."""
    command = compiler()
    if command is None:
        raise CompileException("no C++ compiler is found: set CXX, or install g++ or clang++")
    text = _DYNAMIC_SHARED.sub(r"\1* const \2 = host_cuda::dynamic_shared<\1>();", text)
    command += [*FLAGS, *defines, f"-I{HEADER.parent}"]
    content = "\0".join([*command, _compiler_version(tuple(command[:1])), HEADER.read_text(), text])
    library = _cache_folder() / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            source, built = Path(scratch, "kernel.cpp"), Path(scratch, "kernel.so")
            source.write_text(text)
            run = subprocess.run(
                [*command, str(source), "-o", str(built)], capture_output=True, text=True
            )
            if run.returncode != 0:
                raise CompileException(f"{title}: {' '.join(command)} failed\n{run.stderr}")
            built.replace(library)  # atomic: another process may be building the same
    # PyDLL keeps the GIL, so that two Python threads do not share a block's shared memory.
    return ctypes.PyDLL(str(library))


def _defines(options: Iterable[str]) -> tuple[str, ...]:
    """Pick the macro definitions out of NVRTC's options; the others mean nothing here."""
    words = shlex.split(" ".join(options).replace("--define-macro", "-D"))
    joined = re.sub(r"-D[ =]", "-D", " ".join(words))
    return tuple(word for word in joined.split() if word.startswith("-D"))


def _descending() -> bool:
    if thread_order not in ("ascending", "reversed"):
        raise ValueError(f"thread_order is {thread_order!r}, expected 'ascending' or 'reversed'")
    return thread_order == "reversed"


# ---------------------------------------------------------------------------------------------
# Raw kernels


#: The stacks that no kernel's threads use at present; a process may map only so many of them.
_spare_stacks = ctypes.c_void_p()


class RawModule:
    """cupy.RawModule for CUDA C++ text."""

    def __init__(self, *, code, options=(), backend="nvrtc", name_expressions=None):
        if not isinstance(options, tuple) or not all(isinstance(o, str) for o in options):
            raise TypeError(f"options must be a tuple of str, not {options!r}")
        variable = re.search(r"__device__\s+[\w:]+\s+\w+\s*(\[[^]]*\]\s*)?[=;]", code)
        if variable:
            # They would be shared by all modules on the host; gpubn's kernels have none.
            raise NotImplementedError(f"__device__ variables: {variable.group()}")
        self.code = code
        self.options = options
        self.name_expressions = None if name_expressions is None else tuple(name_expressions)
        self._source = Source("raw", "", options, code, templated=name_expressions is not None)
        self._source.instances += self.name_expressions or ()
        sources.append(self._source)

    def get_function(self, name):
        names = self.name_expressions
        if names is None:  # compiled for this name alone: which others there are is not known
            names = (name,)
            if name not in self._source.instances:
                self._source.instances.append(name)
        if name not in names:
            raise CUDADriverError(f"CUDA_ERROR_NOT_FOUND: {name} is not in {names}")
        return _Function(name, self._library(names), names.index(name))

    def _library(self, names: tuple[str, ...]) -> ctypes.PyDLL:
        # In a nameless namespace two modules may define the same names.
        text = ['#include "cuda_host.h"', "namespace {", '#line 1 "module"', self.code, "}"]
        text.append('#define EXPORT extern "C" __attribute__((visibility("default")))')
        for i, name in enumerate(names):
            text.append(
                f"EXPORT void describe_{i}(char* out, size_t bytes)"
                f" {{ host_cuda::describe_kernel({name}, out, bytes); }}\n"
                f"EXPORT const char* launch_{i}(const unsigned* grid, const unsigned* block,"
                f" void** args, size_t shared, bool descending)"
                f" {{ return host_cuda::launch({name}, grid, block, args, shared, descending); }}"
            )
        text.append("EXPORT void share_stacks(char** list) { host_cuda::spare_stacks = list; }")
        library = _compile("\n".join(text), _defines(self.options), ", ".join(names))
        library.share_stacks(ctypes.byref(_spare_stacks))
        return library


class RawKernel:
    """cupy.RawKernel: a module of one kernel."""

    def __init__(self, code, name, options=()):
        self._function = functools.cache(RawModule(code=code, options=options).get_function)
        self.name = name

    def __call__(self, grid, block, args, **kwargs):
        self._function(self.name)(grid, block, args, **kwargs)


class _Function:
    """A kernel that can be launched."""

    def __init__(self, name: str, library: ctypes.PyDLL, index: int):
        self.name = name
        buffer = ctypes.create_string_buffer(4096)
        library[f"describe_{index}"](buffer, ctypes.c_size_t(len(buffer)))
        self._params = buffer.value.decode().split()
        self._launch = library[f"launch_{index}"]
        self._launch.restype = ctypes.c_char_p
        self._most_shared = device_properties["sharedMemPerBlock"]

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._most_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        if size > device_properties["sharedMemPerBlockOptin"]:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {self.name}: {size} bytes")
        self._most_shared = size

    def __call__(self, grid, block, args, *, shared_mem=0, stream=None):
        if not 0 <= shared_mem <= self._most_shared:
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: {self.name}: {shared_mem} bytes of shared memory, "
                f"at most {self._most_shared} unless max_dynamic_shared_size_bytes is set"
            )
        grid = self._size("grid", grid, (2**31 - 1, 65535, 65535))
        block = self._size("block", block, (1024, 1024, 64))
        if int(np.prod(block)) > 1024:
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: {self.name}: block {block} has more than 1024 threads"
            )
        if len(args) != len(self._params):
            raise TypeError(
                f"{self.name} takes {len(self._params)} arguments "
                f"({' '.join(self._params)}), got {len(args)}"
            )
        # The scalars' arrays must outlive the launch.
        cells = [self._cell(i, arg) for i, arg in enumerate(args)]
        pointers = (ctypes.c_void_p * max(len(cells), 1))(*(cell.ctypes.data for cell in cells))
        dims = ctypes.c_uint * 3
        _count_launch()
        message = self._launch(
            *(dims(*grid), dims(*block), pointers),
            *(ctypes.c_size_t(shared_mem), ctypes.c_bool(_descending())),
        )
        if message is not None:
            raise CUDADriverError(f"{self.name}: {message.decode()}")

    def _size(self, what: str, size: Sequence[int], limits: tuple[int, int, int]):
        if not isinstance(size, tuple) or not 1 <= len(size) <= 3:
            raise TypeError(f"{self.name}: {what} must be a tuple of 1 to 3 int, not {size!r}")
        full = tuple(n.__index__() for n in (*size, 1, 1, 1)[:3])
        # CuPy turns a zero into a one and launches: never what was meant.
        if any(not 1 <= n <= limit for n, limit in zip(full, limits, strict=True)):
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: {self.name}: {what} is {full}, "
                f"expected 1 to {limits} along each axis"
            )
        return full

    def _cell(self, position: int, arg: Any) -> np.ndarray:
        """Return an array that holds the argument as the kernel takes it."""
        param = self._params[position]
        where = f"{self.name}: argument {position}"
        if isinstance(arg, np.ndarray):
            raise TypeError(f"{where}: Unsupported type {type(arg)}")
        if isinstance(arg, ndarray):
            got = "*" + _code(arg.dtype)
            if param != got and (param, got) not in _SAME_POINTERS and param != "*V0":
                raise TypeError(f"{where} is an array of {arg.dtype} ({got}), expected {param}")
            if not arg.flags.c_contiguous:
                raise ValueError(f"{where} is not C-contiguous: the kernel sees only its address")
            return np.array(arg.data.ptr, np.uint64)
        if arg is None:  # a null pointer, or none at all: releases of CuPy differ
            raise TypeError(f"{where} is None, expected numpy.uint64(0) for a null pointer")
        if param.startswith("*") and isinstance(arg, np.uint64) and arg == 0:
            return np.array(0, np.uint64)
        if not isinstance(arg, bool | int | float | np.generic):
            raise TypeError(f"{where}: Unsupported type {type(arg)}")
        # CuPy takes Python's int, float and bool as int64, float64 and bool, and checks nothing.
        cell = np.array(arg)
        if _code(cell.dtype) != param:
            raise TypeError(
                f"{where} is {arg!r}, passed as {cell.dtype} ({_code(cell.dtype)}), "
                f"expected {param}"
            )
        return cell


def _code(dtype: np.dtype) -> str:
    return f"{dtype.kind}{dtype.itemsize}"


# Half floats travel as their bits, and masks as bytes.
_SAME_POINTERS = {("*u2", "*f2"), ("*u2", "*V2"), ("*u1", "*b1")}


# ---------------------------------------------------------------------------------------------
# Elementwise kernels

_C_TYPES = {
    "bool": "bool",
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "uint64": "unsigned long long",
    "float16": "float16",
    "float32": "float",
    "float64": "double",
}


def c_type(dtype: Any) -> str:
    """Return the C++ type that CuPy writes for a dtype."""
    return _C_TYPES[np.dtype(dtype).name]


@dataclasses.dataclass(frozen=True)
class Param:
    """One of an elementwise kernel's parameters: 'T x', 'raw float32 y'."""

    name: str
    type: str  # a template parameter of one letter, or a dtype's name
    raw: bool
    const: bool  # the inputs

    @property
    def ctype(self) -> str:
        return self.type if len(self.type) == 1 else c_type(self.type)


def parse_params(text: str, const: bool) -> list[Param]:
    """Parse the parameter lists of an ElementwiseKernel."""
    params = []
    for part in text.split(",") if text.strip() else []:
        *qualifiers, type_, name = part.split() or [""]
        if qualifiers not in ([], ["raw"]) or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"Syntax error: {part}")
        if name in ("i", "_ind"):
            raise ValueError(f"Can not use {name!r} as a parameter name")
        params.append(Param(name, type_, bool(qualifiers), const))
    return params


class _ArrayView(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("ndim", ctypes.c_longlong),
        ("shape", ctypes.POINTER(ctypes.c_longlong)),
        ("strides", ctypes.POINTER(ctypes.c_longlong)),
    )

    def __init__(self, host: np.ndarray):
        values = ctypes.c_longlong * max(host.ndim, 1)
        super().__init__(host.ctypes.data, host.ndim, values(*host.shape), values(*host.strides))


class ElementwiseKernel:
    """cupy.ElementwiseKernel."""

    def __init__(
        self,
        in_params,
        out_params,
        operation,
        name="kernel",
        reduce_dims=True,
        preamble="",
        no_return=False,
        return_tuple=False,
        *,
        options=(),
        loop_prep="",
        after_loop="",
    ):
        if not re.fullmatch(r"[a-zA-Z_]\w*", name):
            raise ValueError(f'Invalid kernel name: "{name}"')
        if not isinstance(options, tuple):
            raise TypeError(f"options must be a tuple of str, not {options!r}")
        self.name = name
        self.in_params = parse_params(in_params, const=True)
        self.out_params = parse_params(out_params, const=False)
        self.params = self.in_params + self.out_params
        self.no_return = no_return
        self.return_tuple = return_tuple
        self._source = Source(
            "elementwise",
            name,
            options,
            in_params=in_params,
            out_params=out_params,
            operation=operation,
            preamble=preamble,
            loop_prep=loop_prep,
            after_loop=after_loop,
        )
        sources.append(self._source)

    def __call__(self, *args, size=None, block_size=128, stream=None):
        if len(args) not in (len(self.in_params), len(self.params)):
            raise TypeError(
                f"Wrong number of arguments for {self.name!r}. It must be either "
                f"{len(self.in_params)} or {len(self.params)} (with outputs), "
                f"but given {len(args)}."
            )
        for param, arg in zip(self.params, args, strict=False):
            allowed = ndarray if not param.const else ndarray | bool | int | float | np.generic
            if not isinstance(arg, allowed):
                raise TypeError(f"{self.name}: {param.name}: Unsupported type {type(arg)}")
        shape = self._loop_shape(args, size)
        dtypes, letters = self._dtypes(args)

        outs = list(args[len(self.in_params) :])
        if not outs:
            if size is None and any(param.raw for param in self.out_params):
                raise ValueError("Output array size is Undecided")
            outs = [empty(shape, dtypes[param.name]) for param in self.out_params]
        for param, out in zip(self.out_params, outs, strict=True):
            if not param.raw and out.shape != shape:
                raise ValueError(f"Out shape is mismatched: {param.name} {out.shape}, not {shape}")
        if 0 not in shape:
            self._launch([*args[: len(self.in_params)], *outs], shape, dtypes, letters)
        if self.no_return:
            return None
        return outs[0] if len(outs) == 1 and not self.return_tuple else tuple(outs)

    def _loop_shape(self, args: Sequence[Any], size: int | None) -> tuple[int, ...]:
        shapes = [
            arg.shape
            for param, arg in zip(self.params, args, strict=False)
            if isinstance(arg, ndarray) and not param.raw
        ]
        if (size is None) == (not shapes):
            raise ValueError(
                "Loop size is undecided."
                if size is None
                else "Specified 'size' can be used only if all of the ndarray are 'raw'."
            )
        return np.broadcast_shapes(*shapes) if size is None else (size,)

    def _dtypes(self, args: Sequence[Any]) -> tuple[dict[str, np.dtype], dict[str, np.dtype]]:
        """Return the parameters' dtypes, and those that the template letters stand for."""
        letters: dict[str, np.dtype] = {}
        arrays = [
            (param, arg.dtype)
            for param, arg in zip(self.params, args, strict=False)
            if isinstance(arg, ndarray)
        ]
        for param, dtype in arrays:
            known = letters.setdefault(param.type, dtype) if len(param.type) == 1 else param.type
            if np.dtype(known) != dtype:
                raise TypeError(
                    f"Type is mismatched: {self.name}: {param.name} is {dtype}, expected {known}"
                )
        dtypes = {}
        for param in self.params:
            if len(param.type) == 1 and param.type not in letters:
                raise TypeError(f"{self.name}: no array decides the type {param.type}")
            dtypes[param.name] = np.dtype(letters.get(param.type, param.type))
        return dtypes, letters

    def _launch(self, args, shape, dtypes, letters) -> None:
        is_array = [isinstance(arg, ndarray) for arg in args]
        hosts = [
            arg._host if array_ else np.asarray(arg).astype(dtypes[param.name])
            for param, arg, array_ in zip(self.params, args, is_array, strict=True)
        ]
        looped = [i for i, param in enumerate(self.params) if is_array[i] and not param.raw]
        for i in looped:
            hosts[i] = np.broadcast_to(hosts[i], shape)
        if all(hosts[i].flags.c_contiguous for i in looped):  # one axis is enough, as in CuPy
            shape = (int(np.prod(shape)),)
            for i in looped:
                hosts[i] = hosts[i].reshape(shape)

        instance = Instance(
            tuple(
                Argument(host.dtype.name, host.ndim, host.flags.c_contiguous)
                if array_
                else Argument(host.dtype.name, None)
                for host, array_ in zip(hosts, is_array, strict=True)
            ),
            len(shape),
        )
        if instance not in self._source.instances:
            self._source.instances.append(instance)

        _count_launch()
        library = _compile(self._text(is_array, letters), _defines(self._source.options), self.name)
        cells = [
            _ArrayView(host) if array_ else host.ctypes.data_as(ctypes.c_void_p)
            for host, array_ in zip(hosts, is_array, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(cells))(
            *(ctypes.addressof(c) if isinstance(c, _ArrayView) else c.value for c in cells)
        )
        count = ctypes.c_ssize_t(int(np.prod(shape)))
        library.launch(pointers, count, ctypes.c_bool(_descending()))

    def _text(self, is_array: Sequence[bool], letters: dict[str, np.dtype]) -> str:
        """Return the C++ text of the loop, with the declarations that CuPy makes."""
        source = self._source
        before, inside = [], []
        for i, (param, array_) in enumerate(zip(self.params, is_array, strict=True)):
            const = "const " if param.const else ""
            if not array_:
                before.append(
                    f"const {param.ctype} {param.name} = *({param.ctype}*)host_cuda_args[{i}];"
                )
                continue
            name = param.name if param.raw else f"_raw_{param.name}"
            before.append(
                f"{const}host_cuda::CArray<{param.ctype}> {name}"
                f"(*(host_cuda::ArrayView*)host_cuda_args[{i}]);"
            )
            if not param.raw:
                inside.append(f"{const}{param.ctype}& {param.name} = {name}[i];")
        typedefs = [f"typedef {c_type(dtype)} {key};" for key, dtype in sorted(letters.items())]
        return "\n".join(
            [
                '#include "cuda_host.h"',
                "namespace {",
                "using host_cuda::float16;",
                *typedefs,
                f'#line 1 "preamble of {self.name}"',
                source.preamble,
                "}",
                'extern "C" __attribute__((visibility("default")))',
                "void launch(void** host_cuda_args, ptrdiff_t host_cuda_count, bool descending) {",
                "const host_cuda::CIndexer _ind{host_cuda_count};",
                *before,
                f"{source.loop_prep};",
                "for (ptrdiff_t host_cuda_k = 0; host_cuda_k < host_cuda_count; ++host_cuda_k) {",
                "ptrdiff_t i = descending ? host_cuda_count - 1 - host_cuda_k : host_cuda_k;",
                *inside,
                f'#line 1 "{self.name}"',
                f"{source.operation};",
                "}",
                f"{source.after_loop};",
                "}",
            ]
        )


# ---------------------------------------------------------------------------------------------
# cupy.cuda and the modules themselves


class Device:
    """cupy.cuda.Device: there is one, number 0."""

    def __init__(self, device=None):
        self.id = 0 if device is None else int(device)
        if self.id != 0:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return hash(self.id)

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    def __int__(self):
        return self.id

    def use(self):
        pass

    def synchronize(self):
        _synchronize()

    @property
    def compute_capability(self):
        return f"{device_properties['major']}{device_properties['minor']}"

    @property
    def attributes(self):
        return {
            "MultiProcessorCount": device_properties["multiProcessorCount"],
            "MaxSharedMemoryPerBlockOptin": device_properties["sharedMemPerBlockOptin"],
            "WarpSize": 32,
        }

    @property
    def mem_info(self):
        return _memory_info()


def _memory_info() -> tuple[int, int]:
    return free_memory, device_properties["totalGlobalMem"]


_streams: "weakref.WeakSet[Stream]" = weakref.WeakSet()


class Stream:
    """cupy.cuda.Stream. Kernels run on the null stream only; other streams copy."""

    null: "Stream"

    def __init__(self, null=False, non_blocking=False, ptds=False):
        self.ptr = 0 if null else id(self)
        # Any other waits for the null stream, and it for them: here that is to be done at once.
        self._late = non_blocking and not null
        self._queue: list[Callable[[], object]] = []
        self._done = 0
        _streams.add(self)

    def _do(self, work: Callable[[], object]) -> None:
        self._queue.append(work)
        if not self._late:
            self._run_to(self._end())

    def _end(self) -> int:
        """Return how many pieces of work it has been given."""
        return self._done + len(self._queue)

    def _run_to(self, end: int) -> None:
        while self._done < end:
            self._done += 1
            self._queue.pop(0)()

    def record(self, event=None):
        event = Event() if event is None else event
        event._of, event._end = self, self._end()
        stream_log.append(("record", self, event))
        return event

    def wait_event(self, event):
        stream_log.append(("wait", self, event))
        of, end = event._of, event._end  # a later recording does not count
        if of is not None:
            self._do(lambda: of._run_to(end))

    def synchronize(self):
        if self.ptr == 0:
            _synchronize()
        self._run_to(self._end())

    @property
    def done(self):
        return not self._queue

    def __enter__(self):
        if self.ptr != 0:
            # In gpubn only copies go to other streams: kernels there would need an order.
            raise NotImplementedError("the stand-in runs kernels on the null stream only")
        return self

    def __exit__(self, *error):
        pass


Stream.null = Stream(null=True)


class Event:
    """cupy.cuda.Event."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self._of: Stream | None = None
        self._end = 0

    def record(self, stream=None):
        (Stream.null if stream is None else stream).record(self)

    def synchronize(self):
        stream_log.append(("synchronize", None, self))
        if self._of is not None:
            self._of._run_to(self._end)

    @property
    def done(self):
        return self._of is None or self._of._done >= self._end


def _synchronize() -> None:
    global synchronisations
    synchronisations += 1
    for stream in list(_streams):
        stream._run_to(stream._end())


def pending_copies() -> int:
    """Return how much work streams have been given and nobody has waited for."""
    return sum(len(stream._queue) for stream in list(_streams))


class PinnedMemoryPointer(bytearray):
    """cupy.cuda.PinnedMemoryPointer: there is more of it than was asked for, and it is not zero."""

    def __init__(self, size: int):
        super().__init__(b"\xff" * (-(-size // 512) * 512 + 512))


def _is_pinned(array: np.ndarray) -> bool:
    base = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.obj if isinstance(base, memoryview) else base.base
    return isinstance(base, PinnedMemoryPointer)


class MemoryPool:
    """cupy.cuda.MemoryPool: its numbers are what a test sets."""

    total, used, limit = 96 << 20, 32 << 20, 0
    released = False

    def total_bytes(self):
        return self.total

    def used_bytes(self):
        return self.used

    def free_bytes(self):
        return self.total - self.used

    def get_limit(self):
        return self.limit

    def free_all_blocks(self):
        self.released = True


memory_pool, pinned_memory_pool = MemoryPool(), MemoryPool()


class _Module(types.ModuleType):
    """A module with the given names; any other comes from a NumPy namespace, if it has one."""

    def __init__(self, name: str, namespace: Any = None, **names: Any):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__dict__.update(names)
        self.__dict__["_namespace"] = namespace

    def __getattr__(self, name: str) -> Any:
        namespace = self.__dict__.get("_namespace")
        if namespace is None or name.startswith("_") or not hasattr(namespace, name):
            raise AttributeError(f"the stand-in has no {self.__name__}.{name}")
        value = getattr(namespace, name)
        if isinstance(value, types.ModuleType):
            value = _Module(f"{self.__name__}.{name}", value)
        elif callable(value) and not isinstance(value, type):
            value = functools.partial(_call, value)
        self.__dict__[name] = value
        return value


def _properties(device: int) -> dict[str, Any]:
    return dict(device_properties) if Device(device) else {}


runtime = _Module(
    "cupy.cuda.runtime",
    CUDARuntimeError=CUDARuntimeError,
    is_hip=False,
    getDevice=lambda: 0,
    getDeviceCount=lambda: 1,
    getDeviceProperties=_properties,
    deviceSynchronize=_synchronize,
    memGetInfo=_memory_info,
    driverGetVersion=lambda: 13000,
    runtimeGetVersion=lambda: 13000,
)
cuda = _Module(
    "cupy.cuda",
    runtime=runtime,
    driver=_Module("cupy.cuda.driver", CUDADriverError=CUDADriverError),
    compiler=_Module("cupy.cuda.compiler", CompileException=CompileException),
    memory=_Module(
        "cupy.cuda.memory", OutOfMemoryError=type("OutOfMemoryError", (MemoryError,), {})
    ),
    Device=Device,
    Stream=Stream,
    Event=Event,
    PinnedMemoryPointer=PinnedMemoryPointer,
    alloc_pinned_memory=PinnedMemoryPointer,
    MemoryPool=MemoryPool,
    get_current_stream=lambda: Stream.null,
    is_available=lambda: True,
)
#: What ``import cupy`` gives while the stand-in is installed.
module = _Module(
    "cupy",
    np,
    __version__="14.0.0",
    ndarray=ndarray,
    asarray=asarray,
    array=array,
    ascontiguousarray=ascontiguousarray,
    empty=empty,
    empty_like=empty_like,
    asnumpy=asnumpy,
    get_array_module=get_array_module,
    get_default_memory_pool=lambda: memory_pool,
    get_default_pinned_memory_pool=lambda: pinned_memory_pool,
    RawModule=RawModule,
    RawKernel=RawKernel,
    ElementwiseKernel=ElementwiseKernel,
    cuda=cuda,
)


@contextlib.contextmanager
def install(fresh: Iterable[str] = ()) -> Iterator[types.ModuleType]:
    """Put the stand-in in the place of cupy, and yield it.

    The CUDA modules (``gpubn.kernels.*_cuda``) and those named in `fresh` are imported afresh
    inside, since they may hold the real cupy, and are forgotten at the end, since they hold this
    one.
    """
    again = re.compile(
        "|".join([r"(cupy|cupyx)(\..*)?", r"gpubn\.kernels\.\w+_cuda", *map(re.escape, fresh)])
    )
    before = _take_modules(again)
    sys.modules["cupy"] = module
    for submodule in (cuda, runtime, cuda.driver, cuda.compiler, cuda.memory):
        sys.modules[submodule.__name__] = submodule
    try:
        yield module
    finally:
        _take_modules(again)
        for name, value in before.items():
            sys.modules[name] = value
            _set_in_parent(name, value)


def _take_modules(pattern: re.Pattern[str]) -> dict[str, types.ModuleType]:
    """Remove the modules of these names from sys.modules, and from the packages that hold them."""
    taken = {name: value for name, value in sys.modules.items() if pattern.fullmatch(name)}
    for name in taken:
        del sys.modules[name]
        if not name.startswith("cupy"):  # inside cupy they hold each other; it comes back whole
            _set_in_parent(name, None)
    return taken


def _set_in_parent(name: str, value: types.ModuleType | None) -> None:
    parent, _, child = name.rpartition(".")
    package = sys.modules.get(parent)
    if package is None:
        return
    if value is not None:
        setattr(package, child, value)
    elif child in vars(package):
        delattr(package, child)

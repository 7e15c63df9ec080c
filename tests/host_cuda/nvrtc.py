"""Compiles CUDA text to PTX and machine code with NVRTC, which needs neither a GPU nor a driver.

The options and the text around an ElementwiseKernel are CuPy's; ``test_stand_in.py`` holds them
equal to those of the CuPy that is installed. CuPy itself is not imported, only its headers are
read, so this works while the stand-in is installed in its place.
"""

import ctypes
import ctypes.util
import functools
import importlib.machinery
import os
import re
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import cupy_stand_in as stand_in

#: The architectures that gpubn supports.
ARCHES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

_CUPY_HEADERS = ("complex.cuh", "carray.cuh", "atomics.cuh", "math_constants.h")


class NVRTCError(Exception):
    """NVRTC is missing or has refused the text; the message has its log."""


# ---------------------------------------------------------------------------------------------
# The library


def _package_folders(name: str) -> list[Path]:
    """Return where a package lies, without importing it or asking sys.modules."""
    spec = importlib.machinery.PathFinder.find_spec(name)
    return [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []


def _cuda_folders() -> list[Path]:
    """Return the folders that may hold CUDA's lib and include: the wheels', then the toolkit's."""
    wheels = [folder for root in _package_folders("nvidia") for folder in sorted(root.iterdir())]
    toolkits = [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return [folder for folder in (*wheels, *(Path(t) for t in toolkits if t)) if folder.is_dir()]


@functools.cache
def library() -> ctypes.CDLL:
    """Load NVRTC."""
    found = [
        str(path)
        for folder in _cuda_folders()
        for lib in ("lib", "lib64")
        for path in sorted(folder.glob(f"{lib}/libnvrtc.so*"))
    ]
    for path in [*found, ctypes.util.find_library("nvrtc")]:
        if path:
            nvrtc = ctypes.CDLL(path)
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            return nvrtc
    raise NVRTCError("NVRTC is not found: install nvidia-cuda-nvrtc")


def missing() -> str | None:
    """Return why kernels cannot be compiled here, or None where they can."""
    try:
        library()
    except (NVRTCError, OSError) as error:
        return str(error)
    return None if _package_folders("cupy") else "CuPy, whose headers are needed, is not installed"


def _check(status: int, what: str) -> None:
    if status != 0:
        raise NVRTCError(f"{what}: {library().nvrtcGetErrorString(status).decode()}")


def supported_arches() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which of ARCHES this NVRTC compiles for, and which it does not."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    numbers = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(numbers), "nvrtcGetSupportedArchs")
    known = [arch for arch in ARCHES if int(arch.replace(".", "")) in numbers]
    return tuple(known), tuple(arch for arch in ARCHES if arch not in known)


# ---------------------------------------------------------------------------------------------
# Compiling


def cupy_options(options: Sequence[str], arch: str) -> list[str]:
    """Return the options with which CuPy calls NVRTC."""
    includes = [folder / "_core" / "include" for folder in _package_folders("cupy")]
    cccl = [
        f"-I{i}/cupy/_cccl/{part}" for i in includes for part in ("cub", "thrust", "libcudacxx")
    ]
    chooses = any(re.match(r"--?std\b", option) for option in options)
    toolkit = [f for f in _cuda_folders() if (f / "include" / "cuda_fp16.h").is_file()]
    return [
        *cccl,
        *options,
        *([] if chooses else ["--std=c++17"]),
        *(f"-I{folder}" for folder in includes),
        *(f"-I{folder}/include" for folder in toolkit[:1]),
        "-ftz=true",
        f"-arch=sm_{arch.replace('.', '')}",
        "--device-as-default-execution-space",
    ]


def compile_ptx(
    code: str, arch: str, options: Sequence[str] = (), name_expressions: Sequence[str] = ()
) -> tuple[str, bytes]:
    """Compile as CuPy does for one of ARCHES, and return the PTX and the cubin."""
    nvrtc = library()
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), code.encode(), b"module.cu", 0, None, None
    )
    _check(status, "nvrtcCreateProgram")
    try:
        for name in name_expressions:
            _check(nvrtc.nvrtcAddNameExpression(program, name.encode()), name)
        words = [option.encode() for option in cupy_options(options, arch)]
        status = nvrtc.nvrtcCompileProgram(
            program, len(words), (ctypes.c_char_p * len(words))(*words)
        )
        if status != 0:
            log = _read(program, "ProgramLog").rstrip(b"\0").decode()
            raise NVRTCError(f"NVRTC refuses the text for {arch}:\n{log}\n{_numbered(code)}")
        for name in name_expressions:
            lowered = ctypes.c_char_p()
            status = nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered))
            _check(status, f"no kernel {name}")
        return _read(program, "PTX").rstrip(b"\0").decode(), _read(program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library(), f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw


def _numbered(code: str) -> str:
    return "\n".join(f"{i:4} {line}" for i, line in enumerate(code.splitlines(), 1))


def compile_source(source: stand_in.Source, arch: str) -> list[tuple[str, bytes]]:
    """Compile a kernel that the stand-in recorded, each of its instances that was used."""
    if source.kind == "elementwise":
        return [
            compile_ptx(elementwise_code(source, instance), arch, source.options)
            for instance in source.instances
        ]
    names = source.instances if source.templated else ()
    ptx, cubin = compile_ptx(source.code, arch, source.options, names)
    for name in () if source.templated else source.instances:
        if not re.search(rf"\.entry {name}\b", ptx):
            raise NVRTCError(f'{name} is no kernel, or is not extern "C", so CuPy cannot find it')
    return [(ptx, cubin)]


# ---------------------------------------------------------------------------------------------
# ElementwiseKernels

_ELEMENTWISE = string.Template(
    """
    ${float16}${typedefs}
    ${preamble}
    extern "C" __global__ void ${name}(${params}) {
      ${loop_prep};
      #pragma unroll 1
      CUPY_FOR(i, _ind.size()) {
        _ind.set(i);
        ${operation};
      }
      ${after_loop};
    }
    """
)


def elementwise_code(source: stand_in.Source, instance: stand_in.Instance) -> str:
    """Return the text that CuPy compiles for one instance of an ElementwiseKernel."""
    params = [
        *stand_in.parse_params(source.in_params, const=True),
        *stand_in.parse_params(source.out_params, const=False),
    ]
    letters: dict[str, str] = {}
    declared, operation = [], []
    for param, argument in zip(params, instance.arguments, strict=True):
        const = "const " if param.const else ""
        ctype = stand_in.c_type(argument.dtype)
        if len(param.type) == 1:
            letters[param.type] = ctype
        if argument.ndim is None:
            declared.append(f"{const}{ctype} {param.name}")
            continue
        name = param.name if param.raw else f"_raw_{param.name}"
        declared.append(
            f"{const}CArray<{ctype}, {argument.ndim}, {argument.contiguous:d}, 1> {name}"
        )
        if not param.raw:
            operation.append(f"{const}{param.ctype} &{param.name} = {name}[_ind.get()];")
    declared.append(f"CIndexer<{instance.ndim}, 1> _ind")
    half = any(np.dtype(argument.dtype) == np.float16 for argument in instance.arguments)
    headers = "".join(f"#include <cupy/{header}>\n" for header in _CUPY_HEADERS)
    return headers + _ELEMENTWISE.substitute(
        float16='#include "cupy/float16.cuh"\n' if half else "",
        typedefs="".join(f"typedef {ctype} {key};\n" for key, ctype in sorted(letters.items())),
        preamble=source.preamble,
        name=source.name,
        params=", ".join(declared),
        loop_prep=source.loop_prep,
        operation="\n".join([*operation, source.operation]),
        after_loop=source.after_loop,
    )

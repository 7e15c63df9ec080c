"""Compare gpubn's exp and log of every float32 there is, all 2^32, with float64's.

Run by hand; ``test_elementary.py`` takes some of the values::

    python tests/kernels/exhaustive_exp_log.py
    python tests/kernels/exhaustive_exp_log.py --device cuda

An error is told in units in the last place: the spacing of float32 at the exact result, and at the
least the smallest subnormal number. It must be below 1. Infinity counts as the first power of two
that is too large, so whether a result overflows is part of it; a NaN or a sign that is wrong has an
infinite error. On any device but the CPU the results must have the CPU's bits, too.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpubn
from gpubn.backend import Device, resolve, to_host
from gpubn.kernels import for_array

FUNCTIONS = ("exp", "log")
COUNT = 1 << 32
CHUNK = 1 << 20  # larger temporary arrays cost more than they save
WORKERS = 2
CPU = resolve("cpu")
WIDER = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}


def compute(device: Device, function: str, x: NDArray[Any]) -> NDArray[Any]:
    """Return the library's exp or log, computed on a device."""
    with device.scope():
        there = device.asarray(x)
        result: NDArray[Any] = to_host(getattr(for_array("elementary", there), function)(there))
    return result


def errors(function: str, x: NDArray[Any], result: NDArray[Any]) -> NDArray[np.float64]:
    """Return how far each result is from exp or log of x, in units in the last place."""
    wider, format_ = WIDER[x.dtype], np.finfo(x.dtype)
    too_large = np.ldexp(wider(1), format_.maxexp)
    with np.errstate(all="ignore"):
        exact = getattr(np, function)(x.astype(wider))
        exponent = np.frexp(np.clip(exact, -too_large, too_large))[1] - 1
        exponent = np.clip(exponent, format_.minexp, format_.maxexp - 1)
        difference = np.clip(result, -too_large, too_large) - np.clip(exact, -too_large, too_large)
        off = np.abs(np.ldexp(difference, format_.nmant - exponent)).astype(np.float64)
    nan = np.isnan(exact)
    off[nan] = np.where(np.isnan(result[nan]), 0.0, np.inf)
    off[~nan & (np.isnan(result) | (np.signbit(result) != np.signbit(exact)))] = np.inf
    return off


@dataclass
class Outcome:
    """What was seen of a function: how many values, the largest error, and what should not be.

    Attributes
    ----------
    count : int
    error : float
        The largest finite one.
    at : float
        Where that is.
    wrong : list of float
        Where a NaN, an infinity or a sign is wrong: the first ones.
    differ : list of float
        Where the device has not the CPU's bits: the first ones.
    """

    count: int
    error: float
    at: float
    wrong: list[float]
    differ: list[float]

    @property
    def good(self) -> bool:
        return self.error < 1 and not self.wrong and not self.differ

    def __add__(self, other: Outcome) -> Outcome:
        worst = other if other.error > self.error else self
        wrong, differ = (self.wrong + other.wrong)[:3], (self.differ + other.differ)[:3]
        return Outcome(self.count + other.count, worst.error, worst.at, wrong, differ)


def check(device: Device, function: str, x: NDArray[np.float32]) -> Outcome:
    """Compare a function of some values with the exact one, and with the CPU's."""
    result = compute(device, function, x)
    off = errors(function, x, result)
    wrong = np.isinf(off)
    off[wrong] = 0
    worst = int(off.argmax())
    differ = np.zeros(x.shape, bool)
    if device.kind != "cpu":
        expected = compute(CPU, function, x)
        differ = result.view(np.uint32) != expected.view(np.uint32)
        differ &= ~(np.isnan(result) & np.isnan(expected))
    first = (x[where][:3].tolist() for where in (wrong, differ))
    return Outcome(x.size, float(off[worst]), float(x[worst]), *first)


def float32s(first: int, last: int, stride: int) -> NDArray[np.float32]:
    """Return the float32 values whose bits are ``stride`` times the numbers from first to last."""
    return (np.arange(first, last, dtype=np.uint64) * stride).astype(np.uint32).view(np.float32)


def check_all(device: Device, function: str, stride: int) -> Outcome:
    """Compare a function of every ``stride``-th float32, and tell how far it has got."""
    begun, count = time.monotonic(), -(-COUNT // stride)
    starts = range(0, count, CHUNK)

    def part(start: int) -> Outcome:
        return check(device, function, float32s(start, min(start + CHUNK, count), stride))

    seen = check(device, function, np.ones(1, np.float32))  # compiles the kernels, in one thread
    seen.count = 0
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for number, outcome in enumerate(pool.map(part, starts), 1):
            seen += outcome
            if number % 512 == 0 and number < len(starts):
                print(
                    f"{function}  {number / len(starts):4.0%}  {time.monotonic() - begun:4.0f} s  "
                    f"largest error so far {seen.error:.4f}, at {np.float32(seen.at)!s}",
                    flush=True,
                )
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for all that is left
    return seen


@contextlib.contextmanager
def device_named(name: str) -> Iterator[Device]:
    """Let gpubn use a device: cpu, cuda, or host-cuda, the stand-in for CuPy of the tests."""
    with contextlib.ExitStack() as stack:
        if name == "host-cuda":
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from host_cuda import cupy_stand_in

            stack.enter_context(cupy_stand_in.install())
        yield stack.enter_context(gpubn.use("cpu" if name == "cpu" else "cuda"))


def odd(text: str) -> int:
    value = int(text)
    if value < 1 or value % 2 == 0:
        raise argparse.ArgumentTypeError(f"it is {value}, expected an odd number above 0")
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda", "host-cuda"), default="cpu")
    parser.add_argument("--stride", type=odd, default=1, help="take every STRIDE-th value only")
    options = parser.parse_args(arguments)
    good = True
    with device_named(options.device) as device:
        for function in FUNCTIONS:
            seen = check_all(device, function, options.stride)
            good &= seen.good
            print(
                f"{function}: {seen.count:,} values, largest error {seen.error:.4f} units in the "
                f"last place, at {np.float32(seen.at)!s}"
            )
            at = ", ".join(map(str, np.float32(seen.wrong)))
            print(f"  NaN, infinities and signs {f'are WRONG, first at {at}' if at else 'agree'}")
            if device.kind != "cpu":
                at = ", ".join(map(str, np.float32(seen.differ)))
                print(f"  the bits {f'DIFFER from the CPU, first at {at}' if at else 'agree'}")
    print(
        f"\non {options.device}: "
        f"{'exp and log are within one unit in the last place' if good else 'exp or log is WRONG'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Timing: results are checked first, then the contestants take turns in an order that is shuffled.

A turn is a rest, a warm-up, and runs for some milliseconds. The rest is for the others' threads:
those of OpenMP and of a BLAS wait on their cores for more work, and would share them with whoever
comes next.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.checks import Results, WrongResult
from benchmarks.peers import Torch
from benchmarks.shapes import Shape, Size
from gpubn.backend import Device
from gpubn.kernels.threads import get_num_threads

OURS = "gpubn"
COPY = "copy"

TURN = 0.010
"""Seconds of timed runs in a turn; a longer run is timed once."""
WARM_UP = 0.001
"""Seconds of runs before the timed ones, at least one run."""
REST = 0.012
"""Seconds before a turn: an OpenMP's threads wait for about 10 ms."""
BLAS_REST = 0.12
"""Seconds before a turn that has matrix products: those of OpenBLAS wait for about 100 ms."""
SAMPLE = 0.0005
"""Seconds that one measurement on CUDA takes at the least, in as many calls as that needs."""
ROUNDS = 5
"""Turns of every contestant, at the least."""
SECONDS: Mapping[Size, float] = {"full": 1.5, "quick": 0.4, "tiny": 0.0}
"""For a case on the CPU, its checks and preparation not counted."""
CUDA_SHARE = 1 / 3
"""Of those seconds, for a case on CUDA, where nobody else runs."""
WORTH_SPLITTING = 1 << 18
"""Bytes below which a copy in several threads is not tried."""


@dataclass(frozen=True)
class Setting:
    """What a whole run has in common."""

    device: Device
    dtype: str = "float32"
    size: Size = "full"
    reuse: bool = False
    torch: Torch | None = None


@dataclass(frozen=True)
class Contestant:
    """One way to do what a case asks for.

    ``prepare`` returns the function that is timed, ``results`` turns what that returns into float64
    arrays, by name. Both run, and the timing happens, inside ``scope``.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    results: Callable[[Any], Results]
    scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Case:
    """One thing to time.

    ``passes`` are the reads and writes of an array of ``nbytes`` that it must make at the least;
    0 where there is no such array. ``check`` takes a contestant's name and results.
    """

    op: str
    direction: str
    shape: Shape
    layout: str
    dtype: str
    nbytes: int
    passes: int
    contestants: tuple[Contestant, ...]
    check: Callable[[str, Results], None]
    rest: float = REST


class Times(NamedTuple):
    """Seconds of one run."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: list[float]) -> Times:
        p20, median, p80 = np.percentile(samples, [20, 50, 80])
        return Times(float(median), float(p20), float(p80))


def measure(case: Case, device: Device, seconds: float, seed: int = 0) -> dict[str, Times]:
    """Check and time a case's contestants, and a copy, for about ``seconds``; on CUDA for less.

    A peer that fails or is wrong is left out, and a line says why.

    Raises
    ------
    WrongResult
        gpubn's is; nothing was timed.
    """
    runs = {}
    for contestant in case.contestants:
        try:
            runs[contestant.name] = contestant.scope, _checked(case, contestant)
        # A peer may fail with any type, of its compiler, its libraries or its device; the others
        # are timed without it, and a line says so. What gpubn raises goes on.
        except Exception as error:
            if contestant.name == OURS:
                raise
            what = f"{case.op} {case.direction} {case.shape} {case.dtype}"
            print(f"{contestant.name} is left out of {what}: {_first_line(error)}", flush=True)
    if case.passes:
        runs |= {name: (contextlib.nullcontext, run) for name, run in copies(device, case.nbytes)}

    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(seed).shuffle
    on_cpu = device.kind == "cpu"
    rounds, end = 0, time.perf_counter() + seconds * (1 if on_cpu else CUDA_SHARE)
    rest = case.rest if on_cpu and seconds else 0.0
    with _no_garbage_collection():
        while time.perf_counter() < end or rounds < ROUNDS:
            shuffle(order)
            for name in order:
                scope, run = runs[name]
                time.sleep(rest)
                with scope():
                    samples[name] += _turn(device, run, TURN if seconds else 0.0)
            rounds += 1
    times = {name: Times.of(values) for name, values in samples.items()}
    fastest_copy = [times.pop(name) for name in list(times) if name.startswith(COPY)]
    return times | ({COPY: min(fastest_copy)} if fastest_copy else {})


def copies(device: Device, nbytes: int) -> list[tuple[str, Callable[[], Any]]]:
    """Return the ways to copy so many bytes: by one thread, and where it may pay by several."""
    xp = device.xp
    source, target = xp.ones(nbytes, xp.uint8), xp.zeros(nbytes, xp.uint8)
    ways: list[tuple[str, Callable[[], Any]]] = [(COPY, lambda: xp.copyto(target, source))]
    threads = get_num_threads()
    if device.kind == "cpu" and threads > 1 and nbytes >= WORTH_SPLITTING:
        pool = ThreadPoolExecutor(threads - 1)
        shares = list(
            zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
        )

        def split() -> None:
            others = [pool.submit(np.copyto, *share) for share in shares[1:]]
            np.copyto(*shares[0])
            for other in others:
                other.result()

        ways.append((f"{COPY} in threads", split))
    return ways


def time_once(device: Device, run: Callable[[], Any]) -> float:
    """Return the seconds of one run; on CUDA by events, from the first launch to the last end."""
    return _timed(device, run, 1)


def _checked(case: Case, contestant: Contestant) -> Callable[[], Any]:
    """Return what is to be timed, once its results have been found right."""
    with contestant.scope():
        run = contestant.prepare()
        results = contestant.results(run())
    try:
        case.check(contestant.name, results)
    except WrongResult as wrong:
        what = f"{case.op} {case.direction} {case.shape} {case.layout} {case.dtype}"
        raise WrongResult(f"{contestant.name}, {what}: {wrong}") from None
    return run


def _turn(device: Device, run: Callable[[], Any], seconds: float) -> list[float]:
    """Return the seconds of one run, measured several times."""
    warm_up, runs, start = 0.0, 0, time.perf_counter()
    while runs == 0 or warm_up < min(WARM_UP, seconds):
        time_once(device, run)
        runs, warm_up = runs + 1, time.perf_counter() - start
    calls = 1
    if device.kind == "cuda" and seconds:
        calls = max(1, int(SAMPLE * runs / warm_up))
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        if device.kind == "cuda":
            run()  # so that launches queue up behind it, and no sample begins on an idle device
        samples.append(_timed(device, run, calls))
    return samples


def _timed(device: Device, run: Callable[[], Any], calls: int) -> float:
    """Return the seconds of a run, as the mean of so many calls one after the other."""
    if device.kind == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    cuda = device.xp.cuda
    first, last = cuda.Event(), cuda.Event()
    first.record()
    for _ in range(calls):
        run()
    last.record()
    last.synchronize()
    return float(cuda.get_elapsed_time(first, last)) / 1e3 / calls


@contextlib.contextmanager
def _no_garbage_collection() -> Any:
    """Keep Python's search for cycles out of the times."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, WrongResult) else f"{type(error).__name__}: {lines[0]}"

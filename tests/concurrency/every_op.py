"""Python threads call every operation at once, and must get the bits that one thread gets.

``test_concurrency.py`` runs it in a process for each of Numba's threading layers; by hand::

    python tests/concurrency/every_op.py --callers 8 --cases 20 --layer workqueue

Meanwhile one more thread runs a parallel loop of Numba's own on that layer: the workqueue layer
ends a process in which two threads are in such a loop at once.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from gpubn.kernels import threads
from gpubn.testing.parity import contestants
from gpubn.testing.parity.cases import Case
from gpubn.testing.parity.comparison import distance
from gpubn.testing.parity.operations import OPERATIONS, cases


def chosen(count: int, rng: random.Random) -> list[Case]:
    """Return some cases of every operation, of all shapes, dtypes and kinds of values."""
    return [
        case
        for name, operation in OPERATIONS.items()
        for seed in rng.sample(range(len(operation.grid())), count)
        for case in cases(name, range(seed, seed + 1))
    ]


def run(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    return contestants.compute(contestants.CPU, case.op, arguments)


def parallel_loop() -> Callable[[Any], float]:
    @numba.njit(parallel=True)
    def total(x: Any) -> float:
        found = 0.0
        for i in numba.prange(x.size):
            found += x[i]
        return found

    return total  # type: ignore[no-any-return]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--cases", type=int, default=4, help="of every operation (default: 4)")
    parser.add_argument("--layer", default="workqueue", help="Numba's (default: workqueue)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    numba.config.THREADING_LAYER = options.layer

    work = chosen(options.cases, random.Random(options.seed))
    arguments = [OPERATIONS[case.op].draw(case) for case in work]
    threads.set_num_threads(1)
    expected = [run(case, given) for case, given in zip(work, arguments, strict=True)]
    threads.set_num_threads(4)
    threads.WORTH_SPLITTING = threads.PIECE = 1

    total, ones = parallel_loop(), np.ones(10_000)
    total(ones)
    print(f"{len(work)} cases of {len(OPERATIONS)} operations, {options.callers} threads, ", end="")
    print(f"beside Numba's {numba.threading_layer()} layer")
    start, over = threading.Barrier(options.callers + 1), threading.Event()
    differ: Counter[str] = Counter()
    finished: list[int] = []

    def call(number: int) -> None:
        order = list(range(len(work)))
        random.Random(number).shuffle(order)  # each caller another way
        start.wait()
        for i in order:
            results = run(work[i], arguments[i])
            for name, value in expected[i].items():
                if distance(value, results[name]) != 0:
                    differ[f"{work[i].command()}: {name}"] += 1
        finished.append(number)

    def beside() -> None:
        start.wait()
        while not over.is_set():
            if total(ones) != len(ones):
                differ["Numba's loop"] += 1

    callers = [threading.Thread(target=call, args=(i,)) for i in range(options.callers)]
    other = threading.Thread(target=beside)
    for thread in (*callers, other):
        thread.start()
    for thread in callers:
        thread.join()
    over.set()
    other.join()
    for what, times in differ.items():
        print(f"{what} differs in {times} calls")
    print(f"{len(finished)} threads finished, {sum(differ.values())} results differ")
    return 1 if differ or len(finished) != options.callers else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks.reproducible``: what reproducible matrix products cost.

Each is timed in turns with the default, which is the device's BLAS: the three products of a layer,
and whole training steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

import gpubn
from benchmarks.environment import command_line, environment
from benchmarks.harness import time_once
from benchmarks.report import Table
from gpubn.backend import Device, to_host
from gpubn.kernels import for_array

PRODUCTS = ((1024, 1024, 1024), (200, 3072, 100), (50, 784, 512), (50, 512, 256), (50, 256, 10))
STEPS = {"digits": 64, "mnist": 784, "cifar10": 3072}  # values of a sample
REST = 0.05  # seconds before a turn: a BLAS's threads wait on their cores for more work
BATCH, HIDDEN = 50, (512, 256)  # as `gpubn train` has them


@dataclass(frozen=True)
class Comparison:
    """One thing done in two ways, both ready to be timed."""

    what: str
    shape: str
    dtype: str
    default: Callable[[], Any]
    reproducible: Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One result; times are medians in microseconds, the ratio is the median of turns' ratios."""

    what: str
    shape: str
    dtype: str
    default_us: float
    reproducible_us: float
    ratio: float


def products(device: Device, dtype: str) -> Iterator[Comparison]:
    rng = np.random.default_rng(0)
    for m, k, n in PRODUCTS:
        x, w, dout = (
            device.asarray(rng.standard_normal(shape).astype(dtype))
            for shape in ((m, k), (k, n), (m, n))
        )
        for what, a, b in (("x @ w", x, w), ("x.T @ dout", x.T, dout), ("dout @ w.T", dout, w.T)):
            matmul = for_array("gemm", a).matmul
            expected = np.asarray(to_host(a), np.float64) @ np.asarray(to_host(b), np.float64)
            np.testing.assert_allclose(to_host(matmul(a, b)), expected, rtol=0, atol=1e-2)
            yield Comparison(
                what,
                f"{a.shape[0]} x {a.shape[1]} x {b.shape[1]}",
                dtype,
                lambda a=a, b=b: a @ b,
                lambda a=a, b=b, matmul=matmul: matmul(a, b),
            )


def steps(device: Device, dtype: str) -> Iterator[Comparison]:
    rng = np.random.default_rng(0)
    for data, values in STEPS.items():
        X = device.asarray(rng.standard_normal((20 * BATCH, values)).astype(dtype))
        y = device.asarray(rng.integers(0, 10, len(X)))
        solvers = []
        for reproducible in (False, True):
            net = gpubn.FullyConnectedNet(
                HIDDEN, values, 10, 0.7, "batchnorm", 0.0, 0.05, dtype, seed=0,
                reproducible=reproducible,
            )  # fmt: skip
            solvers.append(
                gpubn.Solver(
                    net, {"X_train": X, "y_train": y, "X_val": X, "y_val": y}, update_rule="adam",
                    batch_size=BATCH, shuffle=True, seed=0, verbose=False,
                )
            )  # fmt: skip
        default, reproducible = solvers
        for _ in range(3):
            default._step()
            reproducible._step()
        losses = [solver.loss_history for solver in solvers]
        np.testing.assert_allclose(*losses, rtol=1e-2)
        shape = f"batch {BATCH}, {'-'.join(map(str, (values, *HIDDEN, 10)))}"
        yield Comparison(f"step on {data}", shape, dtype, default._step, reproducible._step)


def measure(device: Device, comparison: Comparison, seconds: float) -> Row:
    """Time both ways in turns for about ``seconds``."""

    def turn(run: Callable[[], Any]) -> float:
        time.sleep(REST)
        for _ in range(2):  # the first time to warm up
            times, end = [], time.perf_counter() + REST
            while time.perf_counter() < end or len(times) < 3:
                times.append(time_once(device, run))
        return statistics.median(times)

    default, reproducible = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(default) < 5:
        default.append(turn(comparison.default))
        reproducible.append(turn(comparison.reproducible))
    ratio = statistics.median(b / a for a, b in zip(default, reproducible, strict=True))
    return Row(
        comparison.what,
        comparison.shape,
        comparison.dtype,
        round(statistics.median(default) * 1e6, 1),
        round(statistics.median(reproducible) * 1e6, 1),
        round(ratio, 2),
    )


def main() -> None:
    parser = command_line("python -m benchmarks.reproducible", __doc__, ("float32", "float64"))
    options = parser.parse_args()

    with gpubn.use(options.device) as device:
        facts = environment(device)
        print(f"{'what':<16} {'shape':<30} {'default µs':>11} {'reprod. µs':>11} {'ratio':>6}")
        with Table(options.out, facts, [field.name for field in fields(Row)]) as table:
            for comparisons in (steps(device, options.dtype), products(device, options.dtype)):
                for comparison in comparisons:
                    row = measure(device, comparison, 0.2 if options.quick else 2.0)
                    table.write(asdict(row))
                    print(
                        f"{row.what:<16} {row.shape:<30} {row.default_us:>11.1f} "
                        f"{row.reproducible_us:>11.1f} {row.ratio:>6.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

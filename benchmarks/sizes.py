"""``python -m benchmarks.sizes``: time against size, to see that costs grow with the bytes.

Where memory bounds a layer, twice the elements take twice the time; where calls bound it, they take
as long. So a step, the ratio of two neighbouring times by the ratio of their sizes, above 1 is
where something else sets in: a cache that is outgrown, memory that is newly asked for, or a fault.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import gpubn
from benchmarks import (
    bench_batchnorm,
    bench_dropout,
    bench_groupnorm,
    bench_layernorm,
    bench_relu,
    bench_rmsnorm,
    plots,
)
from benchmarks.environment import command_line, environment
from benchmarks.harness import COPY, OURS, Case, Setting, measure
from benchmarks.layer import BACKWARD, FORWARD, Layer
from benchmarks.report import COLUMNS, Table, row_of

LEAST, MOST = 8, 26  # powers of two
SECONDS, QUICK_SECONDS = 0.5, 0.1

OPS: Mapping[str, Callable[[str, int], Layer]] = {
    "batchnorm": lambda dtype, n: bench_batchnorm.training(dtype, (n // 64, 64), "2-D", 1),
    "layernorm": lambda dtype, n: bench_layernorm.layer(dtype, (n // 256, 256)),
    "groupnorm": lambda dtype, n: bench_groupnorm.layer(dtype, (n // 256, 16, 4, 4), "NCHW", 1),
    "rmsnorm": lambda dtype, n: bench_rmsnorm.layer(dtype, (n // 256, 256)),
    "relu": lambda dtype, n: bench_relu.layer(dtype, (n,)),
    "dropout": lambda dtype, n: bench_dropout.layer(dtype, (n,)),
}
BACKWARD_TOO = ("batchnorm", "layernorm")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line("python -m benchmarks.sizes", __doc__)
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    parser.add_argument("--most", type=int, default=MOST, help="the largest size's power of two")
    options = parser.parse_args(arguments)

    powers = range(LEAST, options.most + 1, 2 if options.quick else 1)
    series: dict[str, dict[int, float]] = {}
    with gpubn.use(options.device) as device:
        facts = environment(device)
        setting = Setting(device, options.dtype)
        with Table(options.out, facts, COLUMNS) as table:
            for case in cases(setting, [1 << power for power in powers]):
                times = measure(case, device, QUICK_SECONDS if options.quick else SECONDS)
                row = row_of(case, times, reuse=False)
                table.write(row)
                name, elements = f"{case.op} {case.direction}", math.prod(case.shape)
                series.setdefault(name, {})[elements] = times[OURS].median * 1e6
                series.setdefault(COPY, {})[elements] = times[COPY].median * 1e6
                print(f"{name:<20} {elements:>10} {row['gpubn_us']:>12.1f} µs", flush=True)
    for name, times_of in series.items():
        print(largest_step(name, times_of), flush=True)
    if options.plot:
        plots.sizes(options.plot, series, facts)
    return 0


def cases(setting: Setting, sizes: Sequence[int]) -> Iterator[Case]:
    for op, layer in OPS.items():
        directions = (FORWARD, BACKWARD) if op in BACKWARD_TOO else (FORWARD,)
        for size in sizes:
            of_size = layer(setting.dtype, size).cases(setting)
            yield from (case for case in of_size if case.direction in directions)


def largest_step(name: str, times: Mapping[int, float]) -> str:
    """Return the line that says where an op's time grew most beyond its size."""
    points = sorted(times.items())
    steps = {
        (small, large): (after / before) / (large / small)
        for (small, before), (large, after) in itertools.pairwise(points)
    }
    if not steps:
        return f"{name}: one size only"
    at = max(steps, key=lambda pair: steps[pair])
    return f"{name:<20} largest step {steps[at]:.2f}, from {at[0]} to {at[1]} elements"


if __name__ == "__main__":
    sys.exit(main())

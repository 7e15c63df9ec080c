"""``python -m benchmarks``: time the layers on one device and record the results."""

from __future__ import annotations

import gpubn
from benchmarks import bench_batchnorm, bench_layernorm
from benchmarks.harness import QUICK_SHAPES, SHAPES, command_line, environment, measure, write_csv


def main() -> None:
    options = command_line("python -m benchmarks", __doc__).parse_args()

    with gpubn.use(options.device) as device:
        facts = environment(device)
        print(f"{'op':<20} {'shape':>14} {'median µs':>11} {'GB/s':>8} {'of copy':>8}", flush=True)
        shapes = QUICK_SHAPES if options.quick else SHAPES
        rows = []
        for module in (bench_batchnorm, bench_layernorm):
            cases = module.cases(device, shapes, options.dtype)
            for row in measure(device, cases, 0.1 if options.quick else 0.5):
                rows.append(row)
                shape = f"{row.rows} x {row.columns}"
                print(
                    f"{row.op:<20} {shape:>14} {row.median_us:>11.1f} "
                    f"{row.gb_per_s:>8.1f} {row.of_copy:>8.2f}",
                    flush=True,
                )
    if options.out:
        write_csv(options.out, rows, facts)


if __name__ == "__main__":
    main()

"""``python -m benchmarks``: time gpubn beside PyTorch and beside a copy, and record the results.

Exits with 1 where a result of gpubn's was wrong: it is not timed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import gpubn
from benchmarks import (
    bench_batchnorm,
    bench_batchnorm_relu,
    bench_dropout,
    bench_groupnorm,
    bench_layernorm,
    bench_optimizer,
    bench_relu,
    bench_rmsnorm,
    bench_step,
    peers,
    plots,
)
from benchmarks.checks import WrongResult
from benchmarks.environment import command_line, environment
from benchmarks.harness import SECONDS, Setting, measure
from benchmarks.report import COLUMNS, Row, Table, heading, line, row_of, summary
from benchmarks.shapes import Size

OPS = {
    "batchnorm": bench_batchnorm,
    "batchnorm_relu": bench_batchnorm_relu,
    "layernorm": bench_layernorm,
    "groupnorm": bench_groupnorm,
    "rmsnorm": bench_rmsnorm,
    "relu": bench_relu,
    "dropout": bench_dropout,
    "optimizer": bench_optimizer,
    "step": bench_step,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line("python -m benchmarks", __doc__)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="NAME")
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="gpubn writes into buffers that are reused, where its functions take out=",
    )
    parser.add_argument(
        "--peer",
        nargs="*",
        choices=peers.PEERS,
        metavar="NAME",
        help=f"any of {', '.join(peers.PEERS)}, or none; by default those that fit the device",
    )
    parser.add_argument("--plot", type=Path, help="PNG file to draw; of several ops one for each")
    parser.add_argument("--tiny", action="store_true", help="only see that everything runs")
    options = parser.parse_args(arguments)

    wrong, rows = 0, list[Row]()
    with gpubn.use(options.device) as device:
        facts = environment(device)
        torch = peers.load(device, options.peer)
        size: Size = "tiny" if options.tiny else "quick" if options.quick else "full"
        setting = Setting(device, options.dtype, size, options.reuse, torch)
        print(heading(), flush=True)
        with Table(options.out, facts, COLUMNS) as table:
            for name in options.op:
                for case in OPS[name].cases(setting):
                    try:
                        times = measure(case, device, SECONDS[size])
                    except WrongResult as error:
                        wrong += 1
                        print(f"NOT TIMED: {error}", flush=True)
                        continue
                    rows.append(row_of(case, times, options.reuse))
                    table.write(rows[-1])
                    print(line(rows[-1]), flush=True)
    print(*summary(rows), sep="\n", flush=True)
    if options.plot:
        plots.compare(options.plot, rows, facts)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

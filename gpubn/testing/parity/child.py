"""The process that computes cases for another instruction set; ``contestants`` starts it.

Argument: which cases, JSON of ``{operation: [first seed, behind the last]}``. Standard output: for
each case a line of JSON that names its results, then their bytes, one after another.
"""

from __future__ import annotations

import json
import os
import sys
from typing import BinaryIO

from gpubn.testing.parity.contestants import CPU, Results, compute
from gpubn.testing.parity.operations import OPERATIONS, cases


def main() -> None:
    """Compute the cases, and send their results."""
    seeds: dict[str, list[int]] = json.loads(sys.argv[1])
    # What anything prints must not come between the results.
    with os.fdopen(os.dup(1), "wb") as pipe:
        os.dup2(2, 1)
        for op, (first, last) in seeds.items():
            for case in cases(op, range(first, last)):
                arguments = OPERATIONS[op].draw(case)
                _send(pipe, op, case.seed, compute(CPU, op, arguments))


def _send(pipe: BinaryIO, op: str, seed: int, results: Results) -> None:
    described = [
        {"name": name, "shape": array.shape, "dtype": array.dtype.name}
        for name, array in results.items()
    ]
    frame = {"op": op, "seed": seed, "results": described}
    pipe.write(json.dumps(frame).encode() + b"\n")
    for array in results.values():
        pipe.write(array.tobytes())
    pipe.flush()


if __name__ == "__main__":
    main()

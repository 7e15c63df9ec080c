"""``gpubn parity``: every operation, on everything that can compute it here, compared bit for bit.

Operations (``operation``; all are in ``operations``) run on cases (``cases``, ``shapes``) by
contestants (``contestants``): the CPU with one, two and four threads, every CUDA device, and the
CPU again, compiled for another instruction set. Some results each of them computes in two ways,
such as with channels first and last. All are compared with each other and with the float64
reference (``comparison``), and told (``report``).
"""

from gpubn.testing.parity.comparison import Plan, Row, run
from gpubn.testing.parity.contestants import Contestants
from gpubn.testing.parity.report import as_json, environment, header, table_head, table_row, verdict

__all__ = [
    "Contestants",
    "Plan",
    "Row",
    "as_json",
    "environment",
    "header",
    "run",
    "table_head",
    "table_row",
    "verdict",
]

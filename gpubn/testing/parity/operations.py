"""The operations that parity runs. To add one: its arguments, its call, its entry in a family.

Arguments are drawn by a ``Draw``; the call takes them by name, NumPy or CuPy arrays alike, and
returns named results. A reference, where ``gpubn.testing.tolerance`` has a bound, gives for results
the float64 value, its scale and the row of the table.
"""

from collections.abc import Iterator

from gpubn.testing.parity import (
    batchnorm_operations,
    batchnorm_relu_operations,
    element_operations,
    groupnorm_operations,
    product_operations,
    row_operations,
)
from gpubn.testing.parity.cases import Case, missing_dtypes

_ALL = (
    *batchnorm_operations.OPERATIONS,
    *batchnorm_relu_operations.OPERATIONS,
    *groupnorm_operations.OPERATIONS,
    *element_operations.ACTIVATIONS,
    *row_operations.OPERATIONS,
    *product_operations.OPERATIONS,
    *element_operations.OPTIMIZATION,
)

OPERATIONS = {operation.name: operation for operation in _ALL}
"""Every operation by name, in the order in which they run."""


def cases(op: str, seeds: range) -> Iterator[Case]:
    """Yield the cases of these numbers, but of dtypes that are missing here."""
    missing = missing_dtypes()
    for case in map(OPERATIONS[op].case, seeds):
        if case.dtype not in missing:
            yield case

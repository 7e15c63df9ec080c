"""For tests of layers and networks, and of your own functions on NumPy and CuPy arrays.

Do they give the same on every device (``assert_parity``), are their gradients right
(``check_gradients``), how far apart are two results (``ulp_distance``, ``rel_error``)? The
reference formulas in float64 are in ``gpubn.testing.reference``, the bounds that gpubn's own
results keep to in ``gpubn.testing.tolerance``. ``gpubn.testing.plugin`` gives pytest the fixtures
``device`` and ``xp``; pytest finds it by itself.
"""

from gpubn.testing.devices import Agreement, NoSecondDevice, assert_parity, ulp_distance
from gpubn.testing.gradients import (
    check_gradients,
    eval_numerical_gradient,
    eval_numerical_gradient_array,
    rel_error,
)

__all__ = [
    "Agreement",
    "NoSecondDevice",
    "assert_parity",
    "check_gradients",
    "eval_numerical_gradient",
    "eval_numerical_gradient_array",
    "rel_error",
    "ulp_distance",
]

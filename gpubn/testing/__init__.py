"""For tests of layers and networks: reference formulas in float64, gradient checks, tolerances."""

from gpubn.testing.gradients import (
    eval_numerical_gradient,
    eval_numerical_gradient_array,
    rel_error,
)

__all__ = ["eval_numerical_gradient", "eval_numerical_gradient_array", "rel_error"]

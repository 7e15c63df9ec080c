"""The assignment's ``cs231n.gradient_check``, and the ``rel_error`` that its notebooks define."""

from gpubn.testing.gradients import (
    eval_numerical_gradient,
    eval_numerical_gradient_array,
    rel_error,
)

__all__ = ["eval_numerical_gradient", "eval_numerical_gradient_array", "rel_error"]

"""Losses over class scores."""

from __future__ import annotations

from gpubn.backend import Array, namespace, scope_of
from gpubn.kernels import for_array
from gpubn.layers import _check


def softmax_loss(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the mean cross entropy of the softmax of scores, and its gradient.

    Parameters
    ----------
    x : array (N, C), float32 or float64
        Scores; a row's largest is taken from it first, so none is too large.
    y : integer array (N,)
        Labels from 0 to C - 1.

    Returns
    -------
    loss : number, x's dtype
        A CuPy array of no dimensions where x is on CUDA: nothing waits for it.
    dx : array (N, C)

    Raises
    ------
    ValueError, TypeError
        An argument is not as above. Looking at labels on CUDA waits for the device.
    """
    _check.floating("x", x, ndim=2)
    with scope_of(x):
        y = _check.labels(y, x)
        loss, dx = for_array("softmax", x).loss(x, y)
    return loss[()], dx


def svm_loss(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the mean multiclass hinge loss of scores, with margin 1, and its gradient.

    ``mean over i of sum over j != y_i of max(0, x_ij - x_iy + 1)``: Weston and Watkins 1999.
    Arguments, results and errors are those of ``softmax_loss``.
    """
    _check.floating("x", x, ndim=2)
    xp = namespace(x)
    with scope_of(x):
        y = _check.labels(y, x)
        x = xp.ascontiguousarray(x)  # a sum follows the order of memory
        samples = xp.arange(x.shape[0])
        margins = xp.maximum(0, x - x[samples, y][:, None] + 1)
        margins[samples, y] = 0
        loss = margins.sum() / x.shape[0]
        dx = (margins > 0).astype(x.dtype)
        dx[samples, y] = -dx.sum(axis=1)
        dx /= x.shape[0]
    return loss, dx

"""Losses over class scores and weights, and how many answers are right."""

from __future__ import annotations

import numpy as np

from gpubn.backend import Array, namespace, scope_of
from gpubn.interop import foreign
from gpubn.kernels import for_array
from gpubn.layers import _check


@foreign
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
        loss, dx = for_array("losses", x).softmax_loss(x, y)
    return loss[()], dx


@foreign
def svm_loss(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the mean multiclass hinge loss of scores, with margin 1, and its gradient.

    ``mean over i of sum over j != y_i of max(0, x_ij - x_iy + 1)``: Weston and Watkins 1999.
    Arguments, results and errors are those of ``softmax_loss``.
    """
    _check.floating("x", x, ndim=2)
    with scope_of(x):
        y = _check.labels(y, x)
        loss, dx = for_array("losses", x).svm_loss(x, y)
    return loss[()], dx


@foreign
def l2_penalty(w: Array, reg: float) -> tuple[Array, Array]:
    """Return ``0.5 * reg * sum(w**2)``, a number of w's dtype, and its gradient ``reg * w``.

    Parameters
    ----------
    w : array of any shape, float32 or float64
    reg : float

    Raises
    ------
    ValueError, TypeError
        An argument is not as above.
    """
    _check.floating("w", w)
    reg = _check.number("reg", reg)
    kernels = for_array("l2", w)
    xp = namespace(w)
    with scope_of(w):
        loss, dw = xp.zeros((), w.dtype), xp.zeros(w.shape, w.dtype)
        kernels.add_scaled(loss, kernels.sum_of_squares(w), 0.5 * reg)
        kernels.add_scaled(dw, w, reg)
    return loss[()], dw


@foreign
def count_correct(x: Array, y: Array) -> Array:
    """Return how many rows of scores have their first largest one at their label.

    Parameters
    ----------
    x : array (N, C), float32 or float64
        A NaN counts as larger than any number.
    y : integer array (N,)
        A label that is no class is never right.

    Returns
    -------
    count : number, int64
        A CuPy array of no dimensions where x is on CUDA: nothing waits for it.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above.
    """
    _check.floating("x", x, ndim=2)
    _check.label_array(y, x.shape[0])
    _check.same_place("y", y, x)
    with scope_of(x):
        return for_array("losses", x).count_correct(x, y.astype(np.int64, copy=False))[()]

"""Numerical gradients, to check the analytic ones against.

The three functions of CS231n's ``gradient_check`` under their own names. They take NumPy and CuPy
arrays alike and import no CuPy: everything goes through the methods of the arrays that they are
given.

Check in float64: the difference of two results that a step of 1e-5 makes keeps about ten correct
digits there, and one or two in float32. Use a random upstream gradient too: with one of ones,
everything that cancels in the sum over a batch goes unseen, and a wrong ``dx`` of batch
normalization passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

__all__ = ["eval_numerical_gradient", "eval_numerical_gradient_array", "rel_error"]

# A NumPy or a CuPy array. CuPy publishes no types, and this module may not import it to ask.
Array: TypeAlias = Any


def rel_error(x: Array, y: Array) -> float:
    """Return the largest relative error between two arrays.

    ``max(|x - y| / max(1e-8, |x| + |y|))``, computed in float64. The floor keeps two values that
    are both zero, or as good as zero, from counting as different.

    Parameters
    ----------
    x, y : array or number
        Of the same shape and on the same device.

    Returns
    -------
    float
        From 0, equal, to 1, as for values of opposite sign; NaN if any value is NaN.

    Raises
    ------
    TypeError
        If an argument is complex, or one is on a GPU and the other is not.
    ValueError
        If the shapes differ (nothing is broadcast: that hides a gradient of the wrong shape), or
        there is nothing to compare.
    """
    x = _float64("x", x)
    y = _float64("y", y)
    if x.shape != y.shape:
        raise ValueError(f"y has shape {y.shape}, expected {x.shape}, the shape of x")
    if x.size == 0:
        raise ValueError(f"x and y have shape {x.shape}, expected at least one element")
    if x.ndim > 0:  # a number goes with either device
        _check_same_device("y", y, "x", x)
    # clip, and not np.maximum: it is a method, so it is the right device's.
    scale = (abs(x) + abs(y)).clip(1e-8)
    return float((abs(x - y) / scale).max())


def eval_numerical_gradient(
    f: Callable[[Array], Any], x: Array, verbose: bool = True, h: float = 1e-5
) -> Array:
    """Gradient of a scalar function by centred differences.

    ``(f(x + h) - f(x - h)) / (2 h)`` for each element in turn: an error of order h^2, where a
    one-sided difference has order h.

    Parameters
    ----------
    f : callable
        Takes `x` and returns one number: a float, a NumPy scalar or a 0-d array.
    x : array
        The point, floating point, float64 for a useful check. It is changed in place, since `f` may
        look at it through another name (a network's parameter), and every element is put back, also
        when `f` raises.
    verbose : bool
        Print each index and its derivative.
    h : float
        The step.

    Returns
    -------
    array
        The gradient, in the shape, dtype and device of `x`.

    Raises
    ------
    TypeError
        If `x` is not a floating-point array, or `f` does not return a number.
    ValueError
        If `f` returns more than one number, `x` is read-only, `h` is not a positive number, or `h`
        is so small that adding and subtracting it gives the same element.
    """
    _check_point(x, h)
    gradient = x.copy()  # every element is overwritten
    for index in np.ndindex(x.shape):
        with _stepping(x, index, h) as step_to:
            step_to(+1)
            above = _number(f(x))
            step_to(-1)
            below = _number(f(x))
        derivative = (above - below) / (2 * h)
        gradient[index] = derivative
        if verbose:
            print(index, derivative)
    return gradient


def eval_numerical_gradient_array(
    f: Callable[[Array], Array], x: Array, df: Array, h: float = 1e-5
) -> Array:
    """Gradient of ``sum(f(x) * df)`` by centred differences, for a function that returns an array.

    Parameters
    ----------
    f : callable
        Takes `x` and returns an array. It may return the same buffer each time.
    x : array
        The point, as for `eval_numerical_gradient`: changed in place, and put back.
    df : array
        The upstream gradient, in the shape of ``f(x)``.
    h : float
        The step.

    Returns
    -------
    array
        The gradient, in the shape, dtype and device of `x`.

    Raises
    ------
    TypeError
        If `x` is not a floating-point array, `df` or what `f` returns is no array, or one of these
        two is on a GPU and the other is not.
    ValueError
        If `df` is not of the shape that `f` returns, and as for `eval_numerical_gradient`.
    """
    _check_point(x, h)
    if not _is_array(df):
        raise TypeError(f"df is {_describe(df)}, expected an array of the shape that f returns")
    gradient = x.copy()  # every element is overwritten
    for index in np.ndindex(x.shape):
        with _stepping(x, index, h) as step_to:
            step_to(+1)
            above = _output(f(x), df)
            step_to(-1)
            below = _output(f(x), df)
        gradient[index] = float(((above - below) * df).sum()) / (2 * h)
    return gradient


@contextmanager
def _stepping(x: Array, index: tuple[int, ...], h: float) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves ``x[index]`` h up (+1) or down (-1); put it back on leaving."""
    # A copy: x[index] is a number in NumPy, but in CuPy a 0-d view, which would move with x.
    original = x[index].copy()
    centre = float(original)
    as_stored = x.dtype.type
    if as_stored(centre + h) == as_stored(centre - h):
        raise ValueError(
            f"h is {h}, expected a step that changes x{list(index)} = {centre} in {x.dtype}"
        )

    def step_to(side: int) -> None:
        x[index] = centre + side * h

    try:
        yield step_to
    finally:
        x[index] = original


def _check_point(x: Array, h: float) -> None:
    if not _is_array(x):
        raise TypeError(f"x is {_describe(x)}, expected a floating-point array")
    if x.dtype.kind != "f":
        raise TypeError(
            f"x has dtype {x.dtype}, expected floating point: a step of {h} would be lost in it"
        )
    if not getattr(x.flags, "writeable", True):  # CuPy's flags have no such entry
        raise ValueError("x is read-only, expected an array that can be changed in place")
    if not 0 < h < float("inf"):
        raise ValueError(f"h is {h}, expected a positive number")


def _number(value: Any) -> float:
    """Return as a float what a scalar function returned."""
    shape = getattr(value, "shape", ())
    if shape != ():
        raise ValueError(f"f returned an array of shape {shape}, expected one number")
    try:
        return float(value)
    except TypeError as error:
        raise TypeError(f"f returned {_describe(value)}, expected one number") from error


def _output(value: Array, df: Array) -> Array:
    """Return a float64 copy of what an array function returned, checked against `df`.

    A copy, since the function may write its next result into the same buffer.
    """
    if not _is_array(value):
        raise TypeError(
            f"f returned {_describe(value)}, expected an array "
            "(eval_numerical_gradient takes functions that return a number)"
        )
    if value.shape != df.shape:
        raise ValueError(f"df has shape {df.shape}, expected {value.shape}, the shape of f(x)")
    _check_same_device("df", df, "f(x)", value)
    return value.astype("float64")


def _float64(name: str, value: Any) -> Array:
    """Return an array, number or nested list as float64, where it is."""
    # [()] turns a 0-d array into a NumPy scalar, which goes with either device.
    array = value if _on_gpu(value) else np.asarray(value)[()]
    if array.dtype.kind == "c":
        raise TypeError(f"{name} has dtype {array.dtype}, expected real numbers")
    return array.astype("float64")


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "astype")


def _on_gpu(value: Any) -> bool:
    return hasattr(value, "__cuda_array_interface__")


def _describe(value: Any) -> str:
    return f"a {type(value).__name__}"


def _check_same_device(name: str, value: Array, other_name: str, other: Array) -> None:
    if _on_gpu(value) != _on_gpu(other):
        place = {False: "in host memory", True: "on a GPU"}
        raise TypeError(
            f"{name} is {place[_on_gpu(value)]}, expected {place[_on_gpu(other)]} like {other_name}"
        )

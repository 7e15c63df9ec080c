"""Numerical gradients, to check the analytic ones against.

``check_gradients`` checks a pair of forward and backward in one call. The other three are the
functions of CS231n's ``gradient_check`` under their own names. All take NumPy and CuPy arrays alike
and import no CuPy.

Check in float64: the difference of two results that a step of 1e-5 makes keeps about ten correct
digits there, and one or two in float32. Use a random upstream gradient too: with one of ones,
everything that cancels in the sum over a batch goes unseen, and a wrong ``dx`` of batch
normalization passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gpubn.backend import namespace, place, scope_of, to_host

__all__ = [
    "check_gradients",
    "eval_numerical_gradient",
    "eval_numerical_gradient_array",
    "rel_error",
]

# A NumPy or a CuPy array. CuPy publishes no types, and this module may not import it to ask.
Array: TypeAlias = Any

# How many roundings of its result's size a forward pass may have, where its change is taken to be
# noise: about what a normalization has, and few enough to leave eight digits.
_ROUNDINGS = 8


def check_gradients(
    forward: Callable[..., tuple[Array, Any]],
    backward: Callable[[Array, Any], Any],
    *inputs: Any,
    seed: int = 0,
    tolerance: float = 1e-6,
    h: float = 1e-5,
) -> tuple[float, ...]:
    """Assert that a backward pass gives the gradients of its forward pass.

    The upstream gradient is random: one of ones hides errors that cancel in a sum.

    Parameters
    ----------
    forward : callable
        ``out, cache = forward(*inputs)``, with `out` a float64 array or number.
    backward : callable
        ``backward(dout, cache)`` returns the gradients of the float64 arrays among `inputs`, in
        their order: a tuple or list, or the gradient itself where there is one. Other inputs have
        no place in it.
    *inputs
        At least one float64 array, NumPy or CuPy; small, since each element costs two forward
        passes. Anything else (labels, a dict of parameters, a number) is passed on. Each call gets
        copies: yours stay as they are, and what one call changes the next does not see.
    seed : int
        Of the upstream gradient, normally distributed.
    tolerance : float
        The largest relative error that is accepted.
    h : float
        The step of the central differences. They are wrong next to a kink, such as ReLU's at 0:
        keep inputs at least this far away.

    Returns
    -------
    tuple of float
        For each gradient its largest relative error, ``|a - n| / max(|a| + |n|, floor)`` of an
        analytic element a and a numerical one n. At the floor, ``noise / tolerance``, a difference
        as large as the rounding noise of a central difference is just accepted, so that a gradient
        of 0 can be checked too: ``noise = 8 * 2**-52 * sum(abs(out * dout)) / h``.

    Raises
    ------
    AssertionError
        If a gradient is wrong: the input's position, the worst element's index and both values. Or
        if there is not one for each float64 array, of its shape, dtype and device.
    TypeError
        If an input is an array of another floating-point dtype (float32 keeps one or two digits of
        a central difference), none is float64, or `forward` does not return as above.
    ValueError
        If `tolerance` or `h` is not a positive number, or `h` is lost in an element of the inputs.
    """
    __tracebackhide__ = True  # pytest then shows the caller's line, not these
    for option, value in (("tolerance", tolerance), ("h", h)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{option} is {value}, expected a positive number")
    positions = _differentiable(inputs)
    for position in positions:
        shape = inputs[position].shape
        if 0 in shape:
            raise ValueError(f"input {position} has shape {shape}, expected values")
    out, cache = _out_and_cache(forward(*_copies(inputs)))
    normal = np.random.default_rng(seed).normal(size=out.shape)
    with scope_of(out):
        dout = namespace(out).asarray(normal)
    floor = _ROUNDINGS * 2.0**-52 * float(abs(out * dout).sum()) / h / tolerance
    # A copy, for backward may write to it.
    gradients = _gradients(backward(dout.copy(), cache), inputs, positions)

    errors = []
    for position, gradient in zip(positions, gradients, strict=True):

        def out_at(x: Array, position: int = position) -> Array:
            moved = _copies([*inputs[:position], x, *inputs[position + 1 :]])
            return _out_and_cache(forward(*moved))[0]

        point = inputs[position].copy()
        numerical = to_host(eval_numerical_gradient_array(out_at, point, dout, h))
        errors.append(_assert_close(position, gradient, numerical, floor, tolerance))
    return tuple(errors)


def _differentiable(inputs: Sequence[Any]) -> list[int]:
    """Return the positions of the float64 arrays, and refuse other floating-point ones."""
    arrays = [i for i, value in enumerate(inputs) if _is_array(value) and value.dtype.kind in "fc"]
    for i in arrays:
        if inputs[i].dtype != np.float64:
            raise TypeError(
                f"input {i} has dtype {inputs[i].dtype}, expected float64: central differences "
                'need its digits (x.astype("float64") has them)'
            )
    if not arrays:
        raise TypeError("no input is an array of floating point, expected at least one to check")
    return arrays


def _copies(values: Sequence[Any]) -> list[Any]:
    return [value.copy() if _is_array(value) else copy.deepcopy(value) for value in values]


def _out_and_cache(returned: Any) -> tuple[Array, Any]:
    if not isinstance(returned, tuple):
        raise TypeError(f"forward returned {_describe(returned)}, expected a tuple (out, cache)")
    if len(returned) != 2:
        raise TypeError(f"forward returned {len(returned)} values, expected two: (out, cache)")
    out = np.float64(returned[0]) if isinstance(returned[0], float) else returned[0]
    if not _is_array(out):
        raise TypeError(f"forward's out is {_describe(out)}, expected a float64 array or number")
    if out.dtype != np.float64:
        raise TypeError(f"forward's out has dtype {out.dtype}, expected float64 like its inputs")
    return out, returned[1]


def _gradients(returned: Any, inputs: Sequence[Any], positions: list[int]) -> list[NDArray[Any]]:
    """Bring the gradients that backward returned to the host, checked against the inputs."""
    __tracebackhide__ = True
    gradients = returned if isinstance(returned, tuple | list) else (returned,)
    if len(gradients) != len(positions):
        raise AssertionError(
            f"backward's gradients are {len(gradients)}, expected {len(positions)}: one for each "
            f"float64 array among the inputs, at {positions}"
        )
    for position, gradient in zip(positions, gradients, strict=True):
        name, x = f"the gradient of input {position}", inputs[position]
        if not _is_array(gradient):
            raise AssertionError(f"{name} is {_describe(gradient)}, expected an array")
        for what, came, expected in (
            ("shape", gradient.shape, x.shape),
            ("dtype", gradient.dtype, x.dtype),
            ("device", place(gradient), place(x)),
        ):
            if came != expected:
                raise AssertionError(f"{name} has {what} {came}, expected {expected}")
    return [np.asarray(to_host(gradient)) for gradient in gradients]


def _assert_close(
    position: int, gradient: NDArray[Any], numerical: NDArray[Any], floor: float, tolerance: float
) -> float:
    """Return the largest relative error of a gradient, or raise if it is above the tolerance."""
    __tracebackhide__ = True
    with np.errstate(invalid="ignore", divide="ignore"):  # no number, or 0 / 0
        differences = np.abs(gradient - numerical)
        relative = differences / np.maximum(np.abs(gradient) + np.abs(numerical), floor)
    relative = np.where(differences == 0, 0.0, relative)
    relative = np.where(np.isnan(relative), np.inf, relative)  # a NaN on either side is an error
    wrong = relative > tolerance
    if wrong.any():
        index = np.unravel_index(np.argmax(relative), relative.shape)
        raise AssertionError(
            f"the gradient of input {position} is wrong in {np.count_nonzero(wrong)} of "
            f"{wrong.size} elements, worst at {[int(i) for i in index]}: analytic "
            f"{gradient[index]:.17g}, numerical {numerical[index]:.17g}, relative error "
            f"{relative[index]:.3g}, expected at most {tolerance:g}"
        )
    return float(relative.max(initial=0.0))


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

"""Does a function give the same numbers on every device? For code of one's own, as for ours.

``assert_parity`` runs a function written for NumPy and CuPy arrays on each device and compares
what comes back, to the bit or within a tolerance that the caller states. ``ulp_distance`` is its
measure.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpubn import backend
from gpubn.backend import Array, Device, is_array, to_host

__all__ = ["Agreement", "NoSecondDevice", "assert_parity", "ulp_distance"]

_WORDS = {"float16": np.uint16, "float32": np.uint32, "float64": np.uint64}


# --- The measure ---------------------------------------------------------------------------------


def ulp_distance(a: Array, b: Array) -> NDArray[np.float64]:
    """Return how many representable values each element of `a` is apart from that of `b`.

    Parameters
    ----------
    a, b : float16, float32 or float64 array or scalar
        Of the same shape and dtype, each on any device.

    Returns
    -------
    float64 array of that shape, in host memory
        0 where both have the same bits, or both are NaN, whatever its payload; 1 for neighbours,
        which -0 and +0 are as well; infinity where one is NaN and the other is not. An infinite
        value is the neighbour of the largest finite one. Exact up to 2**53.

    Raises
    ------
    TypeError
        If `a` has no such dtype, or `b` another one than `a`.
    ValueError
        If the shapes differ; nothing is broadcast.
    """
    a, b = _native(a), _native(b)
    if a.dtype.name not in _WORDS:
        raise TypeError(f"a has dtype {a.dtype}, expected float16, float32 or float64")
    if b.dtype != a.dtype:
        raise TypeError(f"b has dtype {b.dtype}, expected {a.dtype}, the dtype of a")
    if b.shape != a.shape:
        raise ValueError(f"b has shape {b.shape}, expected {a.shape}, the shape of a")
    ordinal_a, ordinal_b = _ordinals(a), _ordinals(b)
    # The larger minus the smaller: float64's ordinals fill all of uint64, and int64 would overflow.
    larger, smaller = np.maximum(ordinal_a, ordinal_b), np.minimum(ordinal_a, ordinal_b)
    distance = np.asarray((larger - smaller).astype(np.float64))
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    distance[nan_a & nan_b] = 0.0
    distance[nan_a ^ nan_b] = np.inf
    return distance


def _native(value: Any) -> NDArray[Any]:
    """Bring a value to the host, in the processor's byte order."""
    array = np.asarray(to_host(value))
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _words(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(_WORDS[values.dtype.name])


def _ordinals(values: NDArray[Any]) -> NDArray[Any]:
    """Return each value's place in its dtype's order: -inf, ..., -0, +0, ..., inf."""
    words = _words(values)
    sign = words.dtype.type(1 << (8 * words.itemsize - 1))
    # IEEE 754 sorts the positive values as unsigned integers, and the negative ones backwards.
    ordinals: NDArray[Any] = np.where(words & sign, ~words, words | sign)
    return ordinals


# --- The comparison ------------------------------------------------------------------------------


class NoSecondDevice(UserWarning):
    """``assert_parity`` found one device only; the message says why, and what it compared."""


@dataclass(frozen=True)
class Agreement:
    """What ``assert_parity`` compared, and how near it came.

    Attributes
    ----------
    sides : tuple of str
        What was compared: devices (``"cpu"``, ``"cuda:0"``), or on one device ``"cpu"`` and
        ``"cpu in float64"`` or ``"cpu again"``.
    results, elements : int
        How many arrays and numbers were compared, and how many elements they have in all.
    units : float
        The largest distance, in units of the last place: of each element, or against float64 of
        the result's largest value. 0 for the same bits.
    worst : str or None
        The result with that distance, such as ``"result[1]"``; None where it is 0.
    index : tuple of int or None
        Where in that result.
    """

    sides: tuple[str, ...]
    results: int
    elements: int
    units: float
    worst: str | None
    index: tuple[int, ...] | None

    def __str__(self) -> str:
        counts = f"{_count(self.elements, 'element')} in {_count(self.results, 'result')}"
        if self.worst is None or self.index is None:
            distance = "no difference"
        else:
            place = f"{self.worst} at {list(self.index)}"
            distance = f"at most {_count(self.units, 'unit')} apart ({place})"
        return f"{' and '.join(self.sides)}: {counts}, {distance}"


def assert_parity(
    fn: Callable[..., Any],
    /,
    *args: Any,
    units: float = 0,
    atol: float = 0.0,
    reference_units: float = 20,
    devices: Sequence[str] | None = None,
    **kwargs: Any,
) -> Agreement:
    """Assert that a function gives the same numbers on every device.

    Parameters
    ----------
    fn : callable
        Works on NumPy and on CuPy arrays (``gpubn.backend.namespace(x)`` is the module of an
        array's functions). It returns an array or a number of float16, float32, float64, an
        integer, boolean or complex type, None, or tuples, lists and dicts of these. What it writes
        into the arrays, lists and dicts among its arguments counts as a result too.
    *args, **kwargs
        For `fn`. Each call gets copies of the arrays among them, also of those inside tuples, lists
        and dicts, brought to its device; anything else is passed on as it is.
    units : float
        How many units in the last place two elements may be apart (``ulp_distance``). The default
        asks for the same bits, but that a NaN is a NaN. Integers and booleans are always exact.
    atol : float
        Elements whose difference is at most this agree as well, whatever the units. For results
        near zero that are left over from larger terms.
    reference_units : float
        The tolerance where there is one device only, and the results are compared with those for
        float64 arguments: in units of the last place of the result's dtype at the result's largest
        finite magnitude. The default is the most that an operation of this library is allowed
        (``gpubn.testing.tolerance``); more means that rounding errors add up or cancel, which is
        worth a number of its own.
    devices : list of str, optional
        Such as ``["cpu", "cuda:1"]``. Default: the CPU, and CUDA where it works. One name compares
        with float64 on that device.

    Returns
    -------
    Agreement
        What was compared and the largest distance; readable when printed.

    Raises
    ------
    AssertionError
        If results differ: which ones, in how many elements, and the worst with its bits; or if
        they differ in number, shape or dtype.
    DeviceError
        If a device in `devices` cannot be used.
    ValueError
        If a tolerance is negative, `devices` is empty or names one twice, or `fn` returned nothing,
        or nothing but empty arrays, and wrote to no argument.
    TypeError
        If `fn` returned anything else than the above.

    Warns
    -----
    NoSecondDevice
        If `devices` is not given and CUDA cannot be used: the reason, and what was compared
        instead. Results that have no wider reference, float64 ones for instance, are then compared
        between two calls only.

    Notes
    -----
    `fn` runs with ``gpubn.use(device)`` in force and the device current in CuPy. Where `fn` has
    arguments named as the options here, hand over a lambda.
    """
    __tracebackhide__ = True  # pytest then shows the caller's line, not these
    for option, value in (("units", units), ("atol", atol), ("reference_units", reference_units)):
        if not value >= 0:
            raise ValueError(f"{option} is {value}, expected a number that is at least 0")
    first, *others = (_run(fn, args, kwargs, device) for device in _chosen(devices))
    if others:
        return _compare_all(first, others, _Tolerance(units, atol))

    repeated = _run(fn, args, kwargs, first.device, " again")
    agreement = _compare(first, repeated, _Tolerance(units, atol))
    instead = "two calls there were compared, since no result has a wider reference"
    reference = _run(fn, args, kwargs, first.device, " in float64", wide=True)
    if _is_wider(reference, first):
        agreement = _compare(first, reference, _Tolerance(reference_units, atol, True))
        instead = f"it was compared with float64 there ({agreement})"
    if devices is None:
        warnings.warn(
            f"{first.function} ran on {first.side} only, {backend.probe().reason}: {instead}",
            NoSecondDevice,
            stacklevel=2,
        )
    return agreement


@dataclass(frozen=True)
class _Run:
    """What one call gave: its results, and its arguments as it left them, each under a name."""

    function: str
    device: Device
    side: str
    values: Mapping[str, NDArray[Any]]
    counted: frozenset[str]
    """The names of the results, and of the arguments that were written to."""


def _chosen(devices: Sequence[str] | None) -> list[Device]:
    if devices is None:
        devices = ["cpu", "cuda"] if backend.probe().usable else ["cpu"]
    if isinstance(devices, str):
        raise TypeError(f"devices is {devices!r}, expected a list of names")
    chosen = [backend.resolve(device) for device in devices]
    names = [device.name for device in chosen]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"devices is {list(devices)}, expected at least one, and each once")
    return chosen


def _run(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: Device,
    how: str = "",
    *,
    wide: bool = False,
) -> _Run:
    """Call `fn` on copies of its arguments on a device, and bring to the host what it gives."""
    function = getattr(fn, "__name__", type(fn).__name__)
    given = _map_arrays(lambda array: _host_copy(array, wide), {"args": args, "kwargs": kwargs})
    with backend.use(device.name), device.scope():
        # On the CPU asarray makes no copy, and what was given has to stay as it is, to compare.
        arguments = _map_arrays(lambda array: device.asarray(array.copy()), given)
        try:
            result = fn(*arguments["args"], **arguments["kwargs"])
        # The user's function may raise anything: it goes on, with a note of which device it was on.
        except Exception as error:
            error.add_note(f"assert_parity: {function} was running on {device.name}{how}")
            raise
        results = dict(_results(result))
        left = dict(_values(arguments))
    before = dict(_values(given))
    written = {name for name in left if not _is_same(before.get(name), left[name])}
    counted = frozenset({*results, *written})
    if not counted:
        raise ValueError(f"{function} returned nothing and wrote to no argument")
    if not any(np.size({**results, **left}[name]) for name in counted):
        raise ValueError(f"{function} gave no value to compare: what it returned is empty")
    return _Run(function, device, device.name + how, {**results, **left}, counted)


def _map_arrays(function: Callable[[Array], Array], value: Any) -> Any:
    """Rebuild tuples, lists and dicts with `function` of each array in them."""
    if is_array(value):
        return function(value)
    if isinstance(value, tuple | list):
        parts = [_map_arrays(function, part) for part in value]
        if isinstance(value, list):
            return parts
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, dict):
        rebuilt = copy.copy(value)  # a subclass keeps what makes it one
        rebuilt.update({key: _map_arrays(function, part) for key, part in value.items()})
        return rebuilt
    return value


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Name everything in nested tuples, lists and dicts; None is nothing."""
    if isinstance(value, dict):
        parts = [(f"{name}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, tuple | list):
        fields = getattr(value, "_fields", None)
        labels = [f".{f}" for f in fields] if fields else [f"[{i}]" for i in range(len(value))]
        parts = [(name + label, part) for label, part in zip(labels, value, strict=True)]
    else:
        if value is not None:
            yield name, value
        return
    for part_name, part in parts:
        yield from _leaves(part_name, part)


def _is_value(value: Any) -> bool:
    return is_array(value) or isinstance(value, bool | int | float | complex | np.generic)


def _is_comparable(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "biu" or array.dtype.name in (*_WORDS, "complex64", "complex128")


def _values(arguments: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name what can be compared among the arguments, each copied to the host."""
    for kind, values in arguments.items():
        for name, value in _leaves(kind, values):
            if _is_value(value) and _is_comparable(array := _host_copy(value)):
                yield from _parts(name, array)


def _results(value: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name the results, each copied to the host: its buffer may serve the next call as well."""
    for name, leaf in _leaves("result", value):
        if not _is_value(leaf):
            raise TypeError(
                f"{name} is a {type(leaf).__name__}, expected an array, a number or None, or "
                "tuples, lists and dicts of them"
            )
        array = _host_copy(leaf)
        if not _is_comparable(array):
            raise TypeError(
                f"{name} has dtype {array.dtype}, expected float16, float32, float64 or a complex, "
                "integer or boolean dtype"
            )
        yield from _parts(name, array)


def _parts(name: str, array: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name an array, or the real and the imaginary part of a complex one."""
    if array.dtype.kind == "c":
        yield f"{name}.real", array.real
        yield f"{name}.imag", array.imag
    else:
        yield name, array


def _host_copy(value: Any, wide: bool = False) -> NDArray[Any]:
    array = _native(value).copy(order="K")
    if wide and array.dtype.kind in "fc":
        # float16 + float64 is float64, complex64 + float64 is complex128.
        return array.astype(np.result_type(array.dtype, np.float64))
    return array


def _is_same(a: NDArray[Any] | None, b: NDArray[Any]) -> bool:
    return a is not None and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _is_wider(reference: _Run, run: _Run) -> bool:
    return any(
        reference.values[name].dtype.itemsize > run.values[name].dtype.itemsize
        for name in run.counted & reference.values.keys()
    )


@dataclass(frozen=True)
class _Tolerance:
    units: float
    atol: float
    in_float64: bool = False
    """The second side is the reference: float64 results, and units of the largest value."""

    def exceeded(self, a: NDArray[Any], b: NDArray[Any], distances: NDArray[Any]) -> NDArray[Any]:
        wrong = np.asarray(distances > self.units)
        if self.atol > 0 and a.dtype.kind == "f":
            with np.errstate(invalid="ignore"):  # inf - inf: the distance has settled that
                wrong &= ~(np.abs(a.astype(np.float64) - b.astype(np.float64)) <= self.atol)
        return wrong

    def __str__(self) -> str:
        if self.units == 0 and self.atol == 0:
            return "differ"
        of = "of the largest value's last place" if self.in_float64 else "in the last place"
        absolutely = f" and {self.atol:g}" if self.atol else ""
        return f"differ by more than {self.units:g} units {of}{absolutely}"


def _compare_all(first: _Run, others: Sequence[_Run], tolerance: _Tolerance) -> Agreement:
    __tracebackhide__ = True
    agreements = []
    for other in others:
        # Before Python 3.12 a comprehension has a frame of its own, which pytest would show.
        agreements.append(_compare(first, other, tolerance))  # noqa: PERF401 - see above
    worst = max(agreements, key=lambda agreement: agreement.units)
    return replace(worst, sides=(first.side, *(other.side for other in others)))


def _compare(first: _Run, second: _Run, tolerance: _Tolerance) -> Agreement:
    """Compare everything that two calls gave, and raise with all that differs."""
    __tracebackhide__ = True
    counted = first.counted | second.counted
    names = [name for name in {**first.values, **second.values} if name in counted]
    complaints = [_mismatch(name, first, second, tolerance) for name in names]
    if not any(complaints):
        agreement = Agreement((first.side, second.side), len(names), 0, 0.0, None, None)
        for i, name in enumerate(names):
            a, b = first.values[name], second.values[name]
            distances = _distances(a, b, tolerance.in_float64)
            wrong = tolerance.exceeded(a, b, distances)
            if wrong.any():
                complaints[i] = _difference(name, (first, second), distances, wrong, tolerance)
            agreement = _extended(agreement, name, distances)
    if any(complaints):
        title = f"{first.function} gives different results: {first.side} and {second.side}"
        raise AssertionError("\n".join([title, *filter(None, complaints)]))
    return agreement


def _extended(agreement: Agreement, name: str, distances: NDArray[Any]) -> Agreement:
    """Count one more result's elements, and its largest distance if that is the largest so far."""
    agreement = replace(agreement, elements=agreement.elements + distances.size)
    if distances.max(initial=0.0) <= agreement.units:
        return agreement
    index = _argmax(distances)
    return replace(agreement, units=float(distances[index]), worst=name, index=index)


def _mismatch(name: str, first: _Run, second: _Run, tolerance: _Tolerance) -> str | None:
    """Say why two results cannot be compared element by element, if so."""
    if name not in first.values or name not in second.values:
        return f"{name}: there is one for {(first if name in first.values else second).side} only"
    a, b = first.values[name], second.values[name]
    if a.shape != b.shape:
        return f"{name} has shape {a.shape} for {first.side}, {b.shape} for {second.side}"
    both_float = a.dtype.kind == b.dtype.kind == "f"
    if a.dtype != b.dtype and not (tolerance.in_float64 and both_float):
        return f"{name} has dtype {a.dtype} for {first.side}, {b.dtype} for {second.side}"
    return None


def _distances(a: NDArray[Any], b: NDArray[Any], in_float64: bool) -> NDArray[np.float64]:
    if a.dtype.kind in "biu":
        return np.where(a == b, 0.0, np.inf)
    if in_float64 and b.dtype.itemsize > a.dtype.itemsize:
        return _units_of_the_largest(a, b)
    if in_float64:  # no reference: that two calls agree is known already
        return np.zeros(a.shape)
    return ulp_distance(a, b)


def _units_of_the_largest(result: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """Return each error in units of the last place of the result's largest finite magnitude."""
    magnitudes = np.abs(result[np.isfinite(result)])
    unit = float(np.spacing(magnitudes.max(initial=0.0)))
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = reference.astype(result.dtype)  # what is too large for the dtype is infinite
        errors = np.abs(result.astype(np.float64) - reference) / unit
    finite = np.isfinite(result) & np.isfinite(rounded)
    same = (result == rounded) | (np.isnan(result) & np.isnan(rounded))
    return np.where(finite, errors, np.where(same, 0.0, np.inf))


def _argmax(distances: NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.argmax(distances), distances.shape))


def _difference(
    name: str,
    runs: tuple[_Run, _Run],
    distances: NDArray[np.float64],
    wrong: NDArray[np.bool_],
    tolerance: _Tolerance,
) -> str:
    """Tell how many elements of a result differ, and show the worst."""
    array = runs[0].values[name]
    index = _argmax(np.where(wrong, distances, -1.0))
    distance = float(distances[index])
    apart = f"{_count(distance, 'unit')} apart" if np.isfinite(distance) else "unequal"
    count = f"{np.count_nonzero(wrong)} of {_count(array.size, 'element')}"
    width = max(len(run.side) for run in runs)
    return "\n".join(
        [
            f"{name}, {array.dtype} {array.shape}: {count} {tolerance}",
            f"  worst at {list(index)}: {apart}",
            *(f"    {run.side:{width}}  {_shown(run.values[name][index])}" for run in runs),
        ]
    )


def _shown(value: np.generic) -> str:
    """Return a value's shortest text, and the bits of a floating-point one."""
    if value.dtype.kind != "f":
        return str(value)
    bits = int(_words(np.asarray(value)))
    return f"{value!s}  0x{bits:0{2 * value.dtype.itemsize}x}"


def _count(number: float, noun: str) -> str:
    return f"{number:.10g} {noun}{'' if number == 1 else 's'}"

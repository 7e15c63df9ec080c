"""Normalizations against PyTorch: forward, backward, running statistics, evaluation mode."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch_cases import (
    CASES,
    HALF_UNIT,
    KINDS,
    ROUNDED,
    Arrays,
    Scale,
    View,
    assert_close,
    both,
    both_singles,
    chain_growth,
    compare,
    compare_mixed,
    computes_with,
    differentiate,
    draw_values,
    every_dtype,
    image_shapes,
    margin,
    numpy,
    seeds,
    shapes,
    spacing,
    tensor,
    torch,
    torch_scales,
    wide,
)

from gpubn import layers
from gpubn.testing.tolerance import (
    batchnorm_scales,
    batchnorm_test_scales,
    groupnorm_scales,
    layernorm_scales,
    rmsnorm_scales,
)

F = torch.nn.functional
EPS = 1e-5
STATISTICS = ("running_mean", "running_var")

# --- Batch norm ----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A case of batch norm: ``memory`` is the order in which x's axes lie there."""

    shape: tuple[int, ...]
    kind: str = "ordinary"
    seed: int = 0
    memory: str = "plain"
    axis: int = 1
    momentum: float = 0.1  # PyTorch's

    @property
    def channel(self) -> int:
        return self.axis % len(self.shape)

    @property
    def view(self) -> View:
        axes = tuple(i for i in range(len(self.shape)) if i != self.channel)
        parameter = tuple(c if i == self.channel else 1 for i, c in enumerate(self.shape))
        return View(self.shape, axes, parameter)

    @property
    def samples(self) -> int:
        return math.prod(self.shape) // self.shape[self.channel]


@st.composite
def batches(draw: Any, least: int = 2) -> Batch:
    """Cases of two to five dimensions: channels second or last, in memory too."""
    shape = draw(image_shapes(draw(st.integers(2, 5))))
    axis = draw(st.sampled_from([1, 1, 1, -1]))
    if axis == -1:
        shape = (shape[0], *shape[2:], shape[1])
    case = Batch(
        shape,
        draw(st.sampled_from(KINDS)),
        draw(seeds),
        draw(st.sampled_from(["plain", "channels last"])),
        axis,
        draw(st.sampled_from([0.1, 0.0, 0.3, 1.0])),
    )
    return case if case.samples >= least else case._replace(shape=(least, *shape[1:]))


def named_batches(test: Any) -> Any:
    """Add the corner cases: one position, channel or sample, primes, 49 positions, edges, hard."""
    for case in (
        Batch((2, 1)),
        Batch((2, 1, 1, 1)),
        Batch((1, 1, 1, 2), memory="channels last"),
        Batch((5, 3, 1, 1), memory="channels last"),
        Batch((8, 8)),
        Batch((7, 13, 1, 1), "far mean"),
        Batch((1, 3, 7, 7)),
        Batch((2, 33, 7, 7), memory="channels last"),
        Batch((5, 101, 7, 7), "far mean"),
        Batch((3, 1, 7, 7), "constant"),
        Batch((3, 257, 7, 1), "constant", memory="channels last"),
        Batch((2, 2, 2, 2, 2), memory="channels last"),
        Batch((1024, 5)),
        Batch((2049, 3), "far mean"),
        Batch((257, 31, 3), "far sample"),
        Batch((3, 5, 7, 31), axis=-1),
    ):
        test = example(case)(test)
    return test


def batch_arrays(case: Batch, dtype: np.dtype[Any]) -> Arrays:
    """Return random arguments, the running statistics among them."""
    rng = np.random.default_rng(case.seed)
    real, channels = computes_with(dtype), case.shape[case.channel]
    x = draw_values(case.shape, case.view.axes, case.kind, dtype, rng)
    arrays = {
        "x": x,
        "gamma": rng.standard_normal(channels).astype(real),
        "beta": rng.standard_normal(channels).astype(real),
        "dout": rng.standard_normal(case.shape).astype(dtype),
        "running_mean": (x.reshape(-1)[:1] + rng.standard_normal(channels)).astype(real),
        "running_var": rng.chisquare(3, channels).astype(real),
    }
    if case.memory == "channels last":
        for name in ("x", "dout"):
            last = np.moveaxis(arrays[name], case.channel, -1).copy()
            arrays[name] = np.moveaxis(last, -1, case.channel)
    return arrays


def our_param(case: Batch, arrays: Arrays, mode: str) -> Arrays:
    return {
        "mode": mode,
        "momentum": 1 - case.momentum,
        "unbiased": True,
        "running_mean": arrays["running_mean"],
        "running_var": arrays["running_var"],
    }


def our_batchnorm(case: Batch, arrays: Arrays, mode: str) -> Arrays:
    bn_param = our_param(case, arrays, mode)
    x, gamma, beta = (arrays[name] for name in ("x", "gamma", "beta"))
    out, cache = layers.batchnorm_forward(x, gamma, beta, bn_param, case.axis)
    dx, dgamma, dbeta = layers.batchnorm_backward(arrays["dout"], cache)
    results = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    return results | {name: bn_param[name] for name in ("running_mean", "running_var")}


def torch_batchnorm(
    case: Batch, arrays: Arrays, mode: str, after: Any = None, *more: str
) -> Arrays:
    """Return what PyTorch gives of arrays of any dtypes that it takes.

    ``after`` is a function of batch norm's result, and of ``more`` of the arrays.
    """
    running = [tensor(arrays[name]) for name in STATISTICS]

    def forward(x: Any, gamma: Any, beta: Any, **others: Any) -> Any:
        x, training = x.movedim(case.axis, 1), mode == "train"
        out = F.batch_norm(x, *running, gamma, beta, training, case.momentum, EPS)
        out = out.movedim(1, case.axis)
        return out if after is None else after(out, **others)

    inputs = {name: arrays[name] for name in ("x", "gamma", "beta", *more)}
    results = differentiate(forward, inputs, arrays["dout"])
    return results | dict(zip(STATISTICS, map(numpy, running), strict=True))


def by_channel(case: Batch, array: Any) -> Any:
    """Return an array of x's shape as samples by channels."""
    return np.moveaxis(array, case.channel, -1).reshape(case.samples, -1)


def batch_scales(case: Batch, arrays: Arrays) -> dict[str, Scale]:
    """Return the scales of training's results."""
    x, dout = (by_channel(case, arrays[name]) for name in ("x", "dout"))
    ours = batchnorm_scales(x, arrays["gamma"], arrays["beta"], dout)
    for name in ("out", "dx"):
        ours[name] = ours[name].reshape(case.view.parameter)
    inputs = {name: wide(arrays)[name] for name in ("x", "gamma", "beta", "dout")}
    chain = chain_growth(case.samples, case.kind == "constant")
    theirs = torch_scales(case.view, **inputs, chain=chain)
    return both(ours, theirs) | running_scales(case, arrays)


def running_scales(case: Batch, arrays: Arrays) -> dict[str, Scale]:
    """Return the scales of running statistics: PyTorch's variance has the mean's rounding in it."""
    arrays = wide(arrays)
    x, axes, share = arrays["x"], case.view.axes, case.momentum
    mean = (1 - share) * np.abs(arrays["running_mean"]) + share * np.abs(x).mean(axis=axes)
    kept = (1 - share) * arrays["running_var"]
    chain = chain_growth(case.samples, case.kind == "constant")
    var, far = x.var(axis=axes, ddof=1), chain * np.abs(x).max(axis=axes)
    rounded = np.sqrt(var) * far + np.finfo(np.float64).eps * far**2
    return {
        "running_mean": Scale(mean, mean * chain),
        "running_var": Scale(kept + share * var, kept + share * (var + rounded)),
    }


def fixed_scales(case: Batch, arrays: Arrays) -> dict[str, Scale]:
    """Return the scales of evaluation mode's results.

    PyTorch folds the mean into the shift, so its terms are not centred.
    """
    names = ("gamma", "beta", "running_mean", "running_var")
    x, dout = (by_channel(case, arrays[name]) for name in ("x", "dout"))
    ours = batchnorm_test_scales(x, *(arrays[name] for name in names), dout)
    values = wide(arrays)
    gamma, beta, mean, var = (np.abs(values[name]) for name in names)
    x, g = (by_channel(case, np.abs(values[name])) for name in ("x", "dout"))
    invstd = 1 / np.sqrt(var + EPS)
    far = (x + mean) * invstd
    theirs = {"out": gamma * far + beta, "dx": ours["dx"]}
    theirs |= {"dgamma": (g * far).sum(axis=0), "dbeta": ours["dbeta"]}
    for scales in (ours, theirs):
        for name in ("out", "dx"):
            shape = (*np.delete(case.shape, case.channel), -1)
            scales[name] = np.moveaxis(scales[name].reshape(shape), -1, case.channel)
    return both(ours, theirs)


@CASES
@given(case=batches())
@named_batches
@every_dtype
def test_batchnorm(dtype: np.dtype[Any], case: Batch) -> None:
    arrays = batch_arrays(case, dtype)
    results, values = our_batchnorm(case, arrays, "train"), wide(arrays)
    scales = batch_scales(case, arrays)
    compare("batchnorm", dtype, results, torch_batchnorm(case, values, "train"), scales)
    if dtype.itemsize == 2:
        mixed = torch_batchnorm(case, arrays, "train")
        # PyTorch rounds dbeta, and its share in dx, to half precision.
        compare_mixed("batchnorm", dtype, results, mixed, scales, "out", "dgamma", *STATISTICS)


@CASES
@given(case=batches(least=1))
@named_batches
@example(Batch((1, 1, 1, 1)))
@example(Batch((1, 37), memory="channels last"))
@every_dtype
def test_batchnorm_in_evaluation_mode(dtype: np.dtype[Any], case: Batch) -> None:
    arrays = batch_arrays(case, dtype)
    results, values = our_batchnorm(case, arrays, "test"), wide(arrays)
    expected = torch_batchnorm(case, values, "test")
    for name in STATISTICS:  # neither side changes them
        assert results.pop(name) is arrays[name]
        np.testing.assert_array_equal(expected.pop(name), values[name])
    scales = fixed_scales(case, arrays)
    compare("batchnorm test", dtype, results, expected, scales)
    if dtype.itemsize == 2:
        mixed = torch_batchnorm(case, arrays, "test")
        compare_mixed("batchnorm test", dtype, results, mixed, scales, "out", "dx", "dgamma")


@CASES
@given(case=batches(), more=st.integers(1, 3))
@example(Batch((2, 1)), 3)
@example(Batch((5, 3, 7, 7), "far mean"), 3)
@example(Batch((5, 3, 7, 7), "constant"), 3)
@both_singles
def test_running_statistics_of_several_batches(
    dtype: np.dtype[Any], case: Batch, more: int
) -> None:
    """With a momentum, and the mean of all batches where it is None, as in PyTorch's modules."""
    for momentum in (None, case.momentum):
        module = torch_module(case, momentum)
        ones = np.ones(case.shape[case.channel], dtype)
        bn_param = {"mode": "train", "unbiased": True, "running_var": ones}  # PyTorch's begins at 1
        bn_param["momentum"] = None if momentum is None else 1 - momentum
        allowed = dict.fromkeys(STATISTICS, 0.0)
        for number in range(1, more + 2):
            batch = case._replace(
                shape=(case.shape[0] + number, *case.shape[1:]),
                seed=case.seed + number,
                momentum=1 / number if momentum is None else momentum,
            )
            arrays = batch_arrays(batch, dtype)
            arrays |= {name: numpy(getattr(module, name)).copy() for name in STATISTICS}
            layers.batchnorm_forward(arrays["x"], ones, ones, bn_param, case.axis)
            with torch.no_grad():
                module(tensor(wide(arrays)["x"]).movedim(case.axis, 1))
            scales = running_scales(batch, arrays)
            for name in STATISTICS:
                row, expected = f"batchnorm {name}", numpy(getattr(module, name))
                # What the last batches left stays, in the share that they keep.
                allowed[name] = margin(row, dtype, scales[name]) + allowed[name] * (
                    1 - batch.momentum
                )
                assert_close(row, bn_param[name], expected, allowed[name], dtype)
            if momentum is None:
                assert bn_param["num_batches"] == int(module.num_batches_tracked) == number


def torch_module(case: Batch, momentum: float | None) -> Any:
    kind = getattr(torch.nn, f"BatchNorm{max(1, len(case.shape) - 2)}d")
    return kind(case.shape[case.channel], momentum=momentum, dtype=torch.float64)


def test_both_refuse_a_channel_of_one_sample() -> None:
    x, ones = np.ones((1, 3, 1, 1)), np.ones(3)
    with pytest.raises(ValueError, match="expected at least 2 samples"):
        layers.batchnorm_forward(x, ones, ones, {"mode": "train"})
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        F.batch_norm(tensor(x), tensor(ones), tensor(ones), training=True)


# --- Batch norm with what follows it -------------------------------------------------------------


def without_doubt(arrays: Arrays, before: Any, allowed: Any) -> None:
    """Let no gradient come to where the two sides may disagree on whether ReLU lets it pass."""
    arrays["dout"][np.abs(before) <= allowed] = 0


@CASES
@given(case=batches())
@named_batches
@every_dtype
def test_batchnorm_relu(dtype: np.dtype[Any], case: Batch) -> None:
    arrays = batch_arrays(case, dtype)
    scales = batch_scales(case, arrays)
    before = torch_batchnorm(case, wide(arrays), "train")["out"]
    without_doubt(arrays, before, margin("batchnorm out", computes_with(dtype), scales["out"]))
    values = wide(arrays)

    bn_param = our_param(case, arrays, "train")
    inputs = (arrays[name] for name in ("x", "gamma", "beta"))
    out, cache = layers.batchnorm_relu_forward(*inputs, bn_param, case.axis)
    dx, dgamma, dbeta = layers.batchnorm_relu_backward(arrays["dout"], cache)
    results = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    results |= {name: bn_param[name] for name in STATISTICS}

    expected = torch_batchnorm(case, values, "train", F.relu)
    scales = batch_scales(case, arrays | {"dout": arrays["dout"] * (before > 0)})
    compare("batchnorm", dtype, results, expected, scales)


@CASES
@given(case=batches())
@named_batches
@every_dtype
def test_batchnorm_add_relu(dtype: np.dtype[Any], case: Batch) -> None:
    arrays, real = batch_arrays(case, dtype), computes_with(dtype)
    rng = np.random.default_rng(case.seed + 1)
    arrays["residual"] = rng.standard_normal(case.shape).astype(dtype)
    values = wide(arrays)
    scales = batch_scales(case, arrays)
    normalized = torch_batchnorm(case, values, "train")["out"]
    before = normalized + values["residual"]
    # Batch norm's result is rounded to x's dtype, and so is the sum.
    allowed = margin("batchnorm out", real, scales["out"])
    if dtype.itemsize == 2:
        allowed = allowed + HALF_UNIT * spacing(dtype, np.abs(normalized) + allowed)
    allowed = allowed + HALF_UNIT * spacing(dtype, np.abs(before) + allowed)
    without_doubt(arrays, before, allowed)
    values = wide(arrays)

    bn_param = our_param(case, arrays, "train")
    inputs = (arrays[name] for name in ("x", "residual", "gamma", "beta"))
    out, cache = layers.batchnorm_add_relu_forward(*inputs, bn_param, case.axis)
    dx, dresidual, dgamma, dbeta = layers.batchnorm_add_relu_backward(arrays["dout"], cache)

    def add_relu(out: Any, residual: Any) -> Any:
        return F.relu(out + residual)

    expected = torch_batchnorm(case, values, "train", add_relu, "residual")
    assert_close("batchnorm_add_relu out", out, expected.pop("out"), allowed, dtype, roundings=0)
    assert_close(
        "batchnorm_add_relu dresidual", dresidual, expected.pop("dresidual"), 0, dtype, roundings=0
    )
    scales = batch_scales(case, arrays | {"dout": arrays["dout"] * (before > 0)})
    del scales["out"]
    results = {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    results |= {name: bn_param[name] for name in STATISTICS}
    compare("batchnorm", dtype, results, expected, scales)


# --- Layer norm and RMS norm ---------------------------------------------------------------------


class Rows(NamedTuple):
    """A case of a norm over the last ``last`` axes of x."""

    shape: tuple[int, ...]
    last: int = 1
    kind: str = "ordinary"
    seed: int = 0

    @property
    def normalized(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.last :]

    @property
    def view(self) -> View:
        ndim = len(self.shape)
        axes = tuple(range(ndim - self.last, ndim))
        return View(self.shape, axes, (1,) * (ndim - self.last) + self.normalized)


@st.composite
def rows(draw: Any) -> Rows:
    ndim = draw(st.integers(1, 4))
    shape, last = draw(shapes(ndim)), draw(st.integers(1, ndim))
    return Rows(shape, last, draw(st.sampled_from(KINDS)), draw(seeds))


def named_rows(test: Any) -> Any:
    """Add the corner cases: one value, one feature, one row, primes, 49 positions, edges, hard."""
    for case in (
        Rows((1, 1)),
        Rows((7, 1)),
        Rows((1, 257)),
        Rows((2, 1, 7, 7), 2),
        Rows((2, 3, 7, 7), 3, "far mean"),
        Rows((2, 3, 7, 7), 4),
        Rows((31, 101)),
        Rows((3, 1024), kind="constant"),
        Rows((257, 13), kind="far mean"),
        Rows((2, 2049), kind="far sample"),
        Rows((2048, 8)),
        Rows((4, 5, 255), 1, "small"),
    ):
        test = example(case)(test)
    return test


def row_arrays(case: Rows, dtype: np.dtype[Any]) -> Arrays:
    rng, real = np.random.default_rng(case.seed), computes_with(dtype)
    return {
        "x": draw_values(case.shape, case.view.axes, case.kind, dtype, rng),
        "gamma": rng.standard_normal(case.normalized).astype(real),
        "beta": rng.standard_normal(case.normalized).astype(real),
        "dout": rng.standard_normal(case.shape).astype(dtype),
    }


def by_row(case: Rows, arrays: Arrays) -> Arrays:
    """Return x and dout as rows of features, and parameters of a feature."""
    length = math.prod(case.normalized)
    return {
        name: array.reshape((-1, length) if name in ("x", "dout") else -1)
        for name, array in arrays.items()
    }


def in_shape(case: Rows, scales: Arrays) -> Arrays:
    """Undo ``by_row`` for scales, which may be one for all of a row."""
    length = math.prod(case.normalized)
    flat = math.prod(case.shape) // length, length
    return {
        name: np.broadcast_to(scale, flat).reshape(case.shape)
        if name in ROUNDED
        else scale.reshape(case.normalized)
        for name, scale in scales.items()
    }


@CASES
@given(case=rows())
@named_rows
@every_dtype
def test_layernorm(dtype: np.dtype[Any], case: Rows) -> None:
    arrays = row_arrays(case, dtype)
    out, cache = layers.layernorm_forward(arrays["x"], arrays["gamma"], arrays["beta"], {})
    dx, dgamma, dbeta = layers.layernorm_backward(arrays["dout"], cache)
    results = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}

    def torch_layernorm(arrays: Arrays) -> Arrays:
        def forward(x: Any, gamma: Any, beta: Any) -> Any:
            return F.layer_norm(x, case.normalized, gamma, beta, EPS)

        inputs = {name: arrays[name] for name in ("x", "gamma", "beta")}
        return differentiate(forward, inputs, arrays["dout"])

    values, flat = wide(arrays), by_row(case, arrays)
    scales = both(
        in_shape(case, layernorm_scales(**flat)), torch_scales(case.view, **values, squared=True)
    )
    compare("layernorm", dtype, results, torch_layernorm(values), scales)
    if dtype.itemsize == 2:
        mixed = torch_layernorm(arrays)
        # PyTorch adds dgamma and dbeta up in half precision.
        compare_mixed("layernorm", dtype, results, mixed, scales, "out", "dx")


@CASES
@given(case=rows())
@named_rows
@every_dtype
def test_rmsnorm(dtype: np.dtype[Any], case: Rows) -> None:
    arrays = row_arrays(case, dtype)
    del arrays["beta"]
    out, cache = layers.rmsnorm_forward(arrays["x"], arrays["gamma"], {})
    dx, dgamma = layers.rmsnorm_backward(arrays["dout"], cache)
    results = {"out": out, "dx": dx, "dgamma": dgamma}

    def forward(x: Any, gamma: Any) -> Any:
        return F.rms_norm(x, case.normalized, gamma, EPS)

    values = wide(arrays)
    inputs = {name: values[name] for name in ("x", "gamma")}
    expected = differentiate(forward, inputs, values["dout"])
    # PyTorch has no float32 parameters beside half precision here.
    scales = both(in_shape(case, rmsnorm_scales(**by_row(case, arrays))))
    compare("rmsnorm", dtype, results, expected, scales)


# --- Group norm and instance norm ----------------------------------------------------------------


class Groups(NamedTuple):
    """A case of group norm."""

    shape: tuple[int, ...]
    groups: int = 1
    kind: str = "ordinary"
    seed: int = 0
    memory: str = "plain"

    @property
    def view(self) -> View:
        n, c, *spatial = self.shape
        size, positions = c // self.groups, tuple(spatial)
        shape = (n, self.groups, size, *positions)
        parameter = (1, self.groups, size, *(1 for _ in positions))
        return View(shape, tuple(range(2, len(shape))), parameter)


@st.composite
def groups(draw: Any, positions: int = 1, instances: bool = False) -> Groups:
    """Cases of two to five dimensions; ``instances`` are of one channel a group."""
    shape = draw(image_shapes(draw(st.integers(2 if positions == 1 else 3, 5)), positions))
    channels = shape[1]
    divisors = [g for g in range(1, channels + 1) if channels % g == 0]
    return Groups(
        shape,
        channels if instances else draw(st.sampled_from(divisors)),
        draw(st.sampled_from(KINDS)),
        draw(seeds),
        draw(st.sampled_from(["plain", "channels last"])),
    )


def group_arrays(case: Groups, dtype: np.dtype[Any]) -> Arrays:
    rng, real, channels = np.random.default_rng(case.seed), computes_with(dtype), case.shape[1]
    x = draw_values(case.view.shape, case.view.axes, case.kind, dtype, rng)
    arrays = {
        "x": x.reshape(case.shape),
        "gamma": rng.standard_normal(channels).astype(real),
        "beta": rng.standard_normal(channels).astype(real),
        "dout": rng.standard_normal(case.shape).astype(dtype),
    }
    if case.memory == "channels last":
        for name in ("x", "dout"):
            arrays[name] = np.moveaxis(np.moveaxis(arrays[name], 1, -1).copy(), -1, 1)
    return arrays


def torch_groupnorm(case: Groups, arrays: Arrays) -> Arrays:
    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        # F.group_norm refuses a group of one value, which is no error here. Channels last,
        # PyTorch takes the variance as a difference of two squares.
        return torch.group_norm(x.contiguous(), case.groups, gamma, beta, EPS)

    inputs = {name: arrays[name] for name in ("x", "gamma", "beta")}
    return differentiate(forward, inputs, arrays["dout"])


@CASES
@given(case=groups())
@example(Groups((1, 1, 1, 1)))
@example(Groups((3, 1)))
@example(Groups((7, 13), 13))
@example(Groups((2, 6, 1, 1), 3))
@example(Groups((2, 12, 7, 7), 1, "far mean"))
@example(Groups((2, 12, 7, 7), 4, "far mean", memory="channels last"))
@example(Groups((2, 12, 7, 7), 12, "constant"))
@example(Groups((3, 32, 7, 7), 32, memory="channels last"))
@example(Groups((1, 33, 31), 11, "constant"))
@example(Groups((257, 8), 2))
@example(Groups((2, 256, 5, 5), 32, "far sample"))
@example(Groups((2, 3, 1, 2049), 3))
@example(Groups((2, 2, 1024), 1, "far mean"))
@every_dtype
def test_groupnorm(dtype: np.dtype[Any], case: Groups) -> None:
    arrays = group_arrays(case, dtype)
    inputs = (arrays[name] for name in ("x", "gamma", "beta"))
    out, cache = layers.groupnorm_forward(*inputs, case.groups, {})
    dx, dgamma, dbeta = layers.groupnorm_backward(arrays["dout"], cache)
    results = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}

    values = wide(arrays)
    scales = both(
        groupnorm_scales(**arrays, num_groups=case.groups),
        torch_scales(case.view, **values, squared=True),
    )
    compare("groupnorm", dtype, results, torch_groupnorm(case, values), scales)
    if dtype.itemsize == 2:
        mixed = torch_groupnorm(case, arrays)
        compare_mixed("groupnorm", dtype, results, mixed, scales, *results)


@CASES
@given(case=groups(positions=2, instances=True))
@example(Groups((1, 1, 2), 1))
@example(Groups((1, 1, 7, 7), 1, "far mean"))
@example(Groups((3, 13, 7, 7), 13, "constant", memory="channels last"))
@example(Groups((2, 257, 3, 3), 257))
@example(Groups((1, 1, 2049), 1, "far sample"))
@example(Groups((5, 2, 1, 1, 31), 2, "far mean"))
@every_dtype
def test_instancenorm(dtype: np.dtype[Any], case: Groups) -> None:
    arrays = group_arrays(case, dtype)
    out, cache = layers.instancenorm_forward(arrays["x"], arrays["gamma"], arrays["beta"], {})
    dx, dgamma, dbeta = layers.instancenorm_backward(arrays["dout"], cache)
    results = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}

    def torch_instancenorm(arrays: Arrays) -> Arrays:
        def forward(x: Any, gamma: Any, beta: Any) -> Any:
            return F.instance_norm(x, weight=gamma, bias=beta, eps=EPS)

        inputs = {name: arrays[name] for name in ("x", "gamma", "beta")}
        # With channels last in dout, and one sample, PyTorch 2.13 gives wrong gradients.
        return differentiate(forward, inputs, np.ascontiguousarray(arrays["dout"]))

    values = wide(arrays)
    chain = chain_growth(math.prod(case.shape[2:]), case.kind == "constant")
    scales = both(
        groupnorm_scales(**arrays, num_groups=case.groups),
        torch_scales(case.view, **values, chain=chain),
    )
    compare("groupnorm", dtype, results, torch_instancenorm(values), scales)
    if dtype.itemsize == 2:
        mixed = torch_instancenorm(arrays)
        compare_mixed("groupnorm", dtype, results, mixed, scales, "out", "dgamma")

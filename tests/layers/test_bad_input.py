"""What layers refuse: the error names the argument, what came and what was expected."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from conftest import host_cuda
from layer_cases import (
    LAYERS,
    Arrays,
    Layer,
    affine,
    affine_bn_relu,
    affine_relu,
    batchnorm,
    batchnorm_add_relu,
    batchnorm_relu,
    draw,
    draw_of_shape,
    dropout,
    groupnorm,
    instancenorm,
    layernorm,
    relu,
    rmsnorm,
    softmax_loss,
    svm_loss,
)

from gpubn import layers
from gpubn.backend import Array, Device, to_host

N, D = 4, 3

Refusal = tuple[Any, type[Exception], str]


def full(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def three_groups(x: Array, gamma: Array, beta: Array, dout: Array) -> Arrays:
    return groupnorm(x, gamma, beta, dout, D)


def refused(
    device: Device, layer: Layer, name: str, value: Any, error: type[Exception], text: str
) -> None:
    """Call a layer with one argument exchanged; the message has to be ``text`` exactly."""
    rng = np.random.default_rng(0)
    arrays: Arrays = draw_of_shape(layer, (N, D), np.float32, rng) | {name: value}
    arguments = {
        key: device.asarray(array) if isinstance(array, np.ndarray) else array
        for key, array in arrays.items()
    }
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        layer(**arguments)


# --- Arrays --------------------------------------------------------------------------------------


def of_x(expected: str, *others: str) -> list[Refusal]:
    """What is refused of x, where it has to be of one of the expected dtypes."""
    return [
        (full(0, D), ValueError, "x has shape (0, 3), expected at least one value"),
        (full(N, 0), ValueError, "x has shape (4, 0), expected at least one value"),
        *(
            (full(N, D, dtype=dtype), TypeError, f"x has dtype {dtype}, expected {expected}")
            for dtype in ("int64", "bool", "complex64", *others)
        ),
        ([[1.0, 2.0]], TypeError, "x is a list, expected a NumPy or CuPy array"),
        (None, TypeError, "x is a NoneType, expected a NumPy or CuPy array"),
    ]


X = of_x("float32 or float64", "float16")
X_HALF = of_x("float16, bfloat16, float32 or float64", "uint16")
X_2D: list[Refusal] = [
    (full(D), ValueError, "x has shape (3,), expected 2 dimensions"),
    (full(N, D, 1), ValueError, "x has shape (4, 3, 1), expected 2 dimensions"),
]
X_CHANNELS: list[Refusal] = [
    *X_HALF,
    (full(D), ValueError, "x has shape (3,), expected at least 2 dimensions"),
    (full(), ValueError, "x has shape (), expected at least 2 dimensions"),
    (full(N, N), ValueError, "gamma has shape (3,), expected (4,)"),
]
X_LAST: list[Refusal] = [
    *X_HALF,
    (full(N, D, 1), ValueError, "gamma has shape (3,), expected (1,)"),
    (
        full(),
        ValueError,
        "gamma has shape (3,), expected the shape of the last axes of x ()",
    ),
]
X_AFFINE: list[Refusal] = [
    (full(D), ValueError, "x has shape (3,), expected (N, d1, ...)"),
    (full(N, 2, 2), ValueError, "w has shape (3, 3), expected (4, 3)"),
]


def like_x(name: str) -> list[Refusal]:
    """What is refused of an argument that has to be as x."""
    return [
        (full(D, N), ValueError, f"{name} has shape (3, 4), expected (4, 3)"),
        (full(1, D), ValueError, f"{name} has shape (1, 3), expected (4, 3)"),
        (
            full(N, D, dtype=float),
            TypeError,
            f"{name} has dtype float64, expected float32 as x has",
        ),
        (full(N, D, dtype=int), TypeError, f"{name} has dtype int64, expected float32 as x has"),
        (
            full(N, D, dtype=np.float16),
            TypeError,
            f"{name} has dtype float16, expected float32 as x has",
        ),
        (1.0, TypeError, f"{name} is a float, expected a NumPy or CuPy array"),
    ]


DOUT = like_x("dout")


def channel(name: str) -> list[Refusal]:
    """What is refused of an argument of one value a feature."""
    return [
        (full(1), ValueError, f"{name} has shape (1,), expected (3,)"),
        (full(10), ValueError, f"{name} has shape (10,), expected (3,)"),
        (full(1, D), ValueError, f"{name} has shape (1, 3), expected (3,)"),
        (full(D, dtype=float), TypeError, f"{name} has dtype float64, expected float32 as x has"),
        (full(D, dtype=int), TypeError, f"{name} has dtype int64, expected float32 as x has"),
        (
            full(D, dtype=np.float16),
            TypeError,
            f"{name} has dtype float16, expected float32 as x has",
        ),
        ([1.0] * D, TypeError, f"{name} is a list, expected a NumPy or CuPy array"),
    ]


def last_axes(name: str) -> list[Refusal]:
    """What is refused of gamma where it says how many axes are normalized."""
    of_two = [refusal for refusal in channel(name) if np.shape(refusal[0]) != (1, D)]
    text = f"{name} has shape {{}}, expected the shape of the last axes of x (4, 3)"
    return [
        *of_two,
        (full(1, D), ValueError, f"{name} has shape (1, 3), expected (4, 3)"),
        (full(N, D, 1), ValueError, text.format("(4, 3, 1)")),
        (full(), ValueError, text.format("()")),
    ]


W: list[Refusal] = [
    (full(D), ValueError, "w has shape (3,), expected 2 dimensions"),
    (full(N, D), ValueError, "w has shape (4, 3), expected (3, 3)"),
    (full(D, 0), ValueError, "w has shape (3, 0), expected at least one value"),
    (full(D, D, dtype=float), TypeError, "w has dtype float64, expected float32 as x has"),
    (full(D, D, dtype=complex), TypeError, "w has dtype complex128, expected float32 or float64"),
]
Y: list[Refusal] = [
    (np.array([0, 1, 2, 3]), ValueError, "y has a label 3, expected 0 to 2"),
    (np.array([0, -1, 2, 0]), ValueError, "y has a label -1, expected 0 to 2"),
    (np.arange(3), ValueError, "y has shape (3,), expected (4,)"),
    (np.zeros((N, 1), int), ValueError, "y has shape (4, 1), expected (4,)"),
    (np.zeros(N), TypeError, "y has dtype float64, expected integers"),
    (np.zeros(N, bool), TypeError, "y has dtype bool, expected integers"),
    ([0, 1, 2, 0], TypeError, "y is a list, expected a NumPy or CuPy array"),
]
NORM = {"gamma": channel("gamma"), "beta": channel("beta")}
RUNNING = {name: channel(name) for name in ("running_mean", "running_var")}
AFFINE = {"x": X + X_AFFINE, "w": W, "b": channel("b"), "dout": DOUT}

ARRAYS: dict[Layer, Mapping[str, list[Refusal]]] = {
    affine: AFFINE,
    affine_relu: AFFINE,
    affine_bn_relu: {**AFFINE, **NORM},
    relu: {"x": X_HALF, "dout": DOUT},
    batchnorm: {"x": X_CHANNELS, **NORM, **RUNNING, "dout": DOUT},
    batchnorm_relu: {"x": X_CHANNELS, **NORM, **RUNNING, "dout": DOUT},
    batchnorm_add_relu: {
        **{"x": X_HALF, "residual": like_x("residual")},
        **{**NORM, **RUNNING, "dout": DOUT},
    },
    three_groups: {"x": X_CHANNELS[:-1], **NORM, "dout": DOUT},
    layernorm: {"x": X_LAST, "gamma": last_axes("gamma"), "beta": channel("beta"), "dout": DOUT},
    rmsnorm: {"x": X_LAST, "gamma": last_axes("gamma"), "dout": DOUT},
    dropout: {"x": X_HALF, "dout": DOUT},
    softmax_loss: {"x": X + X_2D, "y": Y},
    svm_loss: {"x": X + X_2D, "y": Y},
}


@pytest.mark.parametrize(
    ("layer", "name"), [(layer, name) for layer, names in ARRAYS.items() for name in names]
)
def test_arrays(device: Device, layer: Layer, name: str) -> None:
    for value, error, text in ARRAYS[layer][name]:
        refused(device, layer, name, value, error, text)


@pytest.mark.parametrize("layer", [batchnorm, batchnorm_relu, batchnorm_add_relu, affine_bn_relu])
def test_one_sample_is_no_estimate(device: Device, layer: Layer) -> None:
    for shape in ((1, D), (1, D, 1, 1)) if layer is not affine_bn_relu else ((1, D),):
        arrays = draw_of_shape(layer, shape, np.float32, np.random.default_rng(0))
        text = (
            f"x has shape {shape}, expected at least 2 samples in training: "
            "the variance of one sample is no estimate (mode 'test' takes one)"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            layer(**{name: device.asarray(array) for name, array in arrays.items()})


@pytest.mark.parametrize("shape", [(N, D), (N, D, 1, 1)])
def test_one_position_is_no_instance(device: Device, shape: tuple[int, ...]) -> None:
    arrays = draw_of_shape(instancenorm, shape, np.float32, np.random.default_rng(0))
    text = f"x has shape {shape}, expected at least 2 positions of each sample and channel"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        instancenorm(**{name: device.asarray(array) for name, array in arrays.items()})


@pytest.mark.parametrize(
    ("shape", "parameters", "text"),
    [
        ((N, D, 2), (1, D, 1, 1), "x has shape (4, 3, 2), expected 4 dimensions"),
        ((N, D, 2, 2), (D,), "gamma has shape (3,), expected (1, 3, 1, 1)"),
        ((N, D, 2, 2), (D, 1, 1), "gamma has shape (3, 1, 1), expected (1, 3, 1, 1)"),
    ],
)
def test_images_of_spatial_group_norm(
    device: Device, shape: tuple[int, ...], parameters: tuple[int, ...], text: str
) -> None:
    x, gamma = device.asarray(full(*shape)), device.asarray(full(*parameters))
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        layers.spatial_groupnorm_forward(x, gamma, gamma, D, {})


def test_images_of_spatial_batch_norm(device: Device) -> None:
    for shape in ((N, D), (N, D, 2), (N, D, 2, 2, 2)):
        x, gamma = device.asarray(full(*shape)), device.asarray(full(D))
        with pytest.raises(ValueError, match=f"^{re.escape(f'x has shape {shape}, expected 4')}"):
            layers.spatial_batchnorm_forward(x, gamma, gamma, {"mode": "train"})


@pytest.mark.parametrize("name", ["x", "gamma", "beta", "running_mean", "running_var", "dout"])
def test_masked_arrays(name: str) -> None:
    arrays = draw(batchnorm, N, D, np.float32, np.random.default_rng(0))
    arrays[name] = np.ma.masked_less(arrays[name], 0)
    with pytest.raises(TypeError, match=f"^{name} is a masked array, expected a plain array"):
        batchnorm(**arrays)


# --- Two devices ---------------------------------------------------------------------------------


@pytest.fixture
def cupy(device: Device) -> Iterator[Any]:
    """CuPy, or its stand-in where the device under test is the CPU."""
    if device.kind == "cuda":
        yield device.xp
    else:
        with host_cuda():
            yield importlib.import_module("cupy")


@pytest.mark.parametrize("layer", LAYERS)
def test_arrays_on_two_devices(device: Device, layer: Layer, cupy: Any) -> None:
    arrays = draw(layer, N, D, np.float32, np.random.default_rng(0))
    home = {name: device.asarray(array) for name, array in arrays.items()}
    places = ("cpu", "cuda:0") if device.kind == "cuda" else ("cuda:0", "cpu")
    for name in [name for name in arrays if name != "x"]:
        stray = arrays[name] if device.kind == "cuda" else cupy.asarray(arrays[name])
        text = f"{name} is on {places[0]} and x on {places[1]}, expected one device"
        with pytest.raises(ValueError, match=f"^{text}$"):
            layer(**(home | {name: stray}))


# --- Parameters ----------------------------------------------------------------------------------

EPS: list[Refusal] = [
    (0, ValueError, "eps is 0, expected a number above 0"),
    (-1e-5, ValueError, "eps is -1e-05, expected a number above 0"),
    (float("nan"), ValueError, "eps is nan, expected a finite number"),
    (float("inf"), ValueError, "eps is inf, expected a finite number"),
    (1e-60, ValueError, "eps is 1e-60, which is 0.0 in float32"),
    (1e60, ValueError, "eps is 1e+60, which is inf in float32"),
    ("1e-5", TypeError, "eps is '1e-5', expected a number"),
    (True, TypeError, "eps is True, expected a number"),
    (None, TypeError, "eps is None, expected a number"),
]
MOMENTUM: list[Refusal] = [
    (-0.1, ValueError, "momentum is -0.1, expected a number from 0 to 1, or None"),
    (1.1, ValueError, "momentum is 1.1, expected a number from 0 to 1, or None"),
    (float("nan"), ValueError, "momentum is nan, expected a finite number"),
    ("0.9", TypeError, "momentum is '0.9', expected a number"),
]
UNBIASED: list[Refusal] = [
    (1, TypeError, "unbiased is 1, expected True or False"),
    (None, TypeError, "unbiased is None, expected True or False"),
    ("yes", TypeError, "unbiased is 'yes', expected True or False"),
]
P: list[Refusal] = [
    (0.0, ValueError, "p is 0.0, expected a probability of keeping above 0 and at most 1"),
    (-0.5, ValueError, "p is -0.5, expected a probability of keeping above 0 and at most 1"),
    (1.5, ValueError, "p is 1.5, expected a probability of keeping above 0 and at most 1"),
    (float("nan"), ValueError, "p is nan, expected a finite number"),
    ("half", TypeError, "p is 'half', expected a number"),
]


def counter(name: str, bits: int) -> list[Refusal]:
    expected = f"expected a whole number from 0 to 2**{bits} - 1"
    return [
        (-1, ValueError, f"{name} is -1, {expected}"),
        (2**bits, ValueError, f"{name} is {2**bits}, {expected}"),
        (1.5, TypeError, f"{name} is 1.5, expected a whole number"),
    ]


def modes(params: str) -> list[Refusal]:
    return [
        (mode, ValueError, f"{params}['mode'] is {mode!r}, expected 'train' or 'test'")
        for mode in ("training", "Train", None, 1)
    ]


BATCHNORM = {"mode": modes("bn_param"), "eps": EPS, "momentum": MOMENTUM, "unbiased": UNBIASED}
PARAMETERS: dict[str, dict[str, list[Refusal]]] = {
    **dict.fromkeys(
        ("batchnorm", "batchnorm_relu", "batchnorm_add_relu", "affine_bn_relu"), BATCHNORM
    ),
    **{layer: {"eps": EPS} for layer in ("layernorm", "rmsnorm", "groupnorm", "instancenorm")},
    "dropout": {
        **{"mode": modes("dropout_param"), "p": P, "seed": counter("seed", 64)},
        **{"stream": counter("stream", 32), "step": counter("step", 32)},
    },
}


def call(layer: str, device: Device, params: Any, *choices: Any) -> None:
    x, w, v, images = (
        device.asarray(array) for array in (full(N, D), full(D, D), full(D), full(N, D, 2))
    )
    arguments = {
        "batchnorm": (x, v, v),
        "batchnorm_relu": (x, v, v),
        "batchnorm_add_relu": (x, x, v, v),
        "affine_bn_relu": (x, w, v, v, v),
        "layernorm": (x, v, v),
        "rmsnorm": (x, v),
        "groupnorm": (x, v, v, D),
        "instancenorm": (images, v, v),
        "dropout": (x,),
    }
    getattr(layers, f"{layer}_forward")(*arguments[layer], params, *choices)


def good_parameters(layer: str, device: Device) -> Arrays:
    if layer == "dropout":
        return {"mode": "train", "p": 0.5}
    running = {name: device.asarray(full(D)) for name in ("running_mean", "running_var")}
    return {"mode": "train", **running}


@pytest.mark.parametrize(
    ("layer", "key"), [(layer, key) for layer, keys in PARAMETERS.items() for key in keys]
)
def test_parameters(device: Device, layer: str, key: str) -> None:
    for value, error, text in PARAMETERS[layer][key]:
        params = good_parameters(layer, device) | {key: value}
        before = dict(params)
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            call(layer, device, params)
        assert params.keys() == before.keys()
        assert all(params[name] is before[name] for name in before)


def test_the_count_of_batches(device: Device) -> None:
    for count, error, text in (
        (-1, ValueError, "num_batches is -1, expected a whole number of at least 0"),
        (True, ValueError, "num_batches is True, expected a whole number of at least 0"),
        (1.5, TypeError, "num_batches is 1.5, expected a whole number"),
        (None, TypeError, "num_batches is None, expected a whole number"),
    ):
        params = good_parameters("batchnorm", device) | {"momentum": None, "num_batches": count}
        before = dict(params)
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            call("batchnorm", device, params)
        assert all(params[name] is before[name] for name in before)


@pytest.mark.parametrize("layer", ["batchnorm", "batchnorm_relu", "batchnorm_add_relu"])
def test_axes(device: Device, layer: str) -> None:
    for axis, error, text in (
        (2, ValueError, "axis is 2, expected one of 2 dimensions"),
        (-3, ValueError, "axis is -3, expected one of 2 dimensions"),
        (True, ValueError, "axis is True, expected one of 2 dimensions"),
        (1.0, TypeError, "axis is 1.0, expected a whole number"),
        (None, TypeError, "axis is None, expected a whole number"),
        ((0, 1), TypeError, "axis is (0, 1), expected a whole number"),
    ):
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            call(layer, device, {"mode": "train"}, axis)


@pytest.mark.parametrize("layer", ["groupnorm", "instancenorm"])
def test_axes_of_samples(device: Device, layer: str) -> None:
    """Samples are on axis 0, so channels are not."""
    ndim = 2 if layer == "groupnorm" else 3
    for axis in (0, -ndim):
        text = f"axis is {axis}, expected a channel axis after the samples' axis 0"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            call(layer, device, {}, axis)
    with pytest.raises(ValueError, match=rf"^axis is {ndim}, expected one of {ndim} dimensions$"):
        call(layer, device, {}, ndim)


def test_groups(device: Device) -> None:
    images, v = device.asarray(full(N, D, 2, 2)), device.asarray(full(D))
    refusals: list[Refusal] = [
        (2, ValueError, "G is 2, expected a divisor of x's 3 channels"),
        (4, ValueError, "G is 4, expected a divisor of x's 3 channels"),
        (0, ValueError, "G is 0, expected a whole number of at least 1"),
        (-3, ValueError, "G is -3, expected a whole number of at least 1"),
        (True, ValueError, "G is True, expected a whole number of at least 1"),
        (3.0, TypeError, "G is 3.0, expected a whole number"),
        (None, TypeError, "G is None, expected a whole number"),
    ]
    for groups, error, text in refusals:
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            layers.groupnorm_forward(images, v, v, groups, {})
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            layers.spatial_groupnorm_forward(images, v, v, groups, {})


@pytest.mark.parametrize(
    ("layer", "key", "text"),
    [
        ("batchnorm", "mode", "bn_param has no 'mode', expected 'train' or 'test'"),
        ("affine_bn_relu", "mode", "bn_param has no 'mode', expected 'train' or 'test'"),
        ("dropout", "mode", "dropout_param has no 'mode', expected 'train' or 'test'"),
        ("dropout", "p", "dropout_param has no 'p', expected the probability of keeping a value"),
    ],
)
def test_missing_parameters(device: Device, layer: str, key: str, text: str) -> None:
    params = good_parameters(layer, device)
    del params[key]
    before = dict(params)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        call(layer, device, params)
    assert params.keys() == before.keys()


@pytest.mark.parametrize(
    ("layer", "params", "text"),
    [
        ("batchnorm", None, "bn_param is a NoneType, expected a dict"),
        ("batchnorm", MappingProxyType({}), "bn_param is a mappingproxy, expected a dict"),
        ("affine_bn_relu", "train", "bn_param is a str, expected a dict"),
        ("batchnorm_add_relu", [], "bn_param is a list, expected a dict"),
        ("layernorm", None, "ln_param is a NoneType, expected a dict"),
        ("rmsnorm", 1e-5, "rms_param is a float, expected a dict"),
        ("groupnorm", None, "gn_param is a NoneType, expected a dict"),
        ("instancenorm", None, "in_param is a NoneType, expected a dict"),
        ("dropout", 0.5, "dropout_param is a float, expected a dict"),
    ],
)
def test_what_is_no_dict(device: Device, layer: str, params: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        call(layer, device, params)


# --- What a refusal leaves behind, and other layers' caches --------------------------------------


@pytest.mark.parametrize("name", ["x", "gamma", "beta", "running_mean", "running_var"])
@pytest.mark.parametrize("mode", ["train", "test"])
def test_a_refusal_writes_nothing(device: Device, name: str, mode: str) -> None:
    arrays = draw(batchnorm, N, D, np.float32, np.random.default_rng(0))
    arrays[name] = arrays[name].astype(np.int32)
    x, gamma, beta, *running = (
        device.asarray(arrays[key]) for key in ("x", "gamma", "beta", "running_mean", "running_var")
    )
    names = ("running_mean", "running_var")
    bn_param = {"mode": mode, **dict(zip(names, running, strict=True))}
    before = dict(bn_param)
    with pytest.raises(TypeError, match=f"^{name} has dtype int32, expected float"):
        layers.batchnorm_forward(x, gamma, beta, bn_param)
    assert bn_param.keys() == before.keys()
    assert all(bn_param[key] is before[key] for key in before)
    for key in names:
        np.testing.assert_array_equal(to_host(bn_param[key]), arrays[key])


def test_a_refusal_creates_no_running_statistics(device: Device) -> None:
    bn_param: Arrays = {"mode": "train"}
    x = device.asarray(full(1, D))
    with pytest.raises(ValueError, match=r"^x has shape \(1, 3\)"):
        layers.batchnorm_forward(x, x[0], x[0], bn_param)
    assert bn_param == {"mode": "train"}


@pytest.mark.parametrize(
    "layer",
    [
        *("affine", "relu", "batchnorm", "batchnorm_relu", "batchnorm_add_relu"),
        *("layernorm", "rmsnorm", "groupnorm", "dropout"),
    ],
)
def test_the_cache_of_another_layer(device: Device, layer: str) -> None:
    dout = device.asarray(full(N, D))
    text = f"cache is a tuple, expected the one that {layer}_forward returned"
    with pytest.raises(TypeError, match=f"^{text}$"):
        getattr(layers, f"{layer}_backward")(dout, ())


@pytest.mark.parametrize("layer", ["affine_relu", "affine_bn_relu"])
def test_the_cache_of_another_layer_for_a_combined_one(device: Device, layer: str) -> None:
    dout = device.asarray(full(N, D))
    _, cache = layers.relu_forward(dout)
    for wrong in (None, (), cache):
        with pytest.raises(TypeError, match=r"^cache is a .*, expected"):
            getattr(layers, f"{layer}_backward")(dout, wrong)


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
def test_swapped_bytes_are_refused(dtype: str) -> None:
    """Their names are those of the dtypes that are taken."""
    x = np.ones((N, D)).astype(dtype)
    with pytest.raises(TypeError, match=f"x has dtype {dtype}, expected float16, bfloat16"):
        layers.relu_forward(x)

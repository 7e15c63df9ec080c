"""Named parameters in one buffer: the views share it, and nothing wrong is written to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpubn import FullyConnectedNet
from gpubn.backend import Device, to_host
from gpubn.train import Parameters

SHAPES = {"W1": (3, 2), "b1": (2,), "gamma1": (2,), "beta1": (2,), "W2": (2, 3), "b2": (3,)}
LAYOUT = ["W1", "W2", "b1", "gamma1", "beta1", "b2"]
SIZE = 21
COUNTED = list(range(1, SIZE + 1))


def make(device: Device, dtype: Any = np.float64) -> Parameters:
    """Return parameters whose buffer holds COUNTED."""
    params = Parameters(SHAPES, LAYOUT, np.dtype(dtype), device)
    params.flat[...] = device.xp.asarray(COUNTED, dtype)
    return params


def new_values(dtype: Any = np.float64) -> dict[str, NDArray[Any]]:
    return {name: np.full(shape, -1, dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_views_share_one_buffer(device: Device, dtype: Any) -> None:
    params = make(device, dtype)
    assert list(params) == list(SHAPES)
    assert params.flat.shape == (SIZE,)
    first = 1
    for name in LAYOUT:  # in this order in the buffer, without gaps
        view, size = params[name], np.prod(SHAPES[name])
        assert (view.shape, view.dtype) == (SHAPES[name], dtype)
        assert to_host(view).ravel().tolist() == list(range(first, first + size))
        first += size
    params["b1"][0] = 100
    assert float(params.flat[12]) == 100


def test_starts_as_zeros(device: Device) -> None:
    params = Parameters(SHAPES, LAYOUT, np.dtype(np.float32), device)
    assert to_host(params.flat).tolist() == [0] * SIZE


def test_a_networks_weights_lie_first(device: Device) -> None:
    net = FullyConnectedNet([4, 3], 5, 2, normalization="batchnorm", weight_scale=1.0, seed=0)
    weights = [to_host(net.params[f"W{layer}"]).ravel() for layer in (1, 2, 3)]
    assert net.num_weights == 5 * 4 + 4 * 3 + 3 * 2
    np.testing.assert_array_equal(
        to_host(net.params.flat)[: net.num_weights], np.concatenate(weights)
    )
    names = "W1 b1 gamma1 beta1 W2 b2 gamma2 beta2 W3 b3"
    assert list(net.params) == names.split()


def test_views_of_another_buffer(device: Device) -> None:
    params = make(device)
    other = -params.flat
    views = params.views_of(other)
    assert list(views) == list(SHAPES)
    views["W2"][...] = 7
    assert to_host(other)[6:12].tolist() == [7] * 6
    assert to_host(params.flat)[6:12].tolist() == [7, 8, 9, 10, 11, 12]


def by_name(params: Parameters, new: Any) -> None:
    for name, array in new.items():
        params[name] = array


def by_update(params: Parameters, new: Any) -> None:
    params.update(new)


def by_keywords(params: Parameters, new: Any) -> None:
    params.update(**new)


def by_pairs(params: Parameters, new: Any) -> None:
    params.update(list(new.items()))


def by_or(params: Parameters, new: Any) -> None:
    params |= new


WAYS = (by_name, by_update, by_keywords, by_pairs, by_or)
Way = Callable[[Parameters, Any], None]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("on_device", [False, True])
def test_assigning_copies(device: Device, way: Way, on_device: bool) -> None:
    params = make(device)
    views, flat = dict(params), params.flat
    new = {"W2": np.arange(6.0).reshape(2, 3), "b1": np.array([5.0, 6.0])}
    source = {name: device.asarray(array) if on_device else array for name, array in new.items()}
    way(params, source)
    assert params.flat is flat
    assert all(params[name] is views[name] for name in SHAPES)
    assert to_host(flat).tolist() == [*range(1, 7), *range(6), 5, 6, *range(15, SIZE + 1)]

    params["W2"][...] = -1  # the source is not in the buffer
    np.testing.assert_array_equal(to_host(source["W2"]), new["W2"])
    source["b1"][...] = -1
    assert to_host(params["b1"]).tolist() == [5, 6]


def test_assigning_any_memory_order(device: Device) -> None:
    params = make(device)
    read_only = np.arange(6.0).reshape(2, 3)
    read_only.flags.writeable = False
    params["W2"] = read_only
    params["W1"] = read_only.T
    assert to_host(params.flat)[:12].tolist() == [0, 3, 1, 4, 2, 5, 0, 1, 2, 3, 4, 5]


def test_in_place_arithmetic(device: Device) -> None:
    params = make(device)
    view = params["b2"]
    params["b2"] *= 2
    assert params["b2"] is view
    assert to_host(params.flat)[-3:].tolist() == [38, 40, 42]


def test_assigning_parameters_to_each_other_swaps_them(device: Device) -> None:
    params = make(device)
    params.update(gamma1=params["beta1"], beta1=params["gamma1"])
    assert to_host(params.flat)[14:18].tolist() == [17, 18, 15, 16]


WRONG = {
    "shape": (ValueError, "b2", np.zeros(4), r"b2 has shape \(4,\), expected \(3,\)"),
    "a shape that would broadcast": (ValueError, "b2", np.zeros(1), r"shape \(1,\), expected"),
    "transposed": (ValueError, "W2", np.zeros((3, 2)), r"shape \(3, 2\), expected \(2, 3\)"),
    "dtype": (TypeError, "b2", np.zeros(3, np.float32), "b2 has dtype float32, expected float64"),
    "integers": (TypeError, "b2", np.zeros(3, int), "b2 has dtype int64, expected float64"),
    "complex": (TypeError, "b2", np.zeros(3, complex), "complex128, expected float64"),
    "a list": (TypeError, "b2", [0.0, 0.0, 0.0], "b2 is a list, expected a NumPy or CuPy array"),
    "a number": (TypeError, "b2", 0.0, "b2 is a float, expected"),
    "None": (TypeError, "b2", None, "b2 is a NoneType, expected"),
    "a new name": (KeyError, "W3", np.zeros(3), "there is no parameter 'W3'; there are W1, b1"),
    "no string": (KeyError, 1, np.zeros(3), "there is no parameter 1"),
    "masked": (TypeError, "b2", np.ma.masked_array(np.zeros(3), True), "b2 is a masked array"),
}


@pytest.mark.parametrize("way", [way for way in WAYS if way is not by_keywords])
@pytest.mark.parametrize("case", WRONG)
def test_nothing_is_written_on_an_error(device: Device, way: Way, case: str) -> None:
    error, name, array, text = WRONG[case]
    params = make(device)
    # All-or-nothing: the good arrays before the bad one are not written either. By name each
    # assignment stands for itself, so there the bad one comes alone.
    new = {} if way is by_name else {"W1": np.zeros((3, 2)), "b1": np.zeros(2)}
    with pytest.raises(error, match=text):
        way(params, new | {name: array})
    assert to_host(params.flat).tolist() == COUNTED
    assert list(params) == list(SHAPES)


@pytest.mark.parametrize(
    "change",
    [
        lambda params: params.pop("b2"),
        lambda params: params.pop("W9", None),
        lambda params: params.popitem(),
        lambda params: params.clear(),
        lambda params: params.setdefault("b3", np.zeros(3)),
        lambda params: params.__delitem__("b2"),
    ],
    ids=["pop", "pop with default", "popitem", "clear", "setdefault", "del"],
)
def test_names_are_fixed(device: Device, change: Callable[[Parameters], Any]) -> None:
    params = make(device)
    with pytest.raises(TypeError, match="fixed"):
        change(params)
    assert list(params) == list(SHAPES)


def test_zeros_like(device: Device) -> None:
    params = make(device, np.float32)
    other = params.zeros_like()
    assert list(other) == list(params)
    assert other.flat.dtype == np.float32
    assert to_host(other.flat).tolist() == [0] * SIZE
    other["W1"] = np.ones((3, 2), np.float32)
    assert to_host(params.flat).tolist() == COUNTED
    assert to_host(other.flat).tolist() == [1] * 6 + [0] * (SIZE - 6)


@pytest.mark.parametrize("duplicate", [Parameters.copy, copy.copy, copy.deepcopy])
def test_copies_have_a_buffer_of_their_own(
    device: Device, duplicate: Callable[[Parameters], Parameters]
) -> None:
    params = make(device)
    other = duplicate(params)
    assert isinstance(other, Parameters)
    assert list(other) == list(params)
    assert to_host(other.flat).tolist() == COUNTED
    other["W1"][...] = 0  # through a view into the copy's own buffer
    assert to_host(other.flat).tolist() == [0] * 6 + COUNTED[6:]
    assert to_host(params.flat).tolist() == COUNTED


def test_pickle_keeps_names_and_values() -> None:
    params = make(Device("cpu", 0, "of this test"))
    other = pickle.loads(pickle.dumps(params))
    assert list(other) == list(params)
    for name, view in params.items():
        np.testing.assert_array_equal(other[name], view)
        assert other[name].dtype == view.dtype
    other["W1"][...] = 0
    assert params.flat.tolist() == COUNTED


def test_assigning_a_networks_params(device: Device) -> None:
    net = FullyConnectedNet([2], 3, 3, normalization="layernorm", dtype=np.float64, seed=0)
    params, views = net.params, dict(net.params)
    net.params = new_values()
    assert net.params is params
    assert all(params[name] is view for name, view in views.items())
    assert to_host(params.flat).tolist() == [-1] * SIZE

    net.params = {"b1": np.array([1.0, 2.0])}  # the others stay
    assert to_host(params.flat).tolist() == [-1] * 12 + [1, 2] + [-1] * 7
    before = to_host(params.flat).copy()
    with pytest.raises(ValueError, match="W2 has shape"):
        net.params = {"b1": np.zeros(2), "W2": np.zeros((2, 2))}
    np.testing.assert_array_equal(to_host(params.flat), before)


def test_a_layers_parameters_stay_in_the_buffer(device: Device) -> None:
    net = FullyConnectedNet([2], 3, 3, dtype=np.float64, seed=0)
    params = net.layers[0].params
    new = {"w": np.full((3, 2), 7.0), "b": np.full(2, 8.0)}
    params.update(new)
    assert to_host(net.params["W1"]).tolist() == [[7, 7]] * 3
    assert to_host(net.params["b1"]).tolist() == [8, 8]
    assert params["w"] is net.params["W1"]
    for change in (
        lambda: params.pop("w"),
        params.popitem,
        params.clear,
        lambda: params.__delitem__("w"),
    ):
        with pytest.raises(TypeError, match="fixed"):
            change()
    with pytest.raises(KeyError, match="there is no parameter 'bias'; there are w, b"):
        params.setdefault("bias", new["b"])
    assert params.setdefault("b", new["b"] + 1) is net.params["b1"]
    assert {name: array.shape for name, array in params.items()} == {"w": (3, 2), "b": (2,)}
    assert len(params) == 2
    assert repr(params).startswith("{'w': array(")
    X = np.ones((1, 3))
    before = to_host(net.loss(X))
    net.params.flat[...] = 0
    assert not to_host(net.loss(X)).any()
    assert before.any()

"""Layers that normalize."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np

from gpubn import layers
from gpubn.backend import Array, to_host
from gpubn.layers import _check
from gpubn.nn.layer import Parametrized, changed

RUNNING = ("running_mean", "running_var")
"""The keys of a batch norm's running statistics."""


class BatchNorm(Parametrized):
    """Batch normalization of each channel: Ioffe and Szegedy 2015, arXiv:1502.03167.

    Parameters
    ----------
    num_channels : int
        C: x is ``(N, C)`` or ``(N, C, ...)``.
    axis : int
        Where the channels are: -1 for ``(N, H, W, C)``.
    eps : float
        Inside the root.
    momentum : float or None
        Running statistics are set to ``momentum * running + (1 - momentum) * sample``: 1 minus what
        PyTorch calls momentum. None: to the mean over all batches.
    unbiased : bool
        Whether the running variance takes the batch's variance times n / (n - 1), as PyTorch's
        does. Batches are normalized with the biased one in any case.
    frozen : bool
        Whether the running statistics are used in training too, and stay as they are. May be set
        at any time.
    relu : bool
        Whether a ReLU follows, in the same pass over memory: the bits are those of the two layers.
    initial_var : float
        What the running variance starts at. 1 makes evaluation before training the identity, up to
        eps; the assignment has 0. The running mean starts at 0.
    dtype : float32 or float64
        Of parameters and statistics. With float32, x may be float16 or bfloat16 too.
    device : str, optional
        As for ``gpubn.use``; by default the device in force.

    Attributes
    ----------
    params : dict
        gamma and beta ``(C,)``, 1 and 0 at first.
    buffers : mapping
        running_mean and running_var ``(C,)``; with momentum None also num_batches, how many they
        are the mean over.
    bn_param : dict
        What ``batchnorm_forward`` takes: the buffers and the options above.
    """

    def __init__(
        self,
        num_channels: int,
        axis: int = 1,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.9,
        unbiased: bool = False,
        frozen: bool = False,
        relu: bool = False,
        initial_var: float = 1.0,
        dtype: Any = np.float32,
        device: str | None = None,
    ) -> None:
        super().__init__(dtype, device)
        self.num_channels = _check.whole("num_channels", num_channels)
        self.axis = _axis(axis)
        eps = _check.epsilon(eps, self.dtype)
        if momentum is not None and not 0 <= _check.number("momentum", momentum) <= 1:
            raise ValueError(f"momentum is {momentum!r}, expected None or a number from 0 to 1")
        self.initial_var = _check.number("initial_var", initial_var)
        if self.initial_var < 0:
            raise ValueError(f"initial_var is {initial_var!r}, expected a number of at least 0")
        unbiased = _check_bool("unbiased", unbiased)
        self.frozen = _check_bool("frozen", frozen)
        self.relu = _check_bool("relu", relu)
        shape = (self.num_channels,)
        self._params["gamma"] = self._full(shape, 1)
        self._params["beta"] = self._full(shape, 0)
        self.bn_param: dict[str, Any] = {
            "mode": "train",
            "eps": eps,
            "momentum": momentum,
            "unbiased": unbiased,
            "running_mean": self._full(shape, 0),
            "running_var": self._full(shape, self.initial_var),
        }

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return float(self.bn_param.get("eps", 1e-5))

    @property
    def momentum(self) -> float | None:
        """How much of the running statistics a batch leaves; None for a mean over all batches."""
        momentum: float | None = self.bn_param.get("momentum", 0.9)
        return momentum

    @property
    def unbiased(self) -> bool:
        """Whether the running variance is the unbiased one."""
        return bool(self.bn_param.get("unbiased", False))

    @property
    def buffers(self) -> MutableMapping[str, Array]:
        """The running statistics by name: a view of ``bn_param``."""
        return _Running(self)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        self._check_dtype(x)
        _check_channels(x, self.axis, self.num_channels)
        bn_param, params = self.bn_param, self._params
        bn_param["mode"] = "train" if self.training and not self.frozen else "test"
        forward = layers.batchnorm_relu_forward if self.relu else layers.batchnorm_forward
        return forward(x, params["gamma"], params["beta"], bn_param, self.axis)

    def _backward(self, dout: Array, cache: Any) -> Array:
        backward = layers.batchnorm_relu_backward if self.relu else layers.batchnorm_backward
        dx, self._grads["gamma"], self._grads["beta"] = backward(dout, cache)
        return dx

    def _arguments(self) -> list[str]:
        options = {
            "axis": (self.axis, 1),
            "eps": (self.eps, 1e-5),
            "momentum": (self.momentum, 0.9),
            "unbiased": (self.unbiased, False),
            "frozen": (self.frozen, False),
            "relu": (self.relu, False),
            "initial_var": (self.initial_var, 1.0),
        }
        return [str(self.num_channels), *changed(options), *self._common()]


class _Running(MutableMapping[str, Array]):
    """A batch norm's buffers: its ``bn_param``, of which nothing else is seen."""

    def __init__(self, layer: BatchNorm) -> None:
        self._layer = layer

    def _names(self) -> tuple[str, ...]:
        return RUNNING if self._layer.momentum is not None else (*RUNNING, "num_batches")

    def __getitem__(self, name: str) -> Array:
        if name not in self._names():
            raise KeyError(name)
        layer = self._layer
        if name == "num_batches":
            return np.array(layer.bn_param.get(name) or 0, np.int64)
        if layer.bn_param.get(name) is None:  # batchnorm_forward takes it for zeros
            layer.bn_param[name] = layer._full((layer.num_channels,), 0)
        array: Array = layer.bn_param[name]
        return array

    def __setitem__(self, name: str, array: Array) -> None:
        if name not in self._names():
            raise KeyError(f"there is no buffer {name!r}; there are {', '.join(self._names())}")
        layer = self._layer
        if name == "num_batches":
            layer.bn_param[name] = _check.whole(name, to_host(array), least=0)
            return
        _check.like(name, array, (layer.num_channels,), layer.params["gamma"], "gamma")
        layer.bn_param[name] = array

    def __delitem__(self, name: str) -> None:
        raise TypeError("a layer's buffers are fixed: assign to a name that is there")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


class LayerNorm(Parametrized):
    """Normalization of each sample over its last axes: Ba, Kiros and Hinton 2016, arXiv:1607.06450.

    Parameters
    ----------
    shape : int or tuple of int
        Of the axes that are normalized over together: x is ``(N, ..., *shape)``.
    eps : float
        Inside the root.
    dtype : float32 or float64
        Of the parameters. With float32, x may be float16 or bfloat16 too.
    device : str, optional
        As for ``gpubn.use``; by default the device in force.

    Attributes
    ----------
    params : dict
        gamma and beta of this shape, 1 and 0 at first.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        eps: float = 1e-5,
        dtype: Any = np.float32,
        device: str | None = None,
    ) -> None:
        super().__init__(dtype, device)
        self.shape = _shape(shape)
        self.eps = _check.epsilon(eps, self.dtype)
        self._params["gamma"] = self._full(self.shape, 1)
        self._params["beta"] = self._full(self.shape, 0)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        self._check_dtype(x)
        _check_last_axes(x, self.shape)
        params = self._params
        return layers.layernorm_forward(x, params["gamma"], params["beta"], {"eps": self.eps})

    def _backward(self, dout: Array, cache: Any) -> Array:
        dx, self._grads["gamma"], self._grads["beta"] = layers.layernorm_backward(dout, cache)
        return dx

    def _arguments(self) -> list[str]:
        return [_shape_text(self.shape), *changed({"eps": (self.eps, 1e-5)}), *self._common()]


class RMSNorm(Parametrized):
    """Division of each sample by its root mean square: Zhang and Sennrich 2019, arXiv:1910.07467.

    Parameters
    ----------
    shape : int or tuple of int
        Of the axes that are normalized over together: x is ``(N, ..., *shape)``.
    eps : float
        Inside the root.
    dtype : float32 or float64
        Of gamma. With float32, x may be float16 or bfloat16 too.
    device : str, optional
        As for ``gpubn.use``; by default the device in force.

    Attributes
    ----------
    params : dict
        gamma of this shape, 1 at first.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        eps: float = 1e-5,
        dtype: Any = np.float32,
        device: str | None = None,
    ) -> None:
        super().__init__(dtype, device)
        self.shape = _shape(shape)
        self.eps = _check.epsilon(eps, self.dtype)
        self._params["gamma"] = self._full(self.shape, 1)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        self._check_dtype(x)
        _check_last_axes(x, self.shape)
        return layers.rmsnorm_forward(x, self._params["gamma"], {"eps": self.eps})

    def _backward(self, dout: Array, cache: Any) -> Array:
        dx, self._grads["gamma"] = layers.rmsnorm_backward(dout, cache)
        return dx

    def _arguments(self) -> list[str]:
        return [_shape_text(self.shape), *changed({"eps": (self.eps, 1e-5)}), *self._common()]


class GroupNorm(Parametrized):
    """Normalization of each sample's groups of channels: Wu and He 2018, arXiv:1803.08494.

    Parameters
    ----------
    num_groups, num_channels : int
        G and C: x is ``(N, C, ...)``, a group C / G neighbouring channels.
    axis : int
        Where the channels are.
    eps : float
        Inside the root.
    dtype : float32 or float64
        Of the parameters. With float32, x may be float16 or bfloat16 too.
    device : str, optional
        As for ``gpubn.use``; by default the device in force.

    Attributes
    ----------
    params : dict
        gamma and beta ``(C,)``, 1 and 0 at first.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        axis: int = 1,
        *,
        eps: float = 1e-5,
        dtype: Any = np.float32,
        device: str | None = None,
    ) -> None:
        super().__init__(dtype, device)
        self.num_groups = _check.whole("num_groups", num_groups)
        self.num_channels = _check.whole("num_channels", num_channels)
        if self.num_channels % self.num_groups:
            raise ValueError(
                f"num_groups is {num_groups}, expected a divisor of the {num_channels} channels"
            )
        self.axis = _axis(axis)
        self.eps = _check.epsilon(eps, self.dtype)
        self._params["gamma"] = self._full((self.num_channels,), 1)
        self._params["beta"] = self._full((self.num_channels,), 0)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        self._check_dtype(x)
        _check_channels(x, self.axis, self.num_channels)
        gamma, beta = self._params["gamma"], self._params["beta"]
        return layers.groupnorm_forward(
            x, gamma, beta, self.num_groups, {"eps": self.eps}, self.axis
        )

    def _backward(self, dout: Array, cache: Any) -> Array:
        dx, self._grads["gamma"], self._grads["beta"] = layers.groupnorm_backward(dout, cache)
        return dx

    def _arguments(self) -> list[str]:
        options = {"axis": (self.axis, 1), "eps": (self.eps, 1e-5)}
        sizes = [str(self.num_groups), str(self.num_channels)]
        return [*sizes, *changed(options), *self._common()]


class InstanceNorm(Parametrized):
    """Normalization of each sample's channels: Ulyanov et al. 2016, arXiv:1607.08022.

    Parameters
    ----------
    num_channels : int
        C: x is ``(N, C, d1, ...)``.
    axis : int
        Where the channels are.
    eps : float
        Inside the root.
    dtype : float32 or float64
        Of the parameters. With float32, x may be float16 or bfloat16 too.
    device : str, optional
        As for ``gpubn.use``; by default the device in force.

    Attributes
    ----------
    params : dict
        gamma and beta ``(C,)``, 1 and 0 at first.
    """

    def __init__(
        self,
        num_channels: int,
        axis: int = 1,
        *,
        eps: float = 1e-5,
        dtype: Any = np.float32,
        device: str | None = None,
    ) -> None:
        super().__init__(dtype, device)
        self.num_channels = _check.whole("num_channels", num_channels)
        self.axis = _axis(axis)
        self.eps = _check.epsilon(eps, self.dtype)
        self._params["gamma"] = self._full((self.num_channels,), 1)
        self._params["beta"] = self._full((self.num_channels,), 0)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        self._check_dtype(x)
        _check_channels(x, self.axis, self.num_channels)
        gamma, beta = self._params["gamma"], self._params["beta"]
        return layers.instancenorm_forward(x, gamma, beta, {"eps": self.eps}, self.axis)

    def _backward(self, dout: Array, cache: Any) -> Array:
        dx, self._grads["gamma"], self._grads["beta"] = layers.instancenorm_backward(dout, cache)
        return dx

    def _arguments(self) -> list[str]:
        options = {"axis": (self.axis, 1), "eps": (self.eps, 1e-5)}
        return [str(self.num_channels), *changed(options), *self._common()]


# x is checked before a function sees it, which would say that gamma does not fit x.


def _check_channels(x: Array, axis: int, channels: int) -> None:
    if x.ndim > 1 and -x.ndim <= axis < x.ndim and x.shape[axis] != channels:
        raise ValueError(f"x has {x.shape[axis]} channels on axis {axis}, expected {channels}")


def _check_last_axes(x: Array, shape: tuple[int, ...]) -> None:
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"x has shape {x.shape}, expected its last axes to be {shape}")


def _axis(axis: Any) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise TypeError(f"axis is {axis!r}, expected a whole number")
    return int(axis)


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list):
        return (_check.whole("shape", shape),)
    if not shape:
        raise ValueError(f"shape is {shape!r}, expected at least one axis")
    return tuple(_check.whole(f"shape[{i}]", size) for i, size in enumerate(shape))


def _shape_text(shape: tuple[int, ...]) -> str:
    return str(shape[0]) if len(shape) == 1 else str(shape)

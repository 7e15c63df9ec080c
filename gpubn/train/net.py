"""The fully connected network of CS231n's second assignment."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpubn import backend
from gpubn.backend import Array
from gpubn.kernels import for_array
from gpubn.layers import (
    _check,
    affine_backward,
    affine_forward,
    batchnorm_backward,
    batchnorm_forward,
    dropout_backward,
    dropout_forward,
    layernorm_backward,
    layernorm_forward,
    relu_backward,
    relu_forward,
)
from gpubn.train.parameters import RUNNING, Parameters, digest

NORMALIZATIONS = (None, "batchnorm", "layernorm")


class FullyConnectedNet:
    """``{affine - [norm] - relu - [dropout]} x (L - 1) - affine - softmax``.

    Parameters
    ----------
    hidden_dims : sequence of int
        Width of each hidden layer; may be empty.
    input_dim : int
        Values of one sample, ``d1 * ... * dk``.
    num_classes : int
    dropout_keep_ratio : float
        Probability of keeping a unit, above 0; at 1 there is no dropout.
    normalization : {None, "batchnorm", "layernorm"}
    reg : float
        Strength of the L2 penalty ``0.5 * reg * sum(W**2)``, over every W and nothing else.
    weight_scale : float
        Standard deviation of the initial weights. Biases and beta start at 0, gamma at 1.
    dtype : float32 or float64
    seed : int, optional
        Same seed, same weights and dropout masks, on every device. Without one they are random, and
        every training call of ``loss`` has masks of its own.
    device : str, optional
        As for ``gpubn.use``; by default the device in force.
    reproducible : bool, optional
        Whether matrix products are to have the same bits on every device, as all else has: a whole
        training run then gives the same weights everywhere. By default as ``GPUBN_REPRODUCIBLE``
        says, else False: products run on the device's BLAS. True asks for a seed.

    Attributes
    ----------
    params : Parameters
        W1, b1, [gamma1, beta1,] ... as a dict of views into one buffer. Assigning copies.
    bn_params : list of dict
        One for each batch norm: its ``mode`` and running statistics.
    step : int
        Which dropout masks training uses. ``Solver`` counts it up; with a seed, ``loss`` does not,
        so that it is a function of its arguments and parameters, as gradient checks need. In a
        training loop of your own, add 1 after every step.
    """

    def __init__(
        self,
        hidden_dims: Sequence[int],
        input_dim: int = 3 * 32 * 32,
        num_classes: int = 10,
        dropout_keep_ratio: float = 1,
        normalization: str | None = None,
        reg: float = 0.0,
        weight_scale: float = 1e-2,
        dtype: Any = np.float32,
        seed: int | None = None,
        device: str | None = None,
        reproducible: bool | None = None,
    ) -> None:
        if not isinstance(hidden_dims, Iterable):
            raise TypeError(f"hidden_dims is {hidden_dims!r}, expected a sequence of widths")
        self.hidden_dims = tuple(
            _check.whole(f"hidden_dims[{i}]", width) for i, width in enumerate(hidden_dims)
        )
        self.input_dim = _check.whole("input_dim", input_dim)
        self.num_classes = _check.whole("num_classes", num_classes)
        self.dropout_keep_ratio = _check.number("dropout_keep_ratio", dropout_keep_ratio)
        if not 0 < self.dropout_keep_ratio <= 1:
            raise ValueError(
                f"dropout_keep_ratio is {dropout_keep_ratio!r}, "
                "expected a probability of keeping above 0 and at most 1"
            )
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization is {normalization!r}, expected None, 'batchnorm' or 'layernorm'"
            )
        self.normalization = normalization
        self.reg = _at_least_zero("reg", reg)
        self.weight_scale = _at_least_zero("weight_scale", weight_scale)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _check.FLOATS:
            raise TypeError(f"dtype is {self.dtype}, expected float32 or float64")
        self.seed = None if seed is None else _check.counter("seed", seed, 64)
        self.reproducible = backend.reproducible(reproducible)
        if self.reproducible and self.seed is None:
            raise ValueError(
                "seed is None, expected a number where the network is reproducible "
                f"(by reproducible=True, or {backend.REPRODUCIBLE_VARIABLE})"
            )
        self.device = backend.current() if device is None else backend.resolve(device)
        self.num_layers = len(self.hidden_dims) + 1
        self.step = 0
        self._dropout_seed = secrets.randbits(64) if self.seed is None else self.seed

        self._params = self._initial()
        self.bn_params: list[dict[str, Any]] = [
            {"mode": "train"} for _ in self.hidden_dims if normalization == "batchnorm"
        ]

    @property
    def params(self) -> Parameters:
        """The parameters. Assigning a dict copies its arrays into the network's buffer."""
        return self._params

    @params.setter
    def params(self, arrays: Mapping[str, Array]) -> None:
        self._params.update(arrays)

    @property
    def num_weights(self) -> int:
        """How many leading elements of ``params.flat`` belong to W1 ... WL."""
        return sum(self._params[f"W{layer}"].size for layer in range(1, self.num_layers + 1))

    @property
    def dropout_state(self) -> dict[str, int]:
        """The key of the masks to come: what a checkpoint keeps of dropout."""
        return {"seed": self._dropout_seed, "step": self.step}

    @dropout_state.setter
    def dropout_state(self, state: Mapping[str, int]) -> None:
        self._dropout_seed = _check.counter("seed", state["seed"], 64)
        self.step = _check.whole("step", state["step"], 0)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a network like this one, the device left out."""
        return {
            "hidden_dims": list(self.hidden_dims),
            "input_dim": self.input_dim,
            "num_classes": self.num_classes,
            "dropout_keep_ratio": self.dropout_keep_ratio,
            "normalization": self.normalization,
            "reg": self.reg,
            "weight_scale": self.weight_scale,
            "dtype": self.dtype.name,
            "seed": self.seed,
            "reproducible": self.reproducible,
        }

    def sha256(self) -> str:
        """Return a SHA-256, in hex, of parameters and running statistics: names, shapes, values."""
        arrays = {
            f"{name}{i}": bn_param[name]
            for i, bn_param in enumerate(self.bn_params, 1)
            for name in RUNNING
            if name in bn_param
        }
        return str(digest({**self._params, **arrays}).hexdigest())

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        return f"FullyConnectedNet({given}, device={self.device.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_params": dict(self._params)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"reproducible": False} | state)  # earlier ones knew no other
        values = {name: array.copy() for name, array in self._params.items()}
        self._params = self._initial()
        self._params.update(values)

    def loss(self, X: Array, y: Array | None = None) -> Any:
        """Return class scores in test mode, or the training loss and its gradients.

        Parameters
        ----------
        X : array (N, d1, ..., dk) of numbers
            Cast to the network's dtype. NumPy arrays are brought to the network's device.
        y : integer array (N,), optional
            Labels from 0 to num_classes - 1.

        Returns
        -------
        scores : array (N, num_classes)
            If y is None.
        loss, grads : number, Parameters
            Else: the mean cross entropy plus the L2 penalty, and its gradients by name, in a buffer
            of their own. Batch norms update their running statistics.

        Raises
        ------
        ValueError, TypeError
            Arguments do not fit. Looking at labels on CUDA waits for the device.
        """
        X = self.as_input(X)
        if y is None:
            return self._scores(X, "test")[0]
        _check.label_array(y, X.shape[0])
        _check.label_range(y, self.num_classes)
        with self.device.scope():
            y = self._here("y", y).astype(np.int64, copy=False)
        grads = self._params.zeros_like()
        loss = self.loss_into(X, y, grads)
        if self.seed is None:
            self.step += 1
        return loss[()], grads

    def loss_into(self, X: Array, y: Array, grads: Parameters) -> Array:
        """Return the training loss and write its gradients to ``grads``; nothing is waited for.

        For training loops: ``y`` must be int64 labels on the network's device that are known to
        be in range. The loss is an array of no dimensions there.
        """
        X = self.as_input(X)
        with self.device.scope():
            scores, caches = self._scores(X, "train")
            loss, dout = for_array("losses", scores).softmax_loss(scores, y)
            last = self.num_layers
            dout, grads[f"W{last}"], grads[f"b{last}"] = affine_backward(dout, caches.pop())
            for layer in range(last - 1, 0, -1):
                affine, norm, relu, dropout = caches.pop()
                if dropout is not None:
                    dout = dropout_backward(dout, dropout)
                dout = relu_backward(dout, relu)
                if norm is not None:
                    backward = (
                        batchnorm_backward
                        if self.normalization == "batchnorm"
                        else layernorm_backward
                    )
                    dout, grads[f"gamma{layer}"], grads[f"beta{layer}"] = backward(dout, norm)
                dout, grads[f"W{layer}"], grads[f"b{layer}"] = affine_backward(dout, affine)
            if self.reg:
                l2 = for_array("l2", loss)
                weights = self._params.flat[: self.num_weights]
                l2.add_scaled(loss, l2.sum_of_squares(weights), 0.5 * self.reg)
                l2.add_scaled(grads.flat[: self.num_weights], weights, self.reg)
        return loss

    def _scores(self, X: Array, mode: str) -> tuple[Array, list[Any]]:
        """Run the layers; return the scores and every layer's caches, the last affine's last."""
        params, out, caches = self._params, X, []
        for bn_param in self.bn_params:
            bn_param["mode"] = mode
        for layer in range(1, self.num_layers):
            out, affine = self._affine(out, layer)
            norm = dropout = None
            if self.normalization == "batchnorm":
                gamma, beta = params[f"gamma{layer}"], params[f"beta{layer}"]
                out, norm = batchnorm_forward(out, gamma, beta, self.bn_params[layer - 1])
            elif self.normalization == "layernorm":
                gamma, beta = params[f"gamma{layer}"], params[f"beta{layer}"]
                out, norm = layernorm_forward(out, gamma, beta, {})
            out, relu = relu_forward(out)
            if mode == "train" and self.dropout_keep_ratio < 1:
                mask = {"seed": self._dropout_seed, "stream": layer, "step": self.step % 2**32}
                out, dropout = dropout_forward(
                    out, {"p": self.dropout_keep_ratio, "mode": mode, **mask}
                )
            caches.append((affine, norm, relu, dropout))
        out, affine = self._affine(out, self.num_layers)
        return out, [*caches, affine]

    def _affine(self, x: Array, layer: int) -> tuple[Array, Any]:
        w, b = self._params[f"W{layer}"], self._params[f"b{layer}"]
        return affine_forward(x, w, b, self.reproducible)

    def _initial(self) -> Parameters:
        shapes: dict[str, tuple[int, ...]] = {}
        widths = (self.input_dim, *self.hidden_dims, self.num_classes)
        for layer in range(1, self.num_layers + 1):
            shapes[f"W{layer}"] = widths[layer - 1 : layer + 1]
            shapes[f"b{layer}"] = (widths[layer],)
            if self.normalization is not None and layer < self.num_layers:
                shapes[f"gamma{layer}"] = shapes[f"beta{layer}"] = (widths[layer],)
        # Weights lie first: the L2 penalty and adamw's decay are over one leading stretch.
        layout = sorted(shapes, key=lambda name: not name.startswith("W"))
        params = Parameters(shapes, layout, self.dtype, self.device)
        # Drawn on the host, in float64, in this order: the same on every device. Rounded to float32
        # for float64 too, since a few draws depend on the C library's log in their last bit.
        generator = np.random.default_rng(self.seed)
        for name, shape in shapes.items():
            if name.startswith("W"):
                weights = self.weight_scale * generator.standard_normal(shape)
                params[name] = weights.astype(np.float32).astype(self.dtype)
            elif name.startswith("gamma"):
                params[name] = np.ones(shape, self.dtype)
        return params

    def as_input(self, X: Array, name: str = "X") -> Array:
        """Check a batch and bring it to the network's device and dtype."""
        _check.array(name, X)
        if X.dtype.kind not in "iuf":
            raise TypeError(f"{name} has dtype {X.dtype}, expected real numbers")
        if X.ndim < 2 or math.prod(X.shape[1:]) != self.input_dim or X.shape[0] == 0:
            raise ValueError(
                f"{name} has shape {X.shape}, expected (N, d1, ...) with {self.input_dim} values a "
                "sample and at least one sample"
            )
        if X.dtype.kind == "f" and not backend.is_cuda(X):
            X = X.astype(self.dtype, copy=False)  # here: CuPy's cast makes subnormals zero
        with self.device.scope():
            return self._here(name, X).astype(self.dtype, copy=False)

    def _here(self, name: str, array: Array) -> Array:
        """Bring a NumPy array to the network's device; refuse what is on another one."""
        if backend.is_cuda(array) and backend.place(array) != self.device.name:
            raise ValueError(
                f"{name} is on {backend.place(array)} and the network on {self.device.name}, "
                "expected one device"
            )
        return self.device.asarray(array)


def _at_least_zero(name: str, value: Any) -> float:
    number = _check.number(name, value)
    if number < 0:
        raise ValueError(f"{name} is {value!r}, expected a number of at least 0")
    return number

"""The fully connected network of CS231n's second assignment."""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpubn import backend
from gpubn.backend import Array
from gpubn.kernels import for_array
from gpubn.layers import _check
from gpubn.nn.affine import Affine, draw_weights
from gpubn.nn.elementwise import Dropout, ReLU
from gpubn.nn.files import digest
from gpubn.nn.layer import Layer
from gpubn.nn.norms import RUNNING, BatchNorm, LayerNorm
from gpubn.nn.sequential import Sequential, table
from gpubn.train.parameters import Parameters

NORMALIZATIONS = (None, "batchnorm", "layernorm")

# What `_build` makes: pickles leave it out.
_BUILT = ("layers", "_backward_order", "_affines", "_batchnorms", "_dropouts")


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
    bn_params : tuple of dict
        One for each batch norm: its ``mode`` and running statistics. Assign a whole sequence to
        replace them.
    layers : Sequential
        What the network is made of. Its arrays are those of ``params`` and ``bn_params``: assigning
        a parameter copies, a buffer does not. ``loss`` with labels sets the modes to training.
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
        if self.dtype.name not in _check.FLOATS:
            raise TypeError(f"dtype is {self.dtype}, expected float32 or float64")
        self.seed = None if seed is None else _check.counter("seed", seed, 64)
        reproducible = backend.reproducible(reproducible)
        if reproducible and self.seed is None:
            raise ValueError(
                "seed is None, expected a number where the network is reproducible "
                f"(by reproducible=True, or {backend.REPRODUCIBLE_VARIABLE})"
            )
        self.device = backend.current() if device is None else backend.resolve(device)
        self.num_layers = len(self.hidden_dims) + 1
        self.step = 0
        self._dropout_seed = secrets.randbits(64) if self.seed is None else self.seed

        self._params = self._new_params()
        self._draw_weights(self._params)
        self._build(reproducible)

    @property
    def params(self) -> Parameters:
        """The parameters. Assigning a dict copies its arrays into the network's buffer."""
        return self._params

    @params.setter
    def params(self, arrays: Mapping[str, Array]) -> None:
        self._params.update(arrays)

    @property
    def bn_params(self) -> tuple[dict[str, Any], ...]:
        """What each batch norm takes. Assigning a sequence gives them these dicts."""
        return tuple(norm.bn_param for norm in self._batchnorms)

    @bn_params.setter
    def bn_params(self, bn_params: Sequence[dict[str, Any]]) -> None:
        if len(bn_params) != len(self._batchnorms):
            raise ValueError(
                f"bn_params has {len(bn_params)} entries, expected {len(self._batchnorms)}"
            )
        for norm, bn_param in zip(self._batchnorms, bn_params, strict=True):
            norm.bn_param = bn_param

    @property
    def reproducible(self) -> bool:
        """Whether matrix products have the same bits on every device."""
        return self._affines[0].reproducible

    @reproducible.setter
    def reproducible(self, choice: bool) -> None:
        for affine in self._affines:
            affine.reproducible = choice

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
            f"{name}{i}": norm.buffers[name]
            for i, norm in enumerate(self._batchnorms, 1)
            for name in RUNNING
        }
        return str(digest({**self._params, **arrays}).hexdigest())

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        return f"FullyConnectedNet({given}, device={self.device.name!r})"

    def __str__(self) -> str:
        return "FullyConnectedNet\n" + table(self.layers, ("N", self.input_dim))

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in _BUILT}
        return state | {
            "_params": dict(self._params),
            "bn_params": self.bn_params,
            "frozen": [norm.frozen for norm in self._batchnorms],
            "reproducible": self.reproducible,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"reproducible": False} | state  # earlier ones knew no other
        values = {name: array.copy() for name, array in state.pop("_params").items()}
        bn_params, reproducible = state.pop("bn_params"), state.pop("reproducible")
        frozen = state.pop("frozen", [False] * len(bn_params))
        self.__dict__.update(state)
        self._params = self._new_params()
        self._params.update(values)
        self._build(reproducible)
        self.bn_params = bn_params
        for norm, choice in zip(self._batchnorms, frozen, strict=True):
            norm.frozen = choice

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
            return self.layers.predict_array(X)
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
        for dropout in self._dropouts:
            dropout.seed, dropout.step = self._dropout_seed, self.step
        with self.device.scope():
            scores = self.layers.train().forward_array(X)
            loss, dout = for_array("losses", scores).softmax_loss(scores, y)
            for layer, names in self._backward_order:
                if layer is self._affines[0]:  # X needs no gradient
                    self._affines[0].backward_parameters(dout)
                else:
                    dout = layer.backward_array(dout)
                layer.release()
                for own, name in names.items():
                    grads[name] = layer.grads.pop(own)
            if self.reg:
                l2 = for_array("l2", loss)
                weights = self._params.flat[: self.num_weights]
                l2.add_scaled(loss, l2.sum_of_squares(weights), 0.5 * self.reg)
                l2.add_scaled(grads.flat[: self.num_weights], weights, self.reg)
        return loss

    def folded(self, layers: Sequential) -> FullyConnectedNet:
        """Return a network like this one of other layers: ``fold_batchnorm`` calls it."""
        if self.normalization != "batchnorm":
            return copy.deepcopy(self)
        config = self.config | {"normalization": None}
        net = FullyConnectedNet(**config, device=self.device.name)
        affines = [layer for layer in layers if isinstance(layer, Affine)]
        for i, affine in enumerate(affines, 1):
            net.params.update({f"W{i}": affine.params["w"], f"b{i}": affine.params["b"]})
        net.dropout_state = self.dropout_state
        return net

    def _build(self, reproducible: bool) -> None:
        """Make the layers, of the arrays in ``params``."""
        where: dict[str, Any] = {"dtype": self.dtype, "device": self.device.name}
        self._backward_order: list[tuple[Layer, dict[str, str]]] = []
        layers: list[Layer] = []

        def add(layer: Layer, names: dict[str, str]) -> None:
            if names:
                layer.bind(self._params.renamed(names))
            layers.append(layer)
            self._backward_order.insert(0, (layer, names))

        widths = (self.input_dim, *self.hidden_dims, self.num_classes)
        for i in range(1, self.num_layers + 1):
            # No weights are drawn: those in `params` take their place.
            affine = Affine(widths[i - 1], widths[i], 0, reproducible=reproducible, **where)
            affine.weight_scale = None  # so that printing does not show it
            add(affine, {"w": f"W{i}", "b": f"b{i}"})
            if i == self.num_layers:
                break
            scale = {"gamma": f"gamma{i}", "beta": f"beta{i}"}
            if self.normalization == "batchnorm":
                norm = BatchNorm(widths[i], relu=True, **where)
                # As a caller of batchnorm_forward has it at first: running statistics from zeros.
                norm.bn_param = {"mode": "train"}
                add(norm, scale)
            else:
                if self.normalization == "layernorm":
                    add(LayerNorm(widths[i], **where), scale)
                add(ReLU(), {})
            if self.dropout_keep_ratio < 1:
                add(self._dropout(i), {})
        self.layers = Sequential(*layers)
        self._affines = [layer for layer in layers if isinstance(layer, Affine)]
        self._batchnorms = [layer for layer in layers if isinstance(layer, BatchNorm)]
        self._dropouts = [layer for layer in layers if isinstance(layer, Dropout)]

    def _dropout(self, index: int) -> Layer:
        """Return the dropout behind a hidden layer, the first of which has index 1."""
        return Dropout(self.dropout_keep_ratio, self.seed, stream=index)

    def _new_params(self) -> Parameters:
        """Return parameters as they are at first, with weights of 0."""
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
        for name, shape in shapes.items():
            if name.startswith("gamma"):
                params[name] = np.ones(shape, self.dtype)
        return params

    def _draw_weights(self, params: Parameters) -> None:
        """Draw W1 to WL, in this order, as the assignment has it."""
        generator = np.random.default_rng(self.seed)
        for name, array in params.items():
            if name.startswith("W"):
                weights = draw_weights(generator, array.shape, self.weight_scale)
                params[name] = weights.astype(self.dtype)

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

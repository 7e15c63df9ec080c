"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from gpubn import backend
from gpubn.backend import Array
from gpubn.layers import _check, count_correct
from gpubn.nn.norms import RUNNING
from gpubn.train import optim
from gpubn.train.batches import Batches, Indices, pick, prepare
from gpubn.train.net import FullyConnectedNet


class Model(Protocol):
    """What ``Solver`` can train."""

    params: Any
    """A dict of name to array."""

    def loss(self, X: Array, y: Array | None = None) -> Any:
        """Return scores, or with labels the loss and a dict of gradients."""


class NonFiniteLoss(ArithmeticError):
    """A training loss was NaN or infinite, and training stopped.

    Attributes
    ----------
    iteration : int
        The iteration, counted from 1, whose loss it was.
    """

    def __init__(self, loss: float, iteration: int, checkpoint: str | None) -> None:
        good = (
            f"the last good checkpoint is {checkpoint}"
            if checkpoint
            else "there is no checkpoint before it"
        )
        super().__init__(
            f"the loss became {loss} at iteration {iteration}; {good}; "
            "a smaller learning rate may help"
        )
        self.iteration = iteration


class NonFiniteParameters(ArithmeticError):
    """Parameters became NaN or infinite. They are not saved: no training goes on from them."""


class Solver:
    """Train a model on batches of training data, and watch its accuracy.

    Parameters
    ----------
    model : object
        A ``FullyConnectedNet``, or anything with ``params`` (a dict) and ``loss(X[, y])``.
    data : dict
        ``X_train``, ``y_train``, ``X_val``, ``y_val``. For a ``FullyConnectedNet`` on CUDA, NumPy
        arrays are copied to the device now where they fit, and else batch by batch
        (``gpubn.train.batches``): leave them as they are while it trains.
    update_rule : str
        'sgd', 'sgd_momentum', 'rmsprop', 'adam' or 'adamw'.
    optim_config : dict, optional
        The rule's scalars, such as ``learning_rate``; see ``gpubn.train.optim``.
    lr_decay : float
        The learning rate is multiplied by this after every epoch.
    batch_size, num_epochs : int
    num_train_samples, num_val_samples : int or None
        How many samples, drawn anew each time, an accuracy is measured on; None for all.
    checkpoint_name : str, optional
        After every epoch the run is saved as ``{checkpoint_name}_epoch_{epoch}.safetensors``.
    print_every : int
        Iterations between printed losses. Losses stay on the device until then.
    verbose : bool
        Whether to print.
    shuffle : bool
        False draws batches with replacement, as CS231n does. True goes through a new order of the
        samples every epoch; those that do not fill a last batch are left for the next.
    seed : int, optional
        Same seed, same batches, on every device. Random where absent.
    on_iteration, on_epoch : callable, optional
        Called with the solver after every iteration, and after every epoch's accuracies.
    reproducible : bool, optional
        Sets ``model.reproducible`` of a ``FullyConnectedNet``; by default it stays as it is. Where
        it is True, training gives the same weights, bit for bit, on every device, and a seed is
        asked for. What the Solver itself computes is always the same.

    Attributes
    ----------
    iteration, epoch : int
        How many are done.
    stopped : bool
        Whether ``stop`` ended ``train``.
    best_val_acc, best_params
        Of the epochs' ends. ``train`` puts the best parameters into the model at its end.
    loss_history : list of float
        One an iteration.
    train_acc_history, val_acc_history : list of float
        After the first iteration and after every epoch.
    placement : str
        Where batches come from, and why, in a line that ``train`` prints once; empty where nothing
        was to be decided, as on the CPU.
    optim_configs : mapping of name to dict
        Every parameter's rule: its scalars, and views of its state. Read-only for a
        ``FullyConnectedNet``, whose parameters are updated together.
    """

    def __init__(
        self,
        model: Model,
        data: Mapping[str, Array],
        *,
        update_rule: str = "sgd",
        optim_config: Mapping[str, Any] | None = None,
        lr_decay: float = 1.0,
        batch_size: int = 100,
        num_epochs: int = 10,
        num_train_samples: int | None = 1000,
        num_val_samples: int | None = None,
        checkpoint_name: str | None = None,
        print_every: int = 10,
        verbose: bool = True,
        shuffle: bool = False,
        seed: int | None = None,
        on_iteration: Callable[[Solver], None] | None = None,
        on_epoch: Callable[[Solver], None] | None = None,
        reproducible: bool | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = [name for name in inspect.signature(Solver).parameters if name != "unknown"]
            raise ValueError(
                f"unknown keyword {', '.join(map(repr, unknown))}, expected one of "
                f"{', '.join(known[2:])}"
            )
        self.model = model
        self._batches = Batches(*_samples(data, "train"))
        self.X_val, self.y_val = _samples(data, "val")
        self.update_rule = update_rule
        self.lr_decay = _check.number("lr_decay", lr_decay)
        if not self.lr_decay > 0:
            raise ValueError(f"lr_decay is {lr_decay!r}, expected a number above 0")
        self.batch_size = _check.whole("batch_size", batch_size)
        self.num_epochs = _check.whole("num_epochs", num_epochs)
        self.print_every = _check.whole("print_every", print_every)
        self.num_train_samples = _optional("num_train_samples", num_train_samples)
        self.num_val_samples = _optional("num_val_samples", num_val_samples)
        self.checkpoint_name = checkpoint_name
        self.verbose = verbose
        self.shuffle = shuffle
        self.on_iteration, self.on_epoch = on_iteration, on_epoch
        if shuffle and self.batch_size > len(self.X_train):
            raise ValueError(
                f"batch_size is {batch_size}, expected at most the {len(self.X_train)} training "
                "samples that there are to shuffle"
            )

        self.generator = np.random.default_rng(
            None if seed is None else _check.counter("seed", seed, 64)
        )
        self._order = np.arange(0)  # this epoch's samples, where they are shuffled
        self.iteration = 0
        self.epoch = 0
        self.stopped = False
        self._interrupted = False
        self.best_val_acc = 0.0
        self.best_params: dict[str, Array] = {}
        self.best_bn_params: list[dict[str, Array]] = []
        self.train_acc_history: list[float] = []
        self.val_acc_history: list[float] = []
        self._losses: list[float] = []
        self._pending: list[Array] = []  # losses that are still on the device
        self.last_checkpoint: str | None = None

        config = optim.complete(update_rule, optim_config)
        self._scalars = {name: float(config[name]) for name in optim.scalar_names(update_rule)}
        # A network whose loss is its own is trained through that loss, as any other object is.
        own_loss = getattr(model.loss, "__func__", None) is not FullyConnectedNet.loss
        self._net = model if isinstance(model, FullyConnectedNet) and not own_loss else None
        if self._net is not None:
            for part, X, y in (
                ("train", self.X_train, self.y_train),
                ("val", self.X_val, self.y_val),
            ):
                self._net.as_input(X[:1], f"X_{part}")
                _check.label_range(y, self._net.num_classes, f"y_{part}")
            if self._net.normalization == "batchnorm" and self.batch_size < 2:
                raise ValueError(
                    f"batch_size is {batch_size}, expected at least 2 with batch norm: "
                    "the variance of one sample is no estimate"
                )
            self._config = config
            self._grads = self._net.params.zeros_like()
        else:
            self._configs = {name: dict(config) for name in model.params}
        self._set_reproducible(reproducible, seed)
        self.placement, self._placement_told = "", False
        if self._net is not None:
            self._place_samples(self._net)

    def _place_samples(self, net: FullyConnectedNet) -> None:
        """Let batches come from where they are best: the device, if all samples fit there."""
        train, val = (self.X_train, self.y_train), (self.X_val, self.y_val)
        prepared = prepare(train, val, self.batch_size, net.dtype, net.device)
        self._batches, self.placement = prepared.batches, prepared.placement
        self.X_val, self.y_val = prepared.X_val, prepared.y_val

    def _set_reproducible(self, reproducible: bool | None, seed: int | None) -> None:
        if self._net is None:
            if reproducible is not None:
                raise ValueError(
                    f"reproducible is {reproducible}, expected None for a "
                    f"{type(self.model).__name__}: its loss is its own, and so are its products"
                )
            return
        if reproducible is None:
            reproducible = self._net.reproducible
        reproducible = backend.reproducible(reproducible)
        for name, value in (("seed", seed), ("the network's seed", self._net.seed)):
            if reproducible and value is None:
                raise ValueError(
                    f"{name} is None, expected a number where the network is reproducible"
                )
        self._net.reproducible = reproducible

    # --- What it is about to do, and has done -----------------------------------------------------

    @property
    def X_train(self) -> Array:  # noqa: N802 - the assignment's name, and the data's key
        """The training samples, where batches are cut out of them."""
        return self._batches.X

    @property
    def y_train(self) -> Array:
        """The training samples' labels."""
        return self._batches.y

    @property
    def iterations_per_epoch(self) -> int:
        """Batches that make an epoch: as many as fit into the training samples, at least one."""
        return max(len(self.X_train) // self.batch_size, 1)

    @property
    def num_iterations(self) -> int:
        """Iterations of all epochs together."""
        return self.num_epochs * self.iterations_per_epoch

    @property
    def learning_rate(self) -> float:
        """The learning rate now in force."""
        config = self._config if self._net is not None else next(iter(self._configs.values()))
        return float(config["learning_rate"])

    @property
    def loss_history(self) -> list[float]:
        """Every iteration's loss. Losses that are still on the device are copied now."""
        self._collect_losses()
        return self._losses

    @property
    def optim_configs(self) -> dict[str, dict[str, Any]]:
        """Every parameter's scalars and state."""
        if self._net is None:
            return self._configs
        net, names = self._net, optim.state_names(self.update_rule)
        states: dict[str, Any] = {}
        for name in names:
            if self._config.get(name) is not None:
                states[name] = net.params.views_of(self._config[name])
        scalars = {key: value for key, value in self._config.items() if key not in names}
        return {
            name: {**scalars, **{state: views[name] for state, views in states.items()}}
            for name in net.params
        }

    # --- Training ---------------------------------------------------------------------------------

    def train(self) -> None:
        """Train up to ``num_epochs`` epochs, then put the best parameters into the model.

        Raises
        ------
        NonFiniteLoss
            A loss was NaN or infinite. Seen when losses are collected, at the latest at the end of
            the epoch; no checkpoint is written after it.
        NonFiniteParameters
            Parameters were, when a checkpoint was to be written.
        RuntimeError
            An exception, such as KeyboardInterrupt, ended an earlier call in the middle of an
            iteration. ``stop`` ends training between two.
        """
        if self._interrupted:
            raise RuntimeError(
                f"training was interrupted in the middle of an iteration, after {self.iteration}; "
                "what it left is of no use: resume a checkpoint with a new network and Solver"
            )
        self.stopped = False
        if self.verbose and self.placement and not self._placement_told:
            print(f"batches {self.placement}")
            self._placement_told = True
        with self._scope():
            try:
                self._train()
            finally:
                self._batches.settle()

    def _train(self) -> None:
        while self.iteration < self.num_iterations and not self.stopped:
            self._interrupted = True  # until all that belongs to the iteration is done
            self._step()
            first, last = self.iteration == 1, self.iteration == self.num_iterations
            if self.verbose and (self.iteration - 1) % self.print_every == 0:
                loss = self.loss_history[-1]
                print(f"(Iteration {self.iteration} / {self.num_iterations}) loss: {loss:f}")
            elif self.iteration % self.print_every == 0:
                self._collect_losses()
            epoch_ends = self.iteration % self.iterations_per_epoch == 0
            if epoch_ends:
                self.epoch += 1
                self._set_learning_rate(self.learning_rate * self.lr_decay)
            if first or last or epoch_ends:
                self._collect_losses()
                self._measure()
            self._interrupted = False
            if epoch_ends:
                self._save_checkpoint()
                if self.on_epoch is not None:
                    self.on_epoch(self)
            if self.on_iteration is not None:
                self.on_iteration(self)
        self._collect_losses()
        if not self.stopped:
            self.restore_best()
            if self.verbose and self._net is not None and self._net.reproducible:
                print(f"weights SHA-256 {self._net.sha256()}")

    def _scope(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which new arrays are made on the network's device."""
        return contextlib.nullcontext() if self._net is None else self._net.device.scope()

    def stop(self) -> None:
        """Let ``train`` return after the iteration under way, ready to be saved or to go on."""
        self.stopped = True

    def restore_best(self) -> None:
        """Put the best parameters, and the statistics that belong to them, into the model."""
        if not self.best_params:
            return
        if self._net is None:
            self.model.params = copy_params(self.best_params)
            return
        self._net.params = self.best_params
        for bn_param, best in zip(self._net.bn_params, self.best_bn_params, strict=True):
            bn_param.update(best)

    def _step(self) -> None:
        X, y = self._batches.take(self._draw())
        if self._net is not None:
            net = self._net
            loss = net.loss_into(X, net.device.asarray(y, np.int64), self._grads)
            net.step += 1
            flat = (net.params.flat, self._grads.flat)
            optim.update_in_place(self.update_rule, *flat, self._config, net.num_weights)
        else:
            loss, grads = self.model.loss(X, y)
            rule = optim.get(self.update_rule)
            for name, w in self.model.params.items():
                config = self._configs[name]
                self.model.params[name], self._configs[name] = rule(w, grads[name], config)
        self._pending.append(loss)
        self.iteration += 1
        self._batches.step_launched(self._foreseen() if self._batches.foresees else None)

    def _draw(self) -> Indices:
        """Return the samples of this iteration."""
        if not self.shuffle:
            return self.generator.choice(len(self.X_train), self.batch_size)
        at = self.iteration % self.iterations_per_epoch * self.batch_size
        if at == 0:
            self._order = self.generator.permutation(len(self.X_train))
        return self._order[at : at + self.batch_size]

    def _foreseen(self) -> Indices | None:
        """Return what ``_draw`` will, or None; the generator stays as it is."""
        if self.iteration % self.iterations_per_epoch == 0:
            return None  # accuracies come first, and may draw
        if self.shuffle:
            return self._draw()  # a part of the epoch's order: nothing is drawn
        return copy.deepcopy(self.generator).choice(len(self.X_train), self.batch_size)

    def _set_learning_rate(self, rate: float) -> None:
        for config in [self._config] if self._net is not None else self._configs.values():
            config["learning_rate"] = rate

    def _collect_losses(self) -> None:
        """Bring the losses since the last call to the host, in one copy, and look at them."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        if backend.is_cuda(pending[0]):
            xp = backend.namespace(pending[0])
            with backend.scope_of(pending[0]):
                values = backend.to_host(xp.stack(pending)).tolist()
        else:
            values = [float(loss) for loss in pending]
        first = len(self._losses) + 1
        self._losses.extend(values)
        for i, loss in enumerate(values):
            if not math.isfinite(loss):
                raise NonFiniteLoss(loss, first + i, self.last_checkpoint)

    def _measure(self) -> None:
        """Measure both accuracies, and keep the parameters if they are the best so far."""
        train, val = (
            self.check_accuracy(self.X_train, self.y_train, num_samples=self.num_train_samples),
            self.check_accuracy(self.X_val, self.y_val, num_samples=self.num_val_samples),
        )
        self.train_acc_history.append(train)
        self.val_acc_history.append(val)
        if self.verbose:
            print(
                f"(Epoch {self.epoch} / {self.num_epochs}) train acc: {train:f}; val_acc: {val:f}"
            )
        if val > self.best_val_acc:
            self.best_val_acc = val
            self.best_params = copy_params(self.model.params)
            if self._net is not None:
                self.best_bn_params = [
                    {name: bn_param[name].copy() for name in RUNNING}
                    for bn_param in self._net.bn_params
                ]

    def _save_checkpoint(self) -> None:
        if self.checkpoint_name is not None:
            from gpubn.train import checkpoint  # needs safetensors, which training alone does not

            self.check_parameters()
            path = f"{self.checkpoint_name}_epoch_{self.epoch}.safetensors"
            checkpoint.save(path, self)
            self.last_checkpoint = path

    def check_parameters(self) -> None:
        """Raise NonFiniteParameters unless every parameter is finite: a checkpoint must be good."""
        for array in [self._net.params.flat] if self._net else self.model.params.values():
            with backend.scope_of(array):
                finite = backend.to_host(backend.namespace(array).isfinite(array).all())
            if not finite:
                last = self.last_checkpoint
                raise NonFiniteParameters(
                    f"parameters became NaN or infinite by iteration {self.iteration}; "
                    + (f"the last good checkpoint is {last}" if last else "there is no checkpoint")
                    + "; a smaller learning rate may help"
                )

    def check_accuracy(
        self, X: Array, y: Array, num_samples: int | None = None, batch_size: int = 100
    ) -> float:
        """Return the share of samples whose highest score is their label's.

        Parameters
        ----------
        X : array (N, d1, ..., dk)
        y : integer array (N,)
        num_samples : int, optional
            Measure on so many samples drawn at random, if there are more.
        batch_size : int
            Samples that pass through the model at a time.
        """
        batch_size = _check.whole("batch_size", batch_size)
        num_samples = _optional("num_samples", num_samples)
        _check_samples(X, y, "X", "y")
        if num_samples is not None and len(X) > num_samples:
            chosen = self.generator.choice(len(X), num_samples)
            X, y = pick(X, chosen), pick(y, chosen)
        correct: Any = 0
        for start in range(0, len(X), batch_size):
            scores = self.model.loss(X[start : start + batch_size])
            labels = y[start : start + batch_size]
            with backend.scope_of(scores):
                if scores.dtype.name not in _check.FLOATS:  # float16 or integers, of another model
                    scores = scores.astype(np.float64)
                if backend.is_cuda(scores):
                    labels = backend.namespace(scores).asarray(labels)
                else:
                    labels = backend.to_host(labels)
                correct = correct + count_correct(scores, labels)
        return float(correct) / len(X)

    # --- State, for checkpoints -------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that decide what training computes."""
        return {
            "update_rule": self.update_rule,
            "lr_decay": self.lr_decay,
            "batch_size": self.batch_size,
            "num_epochs": self.num_epochs,
            "num_train_samples": self.num_train_samples,
            "num_val_samples": self.num_val_samples,
            "shuffle": self.shuffle,
            "optim_config": self._scalars,
            "training_samples": len(self.X_train),
        }

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return all that training needs to go on: arrays by name, and what is no array."""
        arrays: dict[str, Array] = {}
        arrays.update({f"params.{name}": array for name, array in self.model.params.items()})
        arrays.update({f"best.params.{name}": array for name, array in self.best_params.items()})
        names = optim.state_names(self.update_rule)
        counts = {}
        for name, config in self.optim_configs.items():
            counts[name] = config.get("t", 0)
            for state in names:
                if config.get(state) is not None:
                    arrays[f"optim.{state}.{name}"] = config[state]
        if self._net is not None:
            for prefix, bn_params in (
                ("bn", self._net.bn_params),
                ("best.bn", self.best_bn_params),
            ):
                for i, bn_param in enumerate(bn_params):
                    for name in RUNNING:
                        if name in bn_param:
                            arrays[f"{prefix}.{i}.{name}"] = bn_param[name]
        arrays["order"] = self._order
        arrays["history.loss"] = np.array(self.loss_history, np.float64)
        arrays["history.train_acc"] = np.array(self.train_acc_history, np.float64)
        arrays["history.val_acc"] = np.array(self.val_acc_history, np.float64)
        values = {
            "iteration": self.iteration,
            "epoch": self.epoch,
            "best_val_acc": self.best_val_acc,
            "learning_rate": self.learning_rate,
            "t": counts,
            "generator": self.generator.bit_generator.state,
            "dropout": None if self._net is None else self._net.dropout_state,
        }
        return arrays, values

    def load_state(self, arrays: Mapping[str, Array], values: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned, from a solver and model made with the same arguments.

        Raises
        ------
        KeyError, ValueError, TypeError
            Something is missing, or is of another network; parameters are checked before anything
            is written.
        """
        params = _with_prefix(arrays, "params.")
        best = _with_prefix(arrays, "best.params.")
        states = {
            state: _with_prefix(arrays, f"optim.{state}.")
            for state in optim.state_names(self.update_rule)
        }
        for group in (params, best, *states.values()):
            _same_shapes(group, self.model.params, required=group is params)

        if self._net is not None:
            self._load_net(arrays, values, params, states)
        else:
            xp_of = self.model.params
            self.model.params.update({name: _beside(xp_of[name], a) for name, a in params.items()})
            for name, config in self._configs.items():
                config["learning_rate"] = values["learning_rate"]
                for state, group in states.items():
                    config.pop(state, None)
                    if name in group:
                        config[state] = _beside(xp_of[name], group[name])
                if "t" in config:
                    config["t"] = values["t"][name]
        self.best_params = {name: _beside(self.model.params[name], a) for name, a in best.items()}
        self._interrupted = False
        self._order = np.array(arrays["order"])
        self._losses, self._pending = [float(loss) for loss in arrays["history.loss"]], []
        self.train_acc_history = [float(value) for value in arrays["history.train_acc"]]
        self.val_acc_history = [float(value) for value in arrays["history.val_acc"]]
        self.iteration, self.epoch = int(values["iteration"]), int(values["epoch"])
        self.best_val_acc = float(values["best_val_acc"])
        self.generator.bit_generator.state = values["generator"]

    def _load_net(
        self,
        arrays: Mapping[str, Array],
        values: Mapping[str, Any],
        params: dict[str, Array],
        states: dict[str, dict[str, Array]],
    ) -> None:
        net = self._net
        assert net is not None
        net.params = params
        net.dropout_state = values["dropout"]
        self._config["learning_rate"] = values["learning_rate"]
        if "t" in self._config:
            self._config["t"] = next(iter(values["t"].values()))
        for state, group in states.items():
            self._config[state] = None
            if group:
                buffer = net.params.zeros_like()
                buffer.update(group)
                self._config[state] = buffer.flat
        with net.device.scope():
            for i, bn_param in enumerate(net.bn_params):
                for name in RUNNING:
                    bn_param.pop(name, None)
                    if f"bn.{i}.{name}" in arrays:
                        bn_param[name] = net.device.asarray(arrays[f"bn.{i}.{name}"])
            self.best_bn_params = [
                {name: net.device.asarray(arrays[f"best.bn.{i}.{name}"]) for name in RUNNING}
                for i in range(len(net.bn_params))
                if f"best.bn.{i}.running_mean" in arrays
            ]


def _with_prefix(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}


def _same_shapes(
    arrays: Mapping[str, Array], params: Mapping[str, Array], *, required: bool
) -> None:
    if (required or arrays) and set(arrays) != set(params):
        raise ValueError(
            f"it is of another network: it has {', '.join(arrays) or 'no parameters'}, "
            f"expected {', '.join(params)}"
        )
    for name, array in arrays.items():
        if array.shape != params[name].shape or array.dtype != params[name].dtype:
            raise ValueError(
                f"it is of another network: {name} has shape {array.shape} and dtype "
                f"{array.dtype}, expected {params[name].shape} and {params[name].dtype}"
            )


def _beside(array: Array, host: Array) -> Array:
    """Copy a NumPy array to the device that holds ``array``."""
    with backend.scope_of(array):
        return backend.namespace(array).array(host)


def copy_params(params: Mapping[str, Array]) -> dict[str, Array]:
    """Return a dict of copies."""
    copies = {}
    for name, array in params.items():
        with backend.scope_of(array):  # CuPy copies to the device in force
            copies[name] = array.copy()
    return copies


def _samples(data: Mapping[str, Array], part: str) -> tuple[Array, Array]:
    for name in (f"X_{part}", f"y_{part}"):
        if name not in data:
            raise ValueError(f"data has no {name!r}, expected X_train, y_train, X_val and y_val")
    X, y = data[f"X_{part}"], data[f"y_{part}"]
    _check_samples(X, y, f"X_{part}", f"y_{part}")
    return X, y


def _check_samples(X: Array, y: Array, X_name: str, y_name: str) -> None:
    _check.array(X_name, X)
    if X.ndim < 2 or len(X) == 0:
        raise ValueError(f"{X_name} has shape {X.shape}, expected (N, d1, ...), N at least 1")
    _check.label_array(y, len(X), y_name)


def _optional(name: str, value: Any) -> int | None:
    return None if value is None else _check.whole(name, value)

"""The configuration of a training run, and its file config.toml."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gpubn import backend
from gpubn.layers import _check
from gpubn.train import optim

NORMALIZATIONS = ("batchnorm", "layernorm", "none")
DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class RunConfig:
    """Every hyper-parameter of a run.

    Parameters
    ----------
    data : str
        As for ``gpubn.train.load_data``: digits, mnist:DIR, cifar10:DIR or FILE.npz.
    hidden : sequence of int
        Width of each hidden layer; empty for a linear classifier.
    normalization : {"batchnorm", "layernorm", "none"}
    dropout_keep_ratio : float
        Probability of keeping a unit, above 0; at 1 there is no dropout.
    update_rule : str
        A name of ``gpubn.train.optim.RULES``.
    learning_rate : float
    lr_decay : float
        The learning rate is multiplied by this after every epoch.
    reg : float
        Strength of the L2 penalty ``0.5 * reg * sum(W**2)``.
    weight_scale : float
        Standard deviation of the initial weights.
    batch_size, epochs : int
    dtype : {"float32", "float64"}
    device : str, optional
        As for ``gpubn.use``; by default the device in force.
    seed : int
        Of the weights, the dropout masks and the order of the samples.
    reproducible : bool
        Whether matrix products have the same bits on every device, so that the trained weights do;
        by default as ``GPUBN_REPRODUCIBLE`` says, else False.
    histograms : bool
        Whether to record what layers put out, and its gradients, in some hundred iterations.
    tensorboard : bool
        Whether to write events for TensorBoard.

    Raises
    ------
    ValueError, TypeError
        A value is out of range or of the wrong type; the message names it.
    """

    data: str = "digits"
    hidden: tuple[int, ...] = (512, 256)
    normalization: str = "batchnorm"
    dropout_keep_ratio: float = 0.7
    update_rule: str = "adam"
    learning_rate: float = 2e-3
    lr_decay: float = 0.8
    reg: float = 0.0
    weight_scale: float = 0.05
    batch_size: int = 50
    epochs: int = 15
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    reproducible: bool = field(default_factory=backend.reproducible)
    histograms: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _text("data", self.data)
        if isinstance(self.hidden, str) or not isinstance(self.hidden, list | tuple):
            raise TypeError(f"hidden is {self.hidden!r}, expected a list of whole numbers")
        self._set("hidden", tuple(_check.whole("hidden", width, 1) for width in self.hidden))
        _one_of("normalization", self.normalization, NORMALIZATIONS)
        _one_of("update_rule", self.update_rule, optim.RULES)
        _one_of("dtype", self.dtype, DTYPES)
        for name in ("dropout_keep_ratio", "lr_decay", "learning_rate", "reg", "weight_scale"):
            value = _check.number(name, getattr(self, name))
            if value < 0 or (value == 0 and name in ("dropout_keep_ratio", "lr_decay")):
                least = "above 0" if name in ("dropout_keep_ratio", "lr_decay") else "of at least 0"
                raise ValueError(f"{name} is {value!r}, expected a number {least}")
            self._set(name, value)
        if self.dropout_keep_ratio > 1:
            raise ValueError(
                f"dropout_keep_ratio is {self.dropout_keep_ratio!r}, expected a probability of "
                "keeping a unit, above 0 and at most 1"
            )
        least_batch = 2 if self.normalization == "batchnorm" else 1
        self._set("batch_size", _check.whole("batch_size", self.batch_size, least_batch))
        self._set("epochs", _check.whole("epochs", self.epochs, 1))
        self._set("seed", _check.whole("seed", self.seed, 0))
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}, expected less than 2**63: TOML holds no more")
        self._set("reproducible", backend.reproducible(self.reproducible))
        for name in ("histograms", "tensorboard"):
            self._set(name, _check.boolean(name, getattr(self, name)))
        if self.device is not None:
            _text("device", self.device)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the way to set a frozen field

    def as_dict(self) -> dict[str, Any]:
        """Return a dict of plain values, as TOML and JSON hold them; no device if none is named."""
        values = {**asdict(self), "hidden": list(self.hidden)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> RunConfig:
        """Make a configuration of a dict; what is absent has its default.

        Raises
        ------
        ValueError, TypeError
            A key is unknown, or a value does not fit; ``source`` is named.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{source} has a key {name!r}, expected: {', '.join(known)}")
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{source}: {error}") from error

    @classmethod
    def read(cls, path: str | os.PathLike[str], **defaults: Any) -> RunConfig:
        """Read a TOML file; ``defaults`` stand for what is absent from it.

        Raises
        ------
        ValueError, TypeError
            The file is no TOML, or no configuration.
        OSError
            The file cannot be read.
        """
        name = os.fspath(path)
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is no TOML file: {error}") from error
        return cls.from_dict({**defaults, **values}, name)

    def to_toml(self) -> str:
        """Return the text of a TOML file that ``read`` reads."""
        import tomli_w

        values = self.as_dict()
        hidden = f"hidden = {values.pop('hidden')}\n"  # on one line, unlike tomli_w's lists
        return (
            "# The hyper-parameters of a run; gpubn train --config THIS_FILE repeats it.\n"
            + hidden
            + tomli_w.dumps(values)
        )


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError(f"{name} is {value!r}, expected a text that is not empty")


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")

"""Checkpoints of training and files of networks.

The format is that of ``gpubn.nn.files``; a header holds the configuration, and what of the state is
no array.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gpubn.backend import Array
from gpubn.nn import files
from gpubn.nn.files import CheckpointError, atomic_write
from gpubn.nn.norms import RUNNING, BatchNorm
from gpubn.train.net import FullyConnectedNet
from gpubn.train.solver import Solver

__all__ = [
    "CheckpointError",
    "atomic_write",
    "load_model",
    "resume",
    "save",
    "save_model",
]

# What of a batch norm no file keeps, and what a network is made with.
_NOT_KEPT = {"frozen": False, "eps": 1e-5, "momentum": 0.9, "unbiased": False}


def save(
    path: str | os.PathLike[str],
    solver: Solver,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Array] | None = None,
) -> None:
    """Write all that ``solver`` needs to go on, atomically.

    Parameters
    ----------
    path : path
        A file there is replaced only by a whole new one.
    solver : Solver
        Between two iterations.
    config : mapping, optional
        What else to keep, as JSON: a run's settings.
    extra : mapping of name to array, optional
        Arrays to keep beside the solver's.

    Raises
    ------
    ValueError
        A batch norm is frozen, or has options of its own, which files do not keep.
    """
    if isinstance(solver.model, FullyConnectedNet):
        _require_plain_batch_norms(solver.model)
    arrays, values = solver.state()
    net = solver.model.config if isinstance(solver.model, FullyConnectedNet) else None
    header = {"net": net, "solver": solver.config, "values": values, "config": dict(config or {})}
    _write(path, "checkpoint", {**arrays, **_extra(extra)}, header)


def resume(path: str | os.PathLike[str], solver: Solver) -> None:
    """Let a solver that was made with the same arguments go on from a checkpoint.

    Raises
    ------
    CheckpointError
        The file is no checkpoint, is damaged, or is of another network or training.
    OSError
        The file cannot be read.
    """
    arrays, header = files.read(path, "checkpoint")
    net = solver.model.config if isinstance(solver.model, FullyConnectedNet) else None
    # A network that was saved before there were reproducible ones is none.
    saved_net = header["net"] and {"reproducible": False, **header["net"]}
    for what, saved, mine in (
        ("network", saved_net, net),
        ("training", header["solver"], solver.config),
    ):
        for key in sorted({*(saved or {}), *(mine or {})} - {"num_epochs"}):
            old, new = (saved or {}).get(key), (mine or {}).get(key)
            if old != new:
                raise CheckpointError(
                    f"{os.fspath(path)} is of another {what}: its {key} is {old!r}, "
                    f"expected {new!r}"
                )
    try:
        solver.load_state(arrays, header["values"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be used: {error}") from error
    solver.last_checkpoint = os.fspath(path)


def save_model(
    path: str | os.PathLike[str],
    net: FullyConnectedNet,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Array] | None = None,
) -> None:
    """Write a network's parameters, running statistics and configuration, atomically.

    Raises
    ------
    ValueError
        A batch norm is frozen, or has options of its own, which files do not keep.
    """
    _require_plain_batch_norms(net)
    arrays: dict[str, Array] = dict(net.params)
    for i, bn_param in enumerate(net.bn_params, 1):
        for name in RUNNING:
            if name in bn_param:
                arrays[f"{name}{i}"] = bn_param[name]
    _write(
        path,
        "model",
        {**arrays, **_extra(extra)},
        {"net": net.config, "config": dict(config or {})},
    )


def load_model(
    path: str | os.PathLike[str], device: str | None = None
) -> tuple[FullyConnectedNet, dict[str, Any], dict[str, Any]]:
    """Return the network that ``save_model`` wrote, and the config and extra arrays beside it.

    Raises
    ------
    CheckpointError
        The file is no model, or is damaged.
    OSError
        The file cannot be read.
    """
    arrays, header = files.read(path, "model")
    try:
        net = FullyConnectedNet(**{"reproducible": False, **header["net"]}, device=device)
        net.params = {name: arrays[name] for name in net.params}
        for i, bn_param in enumerate(net.bn_params, 1):
            for name in RUNNING:
                if f"{name}{i}" in arrays:
                    bn_param[name] = net.device.asarray(arrays[f"{name}{i}"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be used: {error}") from error
    prefix = "extra."
    extra = {key[len(prefix) :]: a for key, a in arrays.items() if key.startswith(prefix)}
    return net, header["config"], extra


def _require_plain_batch_norms(net: FullyConnectedNet) -> None:
    """Refuse batch norms that would come back as others: files keep their statistics only."""
    for name, layer in net.layers.leaves():
        if not isinstance(layer, BatchNorm):
            continue
        for option, expected in _NOT_KEPT.items():
            value = getattr(layer, option)
            if value != expected:
                raise ValueError(
                    f"{option} of the batch norm layers[{name}] is {value!r}, expected "
                    f"{expected!r}: files of a network keep its running statistics only"
                )


def _extra(extra: Mapping[str, Array] | None) -> dict[str, Array]:
    return {f"extra.{name}": array for name, array in (extra or {}).items()}


def _write(
    path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Array], header: dict[str, Any]
) -> None:
    atomic_write(path, files.encode(kind, arrays, header))

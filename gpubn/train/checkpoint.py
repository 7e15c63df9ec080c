"""Checkpoints of training and files of networks, in the safetensors format.

A file holds arrays and, as its metadata's entry ``gpubn``, a SHA-256 followed by one JSON text: the
configuration, and what of the state is no array. The SHA-256, over both, tells whether all is as it
was written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpubn.backend import Array, to_host
from gpubn.train.net import FullyConnectedNet
from gpubn.train.parameters import RUNNING, digest
from gpubn.train.solver import Solver

FORMAT = 1
"""Raised when a change to the format would mislead an older reader."""


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or is of another network."""


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
    """
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
    arrays, header = _read(path, "checkpoint")
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
    """Write a network's parameters, running statistics and configuration, atomically."""
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
    arrays, header = _read(path, "model")
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


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, whole, whenever it looks."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the new name too must survive a loss of power
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _extra(extra: Mapping[str, Array] | None) -> dict[str, Array]:
    return {f"extra.{name}": array for name, array in (extra or {}).items()}


def _write(
    path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Array], header: dict[str, Any]
) -> None:
    from safetensors.numpy import save as to_bytes

    host = {name: np.array(to_host(array), order="C") for name, array in arrays.items()}
    text = json.dumps({"format": FORMAT, "kind": kind, **header}, sort_keys=True)
    # One entry, for safetensors writes several in any order, and equal states make equal files.
    atomic_write(path, to_bytes(host, {"gpubn": digest(host, text).hexdigest() + text}))


def _read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    with open(name, "rb"):  # a missing or forbidden file is an OSError, as from any other reader
        pass
    try:
        with safe_open(name, framework="numpy") as file:
            metadata = file.metadata() or {}
            keys = file.keys()  # an open file is no dict: it has keys(), but cannot be iterated
            arrays = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{name} is no whole safetensors file: {error}") from error
    if "gpubn" not in metadata:
        raise CheckpointError(f"{name} was not written by gpubn")
    written, text = metadata["gpubn"][:64], metadata["gpubn"][64:]
    if written != digest(arrays, text).hexdigest():
        raise CheckpointError(f"{name} is damaged: its contents do not fit its checksum")
    header = json.loads(text)
    if header["format"] != FORMAT:
        raise CheckpointError(f"{name} has format {header['format']}, this gpubn reads {FORMAT}")
    if header["kind"] != kind:
        raise CheckpointError(f"{name} is a {header['kind']}, expected a {kind}")
    return arrays, header

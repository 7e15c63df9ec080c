"""Files of arrays in the safetensors format: written whole or not at all, and checked when read.

A file holds arrays and, as its metadata's entry ``gpubn``, a SHA-256 followed by one JSON text: the
format's number, the file's kind, and what else its writer keeps there. The SHA-256, over both,
tells whether all is as it was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpubn.backend import Array, to_host

FORMAT = 1
"""Raised when a change to the format would mislead an older reader."""


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or is of another network."""


def digest(arrays: Mapping[str, Array], text: str = "") -> Any:
    """Return a SHA-256 object, fed with a text and with arrays: names, dtypes, shapes and bytes."""
    sha256 = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = to_host(arrays[name])
        if array.dtype.kind == "f" and np.isnan(array).any():
            array = np.where(np.isnan(array), array.dtype.type(np.nan), array)  # of any payload
        sha256.update(f"{name} {array.dtype.name} {array.shape}".encode())
        sha256.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return sha256


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


def _safetensors(what: str) -> Any:
    """Return the package, which a plain installation lacks."""
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ImportError(f"{what} needs safetensors: pip install safetensors") from error
    return safetensors


def encode(kind: str, arrays: Mapping[str, Array], header: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file of this kind: equal arrays and headers make equal files."""
    safetensors = _safetensors("saving")
    host = {name: np.array(to_host(array), order="C") for name, array in arrays.items()}
    text = json.dumps({"format": FORMAT, "kind": kind, **header}, sort_keys=True)
    # One entry, for safetensors writes several in any order.
    data: bytes = safetensors.numpy.save(host, {"gpubn": digest(host, text).hexdigest() + text})
    return data


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays and the header of a file of this kind.

    Raises
    ------
    CheckpointError
        The file is of another kind or format, is damaged, or was not written by gpubn.
    OSError
        The file cannot be read.
    ImportError
        safetensors is not installed.
    """
    safetensors = _safetensors("loading")
    name = os.fspath(path)
    with open(name, "rb"):  # a missing or forbidden file is an OSError, as from any other reader
        pass
    try:
        with safetensors.safe_open(name, framework="numpy") as file:
            metadata = file.metadata() or {}
            keys = file.keys()  # an open file is no dict: it has keys(), but cannot be iterated
            arrays = {key: file.get_tensor(key) for key in keys}
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{name} is no whole safetensors file: {error}") from error
    if "gpubn" not in metadata:
        raise CheckpointError(f"{name} was not written by gpubn")
    written, text = metadata["gpubn"][:64], metadata["gpubn"][64:]
    if written != digest(arrays, text).hexdigest():
        raise CheckpointError(f"{name} is damaged: its contents do not fit its checksum")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{name} was not written by gpubn: {error}") from error
    if not isinstance(header, dict) or not {"format", "kind"} <= header.keys():
        raise CheckpointError(f"{name} was not written by gpubn: its header has no format and kind")
    if header["format"] != FORMAT:
        raise CheckpointError(f"{name} has format {header['format']}, this gpubn reads {FORMAT}")
    if header["kind"] != kind:
        raise CheckpointError(f"{name} is a {header['kind']}, expected a {kind}")
    return arrays, header

"""Machine code on disk: each function's, for each set of types, in a file of its own.

Numba's own cache keeps an index beside numbered files, which processes that compile at the same
time spoil for each other: an index may come to name another's file. It loads what a crash or a bad
disk left of a file, and fails where a disk is full. Here a file's name is made from what is in it,
a checksum tells whether it is whole, and who cannot keep a file says so and goes on.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import warnings
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache

_DIGEST = 32


class KernelCache(FunctionCache):  # type: ignore[misc] # Numba publishes no types: its base is Any
    """A function's machine code on disk.

    Raises
    ------
    RuntimeError
        There is no folder that may be written to.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp(), _sources()
        self._cache_file = _Files(self.cache_path, self._impl.filename_base, stamp)

    def save_overload(self, signature: Any, data: Any) -> None:
        """Keep what was compiled, or warn that it is not kept."""
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn_not_kept(f"in {self.cache_path}: {error.strerror or error}")


class Unkept(NullCache):  # type: ignore[misc] # as above
    """The cache of a function where no folder may be written to."""

    def save_overload(self, signature: Any, data: Any) -> None:
        """Warn that what was compiled is not kept."""
        _warn_not_kept("there is no folder that may be written to")


class _Files(IndexDataCacheFile):  # type: ignore[misc] # as above
    """The files of one function. Their names follow from the types; there is no index."""

    def save(self, key: Any, data: Any) -> None:
        payload = self._dump((self._source_stamp, key, data))
        with self._open_for_write(self._path(key)) as file:
            file.write(hashlib.blake2b(payload, digest_size=_DIGEST).digest() + payload)

    def load(self, key: Any) -> Any:
        """Return what was saved; None where nothing was, it is older than the text, or damaged."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                digest, payload = file.read(_DIGEST), file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn_once(f"{path} cannot be read, and is compiled anew: {error.strerror or error}")
            return None
        if digest != hashlib.blake2b(payload, digest_size=_DIGEST).digest():
            _warn_once(f"{path} is damaged, and is compiled anew")
            return None
        stamp, saved_key, data = pickle.loads(payload)
        return data if (stamp, saved_key) == (self._source_stamp, key) else None

    def flush(self) -> None:
        raise NotImplementedError("delete the folder's files instead")

    def _path(self, key: Any) -> str:
        text = f"{numba.__version__} {key}"
        name = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
        base = self._index_name.removesuffix(".nbi")
        return os.path.join(self._cache_path, f"{base}.{name}.nbc")


@functools.cache
def _sources() -> str:
    """Return a hash of all of the kernels' text: what one calls from other files is part of it."""
    folder = files("gpubn.kernels")
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith("_numba.py"))
    text = "".join((folder / name).read_text("utf-8") for name in names)
    return hashlib.sha256(text.encode()).hexdigest()


def _warn_not_kept(why: str) -> None:
    _warn_once(
        f"compiled kernels cannot be kept, so that each process compiles anew: {why}; set "
        "NUMBA_CACHE_DIR to a folder with room that may be written to"
    )


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)

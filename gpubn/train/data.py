"""Data sets to train on, and the step from raw pixels to what a network sees.

``load`` reads the digits that come with gpubn, MNIST, CIFAR-10 or any ``.npz`` file into a
``Dataset`` of raw arrays; ``Preprocessing`` turns those into centred floats, always the same way.

Files are taken for what they are, input from elsewhere: no more is read, decompressed or allocated
than their headers promise and their bytes hold, and nothing in them is executed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import IO, Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

Pixels = NDArray[Any]
Labels = NDArray[Any]

SPEC_FORMS = ("digits", "mnist:DIR", "cifar10:DIR", "FILE.npz")
"""What ``load`` takes."""

SPLIT_SEED = 0
"""Seed of the permutation that splits data which come without a validation set."""

MAX_CLASSES = 100_000
"""Labels from here on are refused: they are a mistake, and would make an output layer as wide."""

_CHUNK = 1 << 20  # bytes read, or values converted, at a time
_PARTS = ("train", "val", "test")


class DataError(ValueError):
    """Data that cannot be used. The message names the file or argument, in one line."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Raw images and labels, split into training, validation and test sets.

    Attributes
    ----------
    name : str
        Where the data came from, as ``load`` was told.
    X_train, X_val, X_test : ndarray
        Images of shape (N, d...), as stored: uint8, uint16 or finite floats. ``X_test`` is None
        where the source has no test set.
    y_train, y_val, y_test : ndarray
        Labels 0, 1, ... of shape (N,). Any integers come in; they are kept as int64.
    max_value : float or None
        The largest value that integer pixels of this source can have; None for floats, or for
        the full range of the dtype.

    Raises
    ------
    DataError
        Where shapes, dtypes or values do not fit this description.
    """

    name: str
    X_train: Pixels
    y_train: Labels
    X_val: Pixels
    y_val: Labels
    X_test: Pixels | None = None
    y_test: Labels | None = None
    max_value: float | None = None

    def __post_init__(self) -> None:
        if (self.X_test is None) != (self.y_test is None):
            lacking, there = ("X_test", "y_test") if self.X_test is None else ("y_test", "X_test")
            raise DataError(f"{self.name}: {there} is given without {lacking}; give both or none")
        for part in _PARTS:
            X, y = getattr(self, f"X_{part}"), getattr(self, f"y_{part}")
            if X is None:
                continue
            y = _checked_labels(self.name, part, X, y)
            object.__setattr__(self, f"y_{part}", y)  # the way to set a frozen field
            if X.shape[1:] != self.input_shape or X.dtype != self.X_train.dtype:
                raise DataError(
                    f"{self.name}: X_{part} holds {X.dtype} images of shape {X.shape[1:]}, "
                    f"expected {self.X_train.dtype} {self.input_shape} as in X_train"
                )
            if int(y.max()) >= self.num_classes:
                raise DataError(
                    f"{self.name}: y_{part} holds label {y.max()}, but the largest in y_train is "
                    f"{self.y_train.max()}; every class needs an image to train on"
                )

    @property
    def num_classes(self) -> int:
        """The largest training label + 1, and at least 2."""
        return max(2, int(self.y_train.max()) + 1)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.X_train.shape[1:]

    @property
    def input_dim(self) -> int:
        """The number of values in one image."""
        return math.prod(self.input_shape)

    def digest(self) -> str:
        """Return a hash of all that training depends on: the training and the validation set."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.X_train, self.y_train, self.X_val, self.y_val):
            digest.update(f"{array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()

    def as_dict(self) -> dict[str, NDArray[Any]]:
        """Return ``{"X_train": ..., "y_train": ..., ...}``, without a test set if there is none."""
        arrays = {
            f"{kind}_{part}": getattr(self, f"{kind}_{part}") for part in _PARTS for kind in "Xy"
        }
        return {key: array for key, array in arrays.items() if array is not None}


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """The map from raw images to a network's input: divide by ``scale``, subtract ``mean``.

    It is fitted to the training images once and kept with the network, so that training,
    evaluation and a resumed run all see the same numbers.

    Attributes
    ----------
    scale : float
        What pixels are divided by: 1 for floats, more than 1 for integers.
    mean : ndarray
        The mean training image after scaling, flattened: float32 of shape (D,).
    """

    scale: float
    mean: NDArray[np.float32]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 1):
            raise DataError(f"scale is {self.scale}, expected 1 for floats or more for integers")
        if self.mean.ndim != 1 or self.mean.dtype != np.float32:
            raise DataError(f"mean is {_describe(self.mean)}, expected float32 of shape (D,)")
        if not np.isfinite(self.mean).all():
            raise DataError("mean holds NaN or infinity, expected finite values")

    @classmethod
    def fit(cls, X_train: Pixels, max_value: float | None = None) -> Preprocessing:
        """Take the scale from the dtype or ``max_value``, and the mean from the images.

        Parameters
        ----------
        X_train : ndarray
            Raw images (N, d...).
        max_value : float, optional
            The largest value that integer pixels can have (``Dataset.max_value``); the largest of
            their dtype if left out. Floats are not scaled and take none.

        Raises
        ------
        DataError
            For images or a ``max_value`` that do not fit this description.
        """
        _check_pixels("X_train", X_train)
        flat = X_train.reshape(len(X_train), -1)
        if X_train.dtype.kind == "f":
            if max_value is not None:
                raise DataError(f"max_value is {max_value}, expected None: floats are not scaled")
            scale = 1.0
        else:
            scale = float(np.iinfo(X_train.dtype).max if max_value is None else max_value)
            if not scale > 1:
                raise DataError(f"max_value is {max_value}, expected more than 1")
        # Integers are summed exactly, so that their mean does not depend on any order.
        wide = np.float64 if X_train.dtype.kind == "f" else np.int64
        total = np.zeros(flat.shape[1], wide)
        with np.errstate(over="ignore", invalid="ignore"):  # the constructor looks for what is left
            for rows in _blocks(flat):
                total += flat[rows].sum(axis=0, dtype=wide)
            mean = (total / (len(flat) * scale)).astype(np.float32)
        return cls(scale, mean)

    def apply(self, X: Pixels, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Return ``X / scale - mean``, computed in float64 and rounded once.

        Parameters
        ----------
        X : ndarray
            Raw images (N, d...), of the kind that ``fit`` was given.
        dtype : dtype
            The floating-point type of the result.

        Returns
        -------
        ndarray
            Of shape (N, D), C-contiguous.

        Raises
        ------
        DataError
            For images of another size or kind, or with values that ``dtype`` cannot hold.
        """
        if X.ndim < 2 or math.prod(X.shape[1:]) != self.mean.size:
            raise DataError(f"X has shape {X.shape}, expected N images of {self.mean.size} values")
        # Bytes seen as floats, or the reverse, would be off by a factor of 255 without a word.
        if X.dtype.kind not in ("f" if self.scale == 1 else "u"):
            expected = "floats" if self.scale == 1 else "unsigned integers"
            raise DataError(f"X has dtype {X.dtype}, expected {expected} as in the training images")
        mean = self.mean.astype(np.float64)
        out = np.empty((len(X), self.mean.size), dtype)
        if out.dtype.kind != "f":
            raise DataError(f"dtype is {out.dtype}, expected a floating-point type")
        with np.errstate(over="ignore", invalid="ignore"):  # looked for in every block
            for rows in _blocks(out):
                block = X[rows].reshape(-1, mean.size).astype(np.float64)
                block /= self.scale
                block -= mean
                out[rows] = block
                if not np.isfinite(out[rows]).all():
                    raise DataError(
                        f"X[{rows.start}:{rows.stop}] holds NaN, infinity or values too large for "
                        f"{out.dtype}; expected finite values that fit"
                    )
        return out


def load(spec: str | os.PathLike[str]) -> Dataset:
    """Load a data set.

    Parameters
    ----------
    spec : str or path
        One of

        - ``digits``: the 1,797 handwritten digits of 8x8 pixels from UCI that come with gpubn,
          split 1,197 / 300 / 300.
        - ``mnist:DIR``: the four idx files of MNIST or of a set like it, plain or gzipped. The last
          twelfth of the training images, 5,000 of 60,000, is the validation set.
        - ``cifar10:DIR``: CIFAR-10's Python version; DIR is the folder of the batches or the one
          above. The last fiftieth of the training images, 1,000 of 50,000, is the validation set.
        - ``FILE.npz``: the arrays X_train, y_train, X_val, y_val, X_test, y_test. Without a
          validation set a random tenth of the training images becomes one, the same
          each time; the test set may be missing; other arrays are ignored.

    Returns
    -------
    Dataset
        Raw, as stored.

    Raises
    ------
    DataError
        Where ``spec`` is none of these, or a file is missing, damaged or not what it should be.
    """
    spec = os.fspath(spec)
    if spec == "digits":
        return _load_digits()
    kind, _, folder = spec.partition(":")
    if kind == "mnist" and folder:
        return _load_mnist(spec, os.path.expanduser(folder))
    if kind == "cifar10" and folder:
        return _load_cifar10(spec, os.path.expanduser(folder))
    if spec.lower().endswith(".npz"):  # after the prefixes, so that C:\data.npz is a file
        return _load_npz(spec, os.path.expanduser(spec))
    raise DataError(f"spec is {spec!r}, expected one of: {', '.join(SPEC_FORMS)}")


# --- Checks ---------------------------------------------------------------------------------------


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _check_pixels(what: str, X: Pixels) -> None:
    """Check that ``X`` is (N, d...), not empty, of a dtype whose range says what it means."""
    kind, size = X.dtype.kind, X.dtype.itemsize
    if not (kind == "u" and size <= 2) and not (kind == "f" and size <= 8):
        raise DataError(
            f"{what} has dtype {X.dtype}, expected uint8, uint16 or floats; convert it with astype"
        )
    if X.ndim < 2 or X.size == 0:
        raise DataError(f"{what} has shape {X.shape}, expected (N, d...) with no dimension of 0")


def _checked_labels(name: str, part: str, X: Pixels, y: Labels) -> NDArray[np.int64]:
    """Check the images and labels of one part of a data set; return the labels as int64."""
    _check_pixels(f"{name}: X_{part}", X)
    if y.dtype.kind not in "iu":
        raise DataError(f"{name}: y_{part} has dtype {y.dtype}, expected integers")
    if y.shape != (len(X),):
        raise DataError(
            f"{name}: y_{part} has shape {y.shape}, expected {(len(X),)}: a label for each image"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(
            f"{name}: y_{part} holds label {low if low < 0 else high}, "
            f"expected 0 to {MAX_CLASSES - 1}"
        )
    if X.dtype.kind == "f":
        for rows in _blocks(X):
            bad = ~np.isfinite(X[rows].reshape(-1, math.prod(X.shape[1:]))).all(axis=1)
            if bad.any():
                row = rows.start + int(bad.argmax())
                raise DataError(f"{name}: X_{part}[{row}] holds NaN or infinity, expected finite")
    return y.astype(np.int64, copy=False)


def _blocks(array: NDArray[Any]) -> Iterator[slice]:
    """Cut the rows of an array into runs of about a million values."""
    step = max(1, _CHUNK // math.prod(array.shape[1:]))
    for start in range(0, len(array), step):
        yield slice(start, min(start + step, len(array)))


# --- Reading without trust ------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(path: str, expected: str) -> Iterator[None]:
    """Turn whatever a damaged file makes its parser raise into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing, expected {expected}") from error
    # On damaged input zipfile, pickle, gzip and NumPy raise a dozen types between them, not all of
    # them documented. Each is raised anew, as a DataError that names the file.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path} cannot be read, expected {expected}: {reason}") from error


def _open(path: str) -> IO[bytes]:
    """Open a regular file: a pipe or a device would block, or never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path} is a folder or a device, expected a file")
    return open(path, "rb")


def _read_exactly(stream: IO[bytes], size: int, what: str) -> bytearray:
    """Read the ``size`` bytes that a header promised, which must be all that is left.

    Memory grows with what arrives, so a header can promise anything; and reading stops
    one byte past the promise, so a compressed stream can hold anything.
    """
    data = bytearray()
    while piece := stream.read(min(_CHUNK, size + 1 - len(data))):
        data += piece
    if len(data) != size:
        came = f"more than {size}" if len(data) > size else str(len(data))
        raise DataError(f"{what} holds {came} bytes of data, its header promises {size}")
    return data


# --- The sources ----------------------------------------------------------------------------------


def _permutation(n: int) -> NDArray[np.intp]:
    """Return the permutation that splits n images.

    It sorts PCG64's raw output, which NumPy promises never to change; ``Generator.permutation``
    may change between versions, and a resumed run would train on its validation set.
    """
    return np.argsort(np.random.PCG64(SPLIT_SEED).random_raw(n), kind="stable")


def _load_digits() -> Dataset:
    with resources.as_file(resources.files("gpubn.train") / "datasets" / "digits.npz") as path:
        arrays = read_npz(str(path), ("X", "y"))
    order = _permutation(len(arrays["X"]))
    X, y = arrays["X"][order], arrays["y"][order]
    return Dataset(
        "digits", X[:-600], y[:-600], X[-600:-300], y[-600:-300], X[-300:], y[-300:], max_value=16.0
    )


def _load_npz(spec: str, path: str) -> Dataset:
    pairs = [(f"X_{part}", f"y_{part}") for part in _PARTS]
    arrays = read_npz(path, [key for pair in pairs for key in pair])
    for X_key, y_key in pairs:
        needed = X_key == "X_train"
        for key, other in ((X_key, y_key), (y_key, X_key)):
            if key not in arrays and (needed or other in arrays):
                raise DataError(f"{path} has no array {key}, expected {X_key} and {y_key}")
    X, y = arrays["X_train"], arrays["y_train"]
    if "X_val" not in arrays:
        y = _checked_labels(spec, "train", X, y)
        if len(X) < 2:
            raise DataError(f"{path} has one image, expected 2 or more: one must be for validation")
        order = _permutation(len(X))
        count = max(1, len(X) // 10)
        train, val = np.sort(order[:-count]), np.sort(order[-count:])
        arrays |= {"X_train": X[train], "y_train": y[train], "X_val": X[val], "y_val": y[val]}
    # mypy fears that an array is passed as max_value, a float: the keys are of X_ and y_ alone.
    return Dataset(spec, **arrays)  # type: ignore[arg-type]


def read_npz(path: str, keys: tuple[str, ...] | list[str]) -> dict[str, NDArray[Any]]:
    """Read those of ``keys`` that the file has.

    Not by ``np.load``, which allocates what a header asks for before it looks at the data.
    """
    arrays = {}
    with (
        _reading(path, "an .npz file as np.savez writes it"),
        _open(path) as file,
        zipfile.ZipFile(file) as archive,
    ):
        names = set(archive.namelist())
        for key in keys:
            if f"{key}.npy" in names:
                arrays[key] = _read_npy(archive, f"{key}.npy", f"{path}: {key}")
    return arrays


def _read_npy(archive: zipfile.ZipFile, member: str, what: str) -> NDArray[Any]:
    # Other methods may ask for gigabytes to decompress anything at all.
    if archive.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{what} is compressed by a method that np.savez_compressed does not use")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):  # later versions have headers of up to 4 GiB, for structured arrays
            raise DataError(f"{what} has .npy version {version}, expected (1, 0): a plain array")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.kind not in "iuf":
            raise DataError(f"{what} has dtype {dtype}, expected integers or floats")
        if any(n < 0 for n in shape):
            raise DataError(f"{what} has shape {shape}, expected no negative dimension")
        data = _read_exactly(stream, math.prod(shape) * dtype.itemsize, what)
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
    return np.asarray(array, dtype.newbyteorder("="), order="C")


def _load_mnist(spec: str, folder: str) -> Dataset:
    X, y = _read_idx_pair(folder, "train")
    X_test, y_test = _read_idx_pair(folder, "t10k")
    if len(X) < 2:
        raise DataError(f"{folder} has {len(X)} training images, expected 2 or more")
    cut = len(X) - max(1, len(X) // 12)
    return Dataset(spec, X[:cut], y[:cut], X[cut:], y[cut:], X_test, y_test, max_value=255.0)


def _read_idx_pair(folder: str, part: str) -> tuple[Pixels, Labels]:
    images, labels = _find_idx(folder, f"{part}-images", 3), _find_idx(folder, f"{part}-labels", 1)
    X, y = _read_idx(images, 3), _read_idx(labels, 1)
    if len(X) != len(y):
        raise DataError(
            f"{labels} has {len(y)} labels, expected {len(X)}, one for each of {images}"
        )
    return X, y


def _find_idx(folder: str, stem: str, ndim: int) -> str:
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = os.path.join(folder, f"{stem}{separator}idx{ndim}-ubyte{suffix}")
            if os.path.isfile(path):
                return path
    raise DataError(f"{folder} has no file {stem}-idx{ndim}-ubyte, plain or .gz, expected all four")


def _read_idx(path: str, ndim: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes: 0 0 8 ndim, ``ndim`` sizes of 4 bytes, the data."""
    with _reading(path, "an idx file"), contextlib.ExitStack() as stack:
        stream = stack.enter_context(_open(path))
        # By content, not by name: browsers unpack a .gz and leave its name.
        zipped = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        if zipped:
            stream = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=stream)))
        head = stream.read(4 + 4 * ndim)
        if head[:4] != bytes((0, 0, 8, ndim)):
            raise DataError(
                f"{path} starts with {head[:4].hex(' ') or 'nothing'}, "
                f"expected 00 00 08 {ndim:02x}: an idx file of bytes, of rank {ndim}"
            )
        if len(head) != 4 + 4 * ndim:
            raise DataError(f"{path} ends in its header, expected {4 + 4 * ndim} bytes of it")
        shape = [int.from_bytes(head[i : i + 4]) for i in range(4, len(head), 4)]
        return np.frombuffer(_read_exactly(stream, math.prod(shape), path), np.uint8).reshape(shape)


def _load_cifar10(spec: str, folder: str) -> Dataset:
    inner = os.path.join(folder, "cifar-10-batches-py")
    if os.path.isdir(inner):
        folder = inner
    batches = [_read_batch(os.path.join(folder, f"data_batch_{i}")) for i in range(1, 6)]
    X_test, y_test = _read_batch(os.path.join(folder, "test_batch"))
    X, y = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    if len(X) < 2:
        raise DataError(f"{folder} has {len(X)} training images, expected 2 or more")
    cut = len(X) - max(1, len(X) // 50)
    return Dataset(spec, X[:cut], y[:cut], X[cut:], y[cut:], X_test, y_test, max_value=255.0)


def _read_batch(path: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read a batch of CIFAR-10: a pickled dict of b"data", bytes (N, 3072), and b"labels"."""
    with _reading(path, "a batch of CIFAR-10's Python version"):
        with _open(path) as file:
            batch = _unpickle(file.read(), path)
        if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
            raise DataError(f"{path} lacks data or labels, expected a batch of CIFAR-10")
        labels = batch["labels"]
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise DataError(f"{path}: labels is not a list of integers")
        if not all(0 <= label <= 9 for label in labels):
            raise DataError(f"{path}: labels holds numbers outside 0 to 9")
        X = _unpickled_bytes(batch["data"], f"{path}: data")
    if len(X) != len(labels):
        raise DataError(f"{path} has {len(labels)} labels, expected {len(X)}: one for each image")
    return X, np.array(labels, np.int64)


# --- Pickles --------------------------------------------------------------------------------------


class _Global(str):
    """The name of something that a pickle imports. It is never imported."""


@dataclass
class _Call:
    """A call that a pickle makes. It is noted, never made."""

    function: str
    args: tuple[Any, ...]
    state: Any = None


_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_GLOBALS = {*_RECONSTRUCT, "numpy ndarray", "numpy dtype"}


def _unpickle(data: bytes, path: str) -> Any:
    """Read a pickle of dicts, lists, tuples, integers, strings and NumPy arrays.

    Python's own unpickler would need its hooks guarded, and NumPy's functions would still run on
    arguments from the file; its memo and its buffers also take sizes from the file on trust. This
    one builds plain values, and its memory is bounded by the file's size. Strings of Python 2 and
    keys come out as str, other bytes as bytes.
    """
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marked.append(stack)
                stack = []
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(arg)
            case "SHORT_BINSTRING" | "BINSTRING" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(arg)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(arg)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items, stack = stack, marked.pop()
                stack.append(tuple(items))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                items, stack = stack, marked.pop()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][_key(key)] = value
            case "SETITEMS":
                items, stack = stack, marked.pop()
                pairs = zip(items[::2], items[1::2], strict=True)
                stack[-1].update((_key(key), value) for key, value in pairs)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL" | "STACK_GLOBAL":
                if opcode.name == "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    arg = f"{_key(module)} {_key(name)}"
                if arg not in _GLOBALS:
                    raise DataError(
                        f"{path} asks for {str(arg)[:100]!r}, expected a batch of CIFAR-10, which "
                        f"holds only bytes and numbers; do not unpickle this file"
                    )
                stack.append(_Global(arg))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                if not isinstance(function, _Global) or not isinstance(args, tuple):
                    raise ValueError("a call of something that is not a function")
                stack.append(_Call(function, args))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], _Call):
                    raise ValueError("a state for something that is not an object")
                stack[-1].state = state
            case name:
                raise ValueError(f"opcode {name}, which such a batch does not use")
    raise ValueError("no end")


def _key(value: Any) -> str:
    """Return a key as str. Others are refused: hashing nested tuples can take forever."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if type(value) is not str:
        raise ValueError(f"a key of type {type(value).__name__}")
    return value


def _unpickled_bytes(value: Any, what: str) -> NDArray[np.uint8]:
    """Rebuild an array of bytes (N, 3072) from what ``_unpickle`` noted; return (N, 3, 32, 32)."""
    if not isinstance(value, _Call) or value.function not in _RECONSTRUCT:
        raise DataError(f"{what} is not a NumPy array")
    _, shape, dtype, fortran_order, raw = value.state
    if not isinstance(dtype, _Call) or _key(dtype.args[0]) != "u1":
        raise DataError(f"{what} is not an array of uint8")
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    rows = len(raw) // 3072
    if not isinstance(raw, bytes) or shape != (rows, 3072) or len(raw) != rows * 3072:
        raise DataError(f"{what} has a wrong shape, expected (N, 3072) and as many bytes")
    array = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order else "C")
    return np.ascontiguousarray(array).reshape(rows, 3, 32, 32)

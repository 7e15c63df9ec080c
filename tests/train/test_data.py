"""Data sets: what loads, what is refused and how the message reads, and the preprocessing."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpubn.train.data import DataError, Dataset, Preprocessing, load

RNG = np.random.default_rng(0)


def refuses(text: str) -> Any:
    """Expect a DataError of one line that has this text in it."""
    return pytest.raises(DataError, match=rf"\A[^\n]*{re.escape(text)}[^\n]*\Z")


# --- Makers of files ------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, separator: str = "-", zipped: bool = False) -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    arrays = {}
    for part, n in (("train", 60), ("t10k", 5)):
        arrays[f"{part}-images{separator}idx3-ubyte"] = RNG.integers(0, 256, (n, 4, 3), np.uint8)
        arrays[f"{part}-labels{separator}idx1-ubyte"] = np.arange(n, dtype=np.uint8) % 5
    for name, array in arrays.items():
        data = gzip.compress(idx(array)) if zipped else idx(array)
        (folder / (name + ".gz" * zipped)).write_bytes(data)
    return arrays


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """Pickle a batch with the opcodes of the published files, which Python 2's cPickle wrote."""

    def string(text: bytes) -> bytes:
        if len(text) < 256:
            return b"U" + bytes([len(text)]) + text
        return b"T" + struct.pack("<i", len(text)) + text

    def integer(n: int) -> bytes:
        return b"K" + bytes([n]) if n < 256 else b"M" + struct.pack("<H", n)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85U\x01b\x87Rq\x08"
        b"(K\x01" + integer(data.shape[0]) + integer(data.shape[1]) + b"\x86"
        b"cnumpy\ndtype\nq\x09U\x02u1K\x00K\x01\x87Rq\x0a"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + string(data.tobytes())
        + b"tb"
    )
    return (
        b"\x80\x02}q\x01("
        + string(b"batch_label")
        + b"q\x02"
        + string(b"training batch 1 of 5")
        + b"q\x03"
        + string(b"labels")
        + b"q\x04]q\x05("
        + b"".join(map(integer, labels))
        + b"e"
        + string(b"data")
        + array
        + string(b"filenames")
        + b"]("
        + string(b"a.png")
        + b"r\x00\x01\x00\x00"
        + string(b"b.png")
        + b"eu."
    )


def python3_batch(data: np.ndarray, labels: list[int], protocol: int = 4) -> bytes:
    return pickle.dumps({b"data": data, b"labels": labels}, protocol)


def write_cifar10(folder: Path, batch: Callable[..., bytes] = python2_batch) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    batches = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = RNG.integers(0, 256, (20, 3072), np.uint8)
        batches[name] = data, [*range(10), *range(10)]
        (folder / name).write_bytes(batch(*batches[name]))
    return batches


def npz_arrays(**changes: Any) -> dict[str, Any]:
    arrays = {}
    for part, n in (("train", 10), ("val", 4), ("test", 3)):
        arrays[f"X_{part}"] = RNG.integers(0, 256, (n, 2, 3), np.uint8)
        arrays[f"y_{part}"] = np.arange(n) % 3
    return {key: value for key, value in (arrays | changes).items() if value is not None}


def npy(header: bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


def zip_of(data: bytes, name: str = "X_train.npy", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


# --- digits ---------------------------------------------------------------------------------------


def test_digits() -> None:
    digits = load("digits")
    assert (len(digits.X_train), len(digits.X_val), len(digits.X_test)) == (1197, 300, 300)
    assert (digits.input_shape, digits.input_dim, digits.num_classes) == ((8, 8), 64, 10)
    assert digits.max_value == 16
    assert digits.X_train.dtype == np.uint8
    assert digits.X_train.max() == 16
    X = np.concatenate([digits.X_train, digits.X_val, digits.X_test])
    y = np.concatenate([digits.y_train, digits.y_val, digits.y_test])
    assert y.dtype == np.int64
    # All images of the source differ, so 1,797 different ones mean that no two splits share any.
    assert len(np.unique(X.reshape(1797, 64), axis=0)) == 1797
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_split_is_the_same_everywhere() -> None:
    digits = load("digits")
    assert digits.y_train[:12].tolist() == FIRST_TRAIN
    assert digits.y_val[:12].tolist() == FIRST_VAL
    assert digits.y_test[:12].tolist() == FIRST_TEST


FIRST_TRAIN = [0, 6, 3, 8, 1, 8, 4, 1, 5, 8, 9, 7]
FIRST_VAL = [2, 8, 5, 3, 5, 5, 4, 6, 1, 6, 4, 1]
FIRST_TEST = [4, 7, 0, 4, 2, 1, 0, 2, 6, 9, 0, 6]


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits, theirs = load("digits"), datasets.load_digits()
    order = np.argsort(np.random.PCG64(0).random_raw(1797), kind="stable")
    np.testing.assert_array_equal(
        np.concatenate([digits.X_train, digits.X_val, digits.X_test]), theirs.images[order]
    )
    np.testing.assert_array_equal(digits.y_train, theirs.target[order[:1197]])


# --- MNIST ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_mnist(tmp_path: Path, separator: str, zipped: bool) -> None:
    files = write_mnist(tmp_path, separator, zipped)
    mnist = load(f"mnist:{tmp_path}")
    images, labels, test_images, test_labels = files.values()
    np.testing.assert_array_equal(mnist.X_train, images[:55])
    np.testing.assert_array_equal(mnist.X_val, images[55:])
    np.testing.assert_array_equal(mnist.y_train, labels[:55])
    np.testing.assert_array_equal(mnist.y_val, labels[55:])
    np.testing.assert_array_equal(mnist.X_test, test_images)
    np.testing.assert_array_equal(mnist.y_test, test_labels)
    assert mnist.y_train.dtype == np.int64
    assert (mnist.input_shape, mnist.num_classes, mnist.max_value) == ((4, 3), 5, 255)


def test_mnist_unpacked_under_its_gz_name(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "train-images-idx3-ubyte.gz")
    assert len(load(f"mnist:{tmp_path}").X_train) == 55


IMAGES = np.zeros((60, 4, 3), np.uint8)
PACKED = gzip.compress(idx(IMAGES))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "starts with nothing, expected 00 00 08 03"),
        (b"\0\0\x08", "starts with 00 00 08, expected 00 00 08 03"),
        (idx(IMAGES[0]), "starts with 00 00 08 02, expected 00 00 08 03"),
        (b"\0\0\x0d\3" + idx(IMAGES)[4:], "starts with 00 00 0d 03"),
        (idx(IMAGES)[:13], "ends in its header, expected 16 bytes"),
        (idx(IMAGES)[:-1], "holds 719 bytes of data, its header promises 720"),
        (idx(IMAGES) + b"\0", "holds more than 720 bytes of data, its header promises 720"),
        (gzip.compress(idx(IMAGES)[:-1]), "holds 719 bytes of data, its header promises 720"),
        (gzip.compress(idx(IMAGES) + b"\0"), "holds more than 720 bytes"),
        (b"\0\0\x08\3" + b"\xff" * 12, "holds 0 bytes of data, its header promises 7922816"),
        (b"\0\0\x08\3" + b"\0" * 4 + b"\xff" * 8, "cannot be read, expected an idx file"),
        (PACKED[:-9], "cannot be read, expected an idx file"),
        (PACKED[:5], "cannot be read, expected an idx file"),
        (PACKED[:-8] + b"\0" * 8, "CRC check failed"),
        (PACKED[:12] + b"\xff" * 8 + PACKED[20:], "cannot be read, expected an idx file"),
        (PACKED + b"junk", "cannot be read, expected an idx file"),
        (idx(IMAGES[:59]), "-labels-idx1-ubyte has 60 labels, expected 59, one for each of "),
        (idx(IMAGES[:, :, :2]), "X_test holds uint8 images of shape (4, 3), expected uint8 (4, 2)"),
    ],
)
def test_mnist_refuses_bad_images(tmp_path: Path, data: bytes, message: str) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with refuses(message) as caught:
        load(f"mnist:{tmp_path}")
    assert str(tmp_path) in str(caught.value)


def test_mnist_refuses_missing_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with refuses(f"{tmp_path} has no file t10k-labels-idx1-ubyte, plain or .gz"):
        load(f"mnist:{tmp_path}")
    with refuses("nowhere has no file train-images-idx3-ubyte"):
        load("mnist:nowhere")


def test_mnist_refuses_a_test_label_without_training_images(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([0, 1, 2, 3, 9], np.uint8)))
    with refuses("y_test holds label 9, but the largest in y_train is 4"):
        load(f"mnist:{tmp_path}")


def test_mnist_refuses_a_single_image(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES[:1]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(1, np.uint8)))
    with refuses("1 training images, expected 2 or more"):
        load(f"mnist:{tmp_path}")


# --- CIFAR-10 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [python2_batch, python3_batch, lambda data, labels: python3_batch(data, labels, protocol=3)],
    ids=["python 2", "protocol 4", "protocol 3"],
)
@pytest.mark.parametrize("inner", [".", "cifar-10-batches-py"])
def test_cifar10(tmp_path: Path, batch: Callable[..., bytes], inner: str) -> None:
    batches = write_cifar10(tmp_path / inner, batch)
    cifar = load(f"cifar10:{tmp_path}")
    X = np.concatenate([batches[f"data_batch_{i}"][0] for i in range(1, 6)])
    np.testing.assert_array_equal(cifar.X_train, X.reshape(100, 3, 32, 32)[:98])
    np.testing.assert_array_equal(cifar.X_val, X.reshape(100, 3, 32, 32)[98:])
    np.testing.assert_array_equal(cifar.X_test, batches["test_batch"][0].reshape(20, 3, 32, 32))
    assert cifar.y_train[:12].tolist() == [*range(10), 0, 1]
    assert cifar.y_val.tolist() == [8, 9]
    assert (cifar.input_dim, cifar.num_classes, cifar.max_value) == (3072, 10, 255)


def test_cifar10_in_fortran_order(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    data = RNG.integers(0, 256, (20, 3072), np.uint8)
    (tmp_path / "test_batch").write_bytes(python3_batch(np.asfortranarray(data), [0] * 20))
    X_test = load(f"cifar10:{tmp_path}").X_test
    np.testing.assert_array_equal(X_test, data.reshape(20, 3, 32, 32))


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


DATA = np.zeros((2, 3072), np.uint8)


def pickled(data: Any = DATA, labels: Any = (0, 1)) -> bytes:
    labels = list(labels) if isinstance(labels, tuple) else labels
    return pickle.dumps({b"data": data, b"labels": labels}, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read, expected a batch of CIFAR-10's Python version"),
        (pickled()[:-200], "cannot be read, expected a batch of CIFAR-10's Python version"),
        (pickled()[:-1], "cannot be read, expected a batch of CIFAR-10's Python version"),
        (pickle.dumps([1, 2], 4), "lacks data or labels"),
        (pickle.dumps({b"data": DATA}, 4), "lacks data or labels"),
        (pickled(labels=(0,)), "has 1 labels, expected 2"),
        (pickled(labels=(0, 10)), "labels holds numbers outside 0 to 9"),
        (pickled(labels=(0, -1)), "labels holds numbers outside 0 to 9"),
        (pickled(labels=(0, True)), "labels is not a list of integers"),
        (pickled(labels="01"), "labels is not a list of integers"),
        (pickled(labels=DATA), "labels is not a list of integers"),
        (pickled(labels=(0, 0.5)), "opcode BINFLOAT"),
        (pickled(DATA[:, 1:]), "data has a wrong shape"),
        (pickled(DATA.reshape(2, 3, 1024)), "data has a wrong shape"),
        (pickled(DATA.view(np.int8)), "data is not an array of uint8"),
        (pickled(np.array([[None]])), "data is not an array of uint8"),
        (pickled(b"bytes"), "data is not a NumPy array"),
        (pickled(Call(os.system, "touch pwned")), "system', expected a batch of CIFAR-10"),
        (pickled(Call(eval, "1")), "asks for 'builtins eval'"),
        (pickled(Call(np.ndarray, (10**15,))), "data is not a NumPy array"),
        (b"\x80\x02cos\nsystem\n(U\x01ltR.", "asks for 'os system'"),
        (b"\x80\x02(U\x01lios\nsystem\n.", "opcode INST"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "lacks data or labels"),  # a memo of 64 GiB in CPython
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.", "cannot be read"),  # a bytearray of an exabyte
        # A key whose hash would take 2**60 steps.
        (b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.", "a key of type tuple"),
    ],
)
def test_cifar10_refuses_bad_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(data)
    with refuses(message) as caught:
        load(f"cifar10:{tmp_path}")
    assert str(tmp_path / "data_batch_3") in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_cifar10_refuses_missing_files(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").unlink()
    with refuses("test_batch is missing, expected a batch of CIFAR-10's Python version"):
        load(f"cifar10:{tmp_path}")
    (tmp_path / "test_batch").mkdir()
    with refuses("test_batch is a folder or a device, expected a file"):
        load(f"cifar10:{tmp_path}")


# --- .npz -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    arrays = npz_arrays()
    save(tmp_path / "d.npz", **arrays, mean_image=np.zeros((2, 3)), names=np.array([{}, None]))
    data = load(str(tmp_path / "d.npz"))
    assert data.as_dict().keys() == arrays.keys()
    for key, array in data.as_dict().items():
        np.testing.assert_array_equal(array, arrays[key])
    assert data.X_train.dtype == np.uint8
    assert (data.input_shape, data.num_classes, data.max_value) == ((2, 3), 3, None)
    assert data.name == str(tmp_path / "d.npz")


def test_npz_of_other_layouts(tmp_path: Path) -> None:
    floats = RNG.normal(size=(3, 2, 10)).astype(">f4").T
    few = floats[:4].copy()
    labels = np.arange(10, dtype=np.uint16) % 3
    path = tmp_path / "D.NPZ"
    with path.open("wb") as file:
        np.savez(file, X_train=floats, y_train=labels, X_val=few, y_val=labels[:4])
    data = load(path)
    np.testing.assert_array_equal(data.X_train, floats)
    assert data.X_train.dtype == np.dtype("=f4")
    assert data.X_train.flags.c_contiguous
    assert data.y_train.dtype == np.int64
    assert data.X_test is None
    assert data.as_dict().keys() == {"X_train", "y_train", "X_val", "y_val"}


@pytest.mark.parametrize(("n", "n_val"), [(2, 1), (9, 1), (10, 1), (25, 2), (100, 10)])
def test_npz_without_validation_is_split(tmp_path: Path, n: int, n_val: int) -> None:
    X = np.arange(n, dtype=np.float32)[:, None]
    np.savez(tmp_path / "d.npz", X_train=X, y_train=np.zeros(n, int))
    data, again = load(tmp_path / "d.npz"), load(tmp_path / "d.npz")
    assert len(data.X_val) == len(data.y_val) == n_val
    assert sorted([*data.X_train[:, 0], *data.X_val[:, 0]]) == list(range(n))
    np.testing.assert_array_equal(data.X_val, again.X_val)
    if n == 100:
        assert data.X_val[:, 0].tolist() == VAL_OF_100
    assert data.num_classes == 2  # one class is no classification


VAL_OF_100 = [26, 27, 67, 73, 77, 78, 91, 94, 95, 97]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X_train": None}, "d.npz has no array X_train, expected X_train and y_train"),
        ({"X_val": None}, "d.npz has no array X_val, expected X_val and y_val"),
        ({"y_test": None}, "d.npz has no array y_test, expected X_test and y_test"),
        ({"y_train": np.zeros(9, int)}, "y_train has shape (9,), expected (10,)"),
        ({"y_train": np.zeros((10, 1), int)}, "y_train has shape (10, 1), expected (10,)"),
        ({"y_train": np.zeros(10)}, "y_train has dtype float64, expected integers"),
        ({"y_train": np.arange(10) - 1}, "y_train holds label -1, expected 0 to 99999"),
        ({"y_train": np.full(10, 10**5)}, "y_train holds label 100000, expected 0 to 99999"),
        ({"y_val": np.full(4, 2**64 - 1, np.uint64)}, "y_val holds label 18446744073709551615"),
        ({"y_val": np.full(4, 3)}, "y_val holds label 3, but the largest in y_train is 2"),
        ({"X_train": np.zeros((10, 2, 3), int)}, "X_train has dtype int64, expected uint8, uint16"),
        ({"X_train": np.zeros((10, 2, 3), "u4")}, "X_train has dtype uint32, expected uint8"),
        ({"X_train": np.zeros((10, 2, 3), bool)}, "X_train has dtype bool, expected integers or"),
        ({"X_train": np.zeros((10, 2, 3), complex)}, "X_train has dtype complex128"),
        ({"X_train": np.zeros((10, 2, 3), object)}, "X_train has dtype object"),
        ({"y_train": np.array(["a"] * 10)}, "y_train has dtype <U1"),
        ({"X_train": np.zeros((10, 2), "u1,f4")}, "X_train has dtype"),
        ({"X_train": np.zeros(10)}, "X_train has shape (10,), expected (N, d...)"),
        ({"X_train": np.float32(3)}, "X_train has shape (), expected (N, d...)"),
        ({"X_train": np.zeros((10, 0), "f4")}, "X_train has shape (10, 0)"),
        ({"X_test": np.zeros((0, 2, 3), "u1")}, "X_test has shape (0, 2, 3)"),
        ({"X_val": np.zeros((4, 6), "u1")}, "X_val holds uint8 images of shape (6,), expected"),
        ({"X_val": np.zeros((4, 2, 3), "f4")}, "X_val holds float32 images of shape (2, 3)"),
    ],
)
def test_npz_refuses_bad_arrays(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "d.npz", **npz_arrays(**changes))
    with refuses(message) as caught:
        load(tmp_path / "d.npz")
    assert str(tmp_path / "d.npz") in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_npz_refuses_non_finite_pixels(tmp_path: Path, part: str, bad: float) -> None:
    arrays = npz_arrays()
    arrays |= {key: arrays[key].astype(np.float32) for key in arrays if key[0] == "X"}
    arrays[f"X_{part}"][2, 1, 0] = bad
    np.savez(tmp_path / "d.npz", **arrays)
    with refuses(f"X_{part}[2] holds NaN or infinity"):
        load(tmp_path / "d.npz")


def test_non_finite_pixels_are_found_in_every_block() -> None:
    X = np.zeros((5, 1 << 19), np.float32)
    X[4, 3] = np.nan
    with refuses("X_train[4] holds NaN"):
        Dataset("big", X, np.zeros(5, int), X[:1], np.zeros(1, int))


def test_npz_refuses_a_single_image(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", X_train=np.zeros((1, 2)), y_train=np.zeros(1, int))
    with refuses("has one image, expected 2 or more"):
        load(tmp_path / "d.npz")


HEADER = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }\n"
SPOILED = bytearray(zip_of(npy(HEADER % b"4,", b"abcd"), method=zipfile.ZIP_STORED))
SPOILED[SPOILED.index(b"abcd")] ^= 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read, expected an .npz file as np.savez writes it"),
        (b"PK\3\4 but not a zip file", "File is not a zip file"),
        (npy(HEADER % b"4,", b"abcd"), "File is not a zip file"),
        (zip_of(b"", "other.npy"), "has no array X_train"),
        (zip_of(b"not a npy file"), "cannot be read"),
        (
            zip_of(npy(HEADER % b"4,", b"abc")),
            "X_train holds 3 bytes of data, its header promises 4",
        ),
        (zip_of(npy(HEADER % b"4,", b"abcde")), "X_train holds more than 4 bytes of data"),
        (zip_of(npy(HEADER % b"10**15,")), "cannot be read"),
        (
            zip_of(npy(HEADER % b"999999999999999999,")),
            "holds 0 bytes of data, its header promises",
        ),
        (zip_of(npy(HEADER % b"-1, -1", b"a")), "has shape (-1, -1), expected no negative"),
        (zip_of(npy(HEADER[:-9])), "cannot be read"),
        (zip_of(npy(b"{" * 5000)), "cannot be read"),
        (zip_of(npy(b"-" * 5000 + b"1")), "cannot be read"),
        (zip_of(npy(b"", version=b"\2\0")), "has .npy version (2, 0), expected (1, 0)"),
        (
            zip_of(npy(HEADER % b"4,", b"abcd"), method=zipfile.ZIP_LZMA),
            "is compressed by a method",
        ),
        (bytes(SPOILED), "Bad CRC-32"),
    ],
)
def test_npz_refuses_bad_files(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(data)
    with refuses(message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with refuses("d.npz is missing, expected an .npz file"):
        load(tmp_path / "d.npz")
    (tmp_path / "d.npz").mkdir()
    with refuses("d.npz is a folder or a device, expected a file"):
        load(tmp_path / "d.npz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.npz")
    with refuses("d.npz is a folder or a device, expected a file"):
        load(tmp_path / "d.npz")


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """Give a function that says how many bytes were allocated at the most."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def write_gz_zeros(path: Path, shape: tuple[int, int, int], megabytes: int) -> None:
    with gzip.open(path, "wb", 1) as file:
        file.write(struct.pack(">4B3I", 0, 0, 8, 3, *shape))
        for _ in range(megabytes):
            file.write(bytes(1 << 20))


def test_gz_bomb(tmp_path: Path, peak: Callable[[], int]) -> None:
    write_mnist(tmp_path, zipped=True)
    write_gz_zeros(tmp_path / "train-images-idx3-ubyte.gz", (1, 10, 10), megabytes=100)
    with refuses("holds more than 100 bytes of data"):
        load(f"mnist:{tmp_path}")
    assert peak() < 8 << 20


def test_gz_that_promises_too_much(tmp_path: Path, peak: Callable[[], int]) -> None:
    write_mnist(tmp_path, zipped=True)
    write_gz_zeros(
        tmp_path / "train-images-idx3-ubyte.gz", (1 << 31, 1 << 20, 1 << 9), megabytes=20
    )
    with refuses("holds 20971520 bytes of data, its header promises 1152921504606846976"):
        load(f"mnist:{tmp_path}")
    assert peak() < 64 << 20


def test_zip_bomb(tmp_path: Path, peak: Callable[[], int]) -> None:
    data = zip_of(npy(HEADER % b"4,", bytes(50 << 20)))
    (tmp_path / "d.npz").write_bytes(data)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with refuses("X_train holds more than 4 bytes of data"):
        load(tmp_path / "d.npz")
    assert peak() - before < 4 << 20


# --- Specs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["", "digit", "mnist", "mnist:", "cifar10:", "imagenet:x", "a.npy"]
)
def test_unknown_spec(spec: str) -> None:
    with refuses(f"spec is {spec!r}, expected one of: digits, mnist:DIR, cifar10:DIR, FILE.npz"):
        load(spec)


def test_a_drive_letter_is_no_prefix() -> None:
    with refuses(r"C:\data\d.npz is missing"):
        load(r"C:\data\d.npz")
    with refuses(r"C:\data has no file train-images"):
        load(r"mnist:C:\data")


# --- Dataset and Preprocessing --------------------------------------------------------------------


def test_dataset_needs_both_halves_of_a_test_set() -> None:
    digits = load("digits")
    with refuses("digits: X_test is given without y_test"):
        dataclasses.replace(digits, y_test=None)
    with refuses("digits: y_test is given without X_test"):
        dataclasses.replace(digits, X_test=None)


def test_preprocessing_of_digits() -> None:
    digits = load("digits")
    prepared = Preprocessing.fit(digits.X_train, digits.max_value)
    assert prepared.scale == 16
    X = digits.X_train.reshape(1197, 64).astype(np.float64) / 16
    np.testing.assert_array_equal(prepared.mean, X.mean(axis=0).astype(np.float32))
    for dtype in (np.float16, np.float32, np.float64):
        out = prepared.apply(digits.X_val, dtype)
        expected = digits.X_val.reshape(300, 64) / 16.0 - prepared.mean.astype(np.float64)
        np.testing.assert_array_equal(out, expected.astype(dtype))
        assert (out.shape, out.dtype, out.flags.c_contiguous) == ((300, 64), dtype, True)


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint8, 255), (np.uint16, 65535)])
def test_integers_are_divided_by_their_range(dtype: Any, scale: float) -> None:
    X = np.array([[0, scale], [scale, scale]], dtype)
    prepared = Preprocessing.fit(X)
    assert prepared.scale == scale
    assert prepared.mean.tolist() == [0.5, 1]
    assert prepared.apply(X).tolist() == [[-0.5, 0], [0.5, 0]]


def test_floats_are_only_centred() -> None:
    X = np.array([[1.0, 300.0], [2.0, 500.0]])
    prepared = Preprocessing.fit(X)
    assert prepared.scale == 1
    assert prepared.apply(X, np.float64).tolist() == [[-0.5, -100], [0.5, 100]]


def test_blocks_change_nothing() -> None:
    """More than one block, a ragged last one, and rows that are not contiguous."""
    X = RNG.integers(0, 256, (50, 3, 7, 7001), np.uint8).transpose(0, 1, 3, 2)[::2]
    flat = X.reshape(25, -1)
    prepared = Preprocessing.fit(X)
    mean = (flat.sum(axis=0, dtype=np.int64) / (25 * 255.0)).astype(np.float32)
    np.testing.assert_array_equal(prepared.mean, mean)
    np.testing.assert_array_equal(
        prepared.apply(X), (flat / 255.0 - mean.astype(np.float64)).astype(np.float32)
    )
    assert prepared.apply(X[:0]).shape == (0, flat.shape[1])


def test_apply_needs_little_more_memory_than_its_result(peak: Callable[[], int]) -> None:
    X = np.zeros((16000, 1000), np.uint8)
    prepared = Preprocessing.fit(X)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    out = prepared.apply(X)
    assert peak() - before < out.nbytes + (20 << 20)


def test_preprocessing_refuses() -> None:
    byte, real = np.zeros((2, 3), np.uint8), np.zeros((2, 3))
    with refuses("X_train has dtype int64, expected uint8, uint16 or floats"):
        Preprocessing.fit(np.zeros((2, 3), np.int64))
    with refuses("X_train has shape (0, 3)"):
        Preprocessing.fit(byte[:0])
    with refuses("max_value is 255, expected None"):
        Preprocessing.fit(real, 255)
    with refuses("max_value is 0, expected more than 1"):
        Preprocessing.fit(byte, 0)
    with refuses("mean holds NaN or infinity"):
        Preprocessing.fit(np.full((2, 3), 1e308))
    with refuses("scale is nan"):
        Preprocessing(float("nan"), np.zeros(3, np.float32))
    with refuses("mean is float64 of shape (3,), expected float32 of shape (D,)"):
        Preprocessing(1.0, np.zeros(3))
    of_bytes, of_floats = Preprocessing.fit(byte), Preprocessing.fit(real)
    with refuses("X has shape (2, 2), expected N images of 3 values"):
        of_bytes.apply(byte[:, :2])
    with refuses("X has dtype float64, expected unsigned integers"):
        of_bytes.apply(real)
    with refuses("X has dtype uint8, expected floats"):
        of_floats.apply(byte)
    with refuses("dtype is int32, expected a floating-point type"):
        of_bytes.apply(byte, np.int32)
    with refuses("X[0:2] holds NaN, infinity or values too large for float32"):
        of_floats.apply(np.full((2, 3), 1e39))


# --- Anything at all ------------------------------------------------------------------------------


SMALL = npz_arrays()


def small_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **SMALL)
    return buffer.getvalue()


def damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    """Make random bytes, or a valid file with some bytes replaced and its end cut or extended."""
    place = st.integers(0, len(valid) - 1)

    def damage(changes: dict[int, int], cut: int, tail: bytes) -> bytes:
        data = bytearray(valid)
        for at, value in changes.items():
            data[at] = value
        return bytes(data[: cut + 1]) + tail

    changes = st.dictionaries(place, st.integers(0, 255), max_size=4)
    cuts = st.just(len(valid)) | place
    return st.binary(max_size=200) | st.builds(damage, changes, cuts, st.binary(max_size=3))


@pytest.mark.parametrize(
    ("valid", "name", "spec"),
    [
        (idx(IMAGES), "train-images-idx3-ubyte", "mnist:{}"),
        (PACKED, "train-images-idx3-ubyte", "mnist:{}"),
        (small_npz(), "d.npz", "{}/d.npz"),
        (python2_batch(DATA, [0, 9]), "test_batch", "cifar10:{}"),
        (python3_batch(DATA, [0, 9]), "test_batch", "cifar10:{}"),
    ],
    ids=["idx", "idx.gz", "npz", "python 2 batch", "python 3 batch"],
)
def test_any_bytes_load_or_are_refused(tmp_path: Path, valid: bytes, name: str, spec: str) -> None:
    if spec.startswith("mnist"):
        write_mnist(tmp_path)
    elif spec.startswith("cifar10"):
        write_cifar10(tmp_path)

    @settings(max_examples=100, deadline=None, database=None)
    @given(damaged(valid))
    @example(valid)
    def check(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        try:
            load(spec.format(tmp_path))
            message = ""
        except DataError as error:
            message = str(error)
        assert "\n" not in message
        assert not message or (str(tmp_path) in message and data != valid)

    check()


# --- The published files --------------------------------------------------------------------------


def published(name: str) -> Path:
    folder = os.environ.get("GPUBN_TEST_DATA")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"GPUBN_TEST_DATA names no folder with {name}")
    return Path(folder) / name


def test_published_mnist() -> None:
    mnist = load(f"mnist:{published('mnist')}")
    assert (mnist.X_train.shape, mnist.X_val.shape) == ((55000, 28, 28), (5000, 28, 28))
    assert mnist.X_test.shape == (10000, 28, 28)
    assert mnist.num_classes == 10
    assert mnist.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    prepared = Preprocessing.fit(mnist.X_train, mnist.max_value)
    assert float(prepared.mean.mean()) == pytest.approx(0.1307, abs=2e-4)


def test_published_cifar10() -> None:
    cifar = load(published("cifar10-subset.npz"))
    assert cifar.X_train.shape == (10000, 3, 32, 32)
    assert cifar.X_val.shape == cifar.X_test.shape == (1000, 3, 32, 32)
    assert (cifar.num_classes, cifar.input_dim) == (10, 3072)
    assert cifar.y_train[:5].tolist() == [6, 9, 9, 4, 1]
    out = Preprocessing.fit(cifar.X_train).apply(cifar.X_test)
    assert abs(float(out.mean())) < 0.02

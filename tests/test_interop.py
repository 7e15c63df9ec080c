"""Other libraries' arrays: fakes that speak DLPack, CuPy over host memory, PyTorch where it is."""

from __future__ import annotations

import builtins
import contextlib
import gc
import importlib
import inspect
import sys
import types
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpubn import backend, interop
from gpubn.interop import foreign, giver, take


class Tensor:
    """An array of fakelib's, which is on whatever device it says."""

    def __init__(self, host: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.host = host
        self.dlpack_device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.dlpack_device

    def __dlpack__(self, *, stream: Any = None, **kwargs: Any) -> Any:
        return self.host.__dlpack__(**kwargs)


class Legacy(Tensor):
    """One that knows DLPack as it was before version 1.0, which had no read-only arrays."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.host.__dlpack__()


class BFloat16(Tensor):
    """One of bfloat16, kept as its bits."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        capsule = super().__dlpack__(*args, **kwargs)
        tensor_in(capsule).code = 4
        return capsule


def tensor_in(capsule: Any) -> Any:
    tensor = interop._tensor_in(capsule)
    assert tensor is not None
    return tensor


class Received(Tensor):
    """What fakelib makes of another's array, with the type's code that DLPack gave it."""

    def __init__(self, other: Any) -> None:
        capsule = other.__dlpack__(max_version=(1, 0))
        self.code = int(tensor_in(capsule).code)
        if self.code == 4:
            tensor_in(capsule).code = 1
        super().__init__(np.from_dlpack(Capsule(capsule)), other.__dlpack_device__())


class Capsule:
    """Hands out a capsule, as if its memory were the CPU's."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.capsule


@pytest.fixture(autouse=True)
def fakelib(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("fakelib")
    vars(module)["from_dlpack"] = Received
    monkeypatch.setitem(sys.modules, "fakelib", module)
    for kind in (Tensor, Legacy, BFloat16, Received):
        monkeypatch.setattr(kind, "__module__", "fakelib.tensors")
    return module


def tensor(*values: float, dtype: Any = np.float32) -> Tensor:
    return Tensor(np.array(values, dtype))


def pointer(array: np.ndarray) -> int:
    return array.ctypes.data


# --- take ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(3),
        np.ma.zeros(3),
        np.float32(3),
        3.0,
        None,
        "train",
        [1.0],
        {"x": 1},
        Tensor,  # the class itself is no array
    ],
    ids=repr,
)
def test_what_is_ours_or_no_array_passes(value: Any) -> None:
    assert take(value) is value
    assert giver(value) is None


@pytest.mark.parametrize("kind", [Tensor, Legacy])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i8", "u2", "?"])
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3)])
def test_memory_is_shared(kind: Any, dtype: str, shape: tuple[int, ...]) -> None:
    host = np.ones(shape, dtype)
    array = take(kind(host))
    assert type(array) is np.ndarray
    assert (array.dtype, array.shape) == (host.dtype, shape)
    assert pointer(array) == pointer(host)


@pytest.mark.parametrize("memory", [1, 3], ids=["cpu", "pinned"])
def test_host_memory_is_numpys(memory: int) -> None:
    value = Tensor(np.arange(6.0).reshape(2, 3).T, (memory, 0))
    array = take(value)
    assert pointer(array) == pointer(value.host)
    assert array.strides == value.host.strides
    assert array.flags.writeable


def test_read_only_stays_read_only() -> None:
    host = np.ones(3)
    host.flags.writeable = False
    array = take(Tensor(host))
    assert not array.flags.writeable
    assert pointer(array) == pointer(host)
    assert not take(Legacy(np.ones(3))).flags.writeable


def test_memory_lives_as_long_as_the_array() -> None:
    value = tensor(1, 2, 3)
    host = weakref.ref(value.host)
    array = take(value)
    del value
    gc.collect()
    assert host() is not None
    assert array.tolist() == [1, 2, 3]
    del array
    gc.collect()
    assert host() is None


@pytest.mark.parametrize(
    ("number", "place"), [((8, 0), "mps:0"), ((10, 0), "hip:0"), ((99, 1), None)]
)
def test_other_devices_are_refused(number: tuple[int, int], place: str | None) -> None:
    value = Tensor(np.ones(3), number)
    if place is not None:
        value.device = place
    expected = place or "DLPack's device type 99"
    with pytest.raises(ValueError, match=f"^gamma is on {expected}, expected the CPU or CUDA$"):
        take(value, "gamma")


def test_a_library_s_refusal_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, **kwargs: Any) -> Any:
        raise BufferError("Can't export tensors of my kind")

    monkeypatch.setattr(Tensor, "__dlpack__", refuse)
    with pytest.raises(
        TypeError, match=r"^dout is a fakelib\.Tensor that cannot be shared: Can't export"
    ) as caught:
        take(tensor(1), "dout")
    assert isinstance(caught.value.__cause__, BufferError)
    monkeypatch.setattr(Tensor, "__dlpack_device__", refuse)
    with pytest.raises(TypeError, match=r"^dout is a fakelib\.Tensor that cannot be shared"):
        take(tensor(1), "dout")


def test_a_gradient_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, **kwargs: Any) -> Any:
        raise BufferError("no")

    monkeypatch.setattr(Tensor, "__dlpack__", refuse)
    monkeypatch.setattr(Tensor, "requires_grad", True, raising=False)
    with pytest.raises(TypeError, match=r"^x requires a gradient, .*: pass x\.detach\(\)$"):
        take(tensor(1))


# --- bfloat16 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["whole", "strided", "scalar", "empty"])
@pytest.mark.parametrize("versioned", [True, False])
def test_bfloat16_is_shared_both_ways(versioned: bool, layout: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    host = {"whole": values, "strided": values[:, ::2], "scalar": values[1, 1], "empty": values[:0]}
    expected = np.asarray(host[layout]).astype(ml_dtypes.bfloat16)

    class Old(BFloat16):
        def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop("max_version", None)
            return super().__dlpack__(*args, **kwargs)

    Old.__module__ = "fakelib"
    value = (BFloat16 if versioned else Old)(expected.view(np.uint16))
    array = take(value)
    assert array.dtype == ml_dtypes.bfloat16
    assert array.shape == expected.shape
    assert (array.astype(float) == expected.astype(float)).all()
    assert pointer(array) == pointer(value.host)

    give = giver(value)
    assert give is not None
    if versioned or array.flags.writeable:
        back = give(array)
        assert back.code == 4
        assert pointer(back.host) == pointer(array)
        assert back.host.strides == array.strides


def test_other_types_keep_theirs() -> None:
    give = giver(tensor(1))
    assert give is not None
    assert give(np.ones(3, np.uint16)).code == 1
    assert give(np.ones(3, np.float16)).code == 2
    assert take(Tensor(np.ones(3, np.uint16))).dtype == np.uint16


def test_bfloat16_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"^w is of bfloat16, .*: pip install ml_dtypes$"):
        take(BFloat16(np.ones(3, np.uint16)), "w")


def test_a_capsule_of_an_unknown_layout_is_left_alone() -> None:
    array = np.ones(3, np.uint16)
    capsule = array.__dlpack__(max_version=(1, 0))
    used = array.__dlpack__()
    np.from_dlpack(Capsule(used))
    assert interop._tensor_in(used) is None  # it is another's now
    address = interop._capsule_pointer(capsule, b"dltensor_versioned")
    managed = interop._Versioned.from_address(address)
    assert (managed.major, managed.tensor.ndim) == (1, 1)
    managed.major = 2
    assert interop._tensor_in(capsule) is None
    managed.major = 1
    assert tensor_in(capsule).data == pointer(array)


# --- giver ---------------------------------------------------------------------------------------


def test_giver_takes_the_array_namespace_first(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = types.SimpleNamespace(from_dlpack=lambda array: ("of the namespace", array))
    monkeypatch.setattr(Tensor, "__array_namespace__", lambda self: namespace, raising=False)
    give = giver(tensor(1))
    assert give is not None
    assert give(np.ones(1))[0] == "of the namespace"
    del namespace.from_dlpack
    give = giver(tensor(1))
    assert give is not None
    assert isinstance(give(np.ones(1)), Received)


def test_a_subclass_from_elsewhere_goes_back_to_its_library() -> None:
    class Mine(Tensor):
        pass

    assert Mine.__module__ != "fakelib"
    give = giver(Mine(np.ones(3)))
    assert give is not None
    assert isinstance(give(np.ones(1)), Received)


def test_a_library_without_from_dlpack(fakelib: types.ModuleType) -> None:
    del fakelib.from_dlpack
    with pytest.raises(TypeError, match=r"^fakelib has no from_dlpack, .*in the place of Tensor$"):
        giver(tensor(1))
    changed: list[Any] = []
    for argument in (tensor(1), {"running_mean": tensor(1)}):
        with pytest.raises(TypeError, match=r"^fakelib has no from_dlpack"):
            foreign(lambda x: changed.append(x))(argument)
    assert not changed


def test_what_other_libraries_could_not_hold_is_copied() -> None:
    give = giver(tensor(1))
    assert give is not None
    backwards = np.arange(3.0)[::-1]
    read_only = np.arange(3.0)
    read_only.flags.writeable = False
    for array in (backwards, read_only):
        back = give(array)
        assert (back.host == array).all()
        assert not np.shares_memory(back.host, array)
        assert back.host.strides == (8,)


# --- foreign -------------------------------------------------------------------------------------


class Cache(NamedTuple):
    x: Any
    note: str


def forward(x: Any, gamma: Any, params: Any, axis: int = 1) -> tuple[Any, Any]:
    """Scale x, and count in params."""
    assert isinstance(x, np.ndarray)
    assert isinstance(gamma, np.ndarray)
    before = params.get("running")
    assert before is None or isinstance(before, np.ndarray)
    params["running"] = np.zeros(2) if before is None else before + 1
    params["count"] = params.get("count", 0) + axis
    if params.get("fail"):
        raise ValueError("params['fail'] is set")
    return gamma * x, Cache(x, "kept")


def backward(dout: Any, cache: Any) -> tuple[Any, Any, Any]:
    assert isinstance(cache.x, np.ndarray)
    return 2 * dout, dout.sum(keepdims=True).reshape(()), 3.0


FORWARD, BACKWARD = foreign(forward), foreign(backward)


def test_the_signature_and_the_name_stay() -> None:
    assert inspect.signature(FORWARD) == inspect.signature(forward)
    assert (FORWARD.__name__, FORWARD.__doc__) == ("forward", "Scale x, and count in params.")


def test_our_arrays_go_through_untouched() -> None:
    x, params = np.ones((3, 2)), {"running": np.ones(2)}
    seen = []
    foreign(lambda *args: seen.extend(args))(x, params)
    assert seen[0] is x
    assert seen[1] is params
    out, cache = FORWARD(x, np.ones(2), params)
    assert type(out) is np.ndarray
    assert cache.x is x


def test_results_come_back_as_they_came() -> None:
    x = Tensor(np.ones((3, 2)))
    params: dict[str, Any] = {}
    out, cache = FORWARD(x, gamma=Tensor(np.full(2, 5.0)), params=params, axis=0)
    assert isinstance(out, Received)
    assert out.host.tolist() == [[5, 5]] * 3
    assert isinstance(cache, Cache)
    assert isinstance(cache.x, np.ndarray)
    assert pointer(cache.x) == pointer(x.host)
    assert isinstance(params["running"], Received)
    assert params["count"] == 0

    dx, dgamma, number = BACKWARD(out, cache)
    assert isinstance(dx, Received)
    assert isinstance(dgamma, Received)
    assert dgamma.host.shape == ()
    assert number == 3.0


def test_results_without_a_tuple() -> None:
    assert isinstance(foreign(lambda x: x + 1)(tensor(1)), Received)
    assert foreign(lambda x: float(x[0]))(tensor(7)) == 7.0
    grads = foreign(lambda x: [x + 1])(tensor(7))
    assert isinstance(grads[0], np.ndarray)


def test_numpy_s_numbers_come_back_as_0_d_arrays() -> None:
    # A loss: what NumPy makes a number of is a 0-d array of CuPy's.
    params: dict[str, Any] = {"running": tensor(1)}
    loss = foreign(lambda x, params: x.sum())
    back = loss(tensor(1, 2), params)
    assert isinstance(back, Received)
    assert (back.host.shape, back.host.dtype, back.host[()]) == ((), np.float32, 3)
    assert type(loss(np.ones(2, np.float32), params)) is np.float32

    def count(x: Any, params: Any) -> None:
        params["count"] = np.float64(3)

    foreign(count)(tensor(1), params)
    assert type(params["count"]) is np.float64


def test_a_result_that_came_as_an_argument_is_that_argument() -> None:
    x, y = tensor(1), tensor(2)
    same = foreign(lambda a, b: (b, a, a is b))
    assert same(x, y) == (y, x, False)
    assert same(x, x) == (x, x, True)  # one array inside as well


def test_the_first_foreign_argument_decides(fakelib: types.ModuleType) -> None:
    class Other(Tensor):
        pass

    otherlib = types.ModuleType("otherlib")
    vars(otherlib)["from_dlpack"] = lambda array: ("other", array)
    Other.__module__ = "otherlib"
    sys.modules["otherlib"] = otherlib
    try:
        add = foreign(lambda a, b, params=None: a + b)
        other, ours = Other(np.ones(1)), np.ones(1)
        assert add(other, tensor(1))[0] == "other"
        assert isinstance(add(tensor(1), other), Received)
        assert isinstance(add(ours, tensor(1)), Received)
        assert add(ours, b=other)[0] == "other"
        # A dict's arrays are its own: arrays of ours give arrays of ours.
        assert isinstance(add(ours, ours, {"running": other}), np.ndarray)
    finally:
        del sys.modules["otherlib"]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_dicts_are_changed_in_place(kind: Any) -> None:
    running, left, number = tensor(1, 2), tensor(3), object()
    params = kind(running=running, left=left, number=number, gone=tensor(4))

    @foreign
    def update(x: Any, params: Any) -> None:
        assert all(isinstance(params[key], np.ndarray) for key in ("running", "left", "gone"))
        params["moved"] = params["left"]
        params["running"] = params["running"] + 1
        params["new"] = np.zeros(3)
        params["text"] = "train"
        del params["gone"]

    update(np.ones(1), params)  # only the dict holds another library's
    assert list(params) == ["running", "left", "number", "moved", "new", "text"]
    assert isinstance(params["running"], Received)
    assert params["running"].host.tolist() == [2, 3]
    assert running.host.tolist() == [1, 2]
    assert params["left"] is left
    assert params["moved"] is left
    assert params["number"] is number
    assert isinstance(params["new"], Received)
    assert params["text"] == "train"


def test_an_array_changed_in_place_is_changed() -> None:
    running = tensor(1, 2)
    params = {"running": running}

    @foreign
    def update(params: Any) -> None:
        params["running"] += 1

    update(params)
    assert params["running"] is running
    assert running.host.tolist() == [2, 3]


def test_an_exception_leaves_dicts_as_they_were() -> None:
    running = tensor(1, 2)
    params = {"running": running, "fail": True}
    before = dict(params)
    with pytest.raises(ValueError, match="is set"):
        FORWARD(tensor(1, 2), tensor(1, 2), params)
    assert params == before
    assert params["running"] is running


def test_a_result_that_cannot_be_given_back_leaves_dicts_as_they_were() -> None:
    params = {"running": tensor(1, 2)}
    before = dict(params)

    @foreign
    def update(params: Any) -> Any:
        params["running"] = params["running"] + 1
        params["name"] = np.array(["no number"])

    with pytest.raises(BufferError):
        update(params)
    assert params == before


def test_errors_name_the_argument() -> None:
    bad = Tensor(np.ones(2), (8, 0))
    x, ours = tensor(1, 2), np.ones(2)
    for arguments, name in (
        ((bad, ours, {}), "x"),
        ((x, bad, {}), "gamma"),
        ((x, ours, {"running": bad}), r"params\['running'\]"),
    ):
        with pytest.raises(ValueError, match=f"^{name} is on DLPack's device type 8"):
            FORWARD(*arguments)
    with pytest.raises(ValueError, match=r"^gamma is on"):
        FORWARD(x, params={}, gamma=bad)
    with pytest.raises(ValueError, match=r"^an argument is on"):
        foreign(lambda *arrays: None)(ours, bad)


def test_too_many_arguments_are_the_function_s_to_refuse() -> None:
    with pytest.raises(TypeError, match="1 positional argument"):
        foreign(lambda x: x)(tensor(1), tensor(2))


# --- CUDA, with a CuPy over host memory ----------------------------------------------------------


class FakeCupyArray:
    """What of cupy.ndarray is used here; kept in host memory."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host
        self.dtype, self.strides = host.dtype, host.strides
        self.flags = types.SimpleNamespace(c_contiguous=host.flags.c_contiguous)
        self.scopes = 0

    @property
    def device(self) -> contextlib.AbstractContextManager[None]:
        self.scopes += 1
        return contextlib.nullcontext()

    def view(self, dtype: Any) -> FakeCupyArray:
        return FakeCupyArray(self.host.view(dtype))

    def copy(self) -> FakeCupyArray:
        return FakeCupyArray(self.host.copy())

    def __add__(self, other: Any) -> FakeCupyArray:
        return FakeCupyArray(self.host + other)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: Any = None, **kwargs: Any) -> Any:
        return self.host.__dlpack__(**kwargs)


def fake_cupy_from_dlpack(value: Any) -> FakeCupyArray:
    assert value.__dlpack_device__()[0] in (2, 13)
    capsule = value.__dlpack__(stream=1, max_version=(1, 0), copy=None)
    return FakeCupyArray(np.from_dlpack(Capsule(capsule)))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("cupy")
    vars(module).update(ndarray=FakeCupyArray, from_dlpack=fake_cupy_from_dlpack)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(backend, "_probes", {0: backend.Probe(True, "a first kernel ran", 1)})
    monkeypatch.setattr(interop, "_roles", interop._Roles())
    return module


@pytest.mark.parametrize("memory", [2, 13], ids=["cuda", "managed"])
def test_cuda_memory_is_cupys(cupy: types.ModuleType, memory: int) -> None:
    value = Tensor(np.ones((2, 3), np.float32), (memory, 0))
    array = take(value)
    assert type(array) is cupy.ndarray
    assert take(array) is array
    assert giver(array) is None
    assert pointer(array.host) == pointer(value.host)
    back = foreign(lambda x: x + 1)(value)
    assert isinstance(back, Received)
    assert back.dlpack_device == (2, 0)
    assert foreign(lambda x: x)(value) is value


def test_arrays_are_given_back_on_their_device(cupy: types.ModuleType) -> None:
    give = giver(Tensor(np.ones(3), (2, 0)))
    assert give is not None
    array = FakeCupyArray(np.ones(3))
    give(array)
    assert array.scopes == 1


def test_bfloat16_on_cuda(cupy: types.ModuleType) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = np.ones(3, ml_dtypes.bfloat16).view(np.uint16)
    value = BFloat16(bits, (2, 0))
    array = take(value)
    assert type(array) is cupy.ndarray
    assert array.dtype == ml_dtypes.bfloat16
    assert pointer(array.host) == pointer(bits)
    give = giver(value)
    assert give is not None
    back = give(array)
    assert (back.code, back.dlpack_device) == (4, (2, 0))
    assert pointer(back.host) == pointer(bits)


def test_cuda_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ModuleNotFoundError("No module named 'cupy'", name="cupy")
    load = importlib.import_module

    def without_cupy(name: str) -> Any:
        if name == "cupy":
            raise missing
        return load(name)

    monkeypatch.setattr(importlib, "import_module", without_cupy)
    monkeypatch.setattr(backend, "_probes", {})
    with pytest.raises(
        backend.DeviceError,
        match=r"^x is on cuda:0, which CuPy cannot use: CuPy is not installed .*cuda12 and cuda13",
    ):
        take(Tensor(np.ones(3), (2, 0)))


def test_cupy_s_own_errors_pass(cupy: types.ModuleType) -> None:
    class CUDARuntimeError(RuntimeError):
        pass

    CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"

    def fail(value: Any) -> Any:
        raise CUDARuntimeError("cudaErrorLaunchFailure")

    vars(cupy)["from_dlpack"] = fail
    with pytest.raises(CUDARuntimeError):
        take(Tensor(np.ones(3), (2, 0)))


@pytest.mark.parametrize("versioned", [True, False])
def test_the_real_cupy_takes_bfloat16(versioned: bool) -> None:
    # It needs no driver for a capsule, only for an array that is asked which stream it wants.
    cupy, ml_dtypes = pytest.importorskip("cupy"), pytest.importorskip("ml_dtypes")
    bits = np.ones((2, 3), ml_dtypes.bfloat16).view(np.uint16)
    exporter = interop._Retyped(BFloat16(bits), 4, 1)
    capsule = exporter.__dlpack__(**({"max_version": (1, 0)} if versioned else {}))
    tensor_in(capsule).device[0] = 2
    array = cupy.from_dlpack(capsule).view(ml_dtypes.bfloat16)
    assert exporter.done
    assert array.dtype == ml_dtypes.bfloat16
    assert array.shape == (2, 3)
    assert array.data.ptr == pointer(bits)


def test_the_host_run_cuda_kernels_take_them(
    two_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in: Any = sys.modules["cupy"]
    kind = stand_in.ndarray

    def from_dlpack(value: Any) -> Any:
        array = kind.__new__(kind)
        array._host = np.from_dlpack(Capsule(value.__dlpack__(stream=1)))
        return array

    monkeypatch.setattr(stand_in, "from_dlpack", from_dlpack, raising=False)
    monkeypatch.setattr(kind, "__dlpack_device__", lambda self: (2, 0), raising=False)
    monkeypatch.setattr(
        kind, "__dlpack__", lambda self, **kwargs: self._host.__dlpack__(**kwargs), raising=False
    )
    monkeypatch.setattr(interop, "_roles", interop._Roles())

    def double(x: Any, params: Any) -> Any:
        assert backend.is_cuda(x)
        params["running"] = x + x
        return x + x

    value = Tensor(np.arange(3, dtype=np.float32), (2, 0))
    params: dict[str, Any] = {}
    out = foreign(double)(value, params)
    assert isinstance(out, Received)
    assert out.dlpack_device == (2, 0)
    assert out.host.tolist() == [0, 2, 4]
    assert isinstance(params["running"], Received)


# --- PyTorch -------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def give_to(tensor: Any, array: Any) -> Any:
    give = giver(tensor)
    assert give is not None
    return give(array)


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda t: t,
    "transposed": lambda t: t.T,
    "strided": lambda t: t[1::2, ::3],
    "broadcast": lambda t: t[:1].expand(5, -1),
    "scalar": lambda t: t[1, 2],
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64"])
def test_torch_both_ways(torch: Any, dtype: str, layout: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    t = LAYOUTS[layout](torch.arange(48).reshape(6, 8).to(getattr(torch, dtype)))
    array = take(t)
    assert array.dtype.name == dtype
    assert array.shape == tuple(t.shape)
    assert array.astype(float).tolist() == t.double().tolist()
    if t.numel():
        assert array.ctypes.data == t.data_ptr()
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        assert array.flags.writeable
    back = give_to(t, array)
    assert type(back) is torch.Tensor
    assert (back.dtype, back.shape) == (t.dtype, t.shape)
    assert back.data_ptr() == array.ctypes.data or not t.numel()
    assert torch.equal(back, t)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_memory_is_freed_once(torch: Any, dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    kept = []
    for value in range(200):
        t = torch.full((1000,), value, dtype=getattr(torch, dtype))
        array = take(t)
        del t
        back = give_to(torch.zeros(1), array)
        expected = float(array[0])
        del array
        gc.collect(0)
        assert (back == expected).all()
        kept.append((expected, back[::100]))
    gc.collect()
    assert all((part == expected).all() for expected, part in kept)


def test_torch_negative_strides_come_back(torch: Any) -> None:
    back = give_to(torch.zeros(1), np.arange(3.0)[::-1])
    assert back.tolist() == [2, 1, 0]


def test_torch_refusals_name_the_argument(torch: Any) -> None:
    leaf = torch.ones(3, requires_grad=True)
    refused = {
        r"gradient.*pass dout\.detach\(\)": leaf,
        "gradient": torch.nn.Parameter(torch.ones(3)),
        "gradient.*detach": leaf * 2,
        "conjugate": torch.ones(3, dtype=torch.complex64).conj(),
        "resolve_neg": torch.ones(3, dtype=torch.complex64).conj().imag,
        "layout": torch.eye(3).to_sparse(),
        "meta": torch.ones(3, device="meta"),
        "dtype": torch.ones(3).to(torch.float8_e4m3fn),
    }
    for words, value in refused.items():
        with pytest.raises(TypeError, match=rf"^dout (requires|is a torch\.).*{words}") as caught:
            take(value, "dout")
        assert isinstance(caught.value.__cause__, Exception)
    assert take(leaf.detach()).ctypes.data == leaf.data_ptr()


def test_torch_through_a_function(torch: Any) -> None:
    x, gamma = torch.ones(3, 2, dtype=torch.float64), torch.full((2,), 5.0, dtype=torch.float64)
    running = torch.zeros(2, dtype=torch.float64)
    params = {"running": running, "mode": "train"}
    out, cache = FORWARD(x, gamma, params)
    assert torch.equal(out, 5 * x)
    assert cache.x.ctypes.data == x.data_ptr()
    assert torch.equal(params["running"], torch.ones_like(running))
    assert params["running"] is not running
    assert params["mode"] == "train"
    dx, dgamma, _ = BACKWARD(out, cache)
    assert torch.equal(dx, 2 * out)
    assert dgamma.shape == ()
    with pytest.raises(TypeError, match=r"^params\['running'\] requires.*\['running'\]\.detach"):
        FORWARD(x, gamma, {"running": running.requires_grad_()})


def test_a_parameter_s_class_goes_back_to_torch(torch: Any) -> None:
    class Mine(torch.nn.Parameter):
        pass

    value = Mine(torch.ones(3), requires_grad=False)
    assert type(foreign(lambda x: x + 1)(value)) is torch.Tensor


def test_nothing_is_imported_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    load = builtins.__import__

    def record(name: str, *args: Any, **kwargs: Any) -> Any:
        imported.append(name.partition(".")[0])
        return load(name, *args, **kwargs)

    @contextlib.contextmanager
    def fresh() -> Iterator[None]:
        kept = sys.modules.pop("gpubn.interop")
        monkeypatch.setattr(builtins, "__import__", record)
        try:
            yield
        finally:
            sys.modules["gpubn.interop"] = kept

    with fresh():
        importlib.import_module("gpubn.interop")
    assert {"numpy", "gpubn"} <= set(imported)
    assert not {"torch", "jax", "cupy", "ml_dtypes", "numba"} & set(imported)

import collections
import inspect
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpubn
from gpubn import backend
from gpubn.backend import namespace
from gpubn.testing import Agreement, NoSecondDevice, assert_parity, ulp_distance
from gpubn.testing.tolerance import BOUNDS

FLOATS = [np.float16, np.float32, np.float64]


def on_gpu(x):
    return namespace(x) is not np


def differs_by(error, at=(0, 0)):
    """A function that is wrong on a GPU by `error` in one place."""

    def fn(x):
        out = x * 2
        if on_gpu(x):
            out[at] += error
        return out

    return fn


class TestUlpDistance:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_counts_steps_also_across_zero(self, dtype):
        smallest = np.finfo(dtype).smallest_subnormal
        a = np.array([1, 1, -1, 0.0, 0.0, smallest, -3 * smallest], dtype)
        b = np.array([1, 1, -1, 0.0, -0.0, -smallest, 3 * smallest], dtype)
        b[1] = np.nextafter(dtype(1), dtype(2))
        b[2] = np.nextafter(np.nextafter(dtype(-1), dtype(0)), dtype(0))
        distance = ulp_distance(a, b)
        # From -smallest over -0 and +0 to smallest: three steps.
        assert distance.tolist() == [0, 1, 2, 0, 1, 3, 7]
        assert distance.dtype == np.float64
        np.testing.assert_array_equal(ulp_distance(b, a), distance)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_special_values(self, dtype):
        other_nan = -np.array(math.nan, dtype)  # NaN with another sign bit
        a = np.array([math.nan, math.nan, math.inf, math.inf, 1], dtype)
        b = np.array([other_nan, 1, math.inf, np.finfo(dtype).max, math.nan], dtype)
        assert ulp_distance(a, b).tolist() == [0, math.inf, 0, 1, math.inf]

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_the_whole_range_does_not_overflow(self, dtype):
        bits = 8 * np.dtype(dtype).itemsize
        # -inf and inf are the ordinals that NaNs leave over at either end.
        nans = 2 ** np.finfo(dtype).nmant - 1
        distance = ulp_distance(dtype(-math.inf), dtype(math.inf))
        assert distance.shape == ()
        assert distance == float(2**bits - 1 - 2 * nans)

    @given(st.floats(allow_nan=False, width=32), st.integers(1, 99))
    def test_agrees_with_nextafter(self, start, steps):
        start = value = np.float32(start)
        crossed = 0
        for _ in range(steps):
            with np.errstate(over="ignore", under="ignore"):
                above = np.nextafter(value, np.float32(math.inf))
            # nextafter takes the two zeros for one: it goes on from -0 as from +0.
            crossed += int(value == 0 and np.signbit(value))
            steps -= int(above == value)  # at infinity
            value = above
        assert ulp_distance(start, value) == steps + crossed

    def test_any_layout_byte_order_and_device(self, two_devices):
        a = np.arange(6.0).reshape(2, 3)
        assert ulp_distance(a.T[::2], a.T[::2].astype(">f8")).tolist() == [[0, 0], [0, 0]]
        on_device = backend.resolve("cuda").asarray(a)
        assert ulp_distance(on_device, a).tolist() == np.zeros((2, 3)).tolist()

    def test_errors_name_the_argument(self):
        x = np.ones(3)
        with pytest.raises(TypeError, match=r"a has dtype int64, expected float16"):
            ulp_distance(np.arange(3), x)
        with pytest.raises(TypeError, match=r"b has dtype float32, expected float64"):
            ulp_distance(x, x.astype(np.float32))
        with pytest.raises(ValueError, match=r"b has shape \(1, 3\), expected \(3,\)"):
            ulp_distance(x, x[np.newaxis])


class TestTwoDevices:
    pytestmark = pytest.mark.usefixtures("two_devices")

    def test_same_bits(self, rng):
        x = rng.normal(size=(5, 7)).astype(np.float32)
        agreement = assert_parity(lambda x: (x * x, {"sum": float(x[0, 0])}), x)
        assert agreement == Agreement(("cpu", "cuda:0"), 2, 36, 0.0, None, None)
        assert str(agreement) == "cpu and cuda:0: 36 elements in 2 results, no difference"

    def test_each_device_gets_its_arrays_and_is_in_force(self):
        seen = []

        def fn(x, *, more):
            inner = more["list"][0].of
            seen.append((type(x), type(inner), gpubn.current().name, more["list"][1]))
            return x + inner

        Pair = collections.namedtuple("Pair", "of by")
        marker = object()
        x = np.ones(3)
        assert_parity(fn, x, more={"list": [Pair(x, 2), marker]})
        cupy = backend.resolve("cuda").xp
        assert seen == [
            (np.ndarray, np.ndarray, "cpu", marker),
            (cupy.ndarray, cupy.ndarray, "cuda:0", marker),
        ]

    def test_arrays_may_come_from_either_device(self):
        x = backend.resolve("cuda").asarray(np.ones(3))
        assert assert_parity(lambda x, y: x + y, x, np.ones(3)).units == 0

    def test_inputs_may_be_written_to_and_stay_as_they_were(self):
        def double(x, params):
            x *= 2
            params["seen"] = x[0] + 1
            params["runs"] = 5

        x, params = np.ones(3), {"mode": "train"}
        agreement = assert_parity(double, x, params)
        assert (agreement.results, agreement.elements) == (3, 5)  # x, seen and runs
        assert x.tolist() == [1, 1, 1]
        assert params == {"mode": "train"}

    def test_what_was_written_differs(self):
        def fn(x, running):
            running += 1 + on_gpu(x)
            return x

        with pytest.raises(
            AssertionError, match=r"args\[1\], float64 \(2,\): 2 of 2 elements differ"
        ):
            assert_parity(fn, np.ones(3), np.zeros(2))

    def test_the_message_shows_the_worst_element(self):
        def fn(x):
            out = x * 2
            if on_gpu(x):
                out[1, 2] += 2**-22
                out[0, 1] += 2**-21
            return x, {"out": out}

        with pytest.raises(AssertionError) as caught:
            assert_parity(fn, np.ones((2, 3), np.float32), units=1)
        assert str(caught.value).splitlines() == [
            "fn gives different results: cpu and cuda:0",
            "result[1]['out'], float32 (2, 3): 1 of 6 elements differ by more than 1 units in the "
            "last place",
            "  worst at [0, 1]: 2 units apart",
            "    cpu     2.0  0x40000000",
            "    cuda:0  2.0000005  0x40000002",
        ]
        assert str(assert_parity(fn, np.ones((2, 3), np.float32), units=2)) == (
            "cpu and cuda:0: 12 elements in 2 results, at most 2 units apart "
            "(result[1]['out'] at [0, 1])"
        )

    def test_every_result_that_differs_is_told(self):
        with pytest.raises(AssertionError, match=r"(?s)result\[0\].*result\[2\]"):
            assert_parity(lambda x: (x + on_gpu(x), x, x - on_gpu(x)), np.ones(3))

    def test_one_unit_is_seen_by_default_and_so_is_the_sign_of_zero(self):
        assert_parity(differs_by(0.0), np.ones((2, 2)))
        with pytest.raises(AssertionError, match=r"1 of 4 elements differ\n.*1 unit apart"):
            assert_parity(differs_by(2**-51), np.ones((2, 2)))
        with pytest.raises(AssertionError, match="1 unit apart"):
            assert_parity(lambda x: x * (-1 if on_gpu(x) else 1), np.zeros(1))

    def test_nan_is_nan(self):
        assert_parity(lambda x: -x if on_gpu(x) else x, np.array([math.nan]))
        with pytest.raises(AssertionError, match=r"1 of 1 element differ.*\n.*unequal"):
            assert_parity(lambda x: x * (math.nan if on_gpu(x) else 1), np.ones(1), atol=9, units=9)

    def test_a_difference_up_to_atol_agrees(self):
        x = np.array([[0.0, math.inf], [0.0, 0.0]])
        agreement = assert_parity(differs_by(1e-7), x, atol=1e-7)
        assert agreement.units > 1e10
        with pytest.raises(AssertionError, match="more than 2 units in the last place and 9e-08"):
            assert_parity(differs_by(1e-7), x, units=2, atol=9e-8)

    def test_the_worst_is_one_that_is_wrong(self):
        def fn(x):
            return x + np.array([1e-9, 0.5, 0.25]) @ np.eye(3) if not on_gpu(x) else x

        with pytest.raises(AssertionError, match=r"2 of 3 elements differ.*\n  worst at \[1\]"):
            assert_parity(fn, np.array([0.0, 1.0, 1.0]), atol=1e-6)

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool])
    def test_integers_are_exact_whatever_the_tolerance(self, dtype):
        x = np.zeros(3, dtype)
        assert_parity(lambda x: x | False, x)
        with pytest.raises(AssertionError, match=r"3 of 3 elements differ.*\n.*unequal"):
            assert_parity(lambda x: x | on_gpu(x), x, units=5, atol=5)

    def test_complex_numbers_are_two(self):
        z = np.array([1 + 2j], np.complex64)
        assert assert_parity(lambda z: z, z + 1).elements == 2
        with pytest.raises(AssertionError, match=r"^[^\n]*\nresult.imag, float32"):
            assert_parity(lambda z: z + 1j * on_gpu(z), z)

    @pytest.mark.parametrize(
        ("fn", "message"),
        [
            (
                lambda x: x[:1] if on_gpu(x) else x,
                r"result has shape \(3,\) for cpu, \(1,\) for cuda",
            ),
            (
                lambda x: x.astype("f4") if on_gpu(x) else x,
                "has dtype float64 for cpu, float32 for",
            ),
            (lambda x: (x, None if on_gpu(x) else x), r"result\[1\]: there is one for cpu only"),
            (lambda x: [x] if on_gpu(x) else x, r"(?s)result: .*cpu only.*t\[0\]: .*cuda:0 only"),
        ],
    )
    def test_structure_shape_and_dtype_have_to_match(self, fn, message):
        with pytest.raises(AssertionError, match=message):
            assert_parity(fn, np.ones(3))

    def test_a_buffer_that_each_call_returns_is_copied(self):
        buffer = np.zeros(3)

        def fn(x):
            buffer[:] += 1
            return buffer

        with pytest.raises(AssertionError, match="3 of 3 elements differ"):
            assert_parity(fn, np.ones(3))

    def test_an_exception_says_on_which_device(self):
        def fn(x):
            return x.numpy_has_no_such_method() if on_gpu(x) else x

        with pytest.raises(AttributeError) as caught:
            assert_parity(fn, np.ones(3))
        assert caught.value.__notes__ == ["assert_parity: fn was running on cuda:0"]

    def test_devices_are_chosen_by_name(self):
        assert assert_parity(np.abs, np.ones(3), devices=["cpu"]).sides == ("cpu", "cpu again")
        sides = assert_parity(lambda x: x, np.ones(3), devices=["cuda:0", "cpu"]).sides
        assert sides == ("cuda:0", "cpu")
        with pytest.raises(gpubn.DeviceError, match="there is no device 7"):
            assert_parity(lambda x: x, np.ones(3), devices=["cpu", "cuda:7"])


def test_of_more_devices_the_worst_is_reported(monkeypatch):
    class Numbered(gpubn.Device):
        """The CPU under another name."""

        @property
        def name(self):
            return f"cpu:{self.index}"

    monkeypatch.setattr(backend, "resolve", lambda name: Numbered("cpu", int(name[4:]), name))
    wrong = [0, 2, 5, 3]

    def fn(x):
        return x + wrong[gpubn.current().index] * 2.0**-52

    devices = ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
    agreement = assert_parity(fn, np.ones(1), units=5, devices=devices)
    assert agreement == Agreement(tuple(devices), 1, 1, 5.0, "result", (0,))
    with pytest.raises(AssertionError, match="cpu:0 and cpu:2\n"):
        assert_parity(fn, np.ones(1), units=4, devices=devices)


@pytest.mark.usefixtures("no_cuda")
class TestOneDevice:
    def test_is_compared_with_float64_and_warns(self, rng):
        x = rng.normal(size=(8, 9)).astype(np.float32)
        with pytest.warns(NoSecondDevice) as caught:
            agreement = assert_parity(np.tanh, x)
        assert agreement.sides == ("cpu", "cpu in float64")
        assert 0 < agreement.units < 2
        message = str(caught[0].message)
        assert message.startswith("tanh ran on cpu only, no NVIDIA driver was found: ")
        assert "compared with float64" in message
        assert caught[0].filename == __file__

    def test_lost_digits_are_seen(self):
        x = np.linspace(0, 1, 10, dtype=np.float32)

        def loses(x):
            return (x + 1e4) - 1e4

        expected = r"cpu and cpu in float64\n.*differ by more than 20 units of the largest value's"
        with pytest.raises(AssertionError, match=expected):
            assert_parity(loses, x)
        with pytest.warns(NoSecondDevice):
            assert_parity(loses, x, reference_units=1e5)
        with pytest.warns(NoSecondDevice):
            assert_parity(loses, x, atol=1e-3)

    def test_units_are_those_of_the_largest_value(self):
        def fn(x):
            # In float32 the first is 3 * 2**-30 too large: 3 units of its own, 3 * 2**-9 of 4's.
            small = 2.0**-7 + (3 * 2.0**-30 if x.dtype == np.float32 else 0)
            return np.array([small, 4.0, math.inf], x.dtype)

        agreement = assert_parity(fn, np.ones(2, np.float32), devices=["cpu"])
        assert agreement.units == 3 * 2.0**-30 / 2.0**-21
        assert agreement.index == (0,)

    @pytest.mark.parametrize(("value", "agrees"), [(math.inf, True), (-math.inf, False)])
    def test_what_overflows_the_dtype_is_infinite(self, value, agrees):
        def fn(x):
            return x * 1e30 if x.dtype == np.float64 else np.full(1, value, np.float32)

        x = np.full(1, 1e30, np.float32)
        if agrees:
            assert assert_parity(fn, x, devices=["cpu"]).units == 0
        else:
            with pytest.raises(AssertionError, match="unequal"):
                assert_parity(fn, x, devices=["cpu"], reference_units=1e9)

    def test_float64_has_no_reference_and_is_called_twice(self):
        with pytest.warns(NoSecondDevice, match="two calls there were compared"):
            agreement = assert_parity(np.tanh, np.ones(3))
        assert agreement.sides == ("cpu", "cpu again")

    def test_a_function_that_is_not_deterministic_fails(self):
        generator = np.random.default_rng(0)
        with pytest.raises(AssertionError, match="cpu and cpu again\n"):
            assert_parity(lambda x: x + generator.normal(), np.ones(3))

    def test_integers_are_compared_with_the_reference_too(self):
        def fn(x):
            return x, (x + 2**24 + 1 > 2**24 + 1).sum()

        with pytest.raises(AssertionError, match=r"result\[1\], int64 \(\): 1 of 1 element differ"):
            assert_parity(fn, np.ones(3, np.float32), devices=["cpu"])

    def test_what_is_written_counts(self):
        def double(x):
            x *= 2

        agreement = assert_parity(double, np.ones(3, np.float32), devices=["cpu"])
        assert (agreement.results, agreement.elements) == (1, 3)

    def test_a_device_that_was_named_is_no_reason_to_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_parity(np.tanh, np.ones(3, np.float32), devices=["cpu"])

    def test_a_device_that_is_not_there_is_an_error(self):
        with pytest.raises(gpubn.DeviceError, match="no NVIDIA driver was found"):
            assert_parity(np.tanh, np.ones(3), devices=["cpu", "cuda"])

    def test_the_default_tolerance_is_the_libraries_widest(self):
        default = inspect.signature(assert_parity).parameters["reference_units"].default
        assert default == max(bound.units for bound in BOUNDS.values())

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"units": -1}, ValueError, "units is -1, expected"),
            ({"atol": math.nan}, ValueError, "atol is nan, expected"),
            ({"reference_units": -2}, ValueError, "reference_units is -2, expected"),
            ({"devices": []}, ValueError, r"devices is \[\], expected at least one"),
            ({"devices": ["cpu", "cpu"]}, ValueError, "expected at least one, and each once"),
            ({"devices": "cpu"}, TypeError, "devices is 'cpu', expected a list"),
        ],
    )
    def test_options_are_checked(self, options, error, message):
        with pytest.raises(error, match=message):
            assert_parity(np.tanh, np.ones(3), **options)

    def test_nothing_to_compare_is_an_error(self):
        def forgot(x):
            x + 1

        with pytest.raises(ValueError, match="forgot returned nothing and wrote to no argument"):
            assert_parity(forgot, np.ones(3))

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            ("text", r"result\[0\] is a str, expected an array"),
            (np.array(["text"]), r"result\[0\] has dtype <U4, expected float16"),
            (2**99, r"result\[0\] has dtype object"),
        ],
    )
    def test_what_cannot_be_compared_is_an_error(self, result, message):
        with pytest.raises(TypeError, match=message):
            assert_parity(lambda: [result])


def test_nothing_to_compare_is_no_agreement():
    with pytest.raises(ValueError, match="gave no value to compare"):
        assert_parity(lambda x: x[:0], np.ones(3, np.float32))

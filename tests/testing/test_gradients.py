import math

import numpy as np
import pytest
from conftest import host_cuda

from gpubn import backend
from gpubn.testing.gradients import (
    check_gradients,
    eval_numerical_gradient,
    eval_numerical_gradient_array,
    rel_error,
)


class DeviceArray(np.ndarray):
    """A NumPy array with CuPy's ways where they differ and the code could trip over them.

    An element is a 0-d view that changes with the array, and NumPy's functions do not take it.
    """

    # RUF012 fears a dict shared by instances; nothing writes to this one.
    __cuda_array_interface__ = {"stands in for": "a real one"}  # noqa: RUF012

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        return super().__getitem__((*index, ...))

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} of a device array")


@pytest.fixture(params=["host", "device"])
def as_array(request):
    """Make an array of either kind from anything."""

    def make(values, dtype=np.float64):
        array = np.array(values, dtype=dtype)
        return array if request.param == "host" else array.view(DeviceArray)

    return make


def as_numpy(array):
    return np.array(array.tolist())


def cube_sum(x):
    return (x**3).sum()


class TestRelError:
    def test_is_the_largest_ratio_to_the_sum_of_magnitudes(self, as_array):
        x = as_array([1.0, -2.0, 3.0])
        y = as_array([1.0, -2.5, 3.1])
        assert rel_error(x, y) == 0.5 / 4.5

    def test_opposite_signs_differ_by_one(self, as_array):
        assert rel_error(as_array([2.0]), as_array([-2.0])) == 1.0

    def test_is_floored_where_both_vanish(self):
        assert rel_error(np.zeros(3), np.zeros(3)) == 0.0
        assert rel_error(np.array([1e-10]), np.array([-1e-10])) == pytest.approx(0.02)

    def test_returns_a_python_float_for_numbers_and_lists_too(self):
        assert type(rel_error(np.float32(1), 3)) is float
        assert rel_error(1, 3) == 0.5
        assert rel_error([1, 1], [1, 3]) == 0.5
        assert rel_error(np.array(1.0), 3.0) == 0.5

    def test_a_device_scalar_compares_with_a_number(self):
        assert rel_error(np.array(1.0).view(DeviceArray), 3.0) == 0.5

    def test_unsigned_integers_do_not_wrap(self):
        assert rel_error(np.array([1], np.uint8), np.array([3], np.uint8)) == 0.5

    def test_float32_is_subtracted_in_float64(self):
        x = np.array([1e30], np.float32)
        assert rel_error(x * np.float32(1e8), -x) == 1.0  # the sum of magnitudes overflows float32

    def test_nan_is_nan(self, as_array):
        assert math.isnan(rel_error(as_array([1.0, math.nan]), as_array([1.0, 2.0])))
        assert math.isnan(rel_error(as_array([1.0, 2.0]), as_array([math.nan, 2.0])))

    def test_shapes_have_to_be_equal(self):
        with pytest.raises(ValueError, match=r"y has shape \(1, 3\), expected \(3,\)"):
            rel_error(np.zeros(3), np.zeros((1, 3)))

    def test_nothing_to_compare_is_an_error(self):
        with pytest.raises(ValueError, match="at least one element"):
            rel_error(np.zeros((0, 3)), np.zeros((0, 3)))

    def test_complex_is_an_error(self):
        with pytest.raises(TypeError, match="y has dtype complex128, expected real"):
            rel_error(np.zeros(3), np.zeros(3, complex))

    def test_mixed_devices_are_an_error(self):
        on_device = np.zeros(3).view(DeviceArray)
        with pytest.raises(TypeError, match="y is on a GPU, expected in host memory like x"):
            rel_error(np.zeros(3), on_device)


class TestScalarFunction:
    def test_centred_difference(self, as_array):
        values = np.linspace(-1, 1, 6).reshape(2, 3)
        x = as_array(values)
        gradient = eval_numerical_gradient(cube_sum, x, verbose=False)
        # The centred difference of a cube is 3 x^2 + h^2, so at the default step they agree to
        # 1e-10; a one-sided one is off by 3 x h, 3e-5.
        np.testing.assert_allclose(as_numpy(gradient), 3 * values**2, rtol=0, atol=1e-9)
        assert type(gradient) is type(x)
        assert gradient.dtype == x.dtype

    def test_the_step_is_h(self):
        gradient = eval_numerical_gradient(cube_sum, np.array([2.0]), verbose=False, h=0.5)
        np.testing.assert_allclose(gradient, [3 * 2.0**2 + 0.5**2], rtol=1e-14)

    def test_steps_up_then_down_and_in_place(self):
        x = np.array([1.0, 2.0])
        seen = []

        def f(argument):
            assert argument is x
            seen.append(argument.tolist())
            return 0.0

        eval_numerical_gradient(f, x, verbose=False, h=0.25)
        assert seen == [[1.25, 2.0], [0.75, 2.0], [1.0, 2.25], [1.0, 1.75]]

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_every_point_is_restored_bit_for_bit(self, as_array, dtype):
        values = np.array([0.1, -0.0, 1 / 3, 1e-30], dtype)
        x = as_array(values, dtype)
        eval_numerical_gradient(cube_sum, x, verbose=False, h=1e-3)
        assert x.tobytes() == values.tobytes()

    @pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
    def test_every_point_is_restored_when_f_raises(self, as_array, failing_call):
        values = np.array([0.1, 0.7])
        x = as_array(values)
        calls = 0

        def f(argument):
            nonlocal calls
            calls += 1
            if calls == failing_call:
                raise RuntimeError("on purpose")
            return cube_sum(argument)

        with pytest.raises(RuntimeError, match="on purpose"):
            eval_numerical_gradient(f, x, verbose=False)
        assert x.tobytes() == values.tobytes()

    @pytest.mark.parametrize("wrap", [float, np.float64, np.array, DeviceArray.view])
    def test_takes_any_kind_of_number(self, wrap):
        def f(x):
            value = np.float64(x[0] * 2)
            return np.array(value).view(DeviceArray) if wrap is DeviceArray.view else wrap(value)

        gradient = eval_numerical_gradient(f, np.array([1.0]), verbose=False)
        np.testing.assert_allclose(gradient, [2.0], rtol=1e-9)

    def test_zero_dimensions_and_strided_views(self):
        gradient = eval_numerical_gradient(cube_sum, np.array(2.0), verbose=False)
        assert gradient.shape == ()
        np.testing.assert_allclose(gradient, 12.0, rtol=1e-9)

        base = np.arange(12.0).reshape(3, 4)
        expected = base.copy()
        gradient = eval_numerical_gradient(cube_sum, base.T[::2], verbose=False)
        np.testing.assert_allclose(gradient, 3 * base.T[::2] ** 2, rtol=1e-7, atol=1e-8)
        np.testing.assert_array_equal(base, expected)

    def test_prints_index_and_derivative(self, as_array, capsys):
        x = as_array([[1.0, 2.0]])
        gradient = eval_numerical_gradient(cube_sum, x)
        expected = as_numpy(gradient)
        printed = capsys.readouterr().out
        assert printed == f"(0, 0) {expected[0, 0]}\n(0, 1) {expected[0, 1]}\n"

    def test_prints_nothing_unless_verbose(self, capsys):
        eval_numerical_gradient(cube_sum, np.ones(2), verbose=False)
        assert capsys.readouterr().out == ""

    def test_integers_are_an_error(self):
        with pytest.raises(TypeError, match="x has dtype int64, expected floating point"):
            eval_numerical_gradient(cube_sum, np.arange(3))

    def test_a_list_is_an_error(self):
        with pytest.raises(TypeError, match="x is a list, expected a floating-point array"):
            eval_numerical_gradient(sum, [1.0, 2.0])

    def test_a_read_only_array_is_an_error(self):
        x = np.ones(2)
        x.flags.writeable = False
        with pytest.raises(ValueError, match="x is read-only"):
            eval_numerical_gradient(cube_sum, x)

    def test_a_function_of_many_results_is_an_error(self):
        with pytest.raises(ValueError, match=r"f returned an array of shape \(2,\), expected one"):
            eval_numerical_gradient(lambda x: x**2, np.ones(2))

    def test_a_function_of_no_number_is_an_error(self):
        with pytest.raises(TypeError, match="f returned a NoneType, expected one number"):
            eval_numerical_gradient(lambda x: None, np.ones(2))

    @pytest.mark.parametrize("h", [0.0, -1e-5, math.nan, math.inf])
    def test_h_has_to_be_positive(self, h):
        with pytest.raises(ValueError, match=r"h is .*, expected a positive number"):
            eval_numerical_gradient(cube_sum, np.ones(2), h=h)

    def test_a_step_that_rounds_away_is_an_error_and_no_zero_gradient(self):
        x = np.array([1.0, 1e6], np.float32)
        with pytest.raises(ValueError, match=r"changes x\[1\] = 1000000.0 in float32"):
            eval_numerical_gradient(cube_sum, x, verbose=False)
        np.testing.assert_array_equal(x, np.array([1.0, 1e6], np.float32))


class TestArrayFunction:
    def test_is_the_transposed_jacobian_times_upstream(self, as_array):
        rng = np.random.default_rng(0)
        matrix, values, upstream = (rng.normal(size=s) for s in ((3, 4), (2, 3), (2, 4)))
        x = as_array(values)
        df = as_array(upstream)
        gradient = eval_numerical_gradient_array(lambda x: x @ as_array(matrix), x, df)
        np.testing.assert_allclose(as_numpy(gradient), upstream @ matrix.T, rtol=1e-9)
        assert type(gradient) is type(x)
        assert x.tobytes() == values.tobytes()

    def test_the_function_may_reuse_its_buffer(self):
        buffer = np.empty(3)

        def f(x):
            np.multiply(x, 2.0, out=buffer)
            return buffer

        gradient = eval_numerical_gradient_array(f, np.ones(3), np.array([1.0, 2.0, 3.0]))
        np.testing.assert_allclose(gradient, [2.0, 4.0, 6.0], rtol=1e-9)

    def test_the_function_may_return_its_argument(self):
        df = np.array([1.0, 2.0])
        gradient = eval_numerical_gradient_array(lambda x: x, np.ones(2), df)
        np.testing.assert_allclose(gradient, df, rtol=1e-9)

    def test_restores_when_f_raises(self, as_array):
        x = as_array([0.1, 0.2])

        def f(argument):
            raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            eval_numerical_gradient_array(f, x, as_array([1.0, 1.0]))
        assert x.tobytes() == np.array([0.1, 0.2]).tobytes()

    def test_upstream_of_the_wrong_shape_is_an_error_also_where_it_would_broadcast(self):
        with pytest.raises(ValueError, match=r"df has shape \(3,\), expected \(2, 3\)"):
            eval_numerical_gradient_array(lambda x: x * 2, np.ones((2, 3)), np.ones(3))

    def test_arguments_that_are_no_arrays_are_errors(self):
        with pytest.raises(TypeError, match="df is a float, expected an array"):
            eval_numerical_gradient_array(lambda x: x, np.ones(2), 1.0)
        with pytest.raises(TypeError, match="f returned a float, expected an array"):
            eval_numerical_gradient_array(lambda x: 1.0, np.ones(2), np.ones(2))
        with pytest.raises(TypeError, match="x has dtype int64"):
            eval_numerical_gradient_array(lambda x: x, np.arange(2), np.ones(2))

    def test_mixed_devices_are_an_error(self):
        x = np.ones(2).view(DeviceArray)
        with pytest.raises(TypeError, match=r"df is in host memory, expected on a GPU like f\(x\)"):
            eval_numerical_gradient_array(lambda x: x * 2, x, np.ones(2))

    def test_sees_a_wrong_dx_that_an_upstream_of_ones_hides(self):
        rng = np.random.default_rng(1)
        x = rng.normal(size=(5, 1))

        def normalise(x):
            return (x - x.mean(axis=0)) / x.std(axis=0)

        def wrong_dx(dout):  # forgets the variance's path
            return (dout - dout.mean(axis=0)) / x.std(axis=0)

        ones, upstream = np.ones_like(x), rng.normal(size=x.shape)
        hidden = eval_numerical_gradient_array(normalise, x, ones)
        shown = eval_numerical_gradient_array(normalise, x, upstream)
        np.testing.assert_allclose(hidden, wrong_dx(ones), atol=1e-8)
        assert rel_error(shown, wrong_dx(upstream)) > 0.01


def cubic_forward(x, w):
    return x**3 * w, (x, w)


def cubic_backward(dout, cache):
    x, w = cache
    return 3 * x**2 * w * dout, x**3 * dout


class TestCheckGradients:
    @pytest.fixture
    def x(self, rng):
        return rng.normal(size=(3, 4))

    @pytest.fixture
    def w(self, rng):
        return rng.normal(size=(3, 4))

    def test_right_gradients_give_their_errors(self, x, w):
        errors = check_gradients(cubic_forward, cubic_backward, x, w)
        assert len(errors) == 2
        assert all(type(error) is float and 0 < error < 1e-8 for error in errors)

    def test_one_gradient_needs_no_tuple(self, x):
        check_gradients(lambda x: (x**2, x), lambda dout, x: 2 * x * dout, x)

    def test_cupy_arrays(self, x, w):
        with host_cuda():
            cupy = backend.resolve("cuda").xp
            on_device = [cupy.asarray(a) for a in (x, w)]
            assert check_gradients(cubic_forward, cubic_backward, *on_device) == pytest.approx(
                check_gradients(cubic_forward, cubic_backward, x, w)
            )
            expected = r"gradient of input 1 has device cpu, expected cuda:0"
            with pytest.raises(AssertionError, match=expected):
                check_gradients(
                    cubic_forward,
                    lambda dout, cache: (cubic_backward(dout, cache)[0], x),
                    *on_device,
                )

    @pytest.mark.parametrize("position", [0, 1])
    def test_a_wrong_element_is_named(self, x, w, position):
        w[2, 1] = x[2, 1] = 1.0

        def wrong(dout, cache):
            gradients = cubic_backward(dout, cache)
            gradients[position][2, 1] *= 1 + 1e-5
            return gradients

        expected = (
            rf"^the gradient of input {position} is wrong in 1 of 12 elements, worst at \[2, 1\]: "
            r"analytic -?\d\.\d+, numerical -?\d\.\d+, relative error 5e-06, expected at most 1e-06"
        )
        with pytest.raises(AssertionError, match=expected):
            check_gradients(cubic_forward, wrong, x, w)
        check_gradients(cubic_forward, wrong, x, w, tolerance=1e-5)

    def test_upstream_is_random_and_seeded(self, x):
        seen = []

        def backward(dout, cache):
            seen.append(dout.copy())
            return 2 * dout

        for seed in (0, 0, 1):
            check_gradients(lambda x: (2 * x, None), backward, x, seed=seed)
        assert (seen[0] == seen[1]).all()
        assert np.unique([*seen[0].ravel(), *seen[2].ravel()]).size == 24

    def test_sees_a_dx_that_forgets_the_variance(self, x):
        def forward(x):
            return (x - x.mean(axis=0)) / x.std(axis=0), x

        def backward(dout, x):
            return (dout - dout.mean(axis=0)) / x.std(axis=0)

        with pytest.raises(AssertionError, match="input 0 is wrong in 12 of 12"):
            check_gradients(forward, backward, x)

    def test_a_gradient_that_vanishes_can_be_checked(self, x):
        bias = np.array([0.3, -0.2, 0.1, 1.0])  # a normalization takes it away again

        def forward(x, bias):
            y = x + bias
            return (y - y.mean(axis=0)) / y.std(axis=0), None

        def dbias(of_bias):
            return lambda dout, _: (numerical, np.full(4, of_bias))

        dout = np.random.default_rng(0).normal(size=x.shape)
        numerical = eval_numerical_gradient_array(lambda x: forward(x, bias)[0], x, dout)
        errors = check_gradients(forward, dbias(0.0), x, bias)
        assert 0 < errors[1] <= 1e-6
        with pytest.raises(AssertionError, match="input 1 is wrong in 4 of 4"):
            check_gradients(forward, dbias(1e-6), x, bias)

    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_nan_and_infinity_are_errors(self, x, wrong):
        with pytest.raises(AssertionError, match=r"in 12 of 12 elements.*relative error inf"):
            check_gradients(lambda x: (x, 1), lambda dout, _: dout * wrong, x)

    def test_other_inputs_are_passed_on_and_have_no_gradient(self, x):
        labels, params = np.array([0, 3, 1]), {"scale": 2.0, "calls": 0}

        def forward(labels, x, params, power):
            params["calls"] += 1
            assert params["calls"] == 1  # each call has its own
            return x[np.arange(3), labels] ** power * params["scale"], (x, labels, power)

        def backward(dout, cache):
            x, labels, power = cache
            dx = np.zeros_like(x)
            rows = np.arange(3)
            dx[rows, labels] = 2 * power * x[rows, labels] ** (power - 1) * dout
            return dx

        assert len(check_gradients(forward, backward, labels, x, params, 3)) == 1
        assert params["calls"] == 0

    def test_forward_may_work_in_place_and_inputs_stay(self, x):
        before = x.copy()
        x.flags.writeable = False

        def forward(x):
            x *= 3
            return x, None

        def backward(dout, _):
            dout *= 3
            return dout

        check_gradients(forward, backward, x)
        assert (x == before).all()

    @pytest.mark.parametrize("as_number", [float, np.float64, np.asarray])
    def test_a_loss_is_a_number(self, x, as_number):
        check_gradients(lambda x: (as_number((x**2).sum()), x), lambda dout, x: 2 * x * dout, x)

    @pytest.mark.parametrize(
        ("gradients", "message"),
        [
            (lambda x: (x,), r"backward's gradients are 1, expected 2: .* at \[0, 2\]"),
            (lambda x: (x, x, x), "backward's gradients are 3, expected 2"),
            (lambda x: (x, None), "gradient of input 2 is a NoneType, expected an array"),
            (lambda x: (x, x[0]), r"gradient of input 2 has shape \(4,\), expected \(3, 4\)"),
            (lambda x: (x.astype("f4"), x), "of input 0 has dtype float32, expected float64"),
        ],
    )
    def test_one_gradient_for_each_array(self, x, gradients, message):
        with pytest.raises(AssertionError, match=message):
            check_gradients(lambda x, n, y: (x, 0), lambda dout, _: gradients(dout), x, 3, x)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.complex128])
    def test_other_floating_point_is_an_error(self, x, dtype):
        expected = f"input 1 has dtype {np.dtype(dtype)}, expected float64: central differences"
        with pytest.raises(TypeError, match=expected):
            check_gradients(cubic_forward, cubic_backward, x, x.astype(dtype))

    @pytest.mark.parametrize(
        ("forward", "message"),
        [
            (lambda x: x, r"forward returned a ndarray, expected a tuple \(out, cache\)"),
            (lambda x: (x, x, x), r"forward returned 3 values, expected two: \(out, cache\)"),
            (lambda x: (None, x), "forward's out is a NoneType, expected a float64 array"),
            (lambda x: (x.astype("f4"), x), "forward's out has dtype float32, expected float64"),
        ],
    )
    def test_forward_returns_out_and_cache(self, x, forward, message):
        with pytest.raises(TypeError, match=message):
            check_gradients(forward, lambda dout, _: dout, x)

    def test_nothing_to_check_is_an_error(self):
        with pytest.raises(TypeError, match="no input is an array of floating point"):
            check_gradients(cubic_forward, cubic_backward, np.arange(3), 2.0)

    @pytest.mark.parametrize("option", ["tolerance", "h"])
    @pytest.mark.parametrize("value", [0, -1e-6, math.nan, math.inf])
    def test_options_are_checked(self, x, option, value):
        with pytest.raises(ValueError, match=f"{option} is {value}, expected a positive number"):
            check_gradients(cubic_forward, cubic_backward, x, x, **{option: value})


def test_a_gradient_of_nothing_is_not_checked():
    with pytest.raises(ValueError, match=r"input 0 has shape \(0, 3\), expected values"):
        check_gradients(lambda x: (2 * x, None), lambda dout, _: 2 * dout, np.ones((0, 3)))

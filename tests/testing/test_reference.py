import dataclasses
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from gpubn.testing import reference as ref
from gpubn.testing.gradients import (
    eval_numerical_gradient,
    eval_numerical_gradient_array,
    rel_error,
)

# A power of two: x + h and x - h are then exact even at 1e6, where 1e-5 would keep 5 digits.
STEP = 2.0**-17

# Centred differences of these functions at this step, in float64: the truncation is of order h^2 =
# 6e-11 and the rounding of order 1e-16 / h = 1e-11, both relative to the whole gradient. An element
# may be a few hundred times smaller than that.
NUMERICAL = 1e-7

# The same value by two orders of float64 operations: a few hundred roundings of 1e-16.
ROUNDING = 1e-12


def numerical(f, x, df):
    return eval_numerical_gradient_array(f, np.array(x), df, h=STEP)


def batch(shape, mean=0.0, deviation=1.0, seed=0):
    """x, gamma, beta and a random upstream gradient."""
    rng = np.random.default_rng([seed, *shape])
    features = shape[1]
    return (
        mean + deviation * rng.normal(size=shape),
        rng.uniform(0.5, 2.0, features) * rng.choice([-1, 1], features),
        rng.normal(size=features),
        rng.normal(size=shape),
    )


def exact_batchnorm(column, gamma, beta, eps, dout):
    """One column in 60 decimal digits: out, dx, dgamma, dbeta, and the exact mean and variance.

    Written with dxhat_i / dx_j, element by element, and so by another way than the module's.
    """
    n = len(column)
    values = [Fraction(float(v)) for v in column]
    upstream = [Fraction(float(v)) for v in dout]
    mean = sum(values) / n
    var = sum((v - mean) ** 2 for v in values) / n
    with localcontext() as context:
        context.prec = 60

        def decimal(fraction):
            return Decimal(fraction.numerator) / Decimal(fraction.denominator)

        std = decimal(var + Fraction(eps)).sqrt()
        centred = [decimal(v - mean) for v in values]
        up = [decimal(u) for u in upstream]
        gamma, beta = Decimal(float(gamma)), Decimal(float(beta))
        out = [gamma * c / std + beta for c in centred]

        def dxhat_by_dx(i, j):
            same = 1 if i == j else 0
            return (same - Decimal(1) / n) / std - centred[i] * centred[j] / (n * std**3)

        dx = [gamma * sum(up[i] * dxhat_by_dx(i, j) for i in range(n)) for j in range(n)]
        dgamma = sum(u * c / std for u, c in zip(up, centred, strict=True))
        return (
            [float(v) for v in out],
            [float(v) for v in dx],
            float(dgamma),
            float(sum(up)),
            float(mean),
            float(var),
        )


BATCHES = [
    ((4, 3), 0.0, 1.0),
    ((2, 5), 0.0, 1.0),
    ((7, 1), 3.0, 10.0),
    ((20, 4), -1.0, 0.1),
    ((6, 3), 1e6, 0.5),
]


class TestBatchNorm:
    @pytest.mark.parametrize(("shape", "mean", "deviation"), BATCHES)
    def test_graph_backward_equals_the_closed_form(self, shape, mean, deviation):
        x, gamma, beta, dout = batch(shape, mean, deviation)
        graph = ref.batchnorm_forward(x, gamma, beta, 1e-5)
        by_graph = ref.batchnorm_backward_graph(dout, graph)
        closed = ref.batchnorm_backward(dout, x, gamma, 1e-5)
        for one, other, argument in zip(by_graph, closed, (x, gamma, beta), strict=True):
            assert one.shape == other.shape == argument.shape
            # Relative to the largest: at N = 2 dx is what is left when nearly everything cancels.
            np.testing.assert_allclose(one, other, rtol=ROUNDING, atol=ROUNDING * abs(one).max())

    @pytest.mark.parametrize(("shape", "mean", "deviation"), BATCHES)
    @pytest.mark.parametrize("backward", ["graph", "closed"])
    def test_backward_equals_central_differences(self, shape, mean, deviation, backward):
        x, gamma, beta, dout = batch(shape, mean, deviation, seed=1)
        # At N = 2 normalised values are +-1 whatever x is, but for eps: a large one leaves a slope.
        eps = 0.1 if shape[0] == 2 else 1e-3
        if backward == "graph":
            graph = ref.batchnorm_forward(x, gamma, beta, eps)
            dx, dgamma, dbeta = ref.batchnorm_backward_graph(dout, graph)
        else:
            dx, dgamma, dbeta = ref.batchnorm_backward(dout, x, gamma, eps)

        def out(x=x, gamma=gamma, beta=beta):
            return ref.batchnorm_forward(x, gamma, beta, eps).out

        assert rel_error(numerical(lambda v: out(x=v), x, dout), dx) < NUMERICAL
        assert rel_error(numerical(lambda v: out(gamma=v), gamma, dout), dgamma) < NUMERICAL
        assert rel_error(numerical(lambda v: out(beta=v), beta, dout), dbeta) < NUMERICAL

    @pytest.mark.parametrize(
        ("mean", "deviation"), [(0.0, 1.0), (1e6, 0.5), (-1e12, 1e-3), (1e18, 1e18), (0.0, 1e30)]
    )
    def test_equals_exact_arithmetic(self, mean, deviation):
        x, gamma, beta, dout = batch((9, 2), mean, deviation, seed=2)
        eps = 1e-5
        graph = ref.batchnorm_forward(x, gamma, beta, eps)
        by_graph = ref.batchnorm_backward_graph(dout, graph)
        closed = ref.batchnorm_backward(dout, x, gamma, eps)
        for d in range(x.shape[1]):
            out, dx, dgamma, dbeta, mu, var = exact_batchnorm(
                x[:, d], gamma[d], beta[d], eps, dout[:, d]
            )
            np.testing.assert_allclose(graph.mean[d], mu, rtol=1e-15)
            np.testing.assert_allclose(graph.var[d], var, rtol=1e-14)
            np.testing.assert_allclose(graph.out[:, d], out, rtol=1e-13)
            for got in (by_graph, closed):
                scale = np.abs(dx).max()
                np.testing.assert_allclose(got[0][:, d], dx, rtol=1e-13, atol=1e-14 * scale)
                np.testing.assert_allclose(got[1][d], dgamma, rtol=1e-13)
                np.testing.assert_allclose(got[2][d], dbeta, rtol=1e-13)

    @pytest.mark.parametrize("value", [0.1, 1 / 3, -1e6, 1e18, 1e30, 5e-324])
    def test_constant_column_gives_exactly_beta(self, value):
        num_rows = 1003
        x = np.full((num_rows, 1), value)
        gamma, beta = np.array([1.7]), np.array([0.3])
        graph = ref.batchnorm_forward(x, gamma, beta, 1e-5)
        assert (graph.out == beta).all()
        assert graph.mean == value
        assert graph.var == 0.0

    def test_mean_1e6_deviation_half_in_a_million_odd_rows(self):
        rng = np.random.default_rng(3)
        x = (1e6 + 0.5 * rng.normal(size=(1_000_003, 2))).astype(np.float32)
        graph = ref.batchnorm_forward(x, np.ones(2), np.zeros(2), 1e-5)
        for d in range(2):
            # Differences of float32 from 1e6 are exact in float64, and fsum rounds once.
            column = x[:, d].astype(np.float64) - 1e6
            mean = math.fsum(column) / len(column)
            var = math.fsum((column - mean) ** 2) / len(column)
            np.testing.assert_allclose(graph.mean[d], 1e6 + mean, rtol=3e-16)
            np.testing.assert_allclose(graph.var[d], var, rtol=1e-14)

    def test_sums_over_many_rows_are_pairwise(self):
        # 0.1 added a million times in a row is off by 1e-11 or so; pairwise by 1e-15.
        num_rows = 1_000_003
        x = np.arange(2.0 * num_rows).reshape(num_rows, 2)
        dout = np.full_like(x, 0.1)
        _, _, dbeta = ref.batchnorm_backward(dout, x, np.ones(2), 1e-5)
        exact = float(Fraction(0.1) * num_rows)
        np.testing.assert_allclose(dbeta, [exact, exact], rtol=1e-14)

    @pytest.mark.parametrize("size", [1e18, 1e30])
    def test_huge_values_stay_finite(self, size):
        x, gamma, beta, dout = batch((10, 3), 0.0, size)
        graph = ref.batchnorm_forward(x, gamma, beta, 1e-5)
        for result in (
            graph.out,
            *ref.batchnorm_backward_graph(dout, graph),
            *ref.batchnorm_backward(dout, x, gamma, 1e-5),
        ):
            assert np.isfinite(result).all()
        # Normalised values do not know the size they had.
        small = ref.batchnorm_forward(x / size, gamma, beta, 0.0)
        np.testing.assert_allclose(graph.out, small.out, rtol=ROUNDING)

    def test_identity_when_gamma_is_std_and_beta_is_mean(self):
        x, _, _, _ = batch((8, 3), 5.0, 2.0)
        eps = 1e-3
        out = ref.batchnorm_forward(x, np.sqrt(x.var(axis=0) + eps), x.mean(axis=0), eps).out
        np.testing.assert_allclose(out, x, rtol=ROUNDING)

    def test_nodes_of_the_graph(self):
        x, gamma, beta, _ = batch((8, 3))
        graph = ref.batchnorm_forward(x, gamma, beta, 1e-2)
        for got, expected in (
            (graph.mean, x.mean(axis=0)),
            (graph.centred, x - x.mean(axis=0)),
            (graph.squared, (x - x.mean(axis=0)) ** 2),
            (graph.var, x.var(axis=0)),
            (graph.std, np.sqrt(x.var(axis=0) + 1e-2)),
            (graph.invstd, 1 / np.sqrt(x.var(axis=0) + 1e-2)),
            (graph.xhat, (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-2)),
            (graph.scaled, graph.out - beta),
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)

    def test_one_row_gives_beta_and_no_dx(self):
        x, gamma, beta, dout = batch((1, 3))
        graph = ref.batchnorm_forward(x, gamma, beta, 1e-5)
        np.testing.assert_array_equal(graph.out, beta[np.newaxis])
        for backward in (
            ref.batchnorm_backward_graph(dout, graph),
            ref.batchnorm_backward(dout, x, gamma, 1e-5),
        ):
            np.testing.assert_array_equal(backward[0], np.zeros((1, 3)))
            np.testing.assert_array_equal(backward[2], dout[0])

    def test_test_mode_uses_the_running_statistics(self):
        out = ref.batchnorm_test([[3.0, 5.0]], [2.0, 3.0], [1.0, -1.0], [1.0, 5.0], [3.0, 8.0], 1.0)
        np.testing.assert_array_equal(out, [[1.0 + 2.0 * 2.0 / 2.0, -1.0]])

    @pytest.mark.parametrize(("unbiased", "var"), [(False, 2 / 3), (True, 1.0)])
    def test_running_statistics(self, unbiased, var):
        old_mean, old_var = np.array([10.0]), np.array([20.0])
        x = np.array([[1.0], [2.0], [3.0]])
        mean, variance = ref.batchnorm_running(old_mean, old_var, x, 0.75, unbiased=unbiased)
        np.testing.assert_allclose(mean, [0.75 * 10 + 0.25 * 2], rtol=1e-15)
        np.testing.assert_allclose(variance, [0.75 * 20 + 0.25 * var], rtol=1e-15)

    def test_running_momentum_is_the_share_of_the_old_value_and_0_9(self):
        mean, _ = ref.batchnorm_running([1.0], [1.0], [[0.0]])
        np.testing.assert_allclose(mean, [0.9], rtol=1e-15)

    def test_wrong_shapes_name_the_argument(self):
        x = np.ones((3, 20))
        with pytest.raises(ValueError, match=r"gamma has shape \(10,\), expected \(20,\)"):
            ref.batchnorm_forward(x, np.ones(10), np.ones(20))
        with pytest.raises(ValueError, match=r"x has shape \(20,\), expected \(N, D\)"):
            ref.batchnorm_forward(x[0], np.ones(20), np.ones(20))
        with pytest.raises(ValueError, match=r"x has shape \(0, 20\), expected \(N, D\)"):
            ref.batchnorm_forward(x[:0], np.ones(20), np.ones(20))
        with pytest.raises(ValueError, match=r"dout has shape \(20,\), expected \(3, 20\)"):
            ref.batchnorm_backward(x[0], x, np.ones(20))
        with pytest.raises(TypeError, match="x has dtype complex128, expected real numbers"):
            ref.batchnorm_forward(x.astype(complex), np.ones(20), np.ones(20))
        with pytest.raises(ValueError, match="expected N >= 2 for an unbiased variance"):
            ref.batchnorm_running(np.ones(20), np.ones(20), x[:1], unbiased=True)


class TestLayerNorm:
    def test_normalises_rows(self):
        x, gamma, beta, _ = batch((5, 40), 3.0, 2.0)
        out = ref.layernorm_forward(x, gamma, beta, 1e-3)
        mean = x.mean(axis=1, keepdims=True)
        std = np.sqrt(x.var(axis=1, keepdims=True) + 1e-3)
        np.testing.assert_allclose(out, gamma * (x - mean) / std + beta, rtol=ROUNDING, atol=1e-14)
        assert out.flags.c_contiguous

    @pytest.mark.parametrize(
        ("shape", "mean", "deviation"),
        [((4, 3), 0.0, 1.0), ((1, 6), 2.0, 1.0), ((3, 20), -1.0, 0.1), ((3, 6), 1e6, 0.5)],
    )
    def test_backward_equals_central_differences(self, shape, mean, deviation):
        x, gamma, beta, dout = batch(shape, mean, deviation, seed=4)
        eps = 1e-3
        dx, dgamma, dbeta = ref.layernorm_backward(dout, x, gamma, eps)

        def out(x=x, gamma=gamma, beta=beta):
            return ref.layernorm_forward(x, gamma, beta, eps)

        assert rel_error(numerical(lambda v: out(x=v), x, dout), dx) < NUMERICAL
        assert rel_error(numerical(lambda v: out(gamma=v), gamma, dout), dgamma) < NUMERICAL
        assert rel_error(numerical(lambda v: out(beta=v), beta, dout), dbeta) < NUMERICAL

    def test_dx_equals_the_row_s_own_closed_form(self):
        x, gamma, _, dout = batch((4, 7), 1.0, 3.0)
        dx, _, _ = ref.layernorm_backward(dout, x, gamma, 1e-5)
        for row, upstream, got in zip(x, dout * gamma, dx, strict=True):
            _, expected, *_ = exact_batchnorm(row, 1.0, 0.0, 1e-5, upstream)
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)

    def test_constant_row_gives_exactly_beta(self):
        beta = np.array([0.3, -0.7, 1e-9])
        out = ref.layernorm_forward(np.full((2, 3), 0.1), np.ones(3), beta)
        np.testing.assert_array_equal(out, [beta, beta])


class TestChannels:
    @pytest.mark.parametrize(
        ("shape", "axis"), [((2, 3), 1), ((2, 3, 4), 1), ((2, 3, 4, 5), 1), ((2, 3, 4), -1)]
    )
    def test_a_row_is_what_the_channels_hold_at_one_place(self, shape, axis):
        x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        rows = ref.channels_to_rows(x, axis)
        assert rows.shape == (x.size // shape[axis], shape[axis])
        places = np.ndindex(*(n for i, n in enumerate(shape) if i != axis % len(shape)))
        for row, place in zip(rows, places, strict=True):
            at = list(place)
            at.insert(axis % len(shape), slice(None))
            np.testing.assert_array_equal(row, x[tuple(at)])
        np.testing.assert_array_equal(ref.rows_to_channels(rows, shape, axis), x)

    def test_images(self):
        x = np.random.default_rng(6).normal(size=(2, 3, 4, 5))
        np.testing.assert_array_equal(
            ref.channels_to_rows(x, 1)[(1 * 4 + 2) * 5 + 3], x[1, :, 2, 3]
        )

    def test_errors(self):
        with pytest.raises(
            ValueError, match=r"x has shape \(3,\), expected an axis 0 of at least 2"
        ):
            ref.channels_to_rows(np.ones(3), 0)
        with pytest.raises(ValueError, match=r"x has shape \(3, 2\), expected an axis 2"):
            ref.channels_to_rows(np.ones((3, 2)), 2)
        with pytest.raises(ValueError, match=r"rows has shape \(3, 2\), expected \(6, 2\)"):
            ref.rows_to_channels(np.ones((3, 2)), (3, 2, 2), 1)


class TestGroupNorm:
    SHAPES = (((3, 6), 1, 2), ((2, 6, 5), 1, 3), ((2, 4, 3, 2), 1, 1), ((2, 3, 2, 4), -1, 2))

    @staticmethod
    def arrays(shape, axis):
        rng = np.random.default_rng([7, *shape])
        parameters = rng.normal(size=(2, shape[axis]))
        return rng.normal(1, 2, shape), *parameters, rng.normal(size=shape)

    @pytest.mark.parametrize(("shape", "axis", "groups"), SHAPES)
    def test_normalises_each_group_of_each_sample(self, shape, axis, groups):
        x, gamma, beta, _ = self.arrays(shape, axis)
        out = ref.groupnorm_forward(x, gamma, beta, groups, 1e-3, axis)
        assert out.shape == shape
        size = shape[axis] // groups
        for sample, result in zip(x, out, strict=True):
            channels, results = (np.moveaxis(a, axis % x.ndim - 1, 0) for a in (sample, result))
            for c, channel in enumerate(results):
                first = c // size * size
                group = channels[first : first + size]
                xhat = (channels[c] - group.mean()) / np.sqrt(group.var() + 1e-3)
                np.testing.assert_allclose(channel, gamma[c] * xhat + beta[c], rtol=0, atol=1e-13)

    @pytest.mark.parametrize(("shape", "axis", "groups"), SHAPES)
    def test_backward_equals_central_differences(self, shape, axis, groups):
        x, gamma, beta, dout = self.arrays(shape, axis)
        dx, dgamma, dbeta = ref.groupnorm_backward(dout, x, gamma, groups, 1e-3, axis)

        def out(x=x, gamma=gamma, beta=beta):
            return ref.groupnorm_forward(x, gamma, beta, groups, 1e-3, axis)

        assert rel_error(numerical(lambda v: out(x=v), x, dout), dx) < NUMERICAL
        assert rel_error(numerical(lambda v: out(gamma=v), gamma, dout), dgamma) < NUMERICAL
        assert rel_error(numerical(lambda v: out(beta=v), beta, dout), dbeta) < NUMERICAL

    def test_one_channel_a_group_is_a_batch_norm_of_each_sample(self):
        x, gamma, beta, dout = self.arrays((3, 4, 5), 1)
        out = ref.groupnorm_forward(x, gamma, beta, 4)
        dx, dgamma, _ = ref.groupnorm_backward(dout, x, gamma, 4)
        total = np.zeros(4)
        for n in range(3):
            graph = ref.batchnorm_forward(x[n].T, gamma, beta)
            np.testing.assert_allclose(out[n], graph.out.T, rtol=0, atol=1e-14)
            expected, share, _ = ref.batchnorm_backward_graph(dout[n].T, graph)
            np.testing.assert_allclose(dx[n], expected.T, rtol=0, atol=1e-13)
            total += share
        np.testing.assert_allclose(dgamma, total, rtol=ROUNDING)

    def test_one_group_of_no_positions_is_layer_norm(self):
        x, gamma, beta, dout = self.arrays((5, 6), 1)
        out = ref.layernorm_forward(x, gamma, beta)
        np.testing.assert_allclose(
            ref.groupnorm_forward(x, gamma, beta, 1), out, rtol=0, atol=1e-14
        )
        results = ref.groupnorm_backward(dout, x, gamma, 1)
        for result, expected in zip(results, ref.layernorm_backward(dout, x, gamma), strict=True):
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13)

    def test_a_constant_group_gives_exactly_beta(self):
        x = np.full((2, 4, 3), 0.1)
        beta = np.array([0.3, -0.7, 1e-9, 5])
        out = ref.groupnorm_forward(x, np.ones(4), beta, 2)
        np.testing.assert_array_equal(out, np.broadcast_to(beta[:, np.newaxis], x.shape))

    def test_errors(self):
        x, ones = np.ones((2, 4, 3)), np.ones(4)
        for groups in (0, 3, 8):
            with pytest.raises(ValueError, match=f"num_groups is {groups}, expected a divisor of"):
                ref.groupnorm_forward(x, ones, ones, groups)
        with pytest.raises(ValueError, match=r"gamma has shape \(4,\), expected \(3,\)"):
            ref.groupnorm_forward(x, ones, ones, 1, axis=-1)
        with pytest.raises(ValueError, match=r"axis is -3, expected a channel axis after"):
            ref.groupnorm_forward(x, ones, ones, 1, axis=-3)
        with pytest.raises(ValueError, match=r"x has shape \(4,\), expected \(N, C, ...\)"):
            ref.groupnorm_forward(x[0, :, 0], ones, ones, 1)
        with pytest.raises(ValueError, match=r"dout has shape \(4, 3\), expected \(2, 4, 3\)"):
            ref.groupnorm_backward(x[0], x, ones, 1)


class TestRMSNorm:
    def test_divides_rows_by_their_root_mean_square(self):
        x, gamma, _, _ = batch((5, 40), 3.0, 2.0)
        out = ref.rmsnorm_forward(x, gamma, 1e-3)
        for row, result in zip(x, out, strict=True):
            rms = math.sqrt(math.fsum(row**2) / 40 + 1e-3)
            np.testing.assert_allclose(result, gamma * row / rms, rtol=1e-14)

    @pytest.mark.parametrize(
        ("shape", "mean", "deviation"),
        [((4, 3), 0.0, 1.0), ((1, 6), 2.0, 1.0), ((3, 20), -1.0, 0.1), ((5, 1), 1.0, 1.0)],
    )
    def test_backward_equals_central_differences(self, shape, mean, deviation):
        x, gamma, _, dout = batch(shape, mean, deviation, seed=8)
        # With one feature out is gamma's sign, but for eps: a large one leaves a slope.
        eps = 0.1 if shape[1] == 1 else 1e-3
        dx, dgamma = ref.rmsnorm_backward(dout, x, gamma, eps)
        assert rel_error(numerical(lambda v: ref.rmsnorm_forward(v, gamma, eps), x, dout), dx) < (
            NUMERICAL
        )
        by_gamma = numerical(lambda v: ref.rmsnorm_forward(x, v, eps), gamma, dout)
        assert rel_error(by_gamma, dgamma) < NUMERICAL

    def test_of_centred_rows_it_is_layer_norm(self):
        x, gamma, beta, _ = batch((4, 9))
        x -= x.mean(axis=1, keepdims=True)
        out = ref.layernorm_forward(x, gamma, 0 * beta)
        np.testing.assert_allclose(ref.rmsnorm_forward(x, gamma), out, rtol=1e-12)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"gamma has shape \(2,\), expected \(3,\)"):
            ref.rmsnorm_forward(np.ones((2, 3)), np.ones(2))
        with pytest.raises(ValueError, match=r"dout has shape \(3,\), expected \(2, 3\)"):
            ref.rmsnorm_backward(np.ones(3), np.ones((2, 3)), np.ones(3))


class TestOtherLayers:
    def test_affine_forward_is_the_assignment_s_known_answer(self):
        x = np.linspace(-0.1, 0.5, num=2 * 4 * 5 * 6).reshape(2, 4, 5, 6)
        w = np.linspace(-0.2, 0.3, num=4 * 5 * 6 * 3).reshape(4 * 5 * 6, 3)
        b = np.linspace(-0.3, 0.1, num=3)
        expected = [[1.49834967, 1.70660132, 1.91485297], [3.25553199, 3.5141327, 3.77273342]]
        np.testing.assert_allclose(ref.affine_forward(x, w, b), expected, rtol=1e-8)

    def test_affine_backward(self):
        rng = np.random.default_rng(5)
        x, w, b, dout = (rng.normal(size=s) for s in ((3, 2, 4), (8, 5), 5, (3, 5)))
        dx, dw, db = ref.affine_backward(dout, x, w)
        assert rel_error(numerical(lambda v: ref.affine_forward(v, w, b), x, dout), dx) < NUMERICAL
        assert rel_error(numerical(lambda v: ref.affine_forward(x, v, b), w, dout), dw) < NUMERICAL
        assert rel_error(numerical(lambda v: ref.affine_forward(x, w, v), b, dout), db) < NUMERICAL

    def test_affine_takes_an_empty_batch(self):
        assert ref.affine_forward(np.ones((0, 2, 2)), np.ones((4, 3)), np.ones(3)).shape == (0, 3)

    def test_affine_wrong_features(self):
        with pytest.raises(ValueError, match=r"x has shape \(2, 3\), expected .* = 4"):
            ref.affine_forward(np.ones((2, 3)), np.ones((4, 3)), np.ones(3))

    def test_relu(self):
        x = np.array([[-1.0, 0.0, 2.0, np.nan, np.inf]])
        np.testing.assert_array_equal(ref.relu_forward(x), [[0.0, 0.0, 2.0, np.nan, np.inf]])
        dout = np.array([[np.inf, 5.0, 7.0, 1.0, -3.0]])
        np.testing.assert_array_equal(ref.relu_backward(dout, x), [[0.0, 0.0, 7.0, 0.0, -3.0]])

    def test_dropout(self):
        x = np.array([[1.0, np.inf, 3.0]])
        mask = np.array([[True, False, True]])
        np.testing.assert_array_equal(ref.dropout_forward(x, mask, 0.5), [[2.0, 0.0, 6.0]])
        np.testing.assert_array_equal(ref.dropout_backward(x, mask, 0.25), [[4.0, 0.0, 12.0]])

    def test_dropout_errors(self):
        with pytest.raises(TypeError, match="mask has dtype float64, expected bool"):
            ref.dropout_forward(np.ones(3), np.ones(3), 0.5)
        with pytest.raises(ValueError, match=r"mask has shape \(2,\), expected \(3,\)"):
            ref.dropout_forward(np.ones(3), np.ones(2, bool), 0.5)
        with pytest.raises(ValueError, match="p is 0, expected 0 < p <= 1"):
            ref.dropout_forward(np.ones(3), np.ones(3, bool), 0)


class TestLosses:
    def test_softmax_by_hand(self):
        # Odds 1 : 2 : 5 in the first row, 1 : 1 : 2 in the second.
        loss, dx = ref.softmax_loss(np.log([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]]), [2, 0])
        assert loss == pytest.approx((math.log(8 / 5) + math.log(4)) / 2, rel=1e-14)
        expected = np.array([[1 / 8, 2 / 8, 5 / 8 - 1], [1 / 4 - 1, 1 / 4, 2 / 4]]) / 2
        np.testing.assert_allclose(dx, expected, rtol=1e-14)

    def test_softmax_of_huge_scores(self):
        loss, dx = ref.softmax_loss([[1e4, 0.0], [0.0, 1e4]], [0, 0])
        assert loss == 5e3
        np.testing.assert_array_equal(dx, [[0.0, 0.0], [-0.5, 0.5]])

    def test_svm_by_hand(self):
        # First row: margins 2 - 3 + 1 = 0 and 2.5 - 3 + 1 = 0.5. Second: 3 - 1 + 1 = 3 and 2.
        loss, dx = ref.svm_loss([[3.0, 2.0, 2.5], [3.0, 1.0, 2.0]], [0, 1])
        assert loss == (0.5 + 3.0 + 2.0) / 2
        np.testing.assert_array_equal(dx, [[-0.5, 0.0, 0.5], [0.5, -1.0, 0.5]])

    @pytest.mark.parametrize("loss", [ref.softmax_loss, ref.svm_loss])
    def test_gradient_equals_central_differences(self, loss):
        rng = np.random.default_rng(6)
        x, y = rng.normal(size=(6, 5)), rng.integers(5, size=6)
        _, dx = loss(x, y)
        step = eval_numerical_gradient(lambda v: loss(v, y)[0], x.copy(), verbose=False)
        assert rel_error(step, dx) < NUMERICAL

    def test_count_correct_by_hand(self):
        # The first of equal ones; a NaN before an infinity; no row has the class -1 or 3.
        x = [[0, 2, 2], [0, 2, 2], [np.inf, 0, np.nan], [3, 1, 2], [3, 1, 2], [3, 1, 2]]
        assert ref.count_correct(x, [1, 2, 2, 0, -3, 3]) == 3
        assert ref.count_correct([[np.nan, np.nan]], [0]) == 1
        with pytest.raises(TypeError, match="y has dtype float64, expected integers"):
            ref.count_correct(x, np.zeros(6))
        with pytest.raises(ValueError, match=r"y has shape \(2,\), expected \(6,\)"):
            ref.count_correct(x, [0, 1])

    def test_count_correct_is_argmax_s(self):
        rng = np.random.default_rng(7)
        x, y = rng.choice([-1.0, 0.0, 1.0, np.inf, np.nan], (200, 4)), rng.integers(4, size=200)
        assert ref.count_correct(x, y) == (x.argmax(axis=1) == y).sum()

    def test_l2_penalty_by_hand(self):
        loss, dw = ref.l2_penalty([[3.0, -4.0], [0.0, 1.0]], 0.5)
        assert loss == 6.5
        np.testing.assert_array_equal(dw, [[1.5, -2.0], [0.0, 0.5]])

    def test_sum_of_squares(self):
        # Exactly rounded: what an addition would round away adds up.
        assert ref.sum_of_squares(np.array([1.0] + [2.0**-27] * 64)) == 1 + 2.0**-48
        assert ref.sum_of_squares(2.0) == 4
        for x, total in (([1e200], np.inf), ([1e154] * 9, np.inf), ([np.inf, -np.inf], np.inf)):
            with np.errstate(over="ignore"):
                assert ref.sum_of_squares(x) == total
        assert math.isnan(ref.sum_of_squares([np.nan, np.inf]))

    @pytest.mark.parametrize("loss", [ref.softmax_loss, ref.svm_loss])
    def test_labels_are_checked(self, loss):
        x = np.zeros((2, 3))
        with pytest.raises(ValueError, match="y has labels from -1 to 0, expected 0 to 2"):
            loss(x, [-1, 0])
        with pytest.raises(ValueError, match="y has labels from 0 to 3, expected 0 to 2"):
            loss(x, [0, 3])
        with pytest.raises(ValueError, match=r"y has shape \(3,\), expected \(2,\)"):
            loss(x, [0, 1, 2])
        with pytest.raises(TypeError, match="y has dtype float64, expected integers"):
            loss(x, [0.0, 1.0])


def spaced(start, stop):
    """The assignment's test arrays: 20 values, 4 by 5."""
    return np.linspace(start, stop, 20).reshape(4, 5)


def elementwise(step, *arrays):
    """Run a step on each element alone, as Decimal of 50 digits."""
    with localcontext() as context:
        context.prec = 50
        results = [
            step(*(Decimal(float(v)) for v in values))
            for values in zip(*(a.ravel() for a in arrays), strict=True)
        ]
    return [
        np.array([float(r) for r in column]).reshape(4, 5) for column in zip(*results, strict=True)
    ]


class TestUpdateRules:
    """Against exact arithmetic, and against the corners of the assignment's printed answers."""

    w = spaced(-0.4, 0.6)
    dw = spaced(-0.6, 0.4)

    def corners(self, array):
        return [array[0, 0], array[0, 1], array[3, 3], array[3, 4]]

    def test_sgd(self):
        next_w = ref.sgd(self.w, self.dw, 1e-2)
        (expected,) = elementwise(lambda w, g: (w - Decimal("1e-2") * g,), self.w, self.dw)
        np.testing.assert_allclose(next_w, expected, rtol=1e-13)

    def test_sgd_momentum(self):
        velocity = spaced(0.6, 0.9)

        def step(w, g, v):
            v = Decimal("0.9") * v - Decimal("1e-3") * g
            return w + v, v

        got = ref.sgd_momentum(self.w, self.dw, velocity, learning_rate=1e-3)
        for one, other in zip(got, elementwise(step, self.w, self.dw, velocity), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-13)
        printed_w = [0.1406, 0.20738947, 1.34281053, 1.4096]
        printed_v = [0.5406, 0.55475789, 0.79544211, 0.8096]
        np.testing.assert_allclose(self.corners(got[0]), printed_w, atol=5e-9)
        np.testing.assert_allclose(self.corners(got[1]), printed_v, atol=5e-9)

    def test_rmsprop(self):
        cache = spaced(0.6, 0.9)

        def step(w, g, c):
            c = Decimal("0.99") * c + (1 - Decimal("0.99")) * g * g
            return w - Decimal("1e-2") * g / (c.sqrt() + Decimal("1e-8")), c

        got = ref.rmsprop(self.w, self.dw, cache, learning_rate=1e-2)
        for one, other in zip(got, elementwise(step, self.w, self.dw, cache), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-13)
        printed_w = [-0.39223849, -0.34037513, 0.54365823, 0.59576619]
        printed_cache = [0.5976, 0.6126277, 0.87657507, 0.8926]
        np.testing.assert_allclose(self.corners(got[0]), printed_w, atol=5e-9)
        np.testing.assert_allclose(self.corners(got[1]), printed_cache, atol=5e-9)

    @pytest.mark.parametrize("decay", [0.0, 1e-2, 0.3])
    @pytest.mark.parametrize("t", [0, 5])
    def test_adam_and_adamw(self, decay, t):
        m, v = spaced(0.6, 0.9), spaced(0.7, 0.5)

        def step(w, g, m, v):
            m = Decimal("0.9") * m + (1 - Decimal("0.9")) * g
            v = Decimal("0.999") * v + (1 - Decimal("0.999")) * g * g
            mhat = m / (1 - Decimal("0.9") ** (t + 1))
            vhat = v / (1 - Decimal("0.999") ** (t + 1))
            direction = mhat / (vhat.sqrt() + Decimal("1e-8")) + Decimal(decay) * w
            return w - Decimal("1e-2") * direction, m, v

        if decay == 0.0:
            *got, next_t = ref.adam(self.w, self.dw, m, v, t, learning_rate=1e-2)
        else:
            *got, next_t = ref.adamw(
                self.w, self.dw, m, v, t, learning_rate=1e-2, weight_decay=decay
            )
        assert next_t == t + 1
        for one, other in zip(got, elementwise(step, self.w, self.dw, m, v), strict=True):
            # 1 - 0.999^t loses three digits or so of sixteen.
            np.testing.assert_allclose(one, other, rtol=1e-12)

    def test_adam_s_printed_answers(self):
        next_w, m, v, t = ref.adam(
            self.w, self.dw, spaced(0.6, 0.9), spaced(0.7, 0.5), 5, learning_rate=1e-2
        )
        printed_w = [-0.40094747, -0.34836187, 0.54544852, 0.59801459]
        np.testing.assert_allclose(self.corners(next_w), printed_w, atol=5e-9)
        np.testing.assert_allclose(self.corners(m), [0.48, 0.49947368, 0.83052632, 0.85], atol=5e-9)
        printed_v = [0.69966, 0.68908382, 0.51013645, 0.49966]
        np.testing.assert_allclose(self.corners(v), printed_v, atol=5e-9)
        assert t == 6

    def test_defaults(self):
        w, dw, zero = np.array([1.0]), np.array([2.0]), np.array([0.0])
        np.testing.assert_allclose(ref.sgd(w, dw), [1 - 1e-2 * 2])
        np.testing.assert_allclose(ref.sgd_momentum(w, dw, [1.0])[1], [0.9 - 1e-2 * 2])
        np.testing.assert_allclose(ref.rmsprop(w, dw, zero)[1], [0.01 * 4])
        np.testing.assert_allclose(ref.rmsprop(w, dw, zero)[0], [1 - 1e-2 * 2 / 0.2])
        # Bias correction makes the first step lr * sign(dw), whatever the gradient's size.
        np.testing.assert_allclose(ref.adam(w, dw, zero, zero, 0)[0], [1 - 1e-3])
        np.testing.assert_allclose(ref.adamw(w, dw, zero, zero, 0)[0], [1 - 1e-3 * (1 + 1e-2)])
        # epsilon is added outside the root: a zero gradient moves nothing and divides by nothing.
        np.testing.assert_array_equal(ref.rmsprop(w, zero, zero)[0], w)
        np.testing.assert_array_equal(ref.adam(w, zero, zero, zero, 0)[0], w)
        # At a gradient of epsilon's size the step is half: 1 / (1 + 1).
        tiny = np.array([1e-8])
        np.testing.assert_allclose(w - ref.adam(w, tiny, zero, zero, 0)[0], [5e-4], rtol=1e-9)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"dw has shape \(1,\), expected \(3,\)"):
            ref.sgd(np.ones(3), np.ones(1))
        with pytest.raises(ValueError, match=r"velocity has shape \(\), expected \(3,\)"):
            ref.sgd_momentum(np.ones(3), np.ones(3), 0.0)
        with pytest.raises(ValueError, match="t is -1"):
            ref.adam(np.ones(3), np.ones(3), np.ones(3), np.ones(3), -1)


# The Random123 library's known-answer file, kat_vectors, philox4x32 10.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(*values):
    return np.array(values, dtype=np.uint32)


def philox_by_integers(counter, key):
    """Philox4x32-10 on Python's own integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for i in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        r0, r1 = (k0 + i * 0x9E3779B9) % 2**32, (k1 + i * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ r0, b % 2**32, (a >> 32) ^ c3 ^ r1, a % 2**32
    return c0, c1, c2, c3


class TestPhilox:
    @pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
    def test_known_answers(self, counter, key, expected):
        got = ref.philox4x32(words(*counter), words(*key))
        assert got.dtype == np.uint32
        assert got.tolist() == list(expected)

    def test_many_counters_at_once(self):
        counters = words(*(c for c, _, _ in KNOWN_ANSWERS)).reshape(3, 1, 4)
        got = ref.philox4x32(counters, words(5, 6))
        assert got.shape == (3, 1, 4)
        for counter, row in zip(counters[:, 0].tolist(), got[:, 0].tolist(), strict=True):
            assert row == list(philox_by_integers(counter, (5, 6)))

    def test_no_rounds_change_nothing(self):
        assert ref.philox4x32(words(1, 2, 3, 4), words(5, 6), rounds=0).tolist() == [1, 2, 3, 4]

    def test_errors(self):
        with pytest.raises(TypeError, match="counter has dtype int64, expected uint32"):
            ref.philox4x32(np.zeros(4, np.int64), words(0, 0))
        with pytest.raises(
            ValueError, match=r"counter has shape \(3,\), expected a last axis of 4"
        ):
            ref.philox4x32(words(0, 0, 0), words(0, 0))
        with pytest.raises(ValueError, match=r"key has shape \(1, 2\), expected \(2,\)"):
            ref.philox4x32(words(0, 0, 0, 0), words(0, 0).reshape(1, 2))


class TestDropoutMask:
    def test_element_block_and_word(self):
        seed, stream, step, p = 0xA4093822_299F31D0, 7, 11, 0.3
        mask = ref.dropout_mask((3, 7), p, seed, stream, step)
        assert mask.dtype == np.bool_
        assert mask.shape == (3, 7)
        for i, kept in enumerate(mask.ravel().tolist()):
            counter = (i // 4, 0, stream, step)
            word = philox_by_integers(counter, (0x299F31D0, 0xA4093822))[i % 4]
            assert kept == (word < round(p * 2**32))

    def test_the_bound_is_compared_strictly_and_in_integers(self):
        for i, word in enumerate(KNOWN_ANSWERS[0][2]):
            assert not ref.dropout_mask((4,), word / 2**32, 0, 0, 0)[i]
            assert ref.dropout_mask((4,), (word + 1) / 2**32, 0, 0, 0)[i]

    def test_one_keeps_even_the_largest_word_and_zero_drops_even_the_smallest(self, monkeypatch):
        monkeypatch.setattr(
            ref, "philox4x32", lambda counter, key: np.full_like(counter, 2**32 - 1)
        )
        assert ref.dropout_mask((5,), 1.0, 1, 2, 3).all()
        monkeypatch.setattr(ref, "philox4x32", lambda counter, key: np.zeros_like(counter))
        assert not ref.dropout_mask((5,), 0.0, 1, 2, 3).any()

    def test_a_longer_mask_starts_with_a_shorter(self):
        shorter = ref.dropout_mask((10,), 0.5, 1, 2, 3)
        longer = ref.dropout_mask((11, 3), 0.5, 1, 2, 3)
        np.testing.assert_array_equal(longer.ravel()[:10], shorter)

    def test_keeps_the_share_p(self):
        share = ref.dropout_mask((400, 1000), 0.25, 1, 2, 3).mean()
        # Five standard deviations of a binomial share.
        assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 400_000)

    @pytest.mark.parametrize("other", [(2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**32, 2, 3)])
    def test_seed_stream_and_step_each_matter(self, other):
        one = ref.dropout_mask((1000,), 0.5, 1, 2, 3)
        share = (one == ref.dropout_mask((1000,), 0.5, *other)).mean()
        assert 0.4 < share < 0.6  # independent, not equal and not opposite

    def test_empty_and_scalar_shapes(self):
        assert ref.dropout_mask((0, 5), 0.5, 1, 2, 3).shape == (0, 5)
        assert ref.dropout_mask((), 1.0, 1, 2, 3).shape == ()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((1.5, 0, 0, 0), "p is 1.5"),
            ((math.nan, 0, 0, 0), "p is nan"),
            ((0.5, -1, 0, 0), "seed is -1"),
            ((0.5, 2**64, 0, 0), r"expected 0 <= seed < 2\*\*64"),
            ((0.5, 0, 2**32, 0), r"expected 0 <= stream < 2\*\*32"),
            ((0.5, 0, 0, -1), "step is -1"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ref.dropout_mask((3,), *arguments)


class TestPurity:
    """No function changes an argument, shares memory with one, or returns less than float64."""

    f32 = np.float32
    x = np.linspace(-1, 2, 12, dtype=f32).reshape(4, 3)
    row = np.linspace(0.5, 2, 3, dtype=f32)
    y = np.array([0, 2, 1, 1])
    mask = x > 0

    CALLS = [  # noqa: RUF012
        (ref.batchnorm_forward, (x, row, row, 1e-5)),
        (ref.batchnorm_backward, (x, x + 1, row, 1e-5)),
        (ref.batchnorm_backward_graph, (x, ref.batchnorm_forward(x, row, row, 1e-5))),
        (ref.batchnorm_running, (row, row, x)),
        (ref.batchnorm_test, (x, row, row, row, row, 1e-5)),
        (ref.layernorm_forward, (x, row, row)),
        (ref.layernorm_backward, (x, x + 1, row)),
        (ref.groupnorm_forward, (x, row, row, 3)),
        (ref.groupnorm_backward, (x, x + 1, row, 1)),
        (ref.rmsnorm_forward, (x, row)),
        (ref.rmsnorm_backward, (x, x + 1, row)),
        (ref.channels_to_rows, (x, 1)),
        (ref.rows_to_channels, (x, (4, 3), 1)),
        (ref.affine_forward, (x, x.T, np.ones(4, f32))),
        (ref.affine_backward, (np.ones((4, 4), f32), x, x.T)),
        (ref.relu_forward, (x,)),
        (ref.relu_backward, (x, x)),
        (ref.dropout_forward, (x, mask, 0.5)),
        (ref.dropout_backward, (x, mask, 1.0)),
        (ref.softmax_loss, (x, y)),
        (ref.svm_loss, (x, y)),
        (ref.l2_penalty, (x, 0.3)),
        (ref.sgd, (x, x)),
        (ref.sgd_momentum, (x, x, x)),
        (ref.rmsprop, (x, x, x + 1)),
        (ref.adam, (x, x, x, x + 1, 3)),
        (ref.adamw, (x, x, x, x + 1, 3)),
    ]

    @staticmethod
    def arrays(value):
        if dataclasses.is_dataclass(value):
            value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
        values = value if isinstance(value, tuple) else (value,)
        return [v for v in values if isinstance(v, np.ndarray)]

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize(
        ("function", "arguments"), CALLS, ids=[function.__name__ for function, _ in CALLS]
    )
    def test_pure(self, function, arguments, dtype):
        given = []
        for argument in arguments:
            if isinstance(argument, np.ndarray) and argument.dtype == np.float32:
                argument = argument.astype(dtype)
            given.append(argument)
        inputs = [array for argument in given for array in self.arrays(argument)]
        before = [array.tobytes() for array in inputs]
        results = self.arrays(function(*given))
        assert results
        assert [array.tobytes() for array in inputs] == before
        for result in results:
            assert result.dtype == np.float64
            assert not any(np.shares_memory(result, array) for array in inputs)

"""Discretization and kernel against scipy and a float64 recurrence."""

import jax
import numpy as np
import pytest
import scipy.signal

import annotated_bigs as bigs


def random_system(seed, N=4):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(N, N)) - 2 * np.eye(N)
    return A, rng.normal(size=N)


@pytest.mark.parametrize(
    ("rule", "method"),
    [(bigs.discretize, "zoh"), (bigs.discretize_bilinear, "bilinear")],
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dt", [0.01, 0.3])
def test_discretization_is_scipys(rule, method, seed, dt):
    A, B = random_system(seed)
    A_bar, B_bar = rule(A, B, dt)
    exact = scipy.signal.cont2discrete(
        (A, B[:, None], np.eye(4), np.zeros((4, 1))), dt, method
    )
    np.testing.assert_allclose(A_bar, exact[0], atol=3e-6)
    np.testing.assert_allclose(B_bar, exact[1][:, 0], atol=3e-6)


def test_diagonal_discretization_is_scipys():
    poles = bigs.s4d_lin(3)
    ssm = bigs.DiagonalSSM(poles, np.ones(3) + 0j, np.array(0.2))
    A_bar, B_bar = bigs.discretize_diagonal(ssm)
    exact = scipy.signal.cont2discrete(
        (np.diag(poles), np.ones((3, 1)), np.eye(3), np.zeros((3, 1))), 0.2, "zoh"
    )
    np.testing.assert_allclose(A_bar, np.diag(exact[0]), atol=1e-6)
    np.testing.assert_allclose(B_bar, exact[1][:, 0], atol=1e-6)


def test_zero_order_hold_is_exact_for_held_input_and_bilinear_of_second_order():
    assert bigs.discretization_error(bigs.discretize, 1.0, 0.0) < 1e-5
    assert abs(bigs.order(bigs.discretize_bilinear, 0.0) - 2) < 0.1


@pytest.mark.parametrize("rule", [bigs.discretize, bigs.discretize_bilinear])
def test_sampled_input_is_of_first_order(rule):
    assert abs(bigs.order(rule, 1.0) - 1) < 0.15


def kernel64(ssm, L):
    """Equation (2) as a loop in float64: the answer to an impulse."""
    A = np.asarray(ssm.A, complex)
    C = np.asarray(ssm.C, complex)
    dt = float(ssm.dt)
    A_bar = np.exp(dt * A)
    x = (A_bar - 1) / A
    K = []
    for _ in range(L):
        K.append((C * x).sum().real)
        x = A_bar * x
    return np.array(K)


@pytest.mark.parametrize("scaling", ["hippo", "lin", "inv"])
@pytest.mark.parametrize("seed", range(3))
def test_kernel_is_the_recurrence(scaling, seed):
    ssm = bigs.SSM(64, scaling, bigs.nnx.Rngs(seed)).diagonal()
    exact = kernel64(ssm, 128)
    # The phase l dt Im A is rounded to float32 before its cosine is taken, so each fade
    # may be wrong by that rounding; the tolerance is the sum over n of |C_n B_n| phase
    # eps.
    phase = np.abs(np.asarray(ssm.A)) * float(ssm.dt) * 128
    weight = np.abs(np.asarray(ssm.C) * np.asarray(bigs.discretize_diagonal(ssm)[1]))
    tolerance = 2 * (weight * (phase + 4)).sum() * np.finfo(np.float32).eps
    assert np.abs(bigs.ssm_kernel(ssm, 128) - exact).max() < tolerance
    assert tolerance < 0.02 * np.abs(exact).max()


def test_poles_that_would_grow_are_clipped():
    ssm = bigs.SSM(4, "lin", bigs.nnx.Rngs(0))
    ssm.A_re[...] = np.full(4, 3.0, np.float32)
    assert np.all(np.asarray(ssm.diagonal().A.real) == np.float32(-1e-4))
    assert np.all(np.isfinite(bigs.ssm_kernel(ssm.diagonal(), 4096)))


def test_hippo_normal_part():
    A = bigs.hippo(16)
    p = np.sqrt(np.arange(16) + 0.5)
    normal = A + np.outer(p, p)
    assert np.allclose(normal @ normal.T, normal.T @ normal)
    found = np.linalg.eigvals(normal)
    assert np.allclose(found.real, -0.5)
    assert np.allclose(np.sort(found.imag), bigs.s4d_hippo(16).imag)


def test_step_sizes_are_log_uniform_between_a_hundredth_and_one():
    steps = np.array(
        [bigs.SSM(1, "lin", bigs.nnx.Rngs(seed)).log_step[0] for seed in range(200)]
    )
    assert np.log(0.01) <= steps.min() < -4.2
    assert -0.4 < steps.max() <= 0
    assert abs(steps.mean() - np.log(0.1)) < 0.3


def test_gradients_reach_every_parameter():
    ssm = bigs.SSM(8, "lin", bigs.nnx.Rngs(0))
    u = np.sin(np.arange(20.0)).reshape(10, 2)
    gradient = jax.grad(lambda s: (bigs.convolve(u, s.diagonal()) ** 2).sum())(ssm)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(g).max() > 0, path

"""Discretization and kernel against scipy and a float64 recurrence."""

import jax
import numpy as np
import pytest
import scipy.signal
from numpy.testing import assert_allclose

import annotated_bigs as bigs
from annotated_bigs import discretize, discretize_diagonal, ssm_kernel


def fresh(N, scaling, seed=0):
    return bigs.SSM(N, scaling, bigs.nnx.Rngs(seed))


def exact_discretization(A, dt, method, B=None):
    """scipy's A_bar and B_bar, B being ones unless given."""
    N = len(A)
    B = np.ones(N) if B is None else B
    C = np.eye(N)
    D = np.zeros((N, 1))
    found = scipy.signal.cont2discrete((A, B[:, None], C, D), dt, method)
    A_bar, B_bar, *_ = found
    return A_bar, B_bar[:, 0]


@pytest.mark.parametrize(
    ("rule", "method"),
    [(discretize, "zoh"), (bigs.discretize_bilinear, "bilinear")],
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dt", [0.01, 0.3])
def test_discretization_is_scipys(rule, method, seed, dt):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(4, 4))
    A -= 2 * np.eye(4)
    B = rng.normal(size=4)

    A_bar, B_bar = rule(A, B, dt)

    exact_A_bar, exact_B_bar = exact_discretization(A, dt, method, B)
    assert_allclose(A_bar, exact_A_bar, atol=3e-6)
    assert_allclose(B_bar, exact_B_bar, atol=3e-6)


def test_diagonal_discretization_is_scipys():
    poles = bigs.s4d_lin(3)
    ssm = bigs.DiagonalSSM(poles, np.ones(3) + 0j, np.array(0.2))

    A_bar, B_bar = discretize_diagonal(ssm)

    exact_A_bar, exact_B_bar = exact_discretization(np.diag(poles), 0.2, "zoh")
    assert_allclose(A_bar, np.diag(exact_A_bar), atol=1e-6)
    assert_allclose(B_bar, exact_B_bar, atol=1e-6)


def kernel64(ssm, L):
    """Equation (2) as a loop in float64: the answer to an impulse."""
    A = np.asarray(ssm.A, complex)
    C = np.asarray(ssm.C, complex)
    A_bar = np.exp(float(ssm.dt) * A)
    x = (A_bar - 1) / A
    K = []
    for _ in range(L):
        read = C * x
        K.append(read.sum().real)
        x = A_bar * x
    return np.array(K)


@pytest.mark.parametrize("scaling", ["hippo", "lin", "inv"])
@pytest.mark.parametrize("seed", range(3))
def test_kernel_is_the_recurrence(scaling, seed):
    ssm = fresh(64, scaling, seed).diagonal()
    exact = kernel64(ssm, 128)

    found = ssm_kernel(ssm, 128)

    # The phase l dt Im A is rounded to float32 before its cosine is taken, so each fade
    # may be wrong by that rounding; the tolerance is the sum over n of |C_n B_n| phase
    # eps.
    _, B_bar = discretize_diagonal(ssm)
    phase = np.abs(ssm.dt * ssm.A) * 128
    weight = np.abs(ssm.C * B_bar)
    rounding = np.finfo(np.float32).eps
    errors = weight * (phase + 4) * rounding
    tolerance = 2 * errors.sum()
    assert np.abs(found - exact).max() < tolerance
    assert tolerance < 0.02 * np.abs(exact).max()


def test_poles_that_would_grow_are_clipped():
    ssm = fresh(4, "lin")
    ssm.A_re[...] = np.full(4, 3.0, np.float32)

    diagonal = ssm.diagonal()

    real = np.asarray(diagonal.A.real)
    assert np.all(real == np.float32(-1e-4))
    kernel = ssm_kernel(diagonal, 4096)
    assert np.all(np.isfinite(kernel))


def test_hippo_normal_part():
    p = np.sqrt(np.arange(16) + 0.5)

    normal = bigs.hippo(16) + np.outer(p, p)

    left = normal @ normal.T
    right = normal.T @ normal
    assert np.allclose(left, right)
    eigenvalues = np.linalg.eigvals(normal)
    assert np.allclose(eigenvalues.real, -0.5)
    frequencies = np.sort(eigenvalues.imag)
    assert np.allclose(frequencies, bigs.s4d_hippo(16).imag)


def test_step_sizes_are_log_uniform_between_a_hundredth_and_one():
    ssms = [fresh(1, "lin", seed) for seed in range(200)]
    steps = np.array([ssm.log_step[0] for ssm in ssms])

    assert np.log(0.01) <= steps.min() < -4.2
    assert -0.4 < steps.max() <= 0
    assert abs(steps.mean() - np.log(0.1)) < 0.3


def test_gradients_reach_every_parameter():
    ssm = fresh(8, "lin")
    u = np.sin(np.arange(20.0))

    def loss(ssm):
        y = bigs.convolve(u.reshape(10, 2), ssm.diagonal())
        return (y**2).sum()

    gradient = jax.grad(loss)(ssm)

    for path, part in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(part).max() > 0, path

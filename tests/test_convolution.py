"""The convolution's four ways against a float64 sum, in value, structure and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_bigs as bigs

LENGTHS = [1, 2, 7, 31, 64, 127, 130]


def exact(u, K, past):
    """The sum of equation (7) in float64, by numpy's own convolution."""
    u = u if past else u[::-1]
    y = np.stack([np.convolve(u[:, c], K)[:len(u)] for c in range(u.shape[1])], 1)
    return y if past else y[::-1]


def case(L, seed=0, scaling="hippo", dtype=np.float32):
    rng = np.random.default_rng(seed)
    ssm = bigs.SSM(16, scaling, bigs.nnx.Rngs(seed)).diagonal()
    return rng.normal(size=(L, 3)).astype(dtype), ssm


def naive_error(u, K):
    """Error of a plain float32 sum, against float64: what a tolerance may be earned from."""
    L = len(u)
    plain = np.zeros_like(u)
    for lag in range(L):
        plain[lag:] += K[lag] * u[:L - lag]
    return np.abs(plain - exact(u.astype(float), K.astype(float), True)).max()


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("L", LENGTHS)
def test_direct_fft_toeplitz(L, past):
    u, ssm = case(L)
    K = np.asarray(bigs.ssm_kernel(ssm, L))
    truth = exact(u.astype(float), K.astype(float), past)
    rounding = np.finfo(np.float32).eps * np.abs(K).sum() * np.abs(u).max()
    for way in (bigs.convolve_direct, bigs.convolve_toeplitz, bigs.convolve_fft):
        error = np.abs(way(u, K, past) - truth).max()
        assert error <= 8 * naive_error(u, K) + 4 * rounding, way.__name__


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("scaling", ["hippo", "lin", "inv"])
def test_blocks(L, past, block, scaling):
    u, ssm = case(L, 1, scaling)
    K = np.asarray(bigs.ssm_kernel(ssm, L))
    truth = exact(u.astype(float), K.astype(float), past)
    phase = np.abs(np.asarray(ssm.A)).max() * float(ssm.dt) * L
    scale = np.abs(np.asarray(ssm.C) * np.asarray(bigs.discretize_diagonal(ssm)[1])).sum() * np.abs(u).sum(0).max()
    tolerance = 4 * np.finfo(np.float32).eps * (phase + 8) * scale
    assert np.abs(bigs.convolve_blocks(u, ssm, block, past) - truth).max() <= tolerance


@pytest.mark.parametrize("algorithm", ["toeplitz", "fft", "blocks"])
@pytest.mark.parametrize("past", [True, False])
def test_jacobian_is_the_triangle(algorithm, past):
    u, ssm = case(12)
    J = jax.jacobian(lambda x: bigs.convolve(x[:, None], ssm, past, algorithm)[:, 0])(jnp.asarray(u[:, 0]))
    T = bigs.toeplitz(bigs.ssm_kernel(ssm, 12).at[0].add(ssm.D), past)
    np.testing.assert_allclose(J, T, atol=2e-5 * float(jnp.abs(T).max()))
    dark = np.triu(np.ones((12, 12)), 1) if past else np.tril(np.ones((12, 12)), -1)
    if algorithm != "fft":  # the FFT is causal only up to rounding
        assert np.all(np.asarray(J)[dark > 0] == 0)


@pytest.mark.parametrize("algorithm", ["toeplitz", "fft", "blocks"])
def test_reading_backward_is_reading_the_reversed_text(algorithm):
    u, ssm = case(33)
    backward = bigs.convolve(u, ssm, False, algorithm)
    forward = bigs.convolve(u[::-1], ssm, True, algorithm)[::-1]
    np.testing.assert_allclose(backward, forward, atol=1e-4)


def test_gradients_agree():
    u, ssm = case(40)
    weights = jnp.asarray(np.random.default_rng(5).normal(size=u.shape))
    loss = lambda x, s, way: (weights * bigs.convolve(x, s, True, way)).sum()  # noqa: E731
    grads = {way: jax.tree.leaves(jax.grad(loss, (0, 1))(jnp.asarray(u), ssm, way))
             for way in ("toeplitz", "fft", "blocks")}
    for way in ("fft", "blocks"):
        for a, b in zip(grads["toeplitz"], grads[way], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3 * max(1.0, float(jnp.abs(a).max())))


@pytest.mark.parametrize("algorithm", ["toeplitz", "blocks"])
def test_bfloat16_stays_near(algorithm):
    u, ssm = case(100)
    wide, narrow = (bigs.convolve(x, ssm, True, algorithm) for x in (u, jnp.asarray(u, jnp.bfloat16)))
    assert narrow.dtype == jnp.bfloat16
    assert float(jnp.abs(narrow - wide).max()) < 0.02 * float(jnp.abs(wide).max())


def test_unknown_algorithm():
    u, ssm = case(4)
    with pytest.raises(bigs.UserError, match="convolution: 'magic'"):
        bigs.convolve(u, ssm, True, "magic")

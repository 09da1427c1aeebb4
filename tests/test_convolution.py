"""The convolution's four ways against float64: values, gradients, structure,
operations.

The oracle is numpy and scipy in float64 and shares no code with the document: the sum
(7) with a kernel in complex128, gradients by formula. It is held against a recurrence
and against difference quotients first.

Tolerances are earned. The naive way is the recurrence itself, token by token in the
precision under test; its largest error over a few neighbouring systems (one alone may
be lucky) is what float32 costs, and a small multiple of that is allowed. One rounding
is taken as given: what every way starts from is dt A in float32.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

import annotated_bigs as bigs

NAMES = ("A_re", "A_im", "C", "D", "log_step")
LENGTHS = (1, 31, 127, 130, 509, 1021, 2048, 4096, 8191, 32768)
MORE_LENGTHS = (
    2,
    3,
    7,
    16,
    64,
    128,
    255,
    257,
    1024,
    1025,
    2039,
    3000,
    4093,
    16384,
    32749,
)
BLOCKS = (16, 32, 64, 100, 128, 250, 256, 512)
STATES = (1, 2, 16, 64, 64, 256)


def system(p):
    """The SSM of the parameters p, by the document's own method: the clipped pole and
    the step are part of it.
    """
    return bigs.SSM.diagonal(SimpleNamespace(**p))


def fresh(N, scaling, seed):
    ssm = bigs.SSM(N, scaling, bigs.nnx.Rngs(seed))
    return {name: np.asarray(getattr(ssm, name)[...]) for name in NAMES}


def trained(N, scaling, seed):
    """As after training: fades from 5 to 1e-4, frequencies moved, any C and D, steps
    from 1e-3 to 1.
    """
    p = fresh(N, scaling, seed)
    rng = np.random.default_rng(seed)
    p |= {
        "A_re": -np.exp(rng.uniform(np.log(1.01e-4), np.log(5), N)),
        "A_im": p["A_im"] * (1 + 0.2 * rng.normal(size=N)),
        "C": p["C"] * np.exp(rng.normal(size=(N, 1))),
        "D": rng.normal(size=1),
        "log_step": rng.uniform(np.log(1e-3), 0, 1),
    }
    return {name: value.astype(np.float32) for name, value in p.items()}


def neighbours(p, count=4):
    """p itself, and systems whose parameters differ from it by a part in a thousand."""
    rng = np.random.default_rng(0)
    for k in range(count):
        q = {
            name: (
                (x * (1 + 1e-3 * (k > 0) * rng.normal(size=x.shape))).astype(np.float32)
            )
            for name, x in p.items()
        }
        yield q | {
            "A_re": np.minimum(q["A_re"], np.float32(-1.01e-4))
        }  # clear of the clip


def rounded(s):
    """dt A as float32 has it, in complex128."""
    return (np.float32(s.dt) * np.asarray(s.A, np.complex64)).astype(complex)


def exact_kernel(s, L, z):
    A = np.asarray(s.A, complex)
    C = np.asarray(s.C, complex)
    return ((C * np.expm1(z) / A) @ np.exp(z[:, None] * np.arange(L))).real


def exact(u, w, s, past, z=None):
    """y = K * u + D u in float64, and the gradients of sum(w y) with respect to u and
    all parameters.
    """
    A = np.asarray(s.A, complex)
    C = np.asarray(s.C, complex)
    dt = float(s.dt)
    D = float(s.D)
    z = dt * A if z is None else z
    turn = 1 if past else -1
    u = np.asarray(u, float)[::turn]
    w = np.asarray(w, float)[::turn]
    L = len(u)
    write = np.expm1(z) / A
    fades = np.exp(z[:, None] * np.arange(L))
    K = ((C * write) @ fades).real[:, None]
    slide = lambda x: scipy.signal.fftconvolve(x, K, axes=0)[:L] + D * x  # noqa: E731
    by_lag = scipy.signal.fftconvolve(w, u[::-1], axes=0)[L - 1 :].sum(
        1
    )  # of the loss by K_l
    # sum_l g_l e^(l z), sum_l l g_l e^(l z)
    faded = fades @ by_lag
    aged = fades @ (np.arange(L) * by_lag)
    by_A = C * ((dt * np.exp(z) - write) / A * faded + write * dt * aged)
    by_C = write * faded
    by_dt = (C * (np.exp(z) * faded + write * A * aged)).sum().real
    return {
        "y": slide(u)[::turn],
        "u": slide(w[::-1])[::-1][::turn],
        "A_re": by_A.real,
        "A_im": -by_A.imag,
        "C": np.stack([by_C.real, -by_C.imag], 1),
        "D": by_lag[:1],
        "log_step": np.array([dt * by_dt]),
    }


def one_by_one(past):
    """The naive way: the recurrence (1) in float32. In bfloat16 it writes and reads its
    float32 state rounded.
    """

    def run(u, s):
        kind = jnp.finfo(u.dtype)
        cut = lambda x: jax.lax.reduce_precision(x, kind.nexp, kind.nmant)  # noqa: E731
        both = lambda x: cut(x.real) + 1j * cut(x.imag)  # noqa: E731
        A_bar = jnp.exp(s.dt * s.A)
        B_bar = both(jnp.expm1(s.dt * s.A) / s.A)

        def step(x, u):
            x = A_bar[:, None] * x + B_bar[:, None] * u
            return x, (both(s.C)[:, None] * both(x)).sum(0).real + cut(s.D) * u

        empty = jnp.zeros((len(s.A), u.shape[1]), jnp.complex64)
        wide = u.astype(jnp.float32)
        return jax.lax.scan(step, empty, wide, reverse=not past)[1].astype(u.dtype)

    return run


def lag_by_lag(u, K, past):
    """The other naive way, for values: the sum (7) in float32. Where nothing fades it
    is a long one.
    """
    u, K = (np.asarray(x, np.float32) for x in (u if past else u[::-1], K))
    y = np.zeros_like(u)
    for lag in range(len(u)):
        y[lag:] += K[lag] * u[: len(u) - lag]
    return y if past else y[::-1]


def with_kernel(way, past):
    return lambda u, s: way(u, bigs.ssm_kernel(s, u.shape[-2]).at[0].add(s.D), past)


def ways(L, block, past):
    found = {
        "fft": with_kernel(bigs.convolve_fft, past),
        "blocks": lambda u, s: bigs.convolve_blocks(u, s, block, past),
    }
    if L <= 4096:
        found |= {
            "direct": with_kernel(bigs.convolve_direct, past),
            "toeplitz": with_kernel(bigs.convolve_toeplitz, past),
        }
    return found


def differentiated(way):
    """u, w, p -> y and the gradients of sum(w y), as numpy arrays by name."""

    def loss(u, p, w):
        y = way(u, system(p))
        return (w * y.astype(jnp.float32)).sum(), y

    compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True))

    def run(u, w, p):
        (by_u, by_p), y = compiled(u, p, w)
        return {
            name: np.asarray(x, float)
            for name, x in (by_p | {"y": y, "u": by_u}).items()
        }

    return run


def furthest(a, b):
    return {name: np.abs(a[name] - b[name]).max() for name in b}


def check(p, L, block, past, dtype, only=None, seed=0, channels=2):
    """Every way's value and gradients within 16 times the naive error and four
    roundings of the result.
    """
    rng = np.random.default_rng(seed)
    u, w = (jnp.asarray(rng.normal(size=(L, channels)), dtype) for _ in range(2))
    truth = lambda q: exact(u, w, system(q), past, rounded(system(q)))  # noqa: E731
    true = truth(p)
    naive = differentiated(one_by_one(past))
    wide = jnp.asarray(w, jnp.float32)
    earned = [furthest(naive(u, wide, q), truth(q)) for q in neighbours(p)]
    if L <= 4096:
        K = exact_kernel(system(p), L, rounded(system(p))) + p["D"][0] * np.eye(1, L)[0]
        plain = {"y": lag_by_lag(u, K, past), "u": lag_by_lag(w, K, not past)}
        earned.append(furthest(plain | {name: true[name] for name in NAMES}, true))
    scale = {name: np.abs(x).max() for name, x in true.items()}
    scale["D"] = np.linalg.norm(np.asarray(u, float)) * np.linalg.norm(
        np.asarray(w, float)
    )  # bounds every lag's sum
    floor = 4 * float(jnp.finfo(dtype).eps)
    allowed = {
        name: 16 * max(e[name] for e in earned) + floor * scale[name] for name in true
    }
    for name, way in ways(L, block, past).items():
        if only not in (None, name):
            continue
        error = furthest(differentiated(way)(u, wide, p), true)
        if (name, dtype) == ("direct", "bfloat16"):
            # jax.grad adds it up lag by lag in bfloat16; an oracle, never trained
            del error["u"]
        too_far = {
            k: (error[k], allowed[k]) for k in error if not error[k] <= allowed[k]
        }
        assert not too_far, f"{name}: (error, tolerance) of {too_far}"


def sample(lengths, seed, rounds=1):
    """Blocks, systems, directions and precisions dealt to the lengths so that each
    comes up about equally often.
    """
    rng = np.random.default_rng(seed)
    lengths = np.repeat(lengths, rounds).tolist()

    def deal(*options):
        return (
            options[i] for i in rng.permutation(np.arange(len(lengths)) % len(options))
        )

    hands = zip(
        lengths,
        deal(*BLOCKS),
        deal(*STATES),
        deal("hippo", "lin", "inv"),
        deal(fresh, trained),
        deal(True, False),
        deal("float32", "float32", "bfloat16"),
        strict=True,
    )
    for L, block, N, scaling, make, past, dtype in hands:
        side = "past" if past else "future"
        name = f"{L}-by-{block}-{N}-{make.__name__}-{scaling}-{side}-{dtype}"
        yield pytest.param(L, block, N, scaling, make, past, dtype, id=name)


@pytest.mark.parametrize(
    ("L", "block", "N", "scaling", "make", "past", "dtype"), sample(LENGTHS, seed=2158)
)  # long ones are large
def test_value_and_gradients(L, block, N, scaling, make, past, dtype):
    check(make(N, scaling, L), L, block, past, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("L", "block", "N", "scaling", "make", "past", "dtype"),
    sample(LENGTHS + MORE_LENGTHS, 1, 2),
)
def test_value_and_gradients_further(L, block, N, scaling, make, past, dtype):
    check(make(N, scaling, L + 1), L, block, past, dtype, seed=1)


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize(
    ("L", "scaling", "make"),
    [(1, "lin", fresh), (57, "inv", trained), (300, "hippo", trained)],
)
def test_the_oracle_is_scipys_discretization_and_a_recurrence(L, scaling, make, past):
    s = system(make(16, scaling, 3))
    rng = np.random.default_rng(3)
    A = np.asarray(s.A, complex)
    C = np.asarray(s.C, complex)
    u = rng.normal(size=(L, 2))
    A_bar, B_bar, *_ = scipy.signal.cont2discrete(
        (np.diag(A), np.ones((16, 1)), C[None], 0), float(s.dt), "zoh"
    )
    x = np.zeros((16, 2), complex)
    y = np.zeros((L, 2))
    for i in range(L) if past else reversed(range(L)):
        x = A_bar @ x + B_bar * u[i]
        y[i] = (C @ x).real + float(s.D) * u[i]
    np.testing.assert_allclose(
        exact(u, u, s, past)["y"], y, rtol=0, atol=1e-10 * np.abs(y).max()
    )


@pytest.mark.parametrize("past", [True, False])
def test_the_oracles_gradients_are_difference_quotients(past):
    N = 3
    h = 1e-6
    rng = np.random.default_rng(4)
    u, w = rng.normal(size=(2, 20, 2))
    p = {name: x.astype(float) for name, x in trained(N, "lin", 4).items()} | {
        "A_re": -rng.random(N)
    }

    def run(u, p):
        A = p["A_re"] + 1j * p["A_im"]
        C = p["C"][:, 0] + 1j * p["C"][:, 1]
        return exact(
            u,
            w,
            SimpleNamespace(A=A, C=C, dt=np.exp(p["log_step"][0]), D=p["D"][0]),
            past,
        )

    loss = lambda u, p: (w * run(u, p)["y"]).sum()
    found = run(u, p)
    for name in NAMES:
        for place in np.ndindex(p[name].shape):
            nudge = np.zeros(p[name].shape)
            nudge[place] = h
            slope = (
                loss(u, p | {name: p[name] + nudge})
                - loss(u, p | {name: p[name] - nudge})
            ) / (2 * h)
            assert abs(found[name][place] - slope) < 1e-7 * (
                1 + np.abs(found[name]).max()
            ), name
    toward = rng.normal(size=u.shape)
    assert loss(u + toward, p) - loss(u, p) == pytest.approx(
        (toward * found["u"]).sum()
    )  # linear in u


def test_poles_that_neither_fade_nor_turn():
    """|dt A| = 1e-7, the least that clip and steps allow: float32 keeps no digit of
    exp(dt A) - 1, but of expm1.
    """
    p = {
        "A_re": np.full(2, -1.01e-4),
        "A_im": np.array([0, 1e-3]),
        "C": np.ones((2, 2)),
        "D": np.ones(1),
        "log_step": np.log(np.full(1, 1e-3)),
    }
    check(
        {name: x.astype(np.float32) for name, x in p.items()}, 40, 16, True, "float32"
    )


@pytest.mark.parametrize(
    ("block", "past"), [(16, True), (16, False), (17, True), (17, False)]
)
def test_many_blocks_and_few(block, past):
    """Beyond 64 blocks a loop carries the states, up to 64 a product: 1030 tokens are
    65 blocks of 16 or 61 of 17.
    """
    check(
        trained(16, "lin", 7), 1030, block, past, "float32", only="blocks", channels=3
    )


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("blocks", [1, 5, 64, 65, 100])
def test_states_are_carried_from_block_to_block(blocks, past):
    rng = np.random.default_rng(blocks)
    N = 3
    written = rng.normal(size=(2, blocks, 2 * N, 4)).astype(np.float32)
    rate = np.array([-0.2 + 3j, -1 - 2j, -0.01])
    w = written[..., :N, :] + 1j * written[..., N:, :]
    h = [None] * blocks
    state = 0
    for c in range(blocks) if past else reversed(range(blocks)):
        h[c] = state + np.zeros((2, N, 4))
        state = np.exp(rate)[:, None] * state + w[:, c]
    h = np.stack(h, 1)
    found = bigs.carry_states(written, rate.astype(np.complex64), past)
    np.testing.assert_allclose(
        found,
        np.concatenate([h.real, h.imag], -2),
        rtol=0,
        atol=2e-5 * np.abs(written).max(),
    )


def evenly_heard(N, dt):
    """Poles that hardly fade, at HiPPO's frequencies; read-outs undo B_bar, so that
    fast ones weigh as much.
    """
    p = fresh(N, "hippo", 0) | {
        "A_re": np.full(N, -1e-4, np.float32),
        "D": np.zeros(1, np.float32),
        "log_step": np.log(np.full(1, dt, np.float32)),
    }
    s = system(p)
    C = (
        np.exp(2j * np.pi * np.random.default_rng(0).random(N))
        * np.asarray(s.A)
        / np.expm1(rounded(s))
    )
    return system(p | {"C": np.stack([C.real, C.imag], 1).astype(np.float32)})


def test_unwinding_saves_the_phase():
    """exp(l dt A) as float32 takes it loses digits with every turn; less the whole
    turns, it keeps them.
    """
    L = 32768
    s = evenly_heard(64, 0.1)
    z = rounded(s)
    A = np.asarray(s.A)
    C = np.asarray(s.C)
    K = exact_kernel(s, L, z)
    impulse = jnp.eye(L, 1)
    off = lambda x: np.abs(np.asarray(x, float) - K).max()  # noqa: E731
    phases = z.astype(np.complex64)[:, None] * np.arange(L, dtype=np.float32)
    naive = off(((C * np.expm1(z) / A) @ np.exp(phases)).real)
    recurrence = off(jax.jit(one_by_one(True))(impulse, s)[:, 0])
    kernel = off(bigs.ssm_kernel(s, L))
    loop, product = (
        off(jax.jit(ways(L, block, True)["blocks"])(impulse, s)[:, 0])
        for block in (250, 521)
    )
    assert naive > 6 * kernel
    assert naive > 10 * loop
    assert naive > 10 * product
    assert kernel < 4 * recurrence
    assert loop < 2 * recurrence
    assert product < 2 * recurrence


def operations_a_channel(way, L, d=64):
    """By the compiler's count, the difference of two widths: what does not depend on
    the channels drops out.
    """

    def count(d):
        u = jax.ShapeDtypeStruct((L, d), np.float32)
        s = system(fresh(64, "lin", 0))
        counted = jax.jit(way).lower(u, s).compile().cost_analysis()
        return (counted[0] if isinstance(counted, list) else counted)["flops"]

    return (count(2 * d) - count(d)) / d


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="other compilers count other things"
)
@pytest.mark.parametrize(
    ("L", "Q"),
    [(300, 256), (4096, 256), (4096, 64), (2050, 128), (100, 256), (130 * 64, 64)],
)
def test_operations_of_blocks_are_the_compilers(L, Q):
    counted = operations_a_channel(lambda u, s: bigs.convolve_blocks(u, s, Q), L)
    assert counted == pytest.approx(
        bigs.convolution_operations("blocks", L, Q=Q), rel=0.03
    )


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="other compilers count other things"
)
@pytest.mark.parametrize("L", [128, 1000])
def test_operations_of_the_matrix_are_the_compilers(L):
    counted = operations_a_channel(with_kernel(bigs.convolve_toeplitz, True), L)
    assert counted == pytest.approx(
        bigs.convolution_operations("toeplitz", L), rel=0.03
    )


@pytest.mark.parametrize("way", ["direct", "toeplitz", "fft", "blocks"])
@pytest.mark.parametrize("past", [True, False])
def test_jacobian_is_the_triangle(way, past):
    p = trained(4, "lin", 2)
    L = 24
    run = ways(L, 7, past)[way]
    J = np.asarray(
        jax.jit(jax.jacobian(lambda x: run(x[:, None], system(p))[:, 0]))(jnp.zeros(L))
    )
    K = exact_kernel(system(p), L, rounded(system(p)))
    K[0] += p["D"][0]
    T = scipy.linalg.toeplitz(K, np.zeros(L))
    np.testing.assert_allclose(
        J,
        T if past else T.T,
        rtol=0,
        atol=16 * np.finfo(np.float32).eps * np.abs(K).sum(),
    )
    if way != "fft":  # the FFT is causal only up to rounding
        assert np.all((np.triu(J, 1) if past else np.tril(J, -1)) == 0)


@pytest.mark.parametrize("way", ["direct", "toeplitz", "fft", "blocks"])
def test_reading_backward_is_reading_the_reversed_text(way):
    s = system(trained(16, "inv", 5))
    u = np.random.default_rng(5).normal(size=(101, 3)).astype(np.float32)
    backward = jax.jit(ways(101, 16, False)[way])(u, s)
    forward = jax.jit(ways(101, 16, True)[way])(u[::-1], s)[::-1]
    np.testing.assert_allclose(
        backward, forward, rtol=0, atol=2e-6 * np.abs(forward).max()
    )


@pytest.mark.parametrize(("make", "rank"), [(trained, 8), (fresh, 4)])
def test_blocks_off_the_diagonal_have_low_rank(make, rank):
    """2N for any poles, N for conjugate pairs, as at the start; up to rounding."""
    p = make(4, "hippo", 1) | {
        "A_re": np.float32([-0.01, -0.02, -0.02, -0.01]),
        "log_step": np.zeros(1, np.float32),
    }
    T = np.asarray(bigs.convolve_blocks(np.eye(96, dtype=np.float32), system(p), 16))
    for rows, columns in ((slice(48, 96), slice(0, 48)), (slice(32, 96), slice(0, 16))):
        heard = np.linalg.svd(T[rows, columns].astype(float), compute_uv=False)
        assert heard[rank] < 1e-5 * heard[0]
        assert heard[rank - 1] > 1e-5 * heard[0]


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize(
    ("way", "block"),
    [("direct", 0), ("toeplitz", 0), ("fft", 0), ("blocks", 16), ("blocks", 1)],
)
def test_a_batch_is_its_sentences(way, block, past):
    s = system(fresh(8, "hippo", 6))
    u = np.random.default_rng(6).normal(size=(2, 3, 70, 2)).astype(np.float32)
    run = jax.jit(ways(70, block, past)[way])
    together = run(u, s)
    assert together.shape == u.shape
    for place in np.ndindex(2, 3):
        alone = run(u[place], s)
        np.testing.assert_allclose(
            together[place], alone, rtol=0, atol=2e-6 * np.abs(alone).max()
        )


@pytest.mark.parametrize(("L", "way"), [(512, "toeplitz"), (513, "blocks")])
def test_length_decides(L, way):
    s = system(fresh(4, "lin", 8))
    u = np.random.default_rng(8).normal(size=(L, 1)).astype(np.float32)
    for past in (True, False):
        np.testing.assert_array_equal(
            bigs.convolve(u, s, past), bigs.convolve(u, s, past, way)
        )
        np.testing.assert_array_equal(
            bigs.convolve(u, s, past, way), ways(L, 256, past)[way](u, s)
        )


def test_unknown_algorithm():
    s = system(fresh(4, "lin", 8))
    u = np.zeros((4, 1), np.float32)
    with pytest.raises(bigs.UserError, match="convolution: 'magic'"):
        bigs.convolve(u, s, True, "magic")

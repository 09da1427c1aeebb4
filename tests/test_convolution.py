"""The convolution's four ways against float64: values, gradients, structure,
operations.

The oracle is numpy and scipy in float64 and shares no code with the document: the sum
(7) with a kernel in complex128, gradients by formula. It is held against a recurrence
and against difference quotients first.

Tolerances are earned. The naive way is the recurrence itself, token by token in the
precision under test; its largest error over a few neighbouring systems (one alone may
be fortunate) is what float32 costs, and a small multiple of that is allowed. One
rounding is taken as given: what every way starts from is dt A in float32.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from numpy.testing import assert_allclose

import annotated_bigs as bigs
from annotated_bigs import (
    carry_by_matrix,
    carry_states,
    convolution_operations,
    convolve,
    convolve_blocks,
    ssm_kernel,
)

NAMES = ("A_re", "A_im", "C", "D", "log_step")
WAYS = ("direct", "toeplitz", "fft", "blocks")
LENGTHS = (1, 31, 127, 130, 509, 1021, 2048, 4096, 8191, 32768)
FURTHER_LENGTHS = (
    *(2, 3, 7, 16, 64, 128, 255, 257),
    *(1024, 1025, 2039, 3000, 4093, 16384, 32749),
)
BLOCKS = (16, 32, 64, 100, 128, 250, 256, 512)
STATES = (1, 2, 16, 64, 64, 256)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def largest(x):
    return np.abs(np.asarray(x)).max()


def assert_near(found, wanted, share):
    """No number is further off than a share of the largest."""
    error = np.asarray(found) - np.asarray(wanted)
    assert largest(error) <= share * largest(wanted)


# Systems: dictionaries of an SSM's parameters


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
    least = np.log(1.01e-4)
    most = np.log(5)
    p["A_re"] = -np.exp(rng.uniform(least, most, N))
    shift = 1 + 0.2 * rng.normal(size=N)
    p["A_im"] = p["A_im"] * shift
    size = np.exp(rng.normal(size=(N, 1)))
    p["C"] = p["C"] * size
    p["D"] = rng.normal(size=1)
    p["log_step"] = rng.uniform(np.log(1e-3), 0, 1)
    return {name: value.astype(np.float32) for name, value in p.items()}


def neighbours(p, count=4):
    """p itself, and systems whose parameters differ from it by a part in a thousand."""
    rng = np.random.default_rng(0)
    for number in range(count):
        size = 0 if number == 0 else 1e-3
        q = {}
        for name, value in p.items():
            factor = 1 + size * rng.normal(size=value.shape)
            q[name] = (value * factor).astype(np.float32)
        # Clear of the clip, where the gradient ends.
        q["A_re"] = np.minimum(q["A_re"], np.float32(-1.01e-4))
        yield q


def rounded(s):
    """dt A as float32 has it, in complex128."""
    z = np.float32(s.dt) * np.asarray(s.A, np.complex64)
    return z.astype(complex)


# The oracle


def exact_kernel(s, L, z):
    """The kernel in complex128, given z = dt A."""
    A = np.asarray(s.A, complex)
    C = np.asarray(s.C, complex)
    B_bar = np.expm1(z) / A
    fades = np.exp(z[:, None] * np.arange(L))
    return ((C * B_bar) @ fades).real


def full_kernel(s, L):
    """The kernel of y: D is what the newest token adds."""
    K = exact_kernel(s, L, rounded(s))
    K[0] += float(s.D)
    return K


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

    def slide(x):
        full = scipy.signal.fftconvolve(x, K, axes=0)
        return full[:L] + D * x

    # The gradient by K_l, for every lag l.
    both_ways = scipy.signal.fftconvolve(w, u[::-1], axes=0)
    by_lag = both_ways[L - 1 :].sum(1)
    # Its sums over l with e^(l z) and with l e^(l z).
    lags = np.arange(L)
    faded = fades @ by_lag
    aged = fades @ (lags * by_lag)
    by_C = write * faded
    write_by_A = (dt * np.exp(z) - write) / A
    by_A = C * (write_by_A * faded + write * dt * aged)
    write_by_dt = np.exp(z)
    by_dt = C * (write_by_dt * faded + write * A * aged)
    y = slide(u)
    by_u = slide(w[::-1])[::-1]
    return {
        "y": y[::turn],
        "u": by_u[::turn],
        "A_re": by_A.real,
        "A_im": -by_A.imag,
        "C": np.stack([by_C.real, -by_C.imag], 1),
        "D": by_lag[:1],
        "log_step": np.array([dt * by_dt.sum().real]),
    }


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize(
    ("L", "scaling", "make"),
    [(1, "lin", fresh), (57, "inv", trained), (300, "hippo", trained)],
)
def test_the_oracle_is_scipys_discretization_and_a_recurrence(L, scaling, make, past):
    s = system(make(16, scaling, 3))
    A = np.diag(np.asarray(s.A, complex))
    B = np.ones((16, 1))
    C = np.asarray(s.C, complex)
    D = float(s.D)
    u = normal(3, L, 2).astype(float)
    A_bar, B_bar, *_ = scipy.signal.cont2discrete(
        (A, B, C[None], 0), float(s.dt), "zoh"
    )
    x = np.zeros((16, 2), complex)
    y = np.zeros((L, 2))
    for i in range(L) if past else reversed(range(L)):
        x = A_bar @ x + B_bar * u[i]
        y[i] = (C @ x).real + D * u[i]

    assert_near(exact(u, u, s, past)["y"], y, share=1e-10)


@pytest.mark.parametrize("past", [True, False])
def test_the_oracles_gradients_are_difference_quotients(past):
    N = 3
    h = 1e-6
    rng = np.random.default_rng(4)
    u, w = rng.normal(size=(2, 20, 2))
    p = trained(N, "lin", 4)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    p["A_re"] = -rng.random(N)

    def run(u, p):
        s = SimpleNamespace(
            A=p["A_re"] + 1j * p["A_im"],
            C=p["C"][:, 0] + 1j * p["C"][:, 1],
            dt=np.exp(p["log_step"][0]),
            D=p["D"][0],
        )
        return exact(u, w, s, past)

    def loss(u, p):
        return (w * run(u, p)["y"]).sum()

    def slope(name, place):
        nudge = np.zeros(p[name].shape)
        nudge[place] = h
        above = loss(u, p | {name: p[name] + nudge})
        below = loss(u, p | {name: p[name] - nudge})
        return (above - below) / (2 * h)

    found = run(u, p)
    for name in NAMES:
        tolerance = 1e-7 * (1 + largest(found[name]))
        for place in np.ndindex(p[name].shape):
            difference = found[name][place] - slope(name, place)
            assert abs(difference) < tolerance, name
    toward = rng.normal(size=u.shape)
    rise = loss(u + toward, p) - loss(u, p)  # the loss is linear in u
    assert rise == pytest.approx((toward * found["u"]).sum())


# The naive ways, and those under test


def one_by_one(past):
    """The recurrence (1) in float32. In bfloat16 it writes and reads its float32 state
    rounded.
    """

    def run(u, s):
        kind = jnp.finfo(u.dtype)

        def cut(x):
            return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)

        def cut_both(x):
            return cut(x.real) + 1j * cut(x.imag)

        z = s.dt * s.A
        A_bar = jnp.exp(z)[:, None]
        B_bar = jnp.expm1(z) / s.A
        B_bar = cut_both(B_bar)[:, None]
        C = cut_both(s.C)[:, None]
        D = cut(s.D)

        def step(x, u):
            x = A_bar * x + B_bar * u
            read = C * cut_both(x)
            return x, read.sum(0).real + D * u

        N = len(s.A)
        channels = u.shape[1]
        empty = jnp.zeros((N, channels), jnp.complex64)
        wide = u.astype(jnp.float32)
        _, y = jax.lax.scan(step, empty, wide, reverse=not past)
        return y.astype(u.dtype)

    return run


def lag_by_lag(u, K, past):
    """The other naive way, for values: the sum (7) in float32. Where nothing fades it
    is a long one.
    """
    turn = 1 if past else -1
    u = np.asarray(u, np.float32)[::turn]
    K = np.asarray(K, np.float32)
    y = np.zeros_like(u)
    for lag in range(len(u)):
        inside = u[: len(u) - lag]
        y[lag:] += K[lag] * inside
    return y[::turn]


def ways(L, block, past):
    """Functions of u and an SSM, by name; two of them take long on long texts."""

    def with_kernel(way):
        def run(u, s):
            K = ssm_kernel(s, u.shape[-2])
            return way(u, K.at[0].add(s.D), past)

        return run

    def blocks(u, s):
        few = L <= bigs.FEW_BLOCKS * block
        carry = carry_by_matrix if few else carry_states
        return convolve_blocks(u, s, block, past, carry)

    found = {"fft": with_kernel(bigs.convolve_fft), "blocks": blocks}
    if L <= 4096:
        found["direct"] = with_kernel(bigs.convolve_direct)
        found["toeplitz"] = with_kernel(bigs.convolve_toeplitz)
    return found


def differentiated(way):
    """u, w, p -> y and the gradients of sum(w y), as numpy arrays by name."""

    def loss(u, p, w):
        y = way(u, system(p))
        return (w * y.astype(jnp.float32)).sum(), y

    compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True))

    def run(u, w, p):
        (by_u, by_p), y = compiled(u, p, w)
        found = by_p | {"y": y, "u": by_u}
        return jax.tree.map(lambda x: np.asarray(x, float), found)

    return run


# Values and gradients


def furthest(a, b):
    found = {}
    for name in b:
        found[name] = largest(a[name] - b[name])
    return found


def earned(p, u, w, past, true):
    """The largest error of the naive ways, for value and gradients."""
    naive = differentiated(one_by_one(past))
    errors = []
    for q in neighbours(p):
        s = system(q)
        truth = exact(u, w, s, past, rounded(s))
        errors.append(furthest(naive(u, w, q), truth))
    L = len(u)
    if L <= 4096:
        K = full_kernel(system(p), L)
        by_lag = {
            "y": lag_by_lag(u, K, past),
            "u": lag_by_lag(w, K, not past),
        }
        errors.append(furthest(true | by_lag, true))
    return jax.tree.map(lambda *error: max(error), *errors)


def check(p, L, block, past, dtype, only=None, seed=0, channels=2):
    """Every way's value and gradients within 16 times the naive error and four
    roundings of the result.
    """
    u, w = jnp.asarray(normal(seed, 2, L, channels), dtype)
    w = w.astype(jnp.float32)
    s = system(p)
    true = exact(u, w, s, past, rounded(s))
    scale = jax.tree.map(largest, true)
    # The gradient by D is a sum that this product bounds.
    size = np.linalg.norm(u.astype(jnp.float32))
    scale["D"] = size * np.linalg.norm(w)
    rounding = float(jnp.finfo(dtype).eps)
    allowed = {
        name: 16 * error + 4 * rounding * scale[name]
        for name, error in earned(p, u, w, past, true).items()
    }
    for name, way in ways(L, block, past).items():
        if only not in (None, name):
            continue
        error = furthest(differentiated(way)(u, w, p), true)
        if (name, dtype) == ("direct", "bfloat16"):
            # jax.grad adds it up lag by lag in bfloat16; an oracle, never trained
            del error["u"]
        too_far = {
            part: (value, allowed[part])
            for part, value in error.items()
            if not value <= allowed[part]
        }
        assert not too_far, f"{name}: (error, tolerance) of {too_far}"


def sample(lengths, seed, rounds=1):
    """Blocks, systems, directions and precisions dealt to the lengths so that each
    comes up about equally often.
    """
    rng = np.random.default_rng(seed)
    lengths = np.repeat(lengths, rounds).tolist()

    def deal(*options):
        turns = np.arange(len(lengths)) % len(options)
        return [options[i] for i in rng.permutation(turns)]

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
    for hand in hands:
        L, block, N, scaling, make, past, dtype = hand
        side = "past" if past else "future"
        words = (L, "by", block, N, make.__name__, scaling, side, dtype)
        name = "-".join(map(str, words))
        yield pytest.param(*hand, id=name)


HAND = ("L", "block", "N", "scaling", "make", "past", "dtype")


# With this seed the long ones are large.
@pytest.mark.parametrize(HAND, sample(LENGTHS, seed=2158))
def test_value_and_gradients(L, block, N, scaling, make, past, dtype):
    p = make(N, scaling, L)
    check(p, L, block, past, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(HAND, sample(LENGTHS + FURTHER_LENGTHS, seed=1, rounds=2))
def test_value_and_gradients_further(L, block, N, scaling, make, past, dtype):
    p = make(N, scaling, L + 1)
    check(p, L, block, past, dtype, seed=1)


def test_poles_that_neither_fade_nor_turn():
    """|dt A| = 1e-7, the least that clip and steps allow: float32 keeps no digit of
    exp(dt A) - 1, but of expm1.
    """
    p = {
        "A_re": np.full(2, -1.01e-4, np.float32),
        "A_im": np.array([0, 1e-3], np.float32),
        "C": np.ones((2, 2), np.float32),
        "D": np.ones(1, np.float32),
        "log_step": np.log(np.full(1, 1e-3, np.float32)),
    }
    check(p, 40, 16, True, "float32")


# Blocks


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("block", [16, 17])
def test_many_blocks_and_few(block, past):
    """Beyond 64 blocks a loop carries the states, up to 64 a product: 1030 tokens are
    65 blocks of 16 or 61 of 17.
    """
    p = trained(16, "lin", 7)
    check(p, 1030, block, past, "float32", only="blocks", channels=3)


@pytest.mark.parametrize("carry", [carry_states, carry_by_matrix])
@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("blocks", [1, 5, 64, 65])
def test_states_are_carried_from_block_to_block(blocks, past, carry):
    N = 3
    written = normal(blocks, 2, blocks, 2 * N, 4)
    real, imaginary = np.split(written, 2, axis=-2)
    w = real + 1j * imaginary
    rate = np.array([-0.2 + 3j, -1 - 2j, -0.01])
    fade = np.exp(rate)[:, None]
    state = np.zeros((2, N, 4), complex)
    states = np.zeros((2, blocks, N, 4), complex)
    for block in range(blocks) if past else reversed(range(blocks)):
        states[:, block] = state
        state = fade * state + w[:, block]

    found = carry(written, rate.astype(np.complex64), past)

    wanted = np.concatenate([states.real, states.imag], -2)
    tolerance = 2e-5 * largest(written)
    assert_allclose(found, wanted, rtol=0, atol=tolerance)


def long_kernel(N, dt):
    """Poles that hardly fade, at HiPPO's frequencies; read-outs undo B_bar, so that
    fast ones weigh as much.
    """
    p = fresh(N, "hippo", 0) | {
        "A_re": np.full(N, -1e-4, np.float32),
        "D": np.zeros(1, np.float32),
        "log_step": np.log(np.full(1, dt, np.float32)),
    }
    s = system(p)
    turns = np.random.default_rng(0).random(N)
    B_bar = np.expm1(rounded(s)) / np.asarray(s.A)
    C = np.exp(2j * np.pi * turns) / B_bar
    C = np.stack([C.real, C.imag], 1)
    return system(p | {"C": C.astype(np.float32)})


def test_unwinding_saves_the_phase():
    """exp(l dt A) as float32 takes it loses digits with every turn; less the whole
    turns, it keeps them.
    """
    L = 32768
    s = long_kernel(64, 0.1)
    z = rounded(s)
    K = exact_kernel(s, L, z)
    impulse = jnp.eye(L, 1)

    def error(found):
        return largest(np.asarray(found, float) - K)

    def answer(way):
        return jax.jit(way)(impulse, s)[:, 0]

    lags = np.arange(L, dtype=np.float32)
    phases = z.astype(np.complex64)[:, None] * lags
    B_bar = np.expm1(z) / np.asarray(s.A)
    weights = np.asarray(s.C) * B_bar
    naive = error((weights @ np.exp(phases)).real)
    recurrence = error(answer(one_by_one(True)))
    kernel = error(ssm_kernel(s, L))
    loop = error(answer(ways(L, 250, True)["blocks"]))
    product = error(answer(ways(L, 521, True)["blocks"]))
    assert naive > 6 * kernel
    assert naive > 10 * loop
    assert naive > 10 * product
    assert kernel < 4 * recurrence
    assert loop < 2 * recurrence
    assert product < 2 * recurrence


@pytest.mark.parametrize(("make", "rank"), [(trained, 8), (fresh, 4)])
def test_blocks_off_the_diagonal_have_low_rank(make, rank):
    """2N for any poles, N for conjugate pairs, as at the start; up to rounding."""
    p = make(4, "hippo", 1)
    p["A_re"] = np.float32([-0.01, -0.02, -0.02, -0.01])
    p["log_step"] = np.zeros(1, np.float32)

    impulses = np.eye(96, dtype=np.float32)
    T = np.asarray(convolve_blocks(impulses, system(p), 16))

    for off in (T[48:96, 0:48], T[32:96, 0:16]):
        values = np.linalg.svd(off.astype(float), compute_uv=False)
        assert values[rank] < 1e-5 * values[0]
        assert values[rank - 1] > 1e-5 * values[0]


# Operations


def counted_by_the_compiler(way, L, channels):
    u = jax.ShapeDtypeStruct((L, channels), np.float32)
    s = system(fresh(64, "lin", 0))
    compiled = jax.jit(way).lower(u, s).compile()
    return compiled.cost_analysis()["flops"]


def operations_a_channel(way, L):
    """The difference of two widths: what does not depend on the channels drops out."""
    wide = counted_by_the_compiler(way, L, 128)
    narrow = counted_by_the_compiler(way, L, 64)
    return (wide - narrow) / 64


on_a_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="other compilers count other things"
)


@on_a_cpu
@pytest.mark.parametrize(
    ("L", "Q"),
    [(300, 256), (4096, 256), (4096, 64), (2050, 128), (100, 256), (130 * 64, 64)],
)
def test_operations_of_blocks_are_the_compilers(L, Q):
    way = ways(L, Q, True)["blocks"]
    counted = operations_a_channel(way, L)
    ours = convolution_operations("blocks", L, Q=Q)
    assert counted == pytest.approx(ours, rel=0.03)


@on_a_cpu
@pytest.mark.parametrize("L", [128, 1000])
def test_operations_of_the_matrix_are_the_compilers(L):
    way = ways(L, 0, True)["toeplitz"]
    counted = operations_a_channel(way, L)
    ours = convolution_operations("toeplitz", L)
    assert counted == pytest.approx(ours, rel=0.03)


# Structure


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("past", [True, False])
def test_jacobian_is_the_triangle(way, past):
    L = 24
    s = system(trained(4, "lin", 2))
    run = ways(L, 7, past)[way]

    def one_channel(x):
        y = run(x[:, None], s)
        return y[:, 0]

    jacobian = jax.jit(jax.jacobian(one_channel))
    J = np.asarray(jacobian(jnp.zeros(L)))

    J = J if past else J.T
    K = full_kernel(s, L)
    T = scipy.linalg.toeplitz(K, np.zeros(L))
    rounding = np.finfo(np.float32).eps
    tolerance = 16 * rounding * np.abs(K).sum()
    assert_allclose(J, T, rtol=0, atol=tolerance)
    if way != "fft":  # the FFT is causal only up to rounding
        assert np.all(np.triu(J, 1) == 0)


@pytest.mark.parametrize("way", WAYS)
def test_reading_backward_is_reading_the_reversed_text(way):
    s = system(trained(16, "inv", 5))
    u = normal(5, 101, 3)
    backward = jax.jit(ways(101, 16, False)[way])
    forward = jax.jit(ways(101, 16, True)[way])

    found = backward(u, s)

    reversed_answer = forward(u[::-1], s)
    assert_near(found, reversed_answer[::-1], share=2e-6)


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize(
    ("way", "block"),
    [("direct", 0), ("toeplitz", 0), ("fft", 0), ("blocks", 16), ("blocks", 1)],
)
def test_a_batch_is_its_sentences(way, block, past):
    s = system(fresh(8, "hippo", 6))
    u = normal(6, 2, 3, 70, 2)
    convolve_so = ways(70, block, past)[way]
    run = jax.jit(convolve_so)

    together = run(u, s)

    assert together.shape == u.shape
    for place in np.ndindex(2, 3):
        alone = run(u[place], s)
        assert_near(together[place], alone, share=2e-6)


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize(("L", "way"), [(512, "toeplitz"), (513, "blocks")])
def test_length_decides(L, way, past):
    s = system(fresh(4, "lin", 8))
    u = normal(8, L, 1)

    found = convolve(u, s, past)

    by_name = convolve(u, s, past, way)
    np.testing.assert_array_equal(found, by_name)
    if way == "blocks":
        itself = convolve_blocks(u, s, 256, past)
    else:
        itself = ways(L, 256, past)[way](u, s)
    np.testing.assert_array_equal(found, itself)


def test_unknown_algorithm():
    s = system(fresh(4, "lin", 8))
    u = normal(8, 4, 1)
    with pytest.raises(bigs.UserError, match="convolution: 'magic'"):
        convolve(u, s, True, "magic")

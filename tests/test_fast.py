"""The fast form of the step: value and gradient are those of the plain form."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import annotated_bigs as bigs
from workshop import arms, running

assert arms  # it adds the layers with something taken away

KINDS = {
    "gated": {},
    "gated, post-norm": {"pre_norm": False},
    "gated, padding convolved": {"mask_padding": False},
    "gated, FFT": {"convolution": "fft"},
    "gated, attention": {"routing": "attention"},
    "gated, no routing": {"routing": "none"},
    "stacked": {"block": "stack", "pre_norm": False},
    "stacked, attention": {
        "block": "stack",
        "routing": "attention",
        "pre_norm": False,
    },
    "stacked, pre-norm": {"block": "stack"},
    "free kernels": {"routing": "free"},
    "an SSM a channel": {"routing": "channels"},
    "sum for product": {"block": "sum"},
    "without V": {"block": "single"},
    "no product": {"block": "no-product"},
    "stacked, GELU": {"block": "stack-gelu"},
}
# In bfloat16 the plain gradient itself is 0.1 to 0.4 away from that in float32.
MOST = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 0.2)}


def model_and_batch(**changes):
    """A model with weights so large that everything in it counts, and rows for it."""
    config = replace(small.CONFIG, initializer_range=0.3, **changes)
    return bigs.BiGS(config), bigs.batch_at(small.random_rows(), 4, 0, 0)


def difference(found, wanted):
    """The largest difference of two trees, by the largest number of the array. (Where
    that is nearly zero, as for the bias of attention's keys, which shifts all scores
    alike, a twentieth of the largest number of all.)
    """
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    least = 0.05 * max(float(jnp.abs(b).max()) for _, b in pairs)
    return max(
        float(jnp.abs(a - b).max()) / max(float(jnp.abs(b).max()), least)
        for a, b in pairs
    )


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_plain_form(kind, dtype, monkeypatch):
    """Layers written out, in a loop, and recomputed in the backward pass; with dropout,
    whose numbers are the same.
    """
    model, batch = model_and_batch(dtype=dtype, **KINDS[kind])
    key = jax.random.key(0)

    def of(loss):
        return jax.jit(jax.value_and_grad(loss))(model, batch, key)

    value, gradient = of(bigs.batch_loss)
    found = [of(bigs.fast_loss)]
    monkeypatch.setattr(bigs, "unrolled", lambda layers: False)
    found += [of(bigs.fast_loss), of(bigs.remat_loss)]
    for fast_value, fast_gradient in found:
        assert abs(fast_value - value) <= MOST[dtype][0] * value
        assert difference(fast_gradient, gradient) <= MOST[dtype][1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_encoder_is_the_plain_one_on_padded_texts(kind):
    model, batch = model_and_batch(**KINDS[kind])
    mask = np.arange(32) < np.array([32, 32, 20, 1])[:, None]
    weights = jax.random.normal(jax.random.key(0), (4, 32, 16)) * mask[..., None]

    def of(encode):
        def weighed(encoder):
            return (encode(encoder, batch.input_ids, mask) * weights).sum()

        features = encode(model.encoder, batch.input_ids, mask)
        return features, jax.grad(weighed)(model.encoder)

    plain, gradient = of(bigs.Encoder.__call__)
    fast, fast_gradient = of(bigs.encode_at)
    np.testing.assert_allclose(fast, plain, rtol=1e-3, atol=1e-3)
    assert difference(fast_gradient, gradient) <= 1e-3


def test_a_model_answers_the_same_with_the_fast_encoder():
    config = replace(small.CONFIG, initializer_range=0.3)
    model = bigs.BiGS(config, "sequence_classification")
    ids = np.arange(20).reshape(2, 10)
    fast = model(ids, encode=bigs.encode_at)
    np.testing.assert_allclose(fast, model(ids), atol=1e-4)


@pytest.mark.parametrize("branch", ["cpu", "default"])
def test_convolutions_of_a_batch_are_those_of_its_sentences_on_every_device(
    branch, monkeypatch
):
    """The branch for CPUs and the one for the rest give the same numbers."""

    def choose(*given, **ways):
        return ways[branch](*given)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    u = jax.random.normal(jax.random.key(0), (3, 600, 4))
    mask = jnp.ones((3, 600), bool)
    for algorithm in ("toeplitz", "blocks", "fft"):
        config = replace(small.CONFIG, convolution=algorithm)
        side = bigs.Direction(config, False, bigs.nnx.Rngs(0))
        fast = bigs.along(side, u.swapaxes(0, 1), mask.T).swapaxes(0, 1)
        np.testing.assert_allclose(fast, side(u, mask), atol=1e-3)


def test_a_run_may_take_the_fast_loss(tmp_path):
    runs = [
        running.pretrain(
            small.CONFIG, small.RECIPE, small.dataset(), tmp_path / name, loss=loss
        )
        for name, loss in (("plain", bigs.batch_loss), ("fast", bigs.fast_loss))
    ]
    plain, fast = (
        [r["heldout"] for r in run.history if "heldout" in r] for run in runs
    )
    np.testing.assert_allclose(fast, plain, rtol=1e-3)

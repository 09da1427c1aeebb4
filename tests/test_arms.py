"""Static routings that a comparison needs: a kernel for each channel, free or frozen
kernels.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

import annotated_bigs as bigs
from workshop import arms, comparison

STATIC = arms.static_routings(small.CONFIG)


@pytest.mark.parametrize("past", [True, False])
def test_each_channel_is_convolved_with_its_own_kernel(past):
    config = replace(small.CONFIG, routing="channels")
    side = arms.ChannelsDirection(config, past, nnx.Rngs(0))
    u = np.random.default_rng(0).normal(size=(2, 7, config.hidden_size))
    mask = np.ones((2, 7), bool)
    mask[1, 5:] = False

    found = side(jnp.asarray(u, jnp.float32), mask)

    u[1, 5:] = 0
    for channel in range(config.hidden_size):
        own = jax.tree.map(lambda leaf, n=channel: leaf[n], side.ssms)
        K = np.array(bigs.ssm_kernel(own.diagonal(), 7))
        K[0] += own.D[0]
        column = u[..., channel : channel + 1]
        expected = bigs.convolve_direct(column, K, past)[..., 0]
        np.testing.assert_allclose(found[..., channel], expected, atol=1e-4)


def moved(name):
    """The names of the parameters in the two directions that a few steps change."""
    arm = STATIC[name]
    plan = comparison.Plan("small", batch=8)
    recipe = replace(comparison.recipe_of(plan, arm, 3, 1.0, 0, 32), warmup=0.0)
    run = bigs.pretrain(arm.config, recipe, small.dataset())
    start = bigs.fresh_state(arm.config, recipe).model
    found = set()
    before = jax.tree_util.tree_leaves_with_path(start)
    after = jax.tree.leaves(run.model)
    for (path, old), new in zip(before, after, strict=True):
        if bigs.is_ssm(path) and not np.array_equal(old, new):
            found.add(bigs.names_of(path)[-1])
    return found


SSM = {"A_re", "A_im", "C", "D", "log_step"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("frozen SSM", set()),
        ("free kernels", {"lags", "D"}),
        ("an SSM a channel", SSM),
        ("lin", SSM),
        ("inv", SSM),
    ],
)
def test_what_training_moves_in_the_kernels(name, expected):
    assert moved(name) == expected


def test_free_kernels_are_no_matrices_of_dense_layers():
    model = bigs.BiGS(STATIC["free kernels"].config)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(model)]
    free = [path for path in paths if bigs.names_of(path)[-1] == "lags"]
    assert len(free) == 2
    assert not any(map(bigs.is_matrix, free))
    assert not any(bigs.is_decayed(path, ssm_decay=False) for path in free)

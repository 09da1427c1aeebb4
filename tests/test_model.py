"""The model's structure: what hears what, counts, padding, symmetry, and equal ways to
the same numbers.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import annotated_bigs as bigs

SMALL = replace(
    bigs.tiny,
    vocab_size=60,
    hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=2,
    max_position_embeddings=32,
    num_ssm=8,
)
STACK = replace(SMALL, block="stack", intermediate_size=64)
IDS = np.random.default_rng(0).integers(5, 60, (3, 12))


def fresh(config, task="masked_lm", seed=0):
    return bigs.BiGS(config, task, seed)


def loud(model):
    """The same model with larger weights, so that what layers do is not lost in the
    residual stream.
    """
    return jax.tree.map(lambda w: 12 * w if w.ndim == 3 else w, model)


CALL = jax.jit(lambda model, *inputs: model(*inputs))


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        ("masked_lm", (3, 12, 60)),
        ("sequence_classification", (3, 2)),
        ("token_classification", (3, 12, 2)),
    ],
)
@pytest.mark.parametrize("config", [SMALL, STACK])
@pytest.mark.parametrize("routing", ["ssm", "attention", "none"])
def test_shapes(task, shape, config, routing):
    assert CALL(fresh(replace(config, routing=routing), task), IDS).shape == shape


def test_shapes_of_the_other_heads():
    start, end = CALL(fresh(SMALL, "question_answering"), IDS)
    assert start.shape == end.shape == (3, 12)
    assert CALL(fresh(SMALL, "multiple_choice"), np.stack([IDS, IDS], 1)).shape == (
        3,
        2,
    )


def test_parameter_counts():
    assert bigs.parameters(bigs.large) == 346_314_134
    assert (
        bigs.parameters(replace(bigs.large, max_position_embeddings=512)) == 346_707_350
    )
    assert bigs.parameters(bigs.base) == 116_303_466
    assert (
        bigs.parameters(replace(bigs.base, max_position_embeddings=4096))
        - bigs.parameters(bigs.base)
        == 3968 * 768
    )
    d = 1024
    N = 64
    layer = bigs.parameters(bigs.large) - bigs.parameters(
        replace(bigs.large, num_hidden_layers=22)
    )
    assert layer == 13 * d * d + 2 * (4 * N + 2) + (2 * 3 * d + 5 * d) + 2 * d


@pytest.mark.parametrize("config", [SMALL, STACK])
@pytest.mark.parametrize("routing", ["ssm", "attention"])
def test_padding_is_silent(config, routing):
    model = loud(fresh(replace(config, routing=routing)))
    alone = CALL(model, IDS)
    padded = np.pad(IDS, [(0, 0), (0, 9)], constant_values=3)
    mask = np.arange(21) < 12
    mask = np.broadcast_to(mask, padded.shape)
    together = CALL(model, padded, mask)[:, :12]
    np.testing.assert_allclose(alone, together, atol=1e-5 * np.asarray(alone).std())
    audible = loud(fresh(replace(config, routing="ssm", mask_padding=False)))
    assert (
        np.abs(CALL(audible, IDS) - CALL(audible, padded, mask)[:, :12]).max()
        > 1e-2 * np.asarray(alone).std()
    )


@pytest.mark.parametrize("kind", ["gated", "stack"])
def test_a_layer_reads_both_directions_and_each_ssm_its_own(kind):
    """Without the backward SSM no later token is heard, without the forward one no
    earlier one.
    """
    config = SMALL if kind == "gated" else STACK
    layer = (bigs.GatedLayer if kind == "gated" else bigs.StackLayer)(
        config, bigs.nnx.Rngs(0)
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 1, 16)), jnp.float32)
    mask = jnp.ones((7, 1), bool)

    def heard():
        J = jax.jacobian(lambda x: layer(x, mask))(x)
        return np.abs(np.asarray(J)).max((1, 2, 4, 5)) > 0

    assert heard().all()
    layer.backward.C[...] = jnp.zeros_like(layer.backward.C[...])
    assert np.array_equal(heard(), np.tril(np.ones((7, 7), bool)))
    layer.forward.C[...] = jnp.zeros_like(layer.forward.C[...])
    assert np.array_equal(heard(), np.eye(7, dtype=bool))


def test_reversal_symmetry_of_the_gated_layer():
    """Exchange the two branches and reverse the text: the output is reversed, and
    nothing else happens.
    """
    layer = bigs.GatedLayer(SMALL, bigs.nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(9, 2, 16)), jnp.float32)
    mask = jnp.ones((9, 2), bool)
    y = layer(x, mask)
    layer.forward, layer.backward = layer.backward, layer.forward
    layer.W_f, layer.W_b = layer.W_b, layer.W_f
    layer.W_u1, layer.W_u2 = layer.W_u2, layer.W_u1
    np.testing.assert_allclose(layer(x[::-1], mask)[::-1], y, atol=1e-5)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(
    "rival",
    [
        {},
        {"routing": "attention"},
        {"routing": "none"},
        {"block": "stack"},
        {"block": "stack", "routing": "attention"},
        {"pre_norm": False},
    ],
)
@pytest.mark.parametrize(("scale", "tolerance"), [(0.02, 1e-6), (0.3, 1e-5)])
def test_chosen_positions_are_those_of_all_logits(
    rival, rows, scale, tolerance, monkeypatch
):
    monkeypatch.setattr(bigs, "unrolled", lambda layers: rows)
    config = replace(SMALL, num_attention_heads=2, initializer_range=scale, **rival)
    model = fresh(config)
    positions = np.array([[1, 4], [0, 11], [2, 2]])
    mask = np.arange(12) < np.array([[12], [12], [7]])
    some = jax.jit(lambda model: bigs.masked_logits(model, positions, IDS, mask))(model)
    every = jax.jit(
        lambda model: bigs.masked_logits(
            model, np.tile(np.arange(12), (3, 1)), IDS, mask
        )
    )(model)
    whole = CALL(model, IDS, mask)
    for b in range(3):
        np.testing.assert_allclose(some[:, b], whole[b, positions[b]], atol=tolerance)
        np.testing.assert_allclose(every[:, b], whole[b], atol=tolerance)


def test_scanned_unrolled_and_rematerialized_agree(monkeypatch):
    model = fresh(SMALL)
    ones = np.ones(IDS.shape, bool)

    def loss(m, **how):
        return (
            bigs.masked_logits(m, np.array([[1], [2], [3]]), IDS, ones, **how) ** 2
        ).sum()

    plain = jax.jit(jax.grad(loss))(model)
    remat = jax.jit(jax.grad(lambda m: loss(m, remat=True)))(model)
    monkeypatch.setattr(bigs, "unrolled", lambda layers: False)
    scanned = jax.jit(jax.grad(lambda m: loss(m)))(model)
    for a, b, c in zip(*map(jax.tree.leaves, (plain, remat, scanned)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(a, c, rtol=1e-3, atol=1e-5)


def test_every_example_has_its_own_dropout():
    model = fresh(replace(SMALL, hidden_dropout_prob=0.5))
    x = model.encoder(
        np.stack([IDS[0], IDS[0]]), np.ones((2, 12), bool), None, jax.random.key(0)
    )
    assert np.abs(x[:, 0] - x[:, 1]).max() > 0.01


def test_bfloat16_is_near_float32():
    wide = fresh(SMALL)
    narrow = fresh(replace(SMALL, dtype="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow))
    a = CALL(wide, IDS)
    b = CALL(narrow, IDS)
    assert np.abs(a - b).max() < 0.1 * np.asarray(a).std()


def test_too_long_a_text_is_refused():
    with pytest.raises(
        bigs.UserError, match="33 tokens, but this model reads at most 32"
    ):
        fresh(SMALL)(np.ones((1, 33), int))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scaling", "x"),
        ("block", "x"),
        ("convolution", "x"),
        ("dtype", "int8"),
        ("pooler_type", "max"),
    ],
)
def test_bad_config(field, value):
    with pytest.raises(bigs.UserError, match=field):
        bigs.Config(**{field: value})


# The call, as transformers' users know it


@pytest.fixture(scope="module")
def tokenizer():
    return bigs.train_tokenizer(["to be or not to be that is the question"] * 20, 60)


TEXTS = ["to be", "or not to be that is the question", "question"]


@pytest.mark.parametrize("mask_padding", [True, False])
def test_what_a_tokenizer_returns_goes_in(tokenizer, mask_padding):
    """A text gets the same answer alone and padded in a batch of any size."""
    model = fresh(replace(SMALL, mask_padding=mask_padding))
    together = tokenizer(TEXTS, padding=True, return_tensors="np")
    logits = model(**together)
    assert logits.shape == (*together["input_ids"].shape, 60)
    assert logits.dtype == jnp.float32
    for row, text in enumerate(TEXTS):
        inputs = tokenizer(text, return_tensors="np")
        alone = model(**inputs)
        np.testing.assert_allclose(
            alone[0], logits[row, : inputs["input_ids"].shape[1]], atol=1e-6
        )


def test_batches_of_any_size_and_lists():
    model = fresh(SMALL)
    every = model(IDS)
    for size in (1, 2, 3):
        np.testing.assert_allclose(model(IDS[:size]), every[:size], atol=1e-6)
    np.testing.assert_allclose(model(IDS.tolist()), every, atol=1e-6)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_one_compilation_for_each_shape(monkeypatch, mask_padding):
    traced = []
    once = bigs.Encoder.__call__

    def count(self, ids, *rest):
        traced.append(ids.shape)
        return once(self, ids, *rest)

    monkeypatch.setattr(bigs.Encoder, "__call__", count)
    config = replace(
        SMALL, mask_padding=mask_padding, vocab_size=61
    )  # a program that no other test has compiled
    model = fresh(config)
    other = fresh(config, seed=1)
    for _ in range(2):
        model(IDS)
        model(IDS, np.ones_like(IDS))
        model(IDS, np.ones_like(IDS), np.zeros_like(IDS))
        other(IDS)
    assert len(traced) == 1
    model(IDS[:2])
    model(IDS[:, :5])
    assert len(traced) == 3


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([[3, 60]]), "60 is none of this model's 60 words"),
        (np.ones(5, int), "shape .5,., but this task reads"),
        (np.ones((1, 2, 5), int), "but this task reads .batch, length."),
    ],
)
def test_ids_that_no_model_can_read(ids, message):
    with pytest.raises(bigs.UserError, match=message):
        fresh(SMALL)(ids)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"3, ?7\b.*3, ?12\b"):
        fresh(SMALL)(IDS, np.ones((3, 7), int))


# Operations


@pytest.mark.parametrize("name", bigs.RIVALS)
@pytest.mark.parametrize(
    ("convolution", "L"),
    [
        ("fft", 128),
        ("fft", 4096),
        ("toeplitz", 128),
        ("toeplitz", 1024),
        ("blocks", 1024),
        ("blocks", 4096),
        ("auto", 128),
        ("auto", 4096),
    ],
)
def test_operations_are_those_that_the_compiler_finds(name, convolution, L):
    """One layer of each architecture, as it is compiled: all its operations, 3 % of
    them outside what we count.
    """
    config = replace(bigs.RIVALS[name], num_hidden_layers=1, convolution=convolution)
    if config.routing != "ssm" and convolution != "auto":
        pytest.skip("nothing is convolved")
    kind = bigs.GatedLayer if config.block == "gated" else bigs.StackLayer
    layer = jax.eval_shape(lambda: kind(config, bigs.nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((L, 1, 1024), jnp.float32)
    mask = jax.ShapeDtypeStruct((L, 1), bool)
    compiled = (
        jax.jit(lambda layer, x, mask: layer(x, mask)).lower(layer, x, mask).compile()
    )
    assert bigs.operations(config, L, convolution) == pytest.approx(
        compiled.cost_analysis()["flops"], rel=0.03
    )


@pytest.mark.parametrize("name", bigs.RIVALS)
def test_operations_of_a_step_are_those_that_the_compiler_finds(name):
    """Of a whole loss, whose last layer mixes channels at the asked positions alone; 6
    % lie outside our count.
    """
    wide = 1024 if bigs.RIVALS[name].block == "stack" else 768
    config = replace(
        bigs.RIVALS[name],
        hidden_size=256,
        intermediate_size=wide,
        num_hidden_layers=2,
        vocab_size=2000,
        num_attention_heads=2,
    )
    recipe = replace(bigs.RECIPES["demonstration"], batch=8, length=128)
    rows = bigs.Rows(
        np.random.default_rng(0).integers(5, 2000, (8, 128)), 2000, 4, (0, 2, 3)
    )
    batch = bigs.batch_at(rows, 8, 0, 0)
    model = jax.eval_shape(lambda: fresh(config))
    compiled = (
        jax.jit(lambda model: bigs.batch_loss(model, batch)).lower(model).compile()
    )
    assert 3 * compiled.cost_analysis()["flops"] == pytest.approx(
        bigs.step_operations(config, recipe), rel=0.06
    )


def test_operations_reproduce_table_8():
    paper = {
        128: (8.1e10, 7.9e10),
        512: (3.2e11, 3.4e11),
        1024: (6.5e11, 7.2e11),
        4096: (2.6e12, 4.1e12),
    }
    for L, numbers in paper.items():
        assert (
            tuple(
                float(f"{bigs.operations(config, L):.1e}")
                for config in (bigs.large, bigs.bert)
            )
            == numbers
        )
    with pytest.raises(bigs.UserError, match="convolution: 'slow' is unknown"):
        bigs.operations(bigs.large, 128, "slow")


def test_dropout_before_every_label_but_those_of_questions():
    """As in the authors' code, a question-answering head has none."""
    x = jax.random.normal(jax.random.key(0), (7, 3, 16))
    mask = jnp.ones((3, 7), bool)
    key = jax.random.key(1)
    config = bigs.Config(50, 16, 1, 48, num_ssm=4, hidden_dropout_prob=0.5)
    for task in (
        "sequence_classification",
        "token_classification",
        "question_answering",
    ):
        head = bigs.LabelHead(config, task, nnx.Rngs(0))
        same = np.array_equal(head(x, mask, key), head(x, mask, None))
        assert same == (task == "question_answering"), task

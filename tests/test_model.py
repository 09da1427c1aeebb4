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
from workshop import running

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


@jax.jit
def call(model, *inputs):
    return model(*inputs)


def spread(logits):
    return np.asarray(logits).std()


# Shapes and counts


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
    config = replace(config, routing=routing)
    assert answer(config, task, IDS).shape == shape


def answer(config, task, ids):
    """What a model answers, without the numbers."""
    return jax.eval_shape(lambda ids: fresh(config, task)(ids), ids)


def test_shapes_of_the_other_heads():
    start, end = answer(SMALL, "question_answering", IDS)
    assert start.shape == (3, 12)
    assert end.shape == (3, 12)
    choices = np.stack([IDS, IDS], 1)
    assert answer(SMALL, "multiple_choice", choices).shape == (3, 2)


def parameters(config, **changes):
    return bigs.parameters(replace(config, **changes))


def test_parameter_counts():
    assert parameters(bigs.large) == 346_314_134
    assert parameters(bigs.large, max_position_embeddings=512) == 346_707_350
    assert parameters(bigs.base) == 116_303_466
    longer = parameters(bigs.base, max_position_embeddings=4096)
    assert longer - parameters(bigs.base) == 3968 * 768


def test_parameters_of_a_layer():
    d = 1024
    N = 64
    layer = parameters(bigs.large) - parameters(bigs.large, num_hidden_layers=22)
    kernels = 13 * d * d
    ssms = 2 * (4 * N + 2)
    biases = 2 * 3 * d + 5 * d
    norm = 2 * d
    assert layer == kernels + ssms + biases + norm


# What reaches what


@pytest.mark.parametrize("config", [SMALL, STACK])
@pytest.mark.parametrize("routing", ["ssm", "attention"])
def test_padding_is_silent(config, routing):
    model = loud(fresh(replace(config, routing=routing)))
    padded = np.pad(IDS, [(0, 0), (0, 9)], constant_values=3)
    mask = np.broadcast_to(np.arange(21) < 12, padded.shape)

    alone = call(model, IDS)
    together = call(model, padded, mask)[:, :12]

    np.testing.assert_allclose(alone, together, atol=1e-5 * spread(alone))


@pytest.mark.parametrize("config", [SMALL, STACK])
def test_padding_counts_where_the_config_says_so(config):
    model = loud(fresh(replace(config, mask_padding=False)))
    padded = np.pad(IDS, [(0, 0), (0, 9)], constant_values=3)
    mask = np.broadcast_to(np.arange(21) < 12, padded.shape)

    alone = call(model, IDS)
    together = call(model, padded, mask)[:, :12]

    assert np.abs(alone - together).max() > 1e-2 * spread(alone)


@pytest.mark.parametrize(
    ("kind", "config"), [(bigs.GatedLayer, SMALL), (bigs.StackLayer, STACK)]
)
def test_a_layer_reads_both_directions_and_each_ssm_its_own(kind, config):
    """Without the backward SSM no later token counts, without the forward one no
    earlier one.
    """
    layer = kind(config, bigs.nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(1, 7, 16)).astype(np.float32)
    mask = np.ones((1, 7), bool)

    def counts():
        """Whether the output at i depends on the input at j."""
        J = jax.jacobian(lambda x: layer(x, mask))(x)
        return np.abs(np.asarray(J)).max((0, 2, 3, 5)) > 0

    assert counts().all()
    layer.backward.C[...] = jnp.zeros_like(layer.backward.C[...])
    assert np.array_equal(counts(), np.tril(np.ones((7, 7), bool)))
    layer.forward.C[...] = jnp.zeros_like(layer.forward.C[...])
    assert np.array_equal(counts(), np.eye(7, dtype=bool))


def test_reversal_symmetry_of_the_gated_layer():
    """Exchange the two branches and reverse the text: the output is reversed, and
    nothing else happens.
    """
    layer = bigs.GatedLayer(SMALL, bigs.nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(2, 9, 16)).astype(np.float32)
    mask = np.ones((2, 9), bool)

    y = layer(x, mask)
    for one, other in (("forward", "backward"), ("W_f", "W_b"), ("W_u1", "W_u2")):
        first = getattr(layer, one)
        second = getattr(layer, other)
        setattr(layer, one, second)
        setattr(layer, other, first)
    layer.forward.past = True
    layer.backward.past = False
    exchanged = layer(x[:, ::-1], mask)

    np.testing.assert_allclose(exchanged[:, ::-1], y, atol=1e-5)


# Positions


@pytest.mark.parametrize(
    "positions", [[[1, 4], [0, 11], [2, 2]], [list(range(12))] * 3]
)
def test_chosen_positions_are_those_of_all_logits(positions):
    model = loud(fresh(SMALL))
    positions = np.array(positions)
    mask = np.arange(12) < np.array([[12], [12], [7]])
    whole = np.asarray(call(model, IDS, mask))
    some = jax.jit(bigs.masked_logits)(model, positions, IDS, mask)
    wanted = np.take_along_axis(whole, positions[..., None], 1)
    assert np.abs(some - wanted).max() < 1e-6 * whole.std()


def test_heads_that_do_not_divide_the_channels_are_refused():
    config = replace(SMALL, routing="attention", num_attention_heads=3)
    with pytest.raises(bigs.UserError, match="3 heads do not divide"):
        fresh(config)(IDS)


def test_every_example_has_its_own_dropout():
    model = fresh(replace(SMALL, hidden_dropout_prob=0.5))
    twice = np.stack([IDS[0], IDS[0]])
    x = model.encoder(twice, np.ones((2, 12), bool), None, jax.random.key(0))
    assert np.abs(x[0] - x[1]).max() > 0.01


@pytest.mark.parametrize(
    ("task", "drops"),
    [
        ("sequence_classification", True),
        ("token_classification", True),
        ("question_answering", False),
    ],
)
def test_dropout_before_every_label_but_those_of_questions(task, drops):
    """As in the authors' code, a question-answering head has none."""
    x = jax.random.normal(jax.random.key(0), (3, 7, 16))
    mask = jnp.ones((3, 7), bool)
    config = bigs.Config(50, 16, 1, 48, num_ssm=4, hidden_dropout_prob=0.5)
    head = bigs.LabelHead(config, task, nnx.Rngs(0))
    with_dropout = head(x, mask, jax.random.key(1))
    without = head(x, mask, None)
    assert np.array_equal(with_dropout, without) == (not drops)


def test_bfloat16_is_near_float32():
    wide = fresh(SMALL)
    narrow = fresh(replace(SMALL, dtype="bfloat16"))
    for leaf in jax.tree.leaves(narrow):
        assert leaf.dtype == jnp.float32
    exact = call(wide, IDS)
    error = np.abs(exact - call(narrow, IDS)).max()
    assert 0 < error < 0.1 * spread(exact)


# What is refused


def test_too_long_a_text_is_refused():
    message = "33 tokens, but this model reads at most 32"
    with pytest.raises(bigs.UserError, match=message):
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
    for row, text in zip(logits, TEXTS, strict=True):
        alone = model(**tokenizer(text, return_tensors="np"))[0]
        np.testing.assert_allclose(alone, row[: len(alone)], atol=1e-6)


def test_batches_of_any_size_and_lists():
    model = fresh(SMALL)
    every = model(IDS)
    for size in (1, 2, 3):
        np.testing.assert_allclose(model(IDS[:size]), every[:size], atol=1e-6)
    np.testing.assert_allclose(model(IDS.tolist()), every, atol=1e-6)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_one_compilation_for_each_shape(monkeypatch, mask_padding):
    traced = []
    once = bigs.Encoder.embed

    def count(self, ids, *rest):
        traced.append(ids.shape)
        return once(self, ids, *rest)

    monkeypatch.setattr(bigs.Encoder, "embed", count)
    # A program that no other test has compiled.
    config = replace(SMALL, mask_padding=mask_padding, vocab_size=61)
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
        (np.array([[3, -100]]), "-100 is none of this model's 60 words"),
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


WAYS = [
    ("fft", 128),
    ("fft", 4096),
    ("toeplitz", 128),
    ("toeplitz", 1024),
    ("blocks", 1024),
    ("blocks", 4096),
    ("auto", 128),
    ("auto", 4096),
]


def counted_by_the_compiler(function, *shapes):
    compiled = jax.jit(function).lower(*shapes).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("name", bigs.RIVALS)
@pytest.mark.parametrize(("convolution", "L"), WAYS)
def test_operations_are_those_that_the_compiler_finds(name, convolution, L):
    """One layer of each architecture, as it is compiled: all its operations, 3 % of
    them outside what we count.
    """
    config = replace(bigs.RIVALS[name], num_hidden_layers=1, convolution=convolution)
    if config.routing != "ssm" and convolution != "auto":
        pytest.skip("nothing is convolved")
    layer = jax.eval_shape(lambda: bigs.one_layer(config, nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((L, 1, 1024), jnp.float32)
    mask = jax.ShapeDtypeStruct((L, 1), bool)

    counted = counted_by_the_compiler(
        lambda *given: bigs.mix_channels(given[0], *bigs.mix_tokens(*given)),
        layer,
        x,
        mask,
    )

    ours = bigs.operations(config, L, convolution)
    assert ours == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("name", bigs.RIVALS)
def test_operations_of_a_step_are_those_that_the_compiler_finds(name):
    """Of a whole loss, whose last layer mixes channels at the asked positions alone; 6
    % lie outside our count.
    """
    is_stack = bigs.RIVALS[name].block == "stack"
    config = replace(
        bigs.RIVALS[name],
        hidden_size=256,
        intermediate_size=1024 if is_stack else 768,
        num_hidden_layers=2,
        vocab_size=2000,
        num_attention_heads=2,
    )
    recipe = replace(bigs.RECIPES["demonstration"], batch=8, length=128)
    tokens = np.random.default_rng(0).integers(5, 2000, (8, 128))
    rows = bigs.Rows(tokens, 2000, 4, (0, 2, 3))
    batch = bigs.batch_at(rows, 8, 0, 0, share=recipe.masked)
    model = jax.eval_shape(lambda: fresh(config))

    forward = counted_by_the_compiler(lambda model: bigs.fast_loss(model, batch), model)

    ours = running.step_operations(config, recipe)
    assert ours == pytest.approx(3 * forward, rel=0.06)


TABLE_8 = {
    128: ("8.1e+10", "7.9e+10"),
    512: ("3.2e+11", "3.4e+11"),
    1024: ("6.5e+11", "7.2e+11"),
    4096: ("2.6e+12", "4.1e+12"),
}


@pytest.mark.parametrize("L", TABLE_8)
def test_operations_reproduce_table_8(L):
    large = bigs.operations(bigs.large, L)
    bert = bigs.operations(bigs.bert, L)
    assert (f"{large:.1e}", f"{bert:.1e}") == TABLE_8[L]


def test_operations_of_an_unknown_convolution():
    with pytest.raises(bigs.UserError, match="convolution: 'slow' is unknown"):
        bigs.operations(bigs.large, 128, "slow")

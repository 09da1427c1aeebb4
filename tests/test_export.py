"""The training step is lowered for CPU, GPU and TPU here, where only a CPU is: what has
no meaning on one of them is noticed without it.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import annotated_bigs as bigs

PLATFORMS = ["cpu", "cuda", "tpu"]
ARCHITECTURES = [
    (block, routing) for block in ("gated", "stack") for routing in ("ssm", "attention")
]
SMALL = replace(
    bigs.tiny,
    vocab_size=50,
    hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=2,
    max_position_embeddings=16,
    num_ssm=4,
)
RECIPE = bigs.Recipe(steps=4, batch=4, length=16)


def batch_of(length):
    tokens = np.arange(4 * length).reshape(4, length) % 45 + 5
    return bigs.batch_at(bigs.Rows(tokens, 50, 4, (0, 2, 3)), 4, 0, 0)


@pytest.fixture
def pretend(monkeypatch):
    """Let the program believe, while it is traced, that JAX runs on another device."""

    def on(backend: str):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)

    return on


def exported(config, recipe=RECIPE, platforms=PLATFORMS, **options):
    step = bigs.make_step(recipe, bigs.fast_loss)
    state = jax.eval_shape(lambda: bigs.fresh_state(config, recipe))
    batch = batch_of(config.max_position_embeddings)
    return export.export(step, platforms=platforms, **options)(state, batch)


PRODUCT = re.compile(r"stablehlo\.dot_general.* -> tensor<(?:\d+x)*(\w+)>")


def types_of_products(program) -> set[str]:
    """Element types of the matrix products in a lowered program."""
    return set(PRODUCT.findall(program.mlir_module()))


# A CPU has the layers written out, the others a loop over them.
@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
@pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=pytest.mark.slow), "tpu"]
)
@pytest.mark.parametrize(("block", "routing"), ARCHITECTURES)
def test_a_step_is_lowered_for_every_platform(pretend, block, routing, backend, dtype):
    pretend(backend)
    config = replace(SMALL, block=block, routing=routing, dtype=dtype)
    program = exported(config)
    assert program.platforms == tuple(PLATFORMS)
    types = types_of_products(program)
    assert ("bf16" in types) == (dtype == "bfloat16")
    assert types <= {"f32", "bf16"}


@pytest.mark.slow
@pytest.mark.parametrize("convolution", ["fft", "toeplitz", "blocks"])
def test_every_convolution_is_lowered_for_every_platform(pretend, convolution):
    pretend("tpu")
    exported(replace(SMALL, convolution=convolution, max_position_embeddings=300))


def test_a_step_in_parts_is_lowered_for_every_platform(pretend):
    pretend("tpu")
    exported(SMALL, replace(RECIPE, accumulate=2, remat=True, shard=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_what_was_lowered_computes_the_step(pretend, backend):
    pretend(backend)
    state = bigs.fresh_state(SMALL, RECIPE)
    batch = batch_of(16)
    _, loss = exported(SMALL).call(state, batch)
    pretend("cpu")
    _, expected = bigs.make_step(RECIPE, bigs.fast_loss)(state, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


# Attention on a GPU, in bfloat16, is cuDNN's

FLASH = replace(SMALL, routing="attention", dtype="bfloat16", hidden_dropout_prob=0.0)


@pytest.fixture
def cudnn(monkeypatch):
    """JAX asks for the version of cuDNN while it traces; none is installed here."""
    name = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(name, lambda: 91000)


def test_flash_attention_is_lowered_for_a_gpu(pretend, cudnn):
    pretend("gpu")
    calls = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    allowed = map(export.DisabledSafetyCheck.custom_call, calls)
    program = exported(FLASH, platforms=["cuda"], disabled_checks=list(allowed))
    for call in calls:
        assert f"@{call}(" in program.mlir_module()


def test_a_step_for_one_platform_only_is_noticed(pretend, cudnn):
    pretend("gpu")
    with pytest.raises(NotImplementedError, match="not found for platforms"):
        exported(FLASH)


def test_flash_attention_is_told_the_same_as_other_attention(pretend, monkeypatch):
    """It gets lengths instead of a mask; another implementation stands in for cuDNN."""
    asked = []
    original = jax.nn.dot_product_attention

    def stand_in(*arguments, implementation=None, **options):
        asked.append(implementation)
        return original(*arguments, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.normal(size=(3, 2, 7, 8)), jnp.bfloat16)
    mask = jnp.arange(7) < jnp.array([[7], [4]])
    usual = bigs.attend(q, k, v, mask, heads=2)
    pretend("gpu")
    flash = bigs.attend(q, k, v, mask, heads=2)
    assert asked == [None, "cudnn"]
    np.testing.assert_array_equal(flash, usual)
    assert not np.array_equal(usual, bigs.attend(q, k, v, mask | True, heads=2))

"""Random weights in the authors' format: our outputs and kernels against those of their
code.
"""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util

import annotated_bigs as bigs

GOLDEN = Path(__file__).parent / "golden"
SMALL = replace(
    bigs.tiny,
    vocab_size=60,
    hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=2,
    max_position_embeddings=32,
    num_ssm=8,
)
IDS = np.random.default_rng(0).integers(5, 60, (3, 12))


def golden(name="mlm"):
    stored = np.load(GOLDEN / name / "golden.npz")
    return [
        stored[key] for key in ("input_ids", "attention_mask", "token_type_ids")
    ], stored["logits"]


def flat_tree(folder=GOLDEN / "mlm"):
    tree = serialization.msgpack_restore((folder / "flax_model.msgpack").read_bytes())
    return traverse_util.flatten_dict(tree, sep="/")


def write(folder, flat, config=None):
    """A model folder from a flat tree and a config, the golden one by default."""
    folder.mkdir(exist_ok=True)
    tree = (
        traverse_util.unflatten_dict(flat, sep="/") if isinstance(flat, dict) else flat
    )
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    config = (
        json.loads((GOLDEN / "mlm" / "config.json").read_text())
        if config is None
        else config
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def moved(config, task="masked_lm"):
    """A model whose every parameter has left its start."""
    rng = np.random.default_rng(1)
    model = bigs.BiGS(config, task)
    return jax.tree.map(
        lambda w: w + jnp.asarray(0.1 * rng.normal(size=w.shape), w.dtype), model
    )


# Against the authors' code


@pytest.mark.parametrize("name", ["mlm", "sequence_classification"])
@pytest.mark.parametrize("convolution", ["toeplitz", "fft", "blocks"])
def test_outputs_are_the_authors(name, convolution):
    inputs, logits = golden(name)
    model = bigs.from_pretrained(GOLDEN / name, convolution=convolution)
    assert np.abs(model(*inputs) - logits).max() < 1e-5 * logits.std()


def test_kernels_are_the_authors():
    model = bigs.from_pretrained(GOLDEN / "mlm")
    stored = np.load(GOLDEN / "mlm" / "golden.npz")
    ours = bigs.kernels_of(model)
    for layer in range(3):
        for direction, theirs in enumerate(("fs4", "bs4")):
            K = stored[f"kernel/{layer}/{theirs}"].ravel()
            assert np.abs(ours[layer, direction] - K).max() < 2e-5 * np.abs(K).max()


def test_the_oracle_can_fail():
    """Silent padding, the one setting that differs, moves the answer a hundred times
    beyond the tolerance.
    """
    inputs, logits = golden()
    model = bigs.from_pretrained(GOLDEN / "mlm", mask_padding=True)
    assert np.abs(model(*inputs) - logits).max() > 100 * 1e-5 * logits.std()


KERNEL = bigs.ssm_kernel
EXACT = bigs.gelu_exact
TANH = bigs.gelu


def with_D_in_one_direction(u, ssm, past=True, algorithm="auto"):
    K = KERNEL(ssm, u.shape[-2])
    return bigs.convolve_toeplitz(u, K.at[0].add(ssm.D if past else 0), past)


CHOICES = [
    ("mlm", {}, {"pre_norm": False}, 1.6),
    ("mlm", {"gelu": EXACT}, {}, 1.1e-5),
    ("mlm", {"gelu_exact": TANH}, {}, 4.8e-4),
    ("mlm", {}, {"layer_norm_eps": 1e-5}, 2.9e-4),
    ("sequence_classification", {}, {"pooler_type": "mean"}, 1.1),
    ("sequence_classification", {}, {"pooler_type": "cls"}, 1.9),
    ("mlm", {"convolve": with_D_in_one_direction}, {}, 1.9e-3),
    ("mlm", {"ssm_kernel": lambda ssm, L: 2 * KERNEL(ssm, L)}, {}, 3.5e-3),
    ("mlm", {}, {"mask_padding": True}, 2.2e-3),
]


@pytest.mark.parametrize(
    ("name", "patch", "changes", "effect"),
    CHOICES,
)
def test_each_choice_of_the_authors_counts(monkeypatch, name, patch, changes, effect):
    """What another choice would do, as section 17 tells it; without these choices the
    oracle could not tell.
    """
    (ids, mask, types), logits = golden(name)
    model = bigs.from_pretrained(GOLDEN / name, **changes)
    for attribute, value in patch.items():
        monkeypatch.setattr(bigs, attribute, value)
    other = jax.jit(lambda model, *inputs: model.logits(*inputs, None))(
        model, ids, mask > 0, types
    )
    assert np.abs(other - logits).max() / logits.std() == pytest.approx(effect, rel=0.1)


# Padding


@pytest.mark.parametrize("name", ["mlm", "sequence_classification"])
def test_what_is_given_without_padding_gets_the_authors_answer(name):
    """Where padding is heard the model pads by itself, as the authors' code asks its
    users to do.
    """
    inputs, logits = golden(name)
    model = bigs.from_pretrained(GOLDEN / name)
    lengths = inputs[1].sum(1)
    assert lengths.min() < 64, "no padding in the golden inputs"
    assert (inputs[0][inputs[1] == 0] == model.config.pad_token_id).all()
    assert not inputs[2][inputs[1] == 0].any()
    for row, length in enumerate(lengths):
        short = model(*(a[row : row + 1, :length] for a in inputs))[0]
        theirs = logits[row, :length] if name == "mlm" else logits[row]
        assert short.shape == theirs.shape
        assert np.abs(short - theirs).max() < 1e-5 * logits.std()


@pytest.mark.parametrize(
    "task",
    [
        "masked_lm",
        "sequence_classification",
        "token_classification",
        "question_answering",
    ],
)
def test_padding_that_is_masked_changes_nothing(task):
    model = moved(SMALL, task)
    most = 0.0
    alone = model(IDS)
    for length in (13, 20, 32):
        padded = np.full((3, length), 7)
        mask = np.broadcast_to(np.arange(length) < 12, (3, length))
        padded[:, :12] = IDS
        for a, b in zip(
            jax.tree.leaves(alone), jax.tree.leaves(model(padded, mask)), strict=True
        ):
            b = b if task == "sequence_classification" else b[:, :12]
            most = max(most, float(np.abs(a - b).max() / np.asarray(a).std()))
    assert most < 1e-6


# Files


TASKS = [
    ("masked_lm", {}),
    ("sequence_classification", {"num_labels": 3}),
    ("sequence_classification", {"num_labels": 1}),  # regression
    ("token_classification", {"num_labels": 4}),
    ("question_answering", {}),
    ("multiple_choice", {}),
]
SHAPES = [
    {"scaling": "hippo"},
    {"scaling": "lin"},
    {"scaling": "inv"},
    {"pre_norm": False},
    {"pooler_type": "mean"},
    {"max_position_embeddings": 77},
    {"block": "stack"},
    {"block": "stack", "routing": "attention"},
    {"routing": "attention"},
    {"routing": "none"},
]


@pytest.mark.parametrize(
    ("task", "changes"),
    TASKS + [("sequence_classification", change) for change in SHAPES],
)
def test_what_is_written_is_read_back(tmp_path, task, changes):
    model = moved(replace(SMALL, **changes), task)
    bigs.save_pretrained(model, tmp_path)
    again = bigs.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.task == task
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_written_files_are_the_same(tmp_path):
    bigs.save_pretrained(bigs.from_pretrained(GOLDEN / "mlm"), tmp_path)
    ours = flat_tree(tmp_path)
    theirs = flat_tree()
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == np.float32
        np.testing.assert_array_equal(ours[name], array)
    assert (tmp_path / "flax_model.msgpack").stat().st_size == (
        GOLDEN / "mlm" / "flax_model.msgpack"
    ).stat().st_size


def packed_size(shapes):
    """Bytes of msgpack_serialize for a tree of float32 arrays, from msgpack's rules for
    its headers.
    """

    def long(n, *steps):
        return next(size for limit, size in steps if n < limit)

    def text(s):
        return len(s) + long(len(s), (32, 1), (256, 2))

    if isinstance(shapes, dict):
        inside = sum(text(key) + packed_size(value) for key, value in shapes.items())
        return inside + long(len(shapes), (16, 1), (2**16, 3))
    size = 4 * int(np.prod(shapes))
    whole = (
        1
        + 1
        + sum(long(n, (2**7, 1), (2**8, 2), (2**16, 3), (2**32, 5)) for n in shapes)
        + text("float32")
    )
    whole += size + long(size, (2**8, 2), (2**16, 3), (2**32, 5))
    return whole + long(whole, (2**8, 3), (2**16, 4), (2**32, 6))


def nested_shapes(model):
    shapes = {}
    for path, leaf in bigs.named_parameters(model):
        names = bigs.published_names(path, model)
        shapes |= {name: leaf.shape["layers" in path :] for name in names}
    return traverse_util.unflatten_dict(shapes, sep="/")


def test_the_size_of_the_published_file():
    golden_config, _ = bigs.read_config(GOLDEN / "mlm")
    assert (
        packed_size(nested_shapes(bigs.BiGS(golden_config)))
        == (GOLDEN / "mlm/flax_model.msgpack").stat().st_size
    )
    large = replace(bigs.large, max_position_embeddings=512)
    assert bigs.parameters(large) == 346_707_350
    assert (
        packed_size(nested_shapes(jax.eval_shape(lambda: bigs.BiGS(large))))
        == 1_386_847_646
    )


@pytest.mark.slow
def test_a_file_of_the_published_size_is_written(tmp_path):
    model = jax.eval_shape(
        lambda: bigs.BiGS(replace(bigs.large, max_position_embeddings=512))
    )
    model = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model)
    bigs.save_pretrained(model, tmp_path)
    assert (tmp_path / "flax_model.msgpack").stat().st_size == 1_386_847_646


@pytest.mark.parametrize("root", ["bert", "BiGS", "s4_bert", "my/own/root", ""])
def test_any_root_is_read(tmp_path, root):
    inputs, logits = golden()
    flat = {
        name.replace("s4_bert/", f"{root}/" if root else "", 1): array
        for name, array in flat_tree().items()
    }
    model = bigs.from_pretrained(write(tmp_path, flat))
    assert np.abs(model(*inputs) - logits).max() < 1e-5 * logits.std()


def test_older_configs_lack_two_fields(tmp_path):
    name = GOLDEN / "sequence_classification"
    inputs, logits = golden("sequence_classification")
    config = json.loads((name / "config.json").read_text())
    del config["scaling"], config["pooler_type"]
    model = bigs.from_pretrained(write(tmp_path, flat_tree(name), config))
    assert np.abs(model(*inputs) - logits).max() < 1e-5 * logits.std()


@pytest.mark.parametrize("file", ["model.safetensors", "flax_model.safetensors"])
@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_safetensors_are_read(tmp_path, file, separator, dtype):
    from safetensors.numpy import save_file

    inputs, logits = golden()
    flat = {
        name.replace("/", separator): array.astype(dtype)
        for name, array in flat_tree().items()
    }
    save_file(flat, tmp_path / file)
    shutil.copy(GOLDEN / "mlm" / "config.json", tmp_path)
    assert (
        np.abs(bigs.from_pretrained(tmp_path)(*inputs) - logits).max()
        < 1e-5 * logits.std()
    )
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-9])
    with pytest.raises(bigs.UserError, match=f"{file}: truncated or not safetensors"):
        bigs.from_pretrained(tmp_path)


def test_half_precision_is_read(tmp_path):
    half = {name: array.astype(jnp.bfloat16) for name, array in flat_tree().items()}
    model = bigs.from_pretrained(write(tmp_path, half))
    found = bigs.published_tree(model)
    for name, array in half.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32))


# Files that do not fit


def ending(flat, end):
    return next(name for name in flat if name.endswith(end))


def renamed(flat, old, new):
    return {name.replace(old, new): array for name, array in flat.items()}


MISFITS = [
    (
        lambda t: t.pop(ending(t, "layer/1/dol/kernel")),
        "lack s4_bert/encoder/layer/1/dol/kernel",
    ),
    (
        lambda t: t.pop("s4_bert/embeddings/LayerNorm/bias"),
        "lack s4_bert/embeddings/LayerNorm/bias",
    ),
    (
        lambda t: t.pop("cls/predictions/transform/dense/bias"),
        "lack cls/predictions/transform/dense/bias",
    ),
    (
        lambda t: t.pop("s4_bert/embeddings/word_embeddings/embedding"),
        "lack s4_bert/embeddings/word_embeddings",
    ),
    (
        lambda t: t.update({ending(t, "layer/0/do/bias"): np.zeros(7, np.float32)}),
        r"layer/0/do/bias has shape \(7,\), config.json wants \(32,\)",
    ),
    (
        lambda t: t.update({ending(t, "layer/0/fs4/D"): np.float32(1)}),
        r"fs4/D has shape \(\)",
    ),
    (lambda t: t.update({ending(t, "layer/0/fs4/D"): "one"}), "fs4/D has shape"),
    (
        lambda t: t.update({ending(t, "layer/0/fs4/D"): np.ones(1, int)}),
        "fs4/D does not hold finite real numbers",
    ),
    (
        lambda t: t.update({ending(t, "layer/0/fs4/D"): np.ones(1, complex)}),
        "fs4/D does not hold finite real",
    ),
    (
        lambda t: t.update(
            {ending(t, "layer/0/fs4/D"): np.full(1, np.nan, np.float32)}
        ),
        "fs4/D does not hold finite",
    ),
    (
        lambda t: t.update({"s4_bert/encoder/layer/9/do/bias": np.zeros(7)}),
        "no place for: s4_bert/encoder/layer/9/do",
    ),
    (
        lambda t: t.update({"s4_bert/encoder/layer/0/query/bias": np.zeros(7)}),
        "no place for: .*layer/0/query",
    ),
    (
        lambda t: t.update({"other/encoder/layer/0/do/bias": np.zeros(7)}),
        "no place for: other/encoder",
    ),
    (
        lambda t: t.update({"cls/predictions/scale": np.zeros(7)}),
        "no place for: cls/predictions/scale",
    ),
    (
        lambda t: t.update({"optimizer/step": np.zeros(7)}),
        "no place for: optimizer/step",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"),
    MISFITS,
)
def test_misfitting_weights_are_named(tmp_path, change, message):
    flat = flat_tree()
    change(flat)
    with pytest.raises(bigs.UserError, match=message) as caught:
        bigs.from_pretrained(write(tmp_path, flat))
    assert str(tmp_path / "flax_model.msgpack") in str(caught.value)


CONTRADICTIONS = [
    ("num_hidden_layers", 4, "lack s4_bert/encoder/layer/3"),
    ("num_hidden_layers", 2, "no place for: .*layer/2/"),
    ("num_hidden_layers", 0, "num_hidden_layers is 0"),
    ("vocab_size", 500, "has shape .*512, 32.*wants .*500, 32"),
    ("hidden_size", 64, "has shape"),
    ("hidden_size", 10**12, "has shape"),
    ("num_ssm", 32, "[fb]s4/.* has shape"),
    ("max_position_embeddings", 128, "position_embeddings/embedding has shape"),
    ("block", "stack", "layer/0/.* has shape|lack .*layer/0/W_"),
    ("routing", "attention", "no place for: .*[fb]s4"),
    ("intermediate_size", 97, "has shape"),
    ("hidden_size", "wide", "hidden_size is 'wide'"),
    ("hidden_size", 32.5, "hidden_size is 32.5"),
    ("pre_norm", 1, "pre_norm is 1"),
    ("num_ssm", True, "num_ssm is True"),
    ("scaling", "log", "scaling: 'log'"),
    ("hidden_dropout_prob", "0.1", "hidden_dropout_prob is '0.1'"),
    ("id2label", 3, "not JSON, or not a model's"),
]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    CONTRADICTIONS,
)
def test_a_config_that_contradicts_the_weights_is_named(
    tmp_path, field, value, message
):
    config = json.loads((GOLDEN / "mlm" / "config.json").read_text()) | {field: value}
    with pytest.raises(bigs.UserError, match=message):
        bigs.from_pretrained(write(tmp_path, flat_tree(), config))


@pytest.mark.parametrize("content", ["{", "[]", "[3]", "null", "7", "\xff"])
def test_a_config_that_is_none(tmp_path, content):
    write(tmp_path, flat_tree())
    (tmp_path / "config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(
        bigs.UserError,
        match="config.json: not JSON, or not a model's|weights lack|no place for|shape",
    ):
        bigs.from_pretrained(tmp_path)


def test_foreign_files_are_named(tmp_path):
    bert = renamed(
        renamed(flat_tree(), "s4_bert", "bert"), "/dv/", "/attention/self/query/"
    )
    with pytest.raises(bigs.UserError, match="lack bert/encoder/layer/0/dv"):
        bigs.from_pretrained(write(tmp_path, bert))
    torch = {
        name.replace("kernel", "weight"): array for name, array in flat_tree().items()
    }
    with pytest.raises(bigs.UserError, match="lack s4_bert/encoder/layer/0/.*kernel"):
        bigs.from_pretrained(write(tmp_path, torch))
    for other in ([1, 2, 3], 5, {"step": 7}, {}, {"a": [1]}):
        (tmp_path / "flax_model.msgpack").write_bytes(
            serialization.msgpack_serialize(other)
        )
        with pytest.raises(
            bigs.UserError,
            match="flax_model.msgpack: (truncated or not msgpack|the weights lack)",
        ):
            bigs.from_pretrained(tmp_path)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_pickle_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(GOLDEN / "mlm" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(
        bigs.UserError,
        match="a pickle .pytorch_model.bin. is not read, because it can run any code; ",
    ):
        bigs.from_pretrained(tmp_path)
    for disguise in ("flax_model.msgpack", "model.safetensors"):
        (tmp_path / "pytorch_model.bin").rename(tmp_path / disguise)
        with pytest.raises(bigs.UserError, match=f"{disguise}: truncated or not"):
            bigs.from_pretrained(tmp_path)
        (tmp_path / disguise).rename(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("left", [0, 1, 100, 100_000, 254_158])
def test_truncated_files_are_named(tmp_path, left):
    write(tmp_path, flat_tree())
    (tmp_path / "flax_model.msgpack").write_bytes(
        (GOLDEN / "mlm" / "flax_model.msgpack").read_bytes()[:left]
    )
    with pytest.raises(
        bigs.UserError, match="flax_model.msgpack: truncated or not msgpack"
    ):
        bigs.from_pretrained(tmp_path)


# Heads


def test_a_missing_head_is_drawn_anew_with_a_warning():
    with pytest.warns(
        UserWarning, match="drawn anew, the file lacks .*classifier/kernel"
    ):
        model = bigs.from_pretrained(GOLDEN / "mlm", "sequence_classification")
    assert model(np.ones((2, 64), int)).shape == (2, 2)
    assert np.asarray(model.head.classifier.kernel[...]).std() > 0
    with pytest.warns(UserWarning, match="cls/predictions/bias"):
        assert (
            bigs.from_pretrained(GOLDEN / "sequence_classification", "masked_lm").task
            == "masked_lm"
        )


def test_a_classifier_belongs_to_its_task():
    """Another task keeps the pooler and draws its own classifier, even where the shapes
    would fit.
    """
    name = GOLDEN / "sequence_classification"
    with pytest.warns(UserWarning, match="lacks classifier/bias, classifier/kernel$"):
        choice = bigs.from_pretrained(name, "multiple_choice")
    np.testing.assert_array_equal(
        choice.head.pooler.kernel[...], flat_tree(name)["s4_bert/pooler/dense/kernel"]
    )
    with pytest.warns(UserWarning, match="lacks classifier/bias, classifier/kernel$"):
        tokens = bigs.from_pretrained(name, "token_classification")
    assert not np.array_equal(
        tokens.head.classifier.kernel[...], flat_tree(name)["classifier/kernel"]
    )


def test_a_config_need_not_name_its_task(tmp_path):
    name = GOLDEN / "sequence_classification"
    inputs, logits = golden("sequence_classification")
    config = json.loads((name / "config.json").read_text())
    del config["architectures"]
    model = bigs.from_pretrained(
        write(tmp_path, flat_tree(name), config), "sequence_classification"
    )
    assert np.abs(model(*inputs) - logits).max() < 1e-5 * logits.std()
    with pytest.raises(bigs.UserError, match="task: 'poetry' does not exist"):
        bigs.from_pretrained(name, "poetry")


# Other lengths


@pytest.mark.parametrize("rows", ["repeat", "last", "mean", "random"])
def test_a_model_for_longer_texts(rows):
    """What fits into the old length is answered as before; what does not is answered,
    too.
    """
    model = moved(SMALL)
    longer = bigs.extend(model, 80, rows)
    assert longer.config == replace(SMALL, max_position_embeddings=80)
    np.testing.assert_allclose(longer(IDS), model(IDS), atol=1e-6)
    long = np.random.default_rng(2).integers(5, 60, (2, 80))
    assert longer(long).shape == (2, 80, 60)
    assert np.isfinite(longer(long)).all()
    table, old = (
        np.asarray(m.encoder.positions.embedding[...]) for m in (longer, model)
    )
    np.testing.assert_array_equal(table[:32], old)
    wanted = {
        "repeat": old[:16],
        "last": old[[31] * 16],
        "mean": np.tile(old.mean(0), (16, 1)),
    }
    if rows in wanted:
        np.testing.assert_allclose(table[64:], wanted[rows], atol=1e-6)
    else:
        spread = np.asarray(table[32:]).std()
        assert spread == pytest.approx(SMALL.initializer_range, rel=0.25)
    again = bigs.extend(longer, 32)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_extend_refuses_what_it_cannot_do():
    with pytest.raises(bigs.UserError, match="length: 0 is not positive"):
        bigs.extend(moved(SMALL), 0)
    with pytest.raises(
        bigs.UserError,
        match="rows: 'zero' is unknown; choose one of repeat, last, mean, random",
    ):
        bigs.extend(moved(SMALL), 40, "zero")


def test_extended_models_are_written_and_read(tmp_path):
    bigs.save_pretrained(
        bigs.extend(bigs.from_pretrained(GOLDEN / "mlm"), 128), tmp_path
    )
    assert bigs.from_pretrained(tmp_path)(np.ones((1, 128), int)).shape == (1, 128, 512)

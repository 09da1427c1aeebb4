"""Random weights in the authors' format: our outputs and kernels against those of their code."""

from pathlib import Path

import jax
import numpy as np
import pytest

import annotated_bigs as bigs

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["mlm", "sequence_classification"])
@pytest.mark.parametrize("convolution", ["toeplitz", "fft", "blocks"])
def test_outputs_are_the_authors(name, convolution):
    model = bigs.from_pretrained(GOLDEN / name, convolution=convolution)
    stored = np.load(GOLDEN / name / "golden.npz")
    logits = model(stored["input_ids"], stored["attention_mask"], stored["token_type_ids"])
    assert np.abs(logits - stored["logits"]).max() < 1e-5 * stored["logits"].std()


def test_kernels_are_the_authors():
    model, stored = bigs.from_pretrained(GOLDEN / "mlm"), np.load(GOLDEN / "mlm" / "golden.npz")
    ours = bigs.kernels_of(model)
    for layer in range(3):
        for direction, theirs in enumerate(("fs4", "bs4")):
            K = stored[f"kernel/{layer}/{theirs}"].ravel()
            assert np.abs(ours[layer, direction] - K).max() < 2e-5 * np.abs(K).max()


def test_the_oracle_can_fail():
    """Silent padding, the one setting that differs, moves the answer a hundred times beyond the tolerance."""
    stored = np.load(GOLDEN / "mlm" / "golden.npz")
    model = bigs.from_pretrained(GOLDEN / "mlm", mask_padding=True)
    logits = model(stored["input_ids"], stored["attention_mask"], stored["token_type_ids"])
    assert np.abs(logits - stored["logits"]).max() > 100 * 1e-5 * stored["logits"].std()


def test_written_files_are_the_same(tmp_path):
    from flax import serialization
    bigs.save_pretrained(bigs.from_pretrained(GOLDEN / "mlm"), tmp_path)
    read = [serialization.msgpack_restore((f / "flax_model.msgpack").read_bytes()) for f in (GOLDEN / "mlm", tmp_path)]
    assert jax.tree.structure(read[0]) == jax.tree.structure(read[1])
    jax.tree.map(np.testing.assert_array_equal, *read)


def damaged(folder, change):
    """A copy of the golden model whose tree has been changed."""
    from flax import serialization, traverse_util
    tree = serialization.msgpack_restore((GOLDEN / "mlm" / "flax_model.msgpack").read_bytes())
    flat = traverse_util.flatten_dict(tree, sep="/")
    change(flat)
    packed = serialization.msgpack_serialize(traverse_util.unflatten_dict(flat, sep="/"))
    (folder / "flax_model.msgpack").write_bytes(packed)
    (folder / "config.json").write_bytes((GOLDEN / "mlm" / "config.json").read_bytes())
    return folder


def name_of(flat, end):
    return next(name for name in flat if name.endswith(end))


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(name_of(t, "layer/1/dol/kernel")), "lack .*layer/1/dol/kernel"),
    (lambda t: t.update({name_of(t, "layer/0/do/bias"): np.zeros(7)}), "shape"),
    (lambda t: t.update({"s4_bert/encoder/layer/9/do/bias": np.zeros(7)}), "no place for"),
])
def test_misfitting_weights_are_named(tmp_path, change, message):
    with pytest.raises(bigs.UserError, match=message):
        bigs.from_pretrained(damaged(tmp_path, change))


def test_truncated_missing_and_pickled_files(tmp_path):
    data = (GOLDEN / "mlm" / "flax_model.msgpack").read_bytes()
    (tmp_path / "config.json").write_bytes((GOLDEN / "mlm" / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(bigs.UserError, match="flax_model.msgpack is missing"):
        bigs.from_pretrained(tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(data[:-100])
    with pytest.raises(bigs.UserError, match="truncated or not msgpack"):
        bigs.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(bigs.UserError, match="not JSON"):
        bigs.from_pretrained(tmp_path)


def test_a_missing_head_is_drawn_anew_with_a_warning():
    with pytest.warns(UserWarning, match="classifier/kernel"):
        model = bigs.from_pretrained(GOLDEN / "mlm", "sequence_classification")
    assert model(np.ones((2, 64), int)).shape == (2, 2)

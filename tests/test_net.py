"""The regression net: what the program said before it was rewritten, it still says.

The cases and how they were stored: make_net.py; how they reach the program: net.py.
"""

import json

import make_net
import net
import numpy as np
import pytest

with np.load(make_net.FILE) as FILE:
    STORED = dict(FILE)


def marked(case):
    marks = [] if case in make_net.DEFAULT else [pytest.mark.slow]
    return pytest.param(case, marks=marks, id=case.replace(" ", "-"))


# The largest difference that is let pass, as make_net.difference measures it: about
# four times what was seen where nothing but rounding differed. Measured with jax 0.10.2
# on a CPU: the compiler's default optimization, not the tests' (none), layers scanned
# instead of written out, and weights moved by an ulp, all together; losses also on a
# processor without AVX-512.
TOLERANCES = {
    "logits": 1e-4,  # seen: 2.8e-5
    "answers": 5e-5,  # 1.2e-5
    "loss": 4e-6,  # 1.0e-6
    "gradient": 4e-4,  # 7.8e-5
    "losses": 5e-5,  # 1.2e-5
    "moved": 6e-4,  # 1.3e-4
    "tuned": 4e-4,  # 1.0e-4
}
# Kernels over hundreds of tokens lose digits, and so do products of products.
LONG = TOLERANCES | {
    "logits": 3e-3,  # 7.8e-4
    "gradient": 5e-3,  # 1.2e-3
}
GATED_SSM = TOLERANCES | {
    "gradient": 4e-3,  # 8.1e-4
    "losses": 4e-4,  # 1.0e-4
    "moved": 1.2e-2,  # 2.8e-3
}
BFLOAT16 = {
    "logits": 0.12,  # 3.0e-2
    "loss": 3e-3,  # 7.2e-4
    "gradient": 0.12,  # 3.0e-2
    "losses": 0.12,  # 3.0e-2
}
KINDS = {
    "start": "answers",
    "end": "answers",
    "last": "tuned",
    "best": "tuned",
    "scores": "loss",
    "heldout": "loss",
}


def tolerance(case, array):
    kind = "logits" if case.startswith("logits") else KINDS.get(array, array)
    if "bfloat16" in case:
        return BFLOAT16[kind]
    if case.endswith(("long", "blocks")):
        return LONG[kind]
    return GATED_SSM[kind] if "gated-ssm" in case else TOLERANCES[kind]


def check(case, found):
    names = [name for name in STORED if name.startswith(f"{case}/")]
    assert [f"{case}/{array}" for array in found] == names
    for array, name in zip(found, names, strict=True):
        difference = make_net.difference(case, array, found[array], STORED[name])
        assert difference <= tolerance(case, array), array


MEASURED = [case for case in make_net.CASES if case != "pretraining"]  # see below


@pytest.mark.parametrize("case", map(marked, MEASURED))
def test_the_program_says_what_it_said(case):
    check(case, make_net.measure(case))


def test_batches_and_rates_are_what_they_were():
    for name, array in make_net.exact_values().items():
        if "rates" in name:
            np.testing.assert_allclose(array, STORED[f"exact/{name}"], rtol=1e-6)
        else:
            np.testing.assert_array_equal(array, STORED[f"exact/{name}"])


@pytest.mark.parametrize("architecture", make_net.ARCHITECTURES)
def test_a_stored_model_is_read_and_written_to_the_byte(architecture, tmp_path):
    stored = make_net.FOLDER / architecture
    net.write(net.read(stored), tmp_path)
    written = tmp_path / "flax_model.msgpack"
    assert written.read_bytes() == (stored / "flax_model.msgpack").read_bytes()
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (stored, tmp_path)
    )
    assert before.items() <= after.items()


@pytest.mark.parametrize("architecture", make_net.ARCHITECTURES)
def test_stored_weights_have_their_published_names(architecture):
    """They are what their names say: drawn by name, without the program."""
    model = net.by_published_name(net.read(make_net.FOLDER / architecture))
    weights = make_net.stored_weights(architecture)
    assert set(model) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(model[name], array)
        drawn = make_net.drawn(name, array.shape)
        np.testing.assert_allclose(array, drawn, rtol=1e-5, atol=1e-7)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Bitwise, for the finished model; and the log goes on where it was."""
    arguments = make_net.pretraining_arguments(tmp_path)
    whole = net.pretrain(tmp_path / "whole", *arguments)
    check("pretraining", make_net.losses_of(whole))
    left = net.pretrain(tmp_path / "left", *arguments, leave_after=4)
    assert left == [entry for entry in whole if entry[0] <= 4]
    assert net.pretrain(tmp_path / "left", *arguments, resume=True) == whole
    finished = [tmp_path / run / "flax_model.msgpack" for run in ("whole", "left")]
    assert finished[0].read_bytes() == finished[1].read_bytes()

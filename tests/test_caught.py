"""What no other test noticed when its fault was seeded (faults.py)."""

import make_net
import net
import numpy as np
import pytest

EMBEDDINGS = "s4_bert/embeddings"
WORDS = f"{EMBEDDINGS}/word_embeddings/embedding"
TYPES = f"{EMBEDDINGS}/token_type_embeddings/embedding"


def test_statistics_are_taken_in_float32(tmp_path):
    """What all channels share is taken away by a LayerNorm, however large it is.

    The embeddings here are whole halves. bfloat16 holds them exactly, even beside a
    hundred, but not their mean.
    """
    weights = make_net.stored_weights("gated-ssm")
    words = np.round(4 * weights[WORDS]) / 2
    types = np.zeros_like(weights[TYPES])
    ids, _ = make_net.random_texts(3, 12)
    answers = []
    for shared in (0, 100):
        positions = np.full_like(weights[make_net.POSITIONS], shared)
        given = {WORDS: words, TYPES: types, make_net.POSITIONS: positions}
        model = make_net.model_of("gated-ssm", tmp_path, given=given, dtype="bfloat16")
        answers.append(np.asarray(net.outputs(model, ids)))
    plain, raised = answers
    assert np.abs(raised - plain).max() < 0.1 * plain.std()


@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-4])
def test_the_optimizer_adds_a_millionth_to_the_size_of_a_gradient(size):
    """Of a constant gradient g Adam makes the rate times g / (|g| + 1e-6)."""
    recipe = {"steps": 10, "warmup": 0.1, "learning_rate": 0.1}
    gradients = [np.array([size, -size])] * 3
    rates = net.learning_rates(recipe, range(3))
    share = size / (size + 1e-6)
    for rate, update in zip(rates, net.updates(recipe, gradients), strict=True):
        np.testing.assert_allclose(update, [-rate * share, rate * share], rtol=1e-4)
    assert rates[1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "task, labels",
    [
        ("mnli", ("entailment", "neutral", "contradiction")),
        ("qnli", ("entailment", "not_entailment")),
        ("rte", ("entailment", "not_entailment")),
    ],
)
def test_labels_are_numbered_as_on_the_hub(task, labels):
    """Data from the hub come with numbers, official files with words; they must agree."""
    assert net.label_names(task) == labels

"""What only the Hugging Face hub has: the published models, GLUE, Wikipedia. These
tests run with `pytest -m hub` alone, and fail where the hub cannot be reached.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

import annotated_bigs as bigs
from workshop import commands, corpora, glue, running

pytestmark = pytest.mark.hub

# The published models

PRETRAINED = "JunxiongWang/BiGS_128"
FINETUNED = "JunxiongWang/BiGS_128_MNLI"

# Twenty words and their probabilities, as the authors printed them.
PUBLISHED_WORDS = {
    "The goal of life is [MASK].": {
        "happiness": 0.16052087,
        "love": 0.04306792,
        "peace": 0.03651363,
        "perfection": 0.03468223,
        "life": 0.02927081,
        "enlightenment": 0.02549769,
        "god": 0.02385132,
        "survival": 0.02261189,
        "freedom": 0.01672831,
        "good": 0.01619471,
    },
    "Paris is the [MASK] of France.": {
        "capital": 0.9981787,
        "centre": 0.00034076,
        "center": 0.00026992,
        "city": 0.00026926,
        "capitol": 0.00017787,
        "prefecture": 0.00004816,
        "headquarters": 0.00004256,
        "president": 0.00003716,
        "metropolis": 0.00003634,
        "heart": 0.00002893,
    },
}

# Figure 3, read off by eye: where each row, 0 at the bottom, is strongest, and some of
# its other values.
STRONGEST = {
    0: (1,),
    1: (-1,),
    2: (-1,),
    4: (-2, -1),
    5: (-1,),
    6: (-2,),
    7: (0,),
    8: (0,),
    12: (-1,),
    13: (0,),
    15: (1,),
    16: (-2, -1),
    19: (0,),
    20: (-1,),
    21: (-1,),
    22: (0,),
}
VALUES = {
    4: {-3: 0.29, 0: 0.47},
    6: {-3: 0.43, -1: 0.39},
    12: {1: 0.5, 2: 0.5},
    15: {-1: 0.82, 0: 0.62},
    22: {-2: 0.88},
}
# Figure 4, by layer and direction (0: the past): lag, before and after MNLI; each curve
# is scaled to a peak of one.
CURVES = {
    (14, 1): [(16, 0.83, 0.92), (32, 0.59, 0.75), (64, 0.38, 0.54), (96, 0.3, 0.41)],
    (17, 0): [(16, 0.77, 0.95), (32, 0.54, 0.81), (64, 0.36, 0.65), (96, 0.28, 0.55)],
    (18, 0): [(8, 0.24, 0.42), (16, 0.11, 0.19), (32, 0.02, 0.08)],
}


@pytest.fixture(scope="module")
def kernels():
    """The published kernels before and after fine-tuning on MNLI."""
    names = PRETRAINED, FINETUNED
    return [bigs.kernels_of(commands.pretrained_model(name)) for name in names]


@pytest.mark.parametrize("text", PUBLISHED_WORDS)
def test_the_published_model_says_the_published_words(text):
    model = bigs.from_pretrained(PRETRAINED)
    tokenizer = bigs.load_tokenizer(PRETRAINED)
    found = dict(bigs.fill_mask(model, tokenizer, text, 10)[0])
    expected = PUBLISHED_WORDS[text]
    assert list(found) == list(expected)
    for word, probability in expected.items():
        tolerance = 0.02 if probability > 1e-3 else 0.2
        assert found[word] == pytest.approx(probability, rel=tolerance), word


@pytest.mark.parametrize("layer", STRONGEST)
def test_the_published_kernels_peak_where_figure_3_says(kernels, layer):
    row = bigs.around(kernels[0][layer])
    assert row.argmax() - 10 in STRONGEST[layer]


@pytest.mark.parametrize("layer", VALUES)
def test_the_published_kernels_have_the_values_of_figure_3(kernels, layer):
    row = bigs.around(kernels[0][layer])
    for place, value in VALUES[layer].items():
        assert row[10 + place] == pytest.approx(value, abs=0.1), place


@pytest.mark.parametrize(("layer", "side"), CURVES)
def test_finetuning_moved_the_kernels_as_figure_4_says(kernels, layer, side):
    curves = [np.abs(stage[layer, side]) for stage in kernels]
    before, after = (curve / curve.max() for curve in curves)
    for lag, *expected in CURVES[layer, side]:
        assert [before[lag], after[lag]] == pytest.approx(expected, abs=0.08), lag


# GLUE

# How often each label occurs in the official development sets, in the order of the
# model's outputs.
LABELS = {
    "mnli": [3479, 3123, 3213],
    "qnli": [2702, 2761],
    "rte": [146, 131],
    "sst2": [428, 444],
    "mrpc": [129, 279],
    "cola": [322, 721],
    "wnli": [40, 31],
}


@pytest.mark.parametrize("name", [name for name in bigs.GLUE if name != "order"])
def test_the_hub_has_the_rows_of_the_official_files(name):
    splits = glue.task_texts(name, None)
    for split, rows in bigs.GLUE[name].rows.items():
        assert len(splits[split].texts) == rows, split


@pytest.mark.parametrize("name", LABELS)
def test_the_hub_numbers_labels_as_we_do(name):
    split = "dev_matched" if name == "mnli" else "dev"
    labels = glue.task_texts(name, None)[split].labels
    assert np.bincount(labels).tolist() == LABELS[name]


def test_a_task_of_the_hub_is_learned(tmp_path):
    output = tmp_path / "wnli"
    command = "finetune --task wnli --epochs 1 --learning-rate 1e-4 --batch 16"
    commands.main([*command.split(), "--output", str(output)])
    assert "wnli" in json.loads((output / "results.json").read_text())


# Wikipedia


def test_a_few_steps_on_streamed_wikipedia(tmp_path):
    shard = corpora.streamed_parts("wikimedia/wikipedia:20231101.en")[0]
    articles = list(itertools.islice(shard.read(), 200))
    corpus = bigs.Corpus(articles[:180], articles[180:], shard.name)
    data = bigs.make_dataset(corpus, bigs.load_tokenizer(), 128)
    recipe = replace(bigs.RECIPES["demonstration"], steps=20, batch=8)
    run = running.pretrain(bigs.tiny, recipe, data, tmp_path / "run")
    heldout = [entry["heldout"] for entry in run.history if "heldout" in entry]
    assert heldout[-1] < heldout[0] - 0.1

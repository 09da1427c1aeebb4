"""A small model, a short recipe and random tokens, shared by the tests of training."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

import annotated_bigs as bigs

ROOT = Path(__file__).parents[1]
CONFIG = replace(
    bigs.tiny,
    vocab_size=200,
    hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=2,
    max_position_embeddings=32,
    num_ssm=8,
)
RECIPE = bigs.Recipe(
    steps=12, batch=4, length=32, learning_rate=1e-2, save_every=5, evaluate_every=6
)


# A step is traced and compiled once for each recipe, however many runs take it.
make_step = functools.cache(bigs.make_step)


def random_rows(count: int = 40, length: int = 32, words: int = 200) -> bigs.Rows:
    """Random tokens between [CLS] and [SEP], with another [SEP] on the way."""
    tokens = np.random.default_rng(0).integers(5, words, (count, length))
    tokens[:, 0] = 2
    tokens[:, -1] = 3
    tokens[:, min(40, length - 2)] = 3
    return bigs.Rows(tokens, words, 4, (0, 2, 3))


class FakeTokenizer:
    """Stands in for a tokenizer where only saving is asked of it."""

    def save_pretrained(self, directory):
        (Path(directory) / "tokenizer.json").write_text("{}")


def dataset(length: int = 32) -> bigs.Dataset:
    rows = random_rows(length=length)
    heldout = [bigs.batch_at(rows, 8, 9, 0)]
    return bigs.Dataset(FakeTokenizer(), rows, heldout, "random tokens")


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]

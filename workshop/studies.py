"""What the comparisons of the story measure; their numbers lie in data/."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

import annotated_bigs as bigs
from workshop import arms, corpora, running

assert arms  # it adds the layers with free kernels


def way_of(run: Path) -> dict[str, np.ndarray]:
    """Kernels at the start of a run; and at every checkpoint that was kept the tokens
    read, step sizes, poles, the standard deviation of the encoder's output, and the
    root mean square of each layer's $W_o$.
    """
    recipe = bigs.Recipe(**json.loads((run / "run.json").read_text())["recipe"])
    way = {}
    start = None
    for step, model in running.states_of(run, every=True):
        layers = model.encoder.layers
        config = model.config
        start = bigs.kernels_of(model) if start is None else start
        words = np.random.default_rng(0).integers(
            5, config.vocab_size, (8, config.max_position_embeddings)
        )
        sides = layers.forward, layers.backward
        poles = [
            np.minimum(s.A_re[...], -1e-4) + 1j * np.asarray(s.A_im[...]) for s in sides
        ]
        now = {
            "tokens": step * recipe.batch * recipe.length,
            "step_sizes": np.stack([np.exp(s.log_step[...][:, 0]) for s in sides], 1),
            "poles": np.stack(poles, 1).astype(np.complex64),
            "spread": np.std(model.encoder(words, np.ones(words.shape, bool))),
            "sizes": np.sqrt(np.square(layers.W_o.kernel[...]).mean((1, 2))),
        }
        for name, value in now.items():
            way.setdefault(name, []).append(np.asarray(value))
    return {name: np.asarray(values) for name, values in way.items()} | {"start": start}


def shortened(model: bigs.BiGS, most: int) -> bigs.BiGS:
    """A gated SSM model whose kernels end after a lag; -1 leaves nothing of them.

    >>> model = bigs.BiGS(bigs.Config(50, 8, 1, 24, num_ssm=4))
    >>> bool(np.allclose(shortened(model, 127)([[5, 6]]), model([[5, 6]]), atol=1e-5))
    True
    """
    kernels = bigs.kernels_of(model)
    short = np.where(np.arange(kernels.shape[-1]) <= most, kernels, 0)
    values = {
        path: leaf
        for path, leaf in bigs.named_parameters(model)
        if not {"forward", "backward"} & set(path)
    }
    for side, name in enumerate(("forward", "backward")):
        path = "encoder", "layers", name
        values[*path, "kernel"] = short[:, side]
        values[*path, "D"] = getattr(model.encoder.layers, name).D[...]
    free = bigs.BiGS(replace(model.config, routing="free"), model.task)
    return bigs.with_parameters(free, values)


def texts_of(text: str) -> list[str]:
    """The documents of a text."""
    return [
        document.text for part in corpora.parts_of(text) for document in part.read()
    ]


def pieces_a_character(tokenizer, text: str) -> float:
    """How many pieces a tokenizer cuts a text into, for each of its characters: a loss
    of one nat a piece is so many nats a character.
    """
    texts = texts_of(text)
    pieces = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return sum(map(len, pieces)) / sum(map(len, texts))


def dataset_of(text: str, tokenizer, length: int, count: int) -> bigs.Dataset:
    """A text as held-out rows, at most `count` of them."""
    rows = bigs.rows_for(tokenizer, bigs.pack(texts_of(text), tokenizer, length))
    return bigs.Dataset(tokenizer, rows, bigs.fixed_batches(rows, count), text)


LAGS = (-1, 0, 1, 2, 4, 8, 16, 32, 64, 127)


def losses_shortened(
    model: bigs.BiGS, tokenizer, text: str, count: int = 512
) -> dict[str, float]:
    """Held-out losses on a text, in nats per masked word, where all kernels end after a
    lag of LAGS.
    """
    data = dataset_of(text, tokenizer, model.config.max_position_embeddings, count)
    return {
        str(most): bigs.evaluate(shortened(model, most), data, bigs.fast_loss)
        for most in LAGS
    }


def print_shortened(losses: dict[str, dict[str, float]]) -> None:
    """For every text its loss where all kernels end after a lag; after -1, all are
    silent.

    >>> print_shortened({"a.txt": {"-1": 6.5, "127": 4.5}})
    kernels end after                   a
    lag -1                          6.500
    lag 127                         4.500
    """
    print(
        f"{'kernels end after':17s}"
        + "".join(f"{text.split('.')[0]:>20s}" for text in losses)
    )
    for most in next(iter(losses.values())):
        values = [found[most] for found in losses.values()]
        print(f"lag {most:13s}" + "".join(f"{value:20.3f}" for value in values))


def losses_without(
    model: bigs.BiGS, tokenizer, text: str, count: int = 512
) -> dict[str, float]:
    """Held-out losses on a text, nats per masked word: with all kernels, without any,
    without each, and without both of each layer.
    """
    data = dataset_of(text, tokenizer, model.config.max_position_embeddings, count)
    layers = model.config.num_hidden_layers
    none = np.zeros((layers, 2), bool)
    found = {"nothing": none, "all": ~none}
    for layer, (side, name) in itertools.product(
        range(layers), (([0], "forward"), ([1], "backward"), ([0, 1], "both"))
    ):
        found[f"layer {layer}, {name}"] = none.copy()
        found[f"layer {layer}, {name}"][layer, side] = True
    return {
        name: bigs.evaluate(bigs.silenced(model, which), data, bigs.fast_loss)
        for name, which in found.items()
    }

"""What the comparisons of the story measure; their numbers lie in data/."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import annotated_bigs as bigs
from annotated_bigs import BiGS
from workshop import arms, corpora, running

assert arms  # it adds the layers with free kernels


def numbers_of(model: BiGS) -> dict[str, np.ndarray]:
    """Step sizes and poles of a gated SSM model, (layers, 2) and (layers, 2, N), the
    standard deviation of its encoder's output, and the root mean square of each layer's
    $W_o$.

    >>> found = numbers_of(BiGS(bigs.Config(50, 8, 1, 24, num_ssm=4)))
    >>> found["step_sizes"].shape, found["poles"].shape, found["sizes"].shape
    ((1, 2), (1, 2, 4), (1,))
    """
    config = model.config
    layers = model.encoder.layers
    step_sizes = []
    poles = []
    for side in (layers.forward, layers.backward):
        step_sizes.append(np.exp(side.log_step[...][:, 0]))
        real = np.minimum(side.A_re[...], -1e-4)
        poles.append(real + 1j * np.asarray(side.A_im[...]))
    shape = 8, config.max_position_embeddings
    words = np.random.default_rng(0).integers(5, config.vocab_size, shape)
    output = model.encoder(words, np.ones(shape, bool))
    squares = np.square(layers.W_o.kernel[...])
    return {
        "step_sizes": np.stack(step_sizes, 1),
        "poles": np.stack(poles, 1).astype(np.complex64),
        "spread": np.std(output),
        "sizes": np.sqrt(squares.mean((1, 2))),
    }


def way_of(run: Path) -> dict[str, np.ndarray]:
    """Kernels at the start of a run, if that was a fresh model; there and at every
    checkpoint that was kept the tokens read, and `numbers_of` the model.
    """
    _, recipe = running.run_settings(run)
    way = {}
    kernels = {}
    for step, model in running.states_of(run, every=True):
        if step == 0:
            kernels["start"] = bigs.kernels_of(model)
        numbers = numbers_of(model)
        numbers["tokens"] = np.asarray(step * recipe.batch * recipe.length)
        for name, value in numbers.items():
            way.setdefault(name, []).append(value)
    return kernels | {name: np.asarray(values) for name, values in way.items()}


def shortened(model: BiGS, most: int) -> BiGS:
    """A gated SSM model whose kernels end after a lag; -1 leaves nothing of them.

    >>> model = BiGS(bigs.Config(50, 8, 1, 24, num_ssm=4))
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
        values[*path, "lags"] = short[:, side]
        values[*path, "D"] = getattr(model.encoder.layers, name).D[...]
    free = BiGS(replace(model.config, routing="free"), model.task)
    return bigs.with_parameters(free, values)


def texts_of(text: str) -> list[str]:
    """The documents of a text."""
    parts = corpora.parts_of(text)
    if any(part.is_shard for part in parts):
        raise bigs.UserError(
            f"heldout: {text} is of HDF5 shards, which hold no texts; give the texts"
        )
    return [document.text for part in parts for document in part.read()]


def pieces_a_character(tokenizer, texts: list[str]) -> float:
    """How many pieces a tokenizer cuts texts into, for each of their characters: a loss
    of one nat a piece is so many nats a character.
    """
    pieces = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return sum(map(len, pieces)) / sum(map(len, texts))


def dataset_of(
    texts: list[str], tokenizer, length: int, count: int = 512
) -> bigs.Dataset:
    """Documents as held-out rows, at most `count` of them."""
    rows = bigs.rows_for(tokenizer, bigs.pack(texts, tokenizer, length))
    return bigs.Dataset(tokenizer, rows, bigs.fixed_batches(rows, count), "")


LAGS = (-1, 0, 1, 2, 4, 8, 16, 32, 64, 127)


def losses_shortened(model: BiGS, data: bigs.Dataset) -> dict[str, float]:
    """Held-out losses, in nats per masked word, where all kernels end after a lag of
    LAGS.
    """
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
    names = [text.split(".")[0] for text in losses]
    heading = "".join(f"{name:>20s}" for name in names)
    print(f"kernels end after{heading}")
    for most in next(iter(losses.values())):
        values = [found[most] for found in losses.values()]
        line = "".join(f"{value:20.3f}" for value in values)
        print(f"lag {most:13s}{line}")


def losses_without(model: BiGS, data: bigs.Dataset) -> dict[str, float]:
    """Held-out losses, in nats per masked word: with all kernels, without any, without
    each, and without both of each layer.
    """
    layers = range(model.config.num_hidden_layers)
    none = np.zeros((len(layers), 2), bool)
    masks = {"nothing": none, "all": ~none}
    sides = {"forward": [0], "backward": [1], "both": [0, 1]}
    for layer, side in itertools.product(layers, sides):
        mask = none.copy()
        mask[layer, sides[side]] = True
        masks[f"layer {layer}, {side}"] = mask

    losses = {}
    for name, mask in masks.items():
        silent = bigs.silenced(model, mask)
        losses[name] = bigs.evaluate(silent, data, bigs.fast_loss)
    return losses


def reading_of(model: BiGS, tokenizer, text: str) -> dict[str, Any]:
    """What a model reads in a text: its `losses` without kernels and with `shortened`
    ones, the loss of knowing word `frequencies` only, in nats per masked word, and
    `pieces_a_character`.
    """
    texts = texts_of(text)
    data = dataset_of(texts, tokenizer, model.config.max_position_embeddings)
    return {
        "losses": losses_without(model, data),
        "shortened": losses_shortened(model, data),
        "frequencies": bigs.frequency_loss(data.train, data.heldout),
        "pieces_a_character": pieces_a_character(tokenizer, texts),
    }


def readings_of(
    model: BiGS, tokenizer, texts: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """`reading_of` each text, by what was read and then by the name of the file; empty
    without texts.
    """
    each = {Path(text).name: reading_of(model, tokenizer, text) for text in texts}
    kinds = next(iter(each.values()), {})
    return {
        kind: {text: reading[kind] for text, reading in each.items()} for kind in kinds
    }

"""What the comparisons of the story measure; their numbers lie in data/."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

import annotated_bigs as bigs
from workshop import corpora


def way_of(run: Path) -> dict[str, np.ndarray]:
    """Kernels at the start of a run; and at every checkpoint that was kept the tokens
    read, step sizes, poles, the standard deviation of the encoder's output, and the
    root mean square of each layer's $W_o$.
    """
    recipe = bigs.Recipe(**json.loads((run / "run.json").read_text())["recipe"])
    way = {}
    start = None
    for step, model in bigs.states_of(run, every=True):
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
            way.setdefault(name, []).append(value)
    return {name: np.asarray(values) for name, values in way.items()} | {"start": start}


def losses_without(
    model: bigs.BiGS, tokenizer, text: str, count: int = 512
) -> dict[str, float]:
    """Held-out losses on a text, nats a masked word: with all kernels, without each,
    each layer's, kinds, and all.
    """
    documents = [
        document.text for part in corpora.parts_of(text) for document in part.read()
    ]
    rows = bigs.rows_for(
        tokenizer, bigs.pack(documents, tokenizer, model.config.max_position_embeddings)
    )
    data = bigs.Dataset(tokenizer, rows, bigs.fixed_batches(rows, count), text)
    local = bigs.reaches(bigs.kernels_of(model)) <= 10
    found = {
        "nothing": np.zeros_like(local),
        "all": np.ones_like(local),
        "local": local,
        "long": ~local,
    }
    for layer, (side, name) in itertools.product(
        range(len(local)), (([0], "forward"), ([1], "backward"), ([0, 1], "both"))
    ):
        found[f"layer {layer}, {name}"] = np.zeros_like(local)
        found[f"layer {layer}, {name}"][layer, side] = True
    return {
        name: bigs.evaluate(bigs.silenced(model, which), data, bigs.fast_loss)
        for name, which in found.items()
    }


def compare_variants(
    config: bigs.Config,
    recipe: bigs.Recipe,
    data: bigs.Dataset,
    variants: Iterable[str],
    seeds: int,
    output: Path,
) -> dict[str, list[float]]:
    """Final held-out losses of variants, a run for each seed, each in a folder of its
    own; finished ones are kept.
    """
    losses = {variant: [] for variant in variants}
    for seed, variant in itertools.product(range(seeds), losses):
        changes = dict(bigs.VARIANTS[variant])
        own = replace(config, dtype=changes.pop("dtype", config.dtype))
        folder = output / f"{variant.replace(' ', '-')}-{seed}"
        plan = replace(recipe, seed=seed, **changes)
        loss = bigs.fast_loss_of(plan)
        run = bigs.pretrain(own, plan, data, folder, resume=True, loss=loss)
        losses[variant].append(run.history[-1]["heldout"])
    return losses

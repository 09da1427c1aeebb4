"""How fast a layer and a step are on the device at hand, by each way to convolve, and
the published way beside ours.
"""

import contextlib
import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

import annotated_bigs as bigs

KINDS = ("convolution, forward", "layer, forward", "layer, training", "model, training")


def variant(config: bigs.Config, route: str, L: int) -> bigs.Config:
    """A gated model with that route for texts of L tokens; for "attention" a BERT of
    about the same size.

    >>> [
    ...     round(bigs.parameters(variant(bigs.base, route, 128)) / 1e6)
    ...     for route in bigs.ROUTES
    ... ]
    [116, 116, 116, 116, 116]
    """
    if route == "attention":
        return replace(
            config,
            block="stack",
            routing="attention",
            pre_norm=False,
            max_position_embeddings=L,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=round(config.num_hidden_layers * 13 / 12),
        )
    changes = {"routing": "none"} if route == "none" else {"convolution": route}
    return replace(config, max_position_embeddings=L, **changes)


def layer_program(what: str) -> Callable:
    """A function of a layer and its input (L, batch, d), for all kinds but whole
    models.
    """

    def everywhere(x):
        return jnp.ones(x.shape[:2], bool)

    def forward(layer, x):
        return bigs.mix_channels(layer, *bigs.mix_tokens(layer, x, everywhere(x)))

    def score(layer, x):
        return (forward(layer, x).astype(jnp.float32) ** 2).mean()

    return {
        "convolution, forward": lambda layer, x: bigs.along(
            layer.forward, x, everywhere(x)
        ),
        "layer, forward": forward,
        "layer, training": jax.grad(score, (0, 1)),
    }[what]


class Program(NamedTuple):
    """A compiled program: a call that waits for its result, seconds of compiling,
    planned memory in GB.
    """

    run: Callable[[], None]
    compile_seconds: float
    gigabytes: float


def planned_gigabytes(compiled) -> float:
    """Memory of a compiled program, inputs and outputs included, in GB.

    >>> planned_gigabytes(
    ...     jax.jit(lambda x: x + 1).lower(np.zeros(250, np.float32)).compile()
    ... )
    2e-06
    """
    plan = compiled.memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.temp_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
    ) / 1e9


def random_rows(config: bigs.Config, recipe: bigs.Recipe) -> bigs.Rows:
    """As many rows of random words as a batch has.

    >>> random_rows(bigs.tiny, bigs.Recipe(batch=3)).tokens.shape
    (3, 128)
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, config.vocab_size, (recipe.batch, recipe.length))
    return bigs.Rows(tokens, config.vocab_size, 4, (0, 2, 3))


def compiled_program(what: str, config: bigs.Config, L: int, batch: int) -> Program:
    """One of KINDS, compiled for this device and for random input."""
    if what == "model, training":
        recipe = replace(bigs.RECIPES["demonstration"], batch=batch, length=L)
        rows = random_rows(config, recipe)
        function = bigs.make_step(recipe, bigs.fast_loss_of(recipe))
        inputs = [
            bigs.fresh_state(config, recipe),
            bigs.batch_at(rows, batch, 0, 0),
        ]
    else:
        x = jax.random.normal(
            jax.random.key(0), (L, batch, config.hidden_size), config.dtype
        )
        function = jax.jit(layer_program(what))
        inputs = [bigs.one_layer(config, nnx.Rngs(0)), x]
    start = time.perf_counter()
    compiled = function.lower(*inputs).compile()
    seconds = time.perf_counter() - start

    def run():
        result = jax.block_until_ready(compiled(*inputs))
        if what == "model, training":  # the old state is used up
            inputs[0] = result[0]

    return Program(run, seconds, planned_gigabytes(compiled))


def median(values: list[float]) -> float | None:
    """The median, if there is a value.

    >>> median([1.0, 4.0, 2.0]), median([])
    (2.0, None)
    """
    return float(np.median(values)) if values else None


def benchmark(
    config: bigs.Config,
    lengths: Iterable[int],
    tokens: int,
    repeats: int,
    kinds: Iterable[str] = KINDS,
    memory: float = 8.0,
) -> list[dict[str, Any]]:
    """Seconds, tokens a second, ratio, compile time and memory (GB) by kind, length and
    route; medians of `repeats`.

    A batch has about `tokens` tokens. What needs more than `memory` GB, as the compiler
    plans it, is not run. Routes take turns, so that a slow moment of the machine meets
    them all, and each is compared with its neighbour in the same round: the layer
    without routing, or for a convolution alone the FFT.

    >>> rows = benchmark(
    ...     bigs.Config(50, 16, 1, 48, num_ssm=4, num_attention_heads=2),
    ...     [32],
    ...     64,
    ...     1,
    ...     KINDS[2:3],
    ... )
    >>> [(row["route"], row["seconds"] > 0) for row in rows][:2], rows[0]["ratio"]
    ([('none', True), ('fft', True)], 1.0)
    """
    from tqdm.auto import tqdm

    cases = [(L, what) for L in lengths for what in kinds]
    found = []
    for L, what in tqdm(cases, unit="case"):
        routes = bigs.ROUTES[1:4] if what == "convolution, forward" else bigs.ROUTES
        batch = max(1, tokens // L)
        programs = {
            route: compiled_program(what, variant(config, route, L), L, batch)
            for route in routes
        }
        fitting = {
            route: program
            for route, program in programs.items()
            if program.gigabytes <= memory
        }
        rounds = []
        for _ in range(repeats + 1):
            rounds.append({})
            for route, program in fitting.items():
                start = time.perf_counter()
                program.run()
                rounds[-1][route] = time.perf_counter() - start
        rounds = rounds[1:]
        for route, program in programs.items():
            timed = [r for r in rounds if route in r]
            seconds = median([r[route] for r in timed])
            ratio = median([r[route] / r[routes[0]] for r in timed if routes[0] in r])
            found.append(
                {
                    "what": what,
                    "length": L,
                    "batch": batch,
                    "route": route,
                    "seconds": seconds,
                    "tokens_per_second": batch * L / seconds if seconds else None,
                    "ratio": ratio,
                    "compile_seconds": program.compile_seconds,
                    "gigabytes": program.gigabytes,
                }
            )
    return found


def print_benchmark(rows: list[dict[str, Any]]) -> None:
    """Ratios and tokens a second, a line for each length.

    >>> print_benchmark(
    ...     [
    ...         {
    ...             "what": "layer, training",
    ...             "length": 8,
    ...             "route": "none",
    ...             "ratio": 1.0,
    ...             "tokens_per_second": 5.0,
    ...         }
    ...     ]
    ... )
    layer, training                   none
           8 tokens             1.00 (5/s)
    """
    for what in dict.fromkeys(row["what"] for row in rows):
        part = [row for row in rows if row["what"] == what]
        routes = list(dict.fromkeys(row["route"] for row in part))
        print(f"{what:20s}" + "".join(f"{route:>18s}" for route in routes))
        for L in sorted({row["length"] for row in part}):
            cells = []
            for row in (row for row in part if row["length"] == L):
                speed = row.get("tokens_per_second")
                text = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
                cells.append(text + (f" ({speed:,.0f}/s)" if speed else ""))
            print(f"{L:8d} tokens     " + "".join(f"{cell:>18s}" for cell in cells))


WAYS = (
    "3-D dense layers",
    "FFT convolutions",
    "logits everywhere",
    "one-hot cross-entropy",
    "words last",
)


def loss_by(
    ways: Iterable[str], model: bigs.BiGS, batch: bigs.Batch, key: jax.Array | None
) -> Float[Array, ""]:
    """Equation (10) with the logits and the cross-entropy of the published way, or of
    ours.

    >>> model = bigs.BiGS(bigs.Config(50, 8, 1, 24, num_ssm=4))
    >>> rows = bigs.Rows(np.arange(5, 45).reshape(4, 10), 50, 4, (0, 2, 3))
    >>> batch = bigs.batch_at(rows, 4, 0, 0)
    >>> bool(
    ...     jnp.allclose(
    ...         loss_by(WAYS, model, batch, None), bigs.batch_loss(model, batch)
    ...     )
    ... )
    True
    """
    rows, L = batch.input_ids.shape
    positions = batch.positions
    labels = jnp.asarray(batch.labels)
    if "logits everywhere" in ways:
        everywhere = jnp.zeros((rows, L), int)
        labels = everywhere.at[jnp.arange(rows)[:, None], positions].max(labels)
        positions = None
    mask = jnp.ones((rows, L), bool)
    x = bigs.encode_at(model.encoder, batch.input_ids, mask, None, key, positions)
    labels = labels.reshape(-1)
    if "words last" in ways:
        axis = 1
        logits = model.head(x, model.encoder.words).reshape(len(labels), -1)
    else:
        axis = 0
        logits = bigs.words_first(model.head, x, model.encoder.words)
    if "one-hot cross-entropy" in ways:
        wanted = jax.nn.one_hot(labels, logits.shape[axis], axis=axis)
        losses = -(wanted * jax.nn.log_softmax(logits, axis)).sum(axis)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis)
    return bigs.mean_loss(losses, labels)


def step_by(ways: Iterable[str], recipe: bigs.Recipe) -> Callable:
    """The training step with these of the published ways; or with "layers in a loop",
    or the "plain" one of the story.
    """
    from unittest import mock

    if "plain" in ways:
        return bigs.make_step(recipe, bigs.batch_loss)

    def loss(model, batch, key):
        with contextlib.ExitStack() as while_it_is_traced:
            if "3-D dense layers" in ways:
                patch = mock.patch.object(bigs, "dense", nnx.Linear.__call__)
                while_it_is_traced.enter_context(patch)
            if "layers in a loop" in ways:
                patch = mock.patch.object(bigs, "unrolled", lambda layers: False)
                while_it_is_traced.enter_context(patch)
            return loss_by(ways, model, batch, key)

    return bigs.make_step(recipe, loss)


TURNS = 5


def factor_speeds(
    config: bigs.Config, recipe: bigs.Recipe, repeats: int = 3
) -> dict[str, dict[str, float]]:
    """Steps by the published way, with each change alone, without each change alone,
    and ours; the plain way, and ours with layers in a loop. Medians over rounds, each
    the fastest of TURNS steps.
    """
    kinds = {"the published way": WAYS, "the plain way": ("plain",), "ours": ()}
    kinds |= {f"only {way} changed": tuple(w for w in WAYS if w != way) for way in WAYS}
    kinds |= {f"all but {way} changed": (way,) for way in WAYS}
    kinds["ours, layers in a loop"] = ("layers in a loop",)
    rows = random_rows(config, recipe)
    programs = {}
    seconds = {}
    losses = {}
    for kind, ways in kinds.items():
        own = replace(
            config, convolution="fft" if "FFT convolutions" in ways else "auto"
        )
        programs[kind] = step_by(ways, recipe), bigs.fresh_state(own, recipe)
    for number, kind, turn in itertools.product(
        range(repeats + 1), kinds, range(TURNS)
    ):
        step, state = programs[kind]
        start = time.perf_counter()
        state, loss = jax.block_until_ready(
            step(state, bigs.batch_at(rows, recipe.batch, 0, TURNS * number + turn))
        )
        programs[kind] = step, state
        seconds.setdefault(kind, []).append(time.perf_counter() - start)
        losses.setdefault(kind, []).append(float(loss))
    times = {
        kind: np.array(found).reshape(-1, TURNS)[1:].min(1)
        for kind, found in seconds.items()
    }
    return {
        kind: {
            "seconds": float(np.median(times[kind])),
            "loss": losses[kind][-1],
            "tokens_per_second": float(
                recipe.batch * recipe.length / np.median(times[kind])
            ),
            "speed": float(np.median(times["the published way"] / times[kind])),
        }
        for kind in kinds
    }


def median_step(
    size: str, recipe: bigs.Recipe, keep: bool = True, steps: int = 8
) -> float:
    """Median seconds of a fast step, after two that are not counted. In a process of
    its own, that process keeps its memory or not.

    >>> median_step("tiny", bigs.Recipe(batch=1, length=8), steps=1) > 0
    True
    """
    if keep:
        bigs.keep_memory()
    config = bigs.configured(bigs.SIZES[size], recipe)
    rows = random_rows(config, recipe)
    state = bigs.fresh_state(config, recipe)
    step = bigs.make_step(recipe, bigs.fast_loss_of(recipe))
    times = []
    for number in range(2 + steps):
        batch = bigs.batch_at(rows, recipe.batch, 0, number)
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def in_turns(
    programs: dict[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """What functions return, in turns, each call in a fresh process.

    >>> in_turns({"one": functools.partial(float, 1)}, 2)
    {'one': [1.0, 1.0]}
    """
    found: dict[str, list[float]] = {kind: [] for kind in programs}
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as process:
        for _, kind in itertools.product(range(repeats), programs):
            found[kind].append(process.submit(programs[kind]).result())
    return found


def kept_memory_speed(size: str, batch: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step in processes with `keep_memory` and without."""
    recipe = bigs.Recipe(batch=batch)
    programs = {
        "kept": functools.partial(median_step, size, recipe),
        "returned": functools.partial(median_step, size, recipe, keep=False),
    }
    return in_turns(programs, repeats)


def step_speeds(
    cases: dict[str, tuple[str, bigs.Recipe]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of a step of a size by a recipe."""
    programs = {
        name: functools.partial(median_step, size, recipe)
        for name, (size, recipe) in cases.items()
    }
    return in_turns(programs, repeats)

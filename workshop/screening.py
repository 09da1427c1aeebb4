"""What lets a small model learn: runs of one recipe with one change at a time.

    python workshop/screening.py --text FOLDER --output runs/screening.jsonl

FOLDER holds the shards of text: `*-valid.jsonl.xz` are held out, and all others are
trained on. Under one seed every run reads the same rows in the same order, and a row
is masked by the same random numbers. A finished run is one line of the output and is
not run again. The size is `small`, the vocabulary that of the model in the box, and the
held-out loss is measured on the same 512 rows, masked by the published rule, whatever
the run itself is trained on.

Runs of one shape that differ in numbers alone are made side by side in one program,
`--together` of them: on a GPU two dozen take hardly longer than one. On a CPU one run
at a time is as fast as any number.
"""

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import annotated_bigs as bigs
from annotated_bigs import by_path, is_matrix
from workshop import comparison, corpora

WIDTH_RULE = bigs.start_for(bigs.small.hidden_size)
SEED_OF_RATES = 100  # learning rates are chosen on this seed, which is not used again
TOKENS = 4_096_000
LENGTH = 128  # tokens of a row
SEEDS = (1, 2, 3)  # of what is measured again
EVALUATIONS = 8


@dataclass(frozen=True)
class Way:
    """Everything that a run may change; the defaults are the recipe under test."""

    start: float = WIDTH_RULE  # standard deviation of fresh weights
    optimizer: str = "muon"  # or adamw
    rate: float = 0.02  # Muon's, for the matrices of the layers
    adam_rate: float = 2e-3  # of all other parameters; of all under AdamW
    b2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.05
    dropout: float = 0.0
    ssm_rate: float = 1.0  # as a multiple of the others' rate
    ssm_decay: bool = False
    warmup: float = 0.05  # share of the steps
    schedule: str = "cosine"  # to a tenth; linear to "zero"; "wsd": in the last fifth
    masking: tuple[float, ...] = (0.15,)  # shares of a row, in turn over the run
    kept: float = 0.1  # of the chosen words: unchanged; as many become random ones
    batches: tuple[int, ...] = (32,)  # rows, in turn over the tokens of the run
    clip: float = 0.0  # largest norm of the gradient; 0: any
    even_steps: bool = False  # step sizes spread evenly over layers and directions
    last: float = 1.0  # factor on the start of each layer's last matrix
    positions: bool = True  # False: the table of positions stays zero
    config: tuple[tuple[str, Any], ...] = ()  # fields of the config, and their values


class Run(NamedTuple):
    """One run to make: its name, what it changes, its seed, and how long it is."""

    name: str
    way: Way
    seed: int
    tokens: int = TOKENS

    def key(self) -> str:
        return json.dumps([self.name, asdict(self.way), self.seed, self.tokens])


class Numbers(NamedTuple):
    """A run in numbers: what may differ among runs that are made side by side."""

    seed: Any
    start: Any
    last: Any
    positions: Any  # 1, or 0: frozen
    log_steps: Any  # of the SSMs, see even_steps
    rates: Any  # of Muon, by step
    adam_rates: Any
    b2: Any
    eps: Any
    decay: Any
    ssm_decay: Any
    ssm_rate: Any
    clip: Any


def initial_model(config: bigs.Config, numbers: Numbers) -> bigs.BiGS:
    """A fresh model, as the way has it start. In the head's own matrix, before a
    LayerNorm, the way's start multiplies the usual one, so that it is smaller here than
    in `fresh_state`.
    """
    seed = jax.random.key(numbers.seed)
    model = bigs.BiGS(replace(config, initializer_range=1.0), seed=seed)

    def start(path, weights):
        names = bigs.names_of(path)
        if names[-1] in ("kernel", "embedding"):
            weights = numbers.start * weights
        if "W_o" in names and names[-1] == "kernel":
            weights = numbers.last * weights
        if "positions" in names:
            weights = numbers.positions * weights
        if names[-1] == "log_step":
            evenly = numbers.log_steps[0 if "forward" in names else 1].reshape(
                weights.shape
            )
            weights = jnp.where(jnp.isnan(evenly), weights, evenly)
        return weights

    return jax.tree_util.tree_map_with_path(start, model)


def even_steps(config: bigs.Config, seed: int) -> np.ndarray:
    """Logarithms of step sizes for both directions of all layers, spread evenly between
    those of 0.01 and 1 and shuffled; without a seed (-1) not a number: they are drawn.

    >>> even_steps(bigs.tiny, 0).shape
    (2, 4)
    """
    count = 2 * config.num_hidden_layers
    if seed < 0:
        return np.full((2, count // 2), np.nan)
    log_steps = np.log(0.01) * (1 - (np.arange(count) + 0.5) / count)
    return np.random.default_rng(seed).permutation(log_steps).reshape(2, -1)


def learning_rate(way: Way, steps: int, peak: float) -> Callable[[int], float]:
    """The schedule of a way: up, and then down by its rule."""
    rising = max(1, round(way.warmup * steps))
    if way.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, rising, steps, end_value=peak / 10
        )
    falling = steps - rising if way.schedule == "zero" else steps // 5
    parts = [
        optax.linear_schedule(0.0, peak, rising),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, falling),
    ]
    return optax.join_schedules(parts, [rising, steps - falling])


def in_numbers(run: Run, config: bigs.Config, steps: int) -> Numbers:
    """The numbers of a run."""
    way = run.way
    every = jnp.arange(steps)

    def rates(peak):
        return np.asarray(jax.vmap(learning_rate(way, steps, peak))(every), np.float32)

    as_they_are = ("start", "last", "positions", "b2", "eps", "decay", "ssm_rate")
    same = {name: np.float32(getattr(way, name)) for name in as_they_are}
    seed = run.seed if way.even_steps else -1
    return Numbers(
        seed=np.uint32(run.seed),
        log_steps=even_steps(config, seed).astype(np.float32),
        rates=rates(way.rate),
        adam_rates=rates(way.adam_rate),
        ssm_decay=np.float32(way.decay * way.ssm_decay),
        clip=np.float32(way.clip or np.inf),
        **same,
    )


def make_optimizer(
    optimizer: str, numbers: Numbers, step: Any = 0
) -> optax.GradientTransformation:
    """One step of Muon for the layers' matrices and AdamW for the rest, or of AdamW for
    everything."""
    dense = by_path(lambda path: bigs.is_decayed(path, ssm_decay=False))
    parts = [
        optax.scale_by_adam(b2=numbers.b2, eps=numbers.eps),
        optax.add_decayed_weights(numbers.decay, dense),
        optax.add_decayed_weights(numbers.ssm_decay, by_path(bigs.is_ssm)),
        optax.masked(optax.scale(numbers.ssm_rate), by_path(bigs.is_ssm)),
        optax.scale(-numbers.adam_rates[step]),
    ]
    core = optax.chain(*parts)
    if optimizer == "muon":
        # By itself `muon` decays nothing that its own AdamW takes care of.
        one_matrix = optax.contrib.MuonDimensionNumbers(1, 2)  # axis 0 counts layers
        muon = optax.contrib.muon(
            numbers.rates[step],
            weight_decay=numbers.decay,
            muon_weight_dimension_numbers=by_path(lambda path: one_matrix),
        )
        chosen = by_path(lambda path: "muon" if is_matrix(path) else "adam")
        core = optax.partition({"muon": muon, "adam": core}, chosen)
    table = by_path(lambda path: "positions" in bigs.names_of(path))
    return optax.chain(
        optax.clip_by_global_norm(numbers.clip),
        core,
        optax.masked(optax.scale(numbers.positions), table),
    )


def masked_batch(
    rows: bigs.Rows,
    numbers: np.ndarray,
    random: np.ndarray,
    shares: np.ndarray,
    kept: float,
    most: int,
) -> bigs.Batch:
    """`mask_tokens` with a share of chosen words for each row, in arrays for `most` of
    them, and any share kept of these.

    >>> rows = bigs.Rows(np.arange(5, 261).reshape(2, 128), 1000, 4, (0, 2, 3))
    >>> numbers = np.arange(2)
    >>> random = np.stack([bigs.random_numbers(7, 0, row, 128) for row in range(2)])
    >>> ours = masked_batch(rows, numbers, random, np.array([0.15, 0.15]), 0.1, 19)
    >>> theirs = bigs.mask_tokens(rows, numbers, random)
    >>> sorted(ours.labels[0]) == sorted(theirs.labels[0])
    True
    >>> np.array_equal(ours.input_ids, theirs.input_ids)
    True
    """
    tokens = np.asarray(rows.tokens[numbers], np.int32)
    scores = random[:, 0] + np.isin(tokens, rows.special_ids)
    positions = np.argsort(scores, axis=1)[:, :most]
    count = np.maximum(1, np.round(shares * tokens.shape[1]))
    asked = np.arange(most) < count[:, None]
    original = np.take_along_axis(tokens, positions, 1)
    labels = np.where(np.isin(original, rows.special_ids) | ~asked, 0, original)
    dice = np.take_along_axis(random[:, 1], positions, 1)
    noise = np.take_along_axis(random[:, 2], positions, 1)
    random_words = (noise * rows.vocab_size).astype(np.int32)
    random_words = np.minimum(random_words, rows.vocab_size - 1)
    shown = np.where(dice < 1 - kept, random_words, labels)
    shown = np.where(dice < 1 - 2 * kept, rows.mask_id, shown)
    shown = np.where(labels > 0, shown, original)
    np.put_along_axis(tokens, positions, shown, axis=1)
    return bigs.Batch(tokens, positions.astype(np.int32), labels.astype(np.int32))


@functools.lru_cache(4096)
def row_numbers(seed: int, row: int) -> np.ndarray:
    """What decides the masks of a row."""
    return bigs.random_numbers(seed, 0, row, LENGTH)


def masked_rows(
    data: bigs.Dataset,
    kind: tuple,
    steps: range,
    sizes: list[int],
    most: int,
) -> bigs.Batch:
    """The batches of some steps of one size, along a further first axis; a `reading`
    says of what kind they are.
    """
    seed, masking, kept = kind
    size = sizes[steps.start]
    before = sum(sizes[: steps.start])
    order = bigs.epoch_order(len(data.train.tokens), seed, 0)
    numbers = order[before : before + size * len(steps)]
    every = np.repeat(np.array(steps), size)
    shares = np.array(masking)[every * len(masking) // len(sizes)]
    random = np.stack([row_numbers(seed, row) for row in numbers.tolist()])
    batch = masked_batch(data.train, numbers, random, shares, kept, most)
    return jax.tree.map(
        lambda part: part.reshape(len(steps), size, *part.shape[1:]), batch
    )


def batch_sizes(way: Way, tokens: int) -> list[int]:
    """Rows of every step: each size of the way gets an equal part of the tokens.

    >>> batch_sizes(Way(batches=(1, 2)), 8 * LENGTH)
    [1, 1, 1, 1, 2, 2]
    """
    each = tokens // LENGTH // len(way.batches)
    return [size for size in way.batches for _ in range(each // size)]


def spread(model: bigs.BiGS) -> jax.Array:
    """Standard deviation of the encoder's output for random words."""
    words = np.random.default_rng(0).integers(5, model.config.vocab_size, (8, LENGTH))
    return jnp.std(model.encoder(words, np.ones(words.shape, bool)))


def heldout(model: bigs.BiGS, batches: bigs.Batch) -> jax.Array:
    """Mean loss of batches that lie along a further first axis."""
    return jax.lax.map(lambda batch: bigs.fast_loss(model, batch), batches).mean()


@functools.cache
def programs(config: bigs.Config, optimizer: str) -> tuple[Callable, ...]:
    """Compiled, each for several runs side by side: their start; some steps; their
    held-out losses; the spreads of their outputs.
    """

    def begin(way):
        model = initial_model(config, way)
        return model, make_optimizer(optimizer, way).init(model)

    def one_step(model, moments, way, batch, number):
        key = jax.random.fold_in(jax.random.key(way.seed), number)
        loss, gradient = jax.value_and_grad(bigs.fast_loss)(
            model, batch, key if config.hidden_dropout_prob else None
        )
        update = make_optimizer(optimizer, way, number).update
        updates, moments = update(gradient, moments, model)
        return optax.apply_updates(model, updates), moments, loss

    def walk(models, moments, ways, batches, which, first):
        """Steps on batches, an array of (step, kind, rows, ...); `which` says what kind
        each run reads.
        """

        def step(carry, batch):
            models, moments, number = carry
            own = jax.tree.map(lambda part: part[which], batch)
            together = jax.vmap(one_step, (0, 0, 0, 0, None))
            models, moments, losses = together(models, moments, ways, own, number)
            return (models, moments, number + 1), losses

        carry, losses = jax.lax.scan(step, (models, moments, first), batches)
        return *carry[:2], losses.mean(0)

    return (
        jax.jit(jax.vmap(begin)),
        jax.jit(walk, donate_argnums=(0, 1)),
        jax.jit(jax.vmap(heldout, (0, None))),
        jax.jit(jax.vmap(spread)),
    )


def shape_of(run: Run) -> tuple:
    """What runs have to share to be made side by side."""
    config = replace(
        bigs.small, hidden_dropout_prob=run.way.dropout, **dict(run.way.config)
    )
    return config, run.way.optimizer, run.way.batches, run.tokens


def reading(run: Run) -> tuple:
    """What decides the batches of a run."""
    return run.seed, run.way.masking, run.way.kept


def stretches(sizes: list[int], most: int = 25) -> Iterator[range]:
    """The steps of a run in pieces of one size of batch, so many at most in each.

    >>> list(stretches([1, 1, 1, 2], 2))
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    first = 0
    for _, same in itertools.groupby(sizes):
        end = first + len(list(same))
        for start in range(first, end, most):
            yield range(start, min(start + most, end))
        first = end


def train(
    runs: list[Run], data: bigs.Dataset, keep: Callable = lambda models: None
) -> list[dict[str, Any]]:
    """Make runs of one shape side by side; for each its held-out losses by tokens read,
    its last one, and its speed. The models, along a further first axis, go to `keep`.
    """
    config, optimizer, batches, tokens = shape_of(runs[0])
    sizes = batch_sizes(runs[0].way, tokens)
    steps = len(sizes)
    begin, walk, measure, spreads = programs(config, optimizer)
    numbers = [in_numbers(run, config, steps) for run in runs]
    ways = jax.tree.map(lambda *parts: jnp.stack(parts), *numbers)
    models, moments = begin(ways)
    readings = list(dict.fromkeys(map(reading, runs)))
    which = jnp.array([readings.index(reading(run)) for run in runs])
    held = jax.tree.map(lambda *parts: jnp.stack(parts), *data.heldout)
    most = max(round(share * LENGTH) for run in runs for share in run.way.masking)
    ends = np.cumsum([0, *sizes]) * LENGTH  # tokens read before each step
    marks = [tokens * (i + 1) // EVALUATIONS for i in range(EVALUATIONS - 1)]
    marks.append(int(ends[-1]))

    def make(piece):
        made = [masked_rows(data, kind, piece, sizes, most) for kind in readings]
        return jax.tree.map(lambda *parts: np.stack(parts, 1), *made)

    curves = [[] for _ in runs]
    losses = []
    seconds = []
    pieces = list(stretches(sizes))
    with ThreadPoolExecutor(1) as thread:
        waiting = [thread.submit(make, piece) for piece in pieces[:2]]
        for number, piece in enumerate(pieces):
            batch = waiting.pop(0).result()
            if number + 2 < len(pieces):
                waiting.append(thread.submit(make, pieces[number + 2]))
            clock = time.perf_counter()
            models, moments, loss = walk(
                models, moments, ways, batch, which, jnp.int32(piece.start)
            )
            losses.append(np.asarray(loss))
            seconds.append((time.perf_counter() - clock) / len(piece))
            read = int(ends[piece.stop])
            if read < marks[0]:
                continue
            marks.pop(0)
            found = np.asarray(measure(models, held)).astype(float).round(5).tolist()
            mean = np.mean(losses, 0).astype(float).round(5).tolist()
            for i, curve in enumerate(curves):
                curve.append({"tokens": read, "heldout": found[i], "loss": mean[i]})
            print(f"{read / 1e6:7.2f} M:", *[f"{x:.3f}" for x in found], flush=True)
            losses = []
    keep(models)
    return [
        {
            "curve": curve,
            "heldout": curve[-1]["heldout"],
            "spread": round(float(width), 3),
            "steps": steps,
            "together": len(runs),
            "step_seconds": round(float(np.median(seconds)) / len(runs), 5),
        }
        for curve, width in zip(curves, spreads(models), strict=True)
    ]


PUBLISHED = Way(
    start=0.02,
    optimizer="adamw",
    b2=0.98,
    eps=1e-6,
    dropout=0.1,
    ssm_decay=True,
)
ADAMW = Way(optimizer="adamw")


def runs_for_rates(found: dict[str, dict]) -> list[Run]:
    """Rates for each optimizer, a factor of two apart, on a seed that is not used
    again. Muon has two rates, its own and that of AdamW for all it leaves out.
    """
    runs = [
        Run("muon", Way(rate=rate, adam_rate=adam_rate), SEED_OF_RATES)
        for rate in (0.01, 0.02, 0.04)
        for adam_rate in (2e-3, 4e-3, 8e-3)
    ]
    for name, way in (("adamw", ADAMW), ("published", PUBLISHED)):
        for rate in (1e-3, 2e-3, 4e-3, 8e-3):
            runs.append(Run(name, replace(way, adam_rate=rate), SEED_OF_RATES))
    return runs


def one_by_one(base: Way, changes: dict[str, dict], seed: int) -> list[Run]:
    """A run for each change of a way."""
    return [
        Run(name, replace(base, **change), seed) for name, change in changes.items()
    ]


ALONE = {
    "published, start": {"start": WIDTH_RULE},
    "published, epsilon and beta_2": {"eps": ADAMW.eps, "b2": ADAMW.b2},
    "published, no dropout": {"dropout": 0.0},
}


def runs_alone(found: dict[str, dict]) -> list[Run]:
    """The published way at its best rate, with one thing at a time of the other."""
    base = best_way("published", found)
    return one_by_one(base, ALONE, SEED_OF_RATES)


CHANGES = {
    "none": {},
    "start 0.02": {"start": 0.02},
    "start halved": {"start": WIDTH_RULE / 2},
    "start doubled": {"start": 2 * WIDTH_RULE},
    "epsilon 1e-6": {"eps": 1e-6},
    "beta_2 0.98": {"b2": 0.98},
    "dropout 0.1": {"dropout": 0.1},
    "masking 20 %": {"masking": (0.2,)},
    "masking 30 %": {"masking": (0.3,)},
    "masking 30 to 15 %": {"masking": (0.3, 0.25, 0.2, 0.15)},
    "decay to zero": {"schedule": "zero"},
    "warm-up, stable, decay": {"schedule": "wsd"},
    "batch 16": {"batches": (16,)},
    "batch 8 to 64": {"batches": (8, 16, 32, 64)},
    "clipping at 1": {"clip": 1.0},
    "SSMs at half the rate": {"ssm_rate": 0.5},
    "SSMs at twice the rate": {"ssm_rate": 2.0},
    "SSMs at four times the rate": {"ssm_rate": 4.0},
    "SSMs decay": {"ssm_decay": True},
    "no decay": {"decay": 0.0},
    "decay 0.2": {"decay": 0.2},
    "warm-up 1 %": {"warmup": 0.01},
    "warm-up 10 %": {"warmup": 0.1},
    "steps drawn evenly": {"even_steps": True},
    "last projection scaled": {"last": float(1 / np.sqrt(12))},
    "last projection zero": {"last": 0.0},
    "positions frozen at zero": {"positions": False},
    "none unchanged": {"kept": 0.0},
    "5 % unchanged": {"kept": 0.05},
}


def best_way(name: str, found: dict[str, dict]) -> Way:
    """The way of the lowest held-out loss among the runs for rates of a name."""
    own = [run for run in runs_for_rates(found) if run.name == name]
    if any(run.key() not in found for run in own):
        raise bigs.UserError(
            "phases: the others need the runs of rates; make them first"
        )
    return min(own, key=lambda run: found[run.key()]["heldout"]).way


def base_way(found: dict[str, dict]) -> Way:
    """The best Muon of the runs for rates."""
    return best_way("muon", found)


def runs_of_changes(found: dict[str, dict]) -> list[Run]:
    """One change at a time from the best Muon."""
    return one_by_one(base_way(found), CHANGES, 0)


AGAIN = {
    "none": {},
    "masking 30 %": {"masking": (0.3,)},
    "masking 40 %": {"masking": (0.4,)},
    "30 %, decay 0.2": {"masking": (0.3,), "decay": 0.2},
    "30 %, positions frozen": {"masking": (0.3,), "positions": False},
    "30 %, SSMs twice": {"masking": (0.3,), "ssm_rate": 2.0},
}


LONGER = ("none", "30 %, positions frozen")


def with_seeds(
    found: dict[str, dict], names: Iterable[str], tokens: int = TOKENS
) -> list[Run]:
    """Changes of the best Muon, with three seeds each."""
    base = base_way(found)
    return [
        Run(name, replace(base, **AGAIN[name]), seed, tokens)
        for name in names
        for seed in SEEDS
    ]


def runs_again(found: dict[str, dict]) -> list[Run]:
    """What helped most, and together, once more with three seeds."""
    return with_seeds(found, AGAIN)


def runs_longer(found: dict[str, dict]) -> list[Run]:
    """What was taken over of that, and the best of the other optimizers, on twice the
    text.
    """
    return with_seeds(found, LONGER, 2 * TOKENS) + [
        Run(name, best_way(name, found), seed, 2 * TOKENS)
        for name in ("adamw", "published")
        for seed in SEEDS
    ]


PHASES = {
    "rates": runs_for_rates,
    "alone": runs_alone,
    "changes": runs_of_changes,
    "again": runs_again,
    "longer": runs_longer,
}


def text_files(folder: Path) -> tuple[list[str], list[str]]:
    """The shards to train on, and those that are held out."""
    files = sorted(folder.glob("*.jsonl.xz"))
    heldout = [file for file in files if file.name.endswith("-valid.jsonl.xz")]
    if not heldout or len(heldout) == len(files):
        raise bigs.UserError(
            f"text: {folder} needs shards NAME.jsonl.xz and held-out ones"
            " NAME-valid.jsonl.xz; name the folder that holds both"
        )
    train = [file for file in files if file not in heldout]
    return list(map(str, train)), list(map(str, heldout))


def finished(output: Path) -> dict[str, dict]:
    """The runs in a file by their keys."""
    records = comparison.read_record(output, {"key", "text", "heldout"})
    return {record["key"]: record for record in records}


def groups(runs: list[Run], together: int) -> list[list[Run]]:
    """The runs in groups of one shape, so many at most in each."""
    by_shape: dict[tuple, list[Run]] = {}
    for run in runs:
        by_shape.setdefault(shape_of(run), []).append(run)
    return [
        same[i : i + together]
        for same in by_shape.values()
        for i in range(0, len(same), together)
    ]


def screen(
    data: bigs.Dataset, output: Path, together: int = 1, phases: Iterable = PHASES
) -> Iterator[Run]:
    """Make all runs that are not finished, and yield each when it is."""
    found = finished(output)
    if {record["text"] for record in found.values()} - {data.identity}:
        raise bigs.UserError(f"{output}: its runs read another text; choose another")
    for phase in phases:
        missing = [run for run in PHASES[phase](found) if run.key() not in found]
        for group in groups(missing, together):
            print(phase, *[f"{run.name} {run.seed}" for run in group], flush=True)
            measured = train(group, data)
            for run, values in zip(group, measured, strict=True):
                about = {"key": run.key(), "name": run.name, "way": asdict(run.way)}
                about |= {"seed": run.seed, "tokens": run.tokens, "text": data.identity}
                found[run.key()] = about | values | {"measured": bigs.circumstances()}
            with bigs.write_whole(output) as part:
                part.write_text("".join(json.dumps(r) + "\n" for r in found.values()))
            programs.cache_clear()
            jax.clear_caches()
            yield from group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of shards")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--together", type=int, default=1, help="runs side by side")
    parser.add_argument(
        "--phases", nargs="+", choices=PHASES, default=PHASES, help="which to make"
    )
    options = parser.parse_args()
    if options.together < 1:
        parser.error(f"together: {options.together} is not positive")
    bigs.keep_memory()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        train_files, held = text_files(options.text)
        data = corpora.prepare(train_files, bigs.load_tokenizer(), LENGTH, held)
        for _ in screen(data, options.output, options.together, options.phases):
            pass
    except bigs.UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

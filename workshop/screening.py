"""What lets a small model learn: runs of one recipe with one change at a time.

    python workshop/screening.py --text FOLDER --output runs/screening.jsonl

FOLDER holds the shards of text: `*-valid.jsonl.xz` are held out, and all others are
trained on. Under one seed every run reads the same rows in the same order with the same
random numbers for its masks. A finished run is one line of the output and is not run
again; a run that was killed begins again. The size is that of the model in the box, its
vocabulary too, and the held-out loss is measured on the same 512 rows, masked by the
published rule, whatever the run itself is trained on.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import annotated_bigs as bigs
from workshop import corpora

WIDTH_RULE = 0.02 * float(np.sqrt(1024 / bigs.boxed.hidden_size))
SEED_OF_RATES = 100  # learning rates are chosen on this seed, which is not used again
TOKENS = 4_096_000
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


class Run(NamedTuple):
    """One run to make: its name, what it changes, its seed, and how long it is."""

    name: str
    way: Way
    seed: int
    tokens: int = TOKENS

    def key(self) -> str:
        return json.dumps([self.name, asdict(self.way), self.seed, self.tokens])


def by_path(test: Callable[[tuple], bool]) -> Callable[[Any], Any]:
    """A function from a tree of parameters to the test's answers for their paths."""

    def mask(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: test(path), tree)

    return mask


def is_matrix(path: tuple) -> bool:
    """Whether a path leads to a matrix of a layer, which Muon takes care of."""
    names = bigs.names_of(path)
    return "layers" in names and names[-1] == "kernel"


def initial_model(way: Way, seed: int) -> bigs.BiGS:
    """A fresh model of the size `boxed`, as the way has it start."""
    config = replace(
        bigs.boxed, initializer_range=way.start, hidden_dropout_prob=way.dropout
    )
    model = bigs.BiGS(config, seed=seed)
    changes = {}
    if way.last != 1:
        last = model.encoder.layers.W_o.kernel[...]
        changes["encoder", "layers", "W_o", "kernel"] = way.last * last
    if not way.positions:
        table = model.encoder.positions.embedding[...]
        changes["encoder", "positions", "embedding"] = 0 * table
    if way.even_steps:
        count = 2 * config.num_hidden_layers
        log_steps = np.log(0.01) * (1 - (np.arange(count) + 0.5) / count)
        mixed = np.random.default_rng(seed).permutation(log_steps).reshape(2, -1, 1)
        changes["encoder", "layers", "forward", "log_step"] = mixed[0]
        changes["encoder", "layers", "backward", "log_step"] = mixed[1]
    return bigs.with_parameters(model, changes)


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


def make_optimizer(way: Way, steps: int) -> optax.GradientTransformation:
    """Muon for the layers' matrices and AdamW for the rest, or AdamW for everything."""
    decayed = by_path(lambda path: bigs.is_decayed(path, way.ssm_decay))
    core = optax.adamw(
        learning_rate(way, steps, way.adam_rate),
        b2=way.b2,
        eps=way.eps,
        weight_decay=way.decay,
        mask=decayed,
    )
    if way.optimizer == "muon":
        # By itself `muon` decays nothing that its own AdamW takes care of.
        one_matrix = optax.contrib.MuonDimensionNumbers(1, 2)  # axis 0 counts layers
        muon = optax.contrib.muon(
            learning_rate(way, steps, way.rate),
            weight_decay=way.decay,
            muon_weight_dimension_numbers=by_path(lambda path: one_matrix),
        )
        chosen = by_path(lambda path: "muon" if is_matrix(path) else "adam")
        core = optax.partition({"muon": muon, "adam": core}, chosen)
    parts = [core]
    if way.clip:
        parts.insert(0, optax.clip_by_global_norm(way.clip))
    if way.ssm_rate != 1:
        slower = optax.scale(way.ssm_rate)
        parts.append(optax.masked(slower, by_path(bigs.is_ssm)))
    if not way.positions:
        table = by_path(lambda path: "positions" in bigs.names_of(path))
        parts.append(optax.masked(optax.set_to_zero(), table))
    return optax.chain(*parts)


def masked_batch(
    rows: bigs.Rows, numbers: np.ndarray, seed: int, share: float, kept: float
) -> bigs.Batch:
    """`mask_tokens` with any share of chosen words, and any share kept of these.

    >>> rows = bigs.Rows(np.arange(5, 261).reshape(2, 128), 1000, 4, (0, 2, 3))
    >>> numbers = np.arange(2)
    >>> luck = np.stack([bigs.luck(7, 0, row, 128) for row in range(2)])
    >>> ours = masked_batch(rows, numbers, 7, 0.15, 0.1)
    >>> theirs = bigs.mask_tokens(rows, numbers, luck)
    >>> all(np.array_equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    True
    """
    tokens = rows.tokens[numbers]
    length = tokens.shape[1]
    count = max(1, round(share * length))
    luck = np.stack([bigs.luck(seed, 0, int(row), length) for row in numbers])
    scores = luck[:, 0] + np.isin(tokens, rows.special_ids)
    positions = np.sort(np.argpartition(scores, count, axis=1)[:, :count], axis=1)
    original = np.take_along_axis(tokens, positions, 1)
    labels = np.where(np.isin(original, rows.special_ids), 0, original)
    dice = np.take_along_axis(luck[:, 1], positions, 1)
    noise = np.take_along_axis(luck[:, 2], positions, 1)
    random_words = (noise * rows.vocab_size).astype(np.int32)
    random_words = np.minimum(random_words, rows.vocab_size - 1)
    shown = np.where(dice < 1 - kept, random_words, labels)
    shown = np.where(dice < 1 - 2 * kept, rows.mask_id, shown)
    input_ids = tokens.copy()
    np.put_along_axis(
        input_ids, positions, np.where(labels > 0, shown, original), axis=1
    )
    return bigs.Batch(
        *(part.astype(np.int32) for part in (input_ids, positions, labels))
    )


def batch_sizes(way: Way, tokens: int, length: int = 128) -> list[int]:
    """Rows of every step: each size of the way gets an equal part of the tokens.

    >>> batch_sizes(Way(batches=(1, 2)), 1024, 128)
    [1, 1, 1, 1, 2, 2]
    """
    each = tokens // length // len(way.batches)
    return [size for size in way.batches for _ in range(each // size)]


def spread(model: bigs.BiGS) -> float:
    """Standard deviation of the encoder's output for random words."""
    words = np.random.default_rng(0).integers(5, model.config.vocab_size, (8, 128))
    return float(np.std(model.encoder(words, np.ones(words.shape, bool))))


def train(run: Run, data: bigs.Dataset) -> dict[str, Any]:
    """Make one run; its held-out losses by tokens read, its last one, and its speed."""
    way = run.way
    sizes = batch_sizes(way, run.tokens)
    steps = len(sizes)
    optimizer = make_optimizer(way, steps)
    model = initial_model(way, run.seed)
    moments = jax.jit(optimizer.init)(model)

    @jax.jit
    def step(model, moments, batch, number):
        key = jax.random.fold_in(jax.random.key(run.seed), number)
        loss, gradient = jax.value_and_grad(bigs.fast_loss)(
            model, batch, key if way.dropout else None
        )
        updates, moments = optimizer.update(gradient, moments, model)
        return optax.apply_updates(model, updates), moments, loss

    order = np.random.default_rng((run.seed, 0, 0)).permutation(len(data.train.tokens))
    marks = [round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)]
    curve, losses, seconds = [], [], []
    read = 0
    for number, size in enumerate(sizes):
        share = way.masking[number * len(way.masking) // steps]
        rows = order[read : read + size]
        batch = masked_batch(data.train, rows, run.seed, share, way.kept)
        read += size
        start = time.perf_counter()
        model, moments, loss = step(model, moments, batch, number)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
        if number + 1 in marks:
            heldout = round(bigs.evaluate(model, data, bigs.fast_loss), 5)
            mean = round(float(np.mean(losses)), 5)
            curve.append({"tokens": read * 128, "heldout": heldout, "loss": mean})
            print(
                f"  {read * 128 / 1e6:6.2f} million tokens: {heldout:.4f}", flush=True
            )
            losses = []
    return {
        "curve": curve,
        "heldout": curve[-1]["heldout"],
        "spread": round(spread(model), 3),
        "steps": steps,
        "step_seconds": round(float(np.median(seconds)), 4),
    }


PUBLISHED = Way(
    start=0.02,
    optimizer="adamw",
    b2=0.98,
    eps=1e-6,
    dropout=0.1,
    ssm_decay=True,
)
ADAMW = Way(optimizer="adamw")


def runs_for_rates() -> list[Run]:
    """Three rates for each optimizer, on a seed that is not used again."""
    runs = [Run("muon", Way(rate=rate), SEED_OF_RATES) for rate in (0.02, 0.01, 0.04)]
    for name, way in (("adamw", ADAMW), ("published", PUBLISHED)):
        for rate in (2e-3, 1e-3, 4e-3):
            runs.append(Run(name, replace(way, adam_rate=rate), SEED_OF_RATES))
    for rate in (1e-3, 4e-3):
        runs.append(Run("muon", Way(adam_rate=rate), SEED_OF_RATES))
    return runs


CHANGES = {
    "none": {},
    "start 0.02": {"start": 0.02},
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
    "SSMs decay": {"ssm_decay": True},
    "no decay": {"decay": 0.0},
    "decay 0.2": {"decay": 0.2},
    "steps drawn evenly": {"even_steps": True},
    "last projection scaled": {"last": float(1 / np.sqrt(12))},
    "last projection zero": {"last": 0.0},
    "positions frozen at zero": {"positions": False},
    "none unchanged": {"kept": 0.0},
    "5 % unchanged": {"kept": 0.05},
}


def best_way(name: str, runs: list[Run], found: dict[str, dict]) -> Way:
    """The way of the lowest held-out loss among the finished runs of a name."""
    own = [run for run in runs if run.name == name]
    return min(own, key=lambda run: found[run.key()]["heldout"]).way


def runs_of_changes(found: dict[str, dict]) -> list[Run]:
    """One change at a time from the best Muon; the best AdamW and published runs."""
    rates = runs_for_rates()
    base = best_way("muon", rates, found)
    runs = [Run(name, replace(base, **change), 0) for name, change in CHANGES.items()]
    others = [
        Run(name, best_way(name, rates, found), 0) for name in ("adamw", "published")
    ]
    return runs[:1] + others + runs[1:]


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
    lines = output.read_text().splitlines() if output.exists() else []
    records = [json.loads(line) for line in lines]
    return {record["key"]: record for record in records}


def screen(data: bigs.Dataset, output: Path) -> Iterator[Run]:
    """Make all runs that are not finished, and yield each when it is."""
    found = finished(output)
    for phase in (lambda found: runs_for_rates(), runs_of_changes):
        for run in phase(found):
            if run.key() in found:
                continue
            print(f"{run.name}, seed {run.seed}: {asdict(run.way)}", flush=True)
            about = {"key": run.key(), "name": run.name, "way": asdict(run.way)}
            about |= {"seed": run.seed, "tokens": run.tokens, "text": data.identity}
            record = about | train(run, data) | {"measured": bigs.circumstances()}
            found[run.key()] = record
            with bigs.write_whole(output) as part:
                part.write_text("".join(json.dumps(r) + "\n" for r in found.values()))
            jax.clear_caches()
            yield run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of shards")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines")
    options = parser.parse_args()
    bigs.keep_memory()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    train_files, heldout_files = text_files(options.text)
    data = corpora.prepare(train_files, bigs.load_tokenizer(), 128, heldout_files)
    for _ in screen(data, options.output):
        pass


if __name__ == "__main__":
    main()

"""The command line: `python annotated_bigs.py COMMAND` and `python -m workshop
COMMAND`.

Each command checks names, chooses defaults and calls the story. `main` hands over to
tyro and is the one place where a user's mistake becomes a line instead of a traceback.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import annotated_bigs as bigs
from workshop import benchmark, comparison, corpora, glue, grammar, running, studies
from workshop.arms import all_arms, of_one_size
from workshop.tpu import layers_on_tpu, steps_on_tpu

ARMS = all_arms(bigs.tiny)


def drawings() -> list[Callable]:
    """All figures of the document, in order.

    >>> [draw.name for draw in drawings()][:2]
    ['fades', 'bases']
    """
    return [
        value
        for value in list(vars(bigs).values())
        if callable(value) and hasattr(value, "caption")
    ]


def command_figures(
    runs: tuple[Path, ...] = (),
    model: str | None = None,
    finetuned: str | None = None,
    output: Path = bigs.RUNS,
) -> None:
    """Redraw every figure into figures/; or draw Figures 3 and 4 of a model, or the
    losses of runs.

    Args:
        runs: folders of runs of pretrain, to draw only their losses, beside each other,
            as losses.png.
        model: folder or hub name of a model, to draw only its kernels, as kernels.png.
        finetuned: the same model after fine-tuning, to draw what moved, as
            finetuned.png (the paper's choice of kernels for a model of its size, else
            the three that moved most).
        output: folder for the figures of runs or models.
    """
    if finetuned and model is None:
        raise bigs.UserError(
            "finetuned: give the model before fine-tuning, too, with --model"
        )
    chosen = ([compare_runs(runs)] if runs else []) + (
        model_figures(model, finetuned) if model else []
    )
    for draw in chosen:
        bigs.show(draw, output)
    if not chosen:
        for draw in drawings():
            bigs.show(draw, bigs.FIGURES)


def compare_runs(folders: tuple[Path, ...]) -> Callable:
    """A figure of the losses of several runs, training pale and held-out dark."""

    @bigs.figure(
        name="losses",
        alt="Loss against tokens read, a curve for each run.",
        caption="Loss of "
        + ", ".join(str(folder) for folder in folders)
        + ". Drawn by compare_runs.",
    )
    def runs_figure():
        drawing, ax = bigs.canvas()
        for number, folder in enumerate(folders):
            color = f"C{number}"
            _, recipe = running.run_settings(folder)
            history = running.read_log(folder)
            for key, style in (
                ("loss", dict(alpha=0.3, lw=0.8)),
                ("heldout", dict(marker=".", label=str(folder))),
            ):
                points = [
                    (r["step"] * recipe.batch * recipe.length / 1e6, r[key])
                    for r in history
                    if key in r
                ]
                if points:
                    ax.plot(*zip(*points, strict=True), color=color, **style)
        ax.set(xlabel="million tokens", ylabel="nats per masked word")
        ax.legend(frameon=False)
        return drawing

    return runs_figure


def model_figures(model: str, finetuned: str | None) -> list[Callable]:
    """Figure 3 of a model and, with the same model fine-tuned, Figure 4."""
    before = bigs.kernels_of(pretrained_model(model))
    rows = bigs.figure(
        name="kernels",
        alt="Filled step plots over positions -10 to 10, a row for each layer.",
        caption=(
            f"How each layer of {model} reads its surroundings; rows are layers, 0 at"
            " the bottom."
        ),
    )
    drawn = [rows(lambda: bigs.draw_rows({Path(model).name: before}))]
    if finetuned is not None:
        after = bigs.kernels_of(pretrained_model(finetuned))
        if after.shape != before.shape:
            raise bigs.UserError(
                f"finetuned: {finetuned} has kernels of shape {after.shape}, {model} of"
                f" {before.shape}; give the same model before and after fine-tuning"
            )
        moved = bigs.movement(before, after)
        of_paper = [
            one
            for place in ((14, 1), (18, 0), (17, 0))
            for one in moved
            if one[1:] == place
        ]
        pairs = bigs.figure(
            name="finetuned",
            alt="Kernels over all positions, before in grey and after in red.",
            caption=(
                f"Kernels of {model} (grey) and {finetuned} (red), each scaled to a"
                " peak of one."
            ),
        )
        drawn.append(
            pairs(
                lambda: bigs.draw_pairs(
                    before, after, of_paper if len(before) == 23 else moved[:3]
                )
            )
        )
    return drawn


def pretrained_model(name: str, task: str | None = "masked_lm") -> bigs.BiGS:
    """A model for its encoder's sake: no warning if a head is drawn anew."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*drawn anew", UserWarning)
        return bigs.from_pretrained(name, task)


@contextlib.contextmanager
def leaving_on_request() -> Iterator[Callable[[], bool]]:
    """While this holds, the first SIGTERM or SIGINT only sets what the yielded function
    returns. A cluster takes its machine back by SIGTERM; the run then saves its state.

    >>> import signal
    >>> with leaving_on_request() as asked:
    ...     before = asked()
    ...     signal.raise_signal(signal.SIGTERM)
    ...     after = asked()
    >>> before, after
    (False, True)
    """
    import signal

    # Each process would leave at another step; jax's own handler lets all agree on one.
    if jax.process_count() > 1:
        yield lambda: False
        return
    received = []
    numbers = signal.SIGTERM, signal.SIGINT
    before = [
        signal.signal(number, lambda number, _: received.append(number))
        for number in numbers
    ]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def join_processes(distributed: str) -> None:
    """Join the other processes of a run: "auto" on a TPU pod or under a scheduler, else
    "host:port,count,index".
    """
    if distributed == "auto":
        jax.distributed.initialize()
    elif distributed:
        try:
            address, count, index = distributed.split(",")
            jax.distributed.initialize(address, int(count), int(index))
        except ValueError:
            raise bigs.UserError(
                f"distributed: {distributed!r} is neither auto nor"
                " host:port,count,index"
            ) from None


def check_positive(**numbers: int | None) -> None:
    """UserError for a number below 1.

    >>> check_positive(parts=None, seeds=0)
    Traceback (most recent call last):
    annotated_bigs.UserError: seeds: 0 is not positive
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise bigs.UserError(f"{name}: {number} is not positive")


def usual_precision() -> str:
    """The precision that suits this device."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def keep_programs() -> None:
    """Let jax keep what it compiles for the next command."""
    folder = (bigs.RUNS / "compiled").resolve()
    jax.config.update("jax_compilation_cache_dir", str(folder))


@dataclass(frozen=True)
class Reading:
    """What a run reads.

    Args:
        corpus: text or JSON-lines files, folders of such, data sets of the hub, or HDF5
            shards (the paper: Wikipedia and books, as shards); default: embedded
            English.
        heldout: other such texts to measure the loss on; default: one document in
            sixty-four of the corpus.
        parts: only the first so many files of a folder, or shards of a data set.
        vocabulary: file with one piece a line, folder, or name on the hub (the paper:
            bert-large-uncased); default: that of --model, or one trained on the corpus,
            in lower case.
        pieces: word pieces of a vocabulary that is trained on the corpus (the paper's
            vocabulary has 30,522).
    """

    corpus: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    parts: int | None = None
    vocabulary: str | None = None
    pieces: int = 8192

    def dataset(self, length: int, model: str | None = None) -> bigs.Dataset:
        """Tokenizer and rows; UserError for what makes none."""
        check_positive(parts=self.parts)
        if length < 3:
            raise bigs.UserError(
                f"length: {length} leaves no room between [CLS] and [SEP]; give 3 or"
                " more"
            )
        if not self.corpus and (self.heldout or self.parts is not None):
            raise bigs.UserError("heldout, parts: these need a --corpus; give one")
        if self.vocabulary or model:
            tokenizer = (
                corpora.load_vocabulary(self.vocabulary)
                if self.vocabulary
                else bigs.load_tokenizer(model)
            )
        elif self.corpus:
            tokenizer = corpora.trained_vocabulary(
                self.corpus, self.pieces, parts=self.parts
            )
        else:
            tokenizer = bigs.tiny_dataset().tokenizer
        if self.corpus:
            return corpora.prepare(
                self.corpus, tokenizer, length, self.heldout, self.parts
            )
        return bigs.make_dataset(bigs.embedded_english(), tokenizer, length)


@dataclass(frozen=True)
class Changes:
    """Where a run differs from its recipe; what is not given stays.

    Args:
        length: tokens of a row (the paper: 128, then 512, 1024 or 4096).
        steps: number of steps (the paper: 100,000 in the documented run).
        batch: rows in a batch (the paper: 760 to 1136).
        learning_rate: its peak (the paper: 2e-4 to 8e-4).
        start: standard deviation of fresh weights (the paper: 0.02); default: the
            recipe's or that of the size.
        accumulate: parts of a batch that are computed one after the other, to save
            memory.
        remat: recompute layers in the backward pass, to save memory.
        shard: split parameters and moments among devices.
        log_every: steps between lines of the log.
        evaluate_every: steps between held-out losses.
        save_every: steps between checkpoints.
        keep: checkpoints that stay.
    """

    length: int | None = None
    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    start: float | None = None
    accumulate: int | None = None
    remat: bool | None = None
    shard: bool | None = None
    log_every: int | None = None
    evaluate_every: int | None = None
    save_every: int | None = None
    keep: int | None = None

    def of(self, recipe: bigs.Recipe, seed: int) -> bigs.Recipe:
        """The recipe with these changes and the seed."""
        given = {
            field: value for field, value in asdict(self).items() if value is not None
        }
        return replace(recipe, seed=seed, **given)


@dataclass(frozen=True)
class Architecture:
    """What a new model is made of; what is not given is the size's.

    Args:
        block: gated or stack (or, of workshop/arms.py, sum, single, no-product or
            stack-gelu); a stack's feed-forward layers are four times as wide as the
            model.
        routing: ssm, attention or none (or, of workshop/arms.py, free kernels that are
            no SSM's, or channels, an SSM for each).
        pooler: non_padding_mean, mean or cls; how a text becomes one vector in
            fine-tuning.
    """

    block: str | None = None
    routing: str | None = None
    pooler: str | None = None

    def of(self, config: bigs.Config) -> bigs.Config:
        """The config with these; UserError for a layer that does not exist.

        >>> Architecture(block="stack", routing="free").of(bigs.tiny)
        Traceback (most recent call last):
        annotated_bigs.UserError: block: there is no stack layer with routing free
        """
        given = {
            "block": self.block,
            "routing": self.routing,
            "pooler_type": self.pooler,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        if str(self.block).startswith("stack"):
            changes["intermediate_size"] = 4 * config.hidden_size
        config = replace(config, **changes)
        if (config.block, config.routing) not in bigs.LAYERS:
            raise bigs.UserError(
                f"block: there is no {config.block} layer with routing {config.routing}"
            )
        return config


def model_for(
    config: bigs.Config, model: str | None, length: int, dtype: str
) -> tuple[bigs.Config, bigs.BiGS | None]:
    """The config of a run, and the model that it starts from if there is one. Then the
    length may differ from that model's, which is how the paper went from 128 tokens to
    512 and 4096.
    """
    if model is None:
        return replace(config, dtype=dtype, max_position_embeddings=length), None
    start = bigs.extend(bigs.from_pretrained(model, "masked_lm"), length)
    if start.config.vocab_size != config.vocab_size:
        raise bigs.UserError(
            f"vocabulary: {config.vocab_size} pieces, but {model} has"
            f" {start.config.vocab_size}; leave it out"
        )
    start = bigs.changed(
        start,
        {},
        dtype=dtype,
        mask_padding=True,
        hidden_dropout_prob=config.hidden_dropout_prob,
    )
    return start.config, start


def command_pretrain(
    output: Path,
    reading: Reading,
    changes: Changes,
    architecture: Architecture,
    size: str = "mini",
    recipe: str = "documented",
    model: str | None = None,
    precision: str | None = None,
    seed: int = 0,
    resume: bool = False,
    distributed: str = "",
    json: Path | None = None,
) -> None:
    """Pretrain a model by masked language modelling.

    Args:
        output: folder for checkpoints, log and the finished model.
        size: tiny, small, boxed, mini, base or large (the paper's, 23 layers of 1024).
        recipe: documented (the authors' run: 100,000 steps of 1048 x 128), short,
            medium or full (the paper's 11, 29 and 97 billion tokens), longer (their
            10,000 steps at 512), annotated (ours for small models, an hour or two on a
            CPU), documented-small (the authors' way, for size small), boxed (the model
            in the box, on a GPU), demonstration (minutes on a CPU) or quarter-hour.
        model: folder or hub name of a model to go on from, its size and vocabulary
            included.
        precision: of products, float32 or bfloat16; default: bfloat16 but on a CPU (the
            paper: float32).
        seed: decides the start, the masks and the order of the text.
        resume: go on with the run in the output folder, if there is one.
        distributed: auto on a TPU pod, or host:port,count,index for each of several
            processes.
        json: also add the log of the finished run to this file, under the name of the
            output folder.
    """
    config = architecture.of(bigs.choose(bigs.SIZES, "size", size))
    if model is not None and architecture != Architecture():
        raise bigs.UserError(
            "block, routing, pooler: these are given by --model; leave them out"
        )
    plan = changes.of(bigs.choose(bigs.RECIPES, "recipe", recipe), seed)
    if precision is not None:
        bigs.choose({"float32": 0, "bfloat16": 0}, "precision", precision)
    join_processes(distributed)
    print(
        f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
        f" ({jax.default_backend()})",
        file=sys.stderr,
    )
    keep_programs()
    data = reading.dataset(plan.length, model)
    dtype = precision or usual_precision()
    config, start = model_for(
        replace(config, vocab_size=len(data.tokenizer)), model, plan.length, dtype
    )
    with leaving_on_request() as asked:
        loss = bigs.fast_loss_of(plan)
        run = running.pretrain(config, plan, data, output, resume, start, asked, loss)
    last = run.history[-1]
    if last["step"] < plan.steps:
        print(
            f"{output}: stopped at step {last['step']} of {plan.steps}; go on with"
            " --resume"
        )
        raise SystemExit(143)  # as after a SIGTERM that nobody caught
    print(f"{output}: held-out loss {last['heldout']:.3f} after {plan.steps} steps")
    if json is not None:
        about = {
            "size": model or size,
            "parameters": bigs.parameters(config),
            "vocabulary": config.vocab_size,
            "text": data.source,
            "rows": len(data.train.tokens),
        }
        bigs.keep_results(
            json,
            **{output.name: about | {"recipe": asdict(plan), "history": run.history}},
        )


def command_export(run: Path, output: Path, compact: bool = False) -> None:
    """Write the last checkpoint of a run, finished or not, as a model in the published
    format.

    Args:
        run: folder of a run of pretrain; it may still be going on.
        output: folder for the model.
        compact: matrices in bfloat16; half the size, but the authors' code reads
            float32 only.
    """
    *_, (step, model) = running.states_of(run)
    running.export(model, output, bigs.load_tokenizer(run), compact)
    print(f"{output}: the model after {step} steps")


def masked_model(name: str) -> bigs.BiGS:
    """A model that was pretrained to fill masks; UserError for another."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*drawn anew", UserWarning)
            return bigs.from_pretrained(name, "masked_lm")
    except UserWarning:
        raise bigs.UserError(
            f"{name}: this model has no head for masked words; give one that was"
            " pretrained"
        ) from None


def print_way(way: dict[str, np.ndarray]) -> None:
    """A line for each checkpoint of a run, as `way_of` gives them.

    >>> way = {"tokens": [2e6], "spread": [1.5], "sizes": [[0.02, 0.03]]}
    >>> print_way({name: np.array(values) for name, values in way.items()})
         2.0 million tokens: the output spreads by 1.5; W_o of the layers 0.020, 0.030
    """
    for tokens, spread, sizes in zip(
        way["tokens"], way["spread"], way["sizes"], strict=True
    ):
        print(
            f"{tokens / 1e6:8,.1f} million tokens: the output spreads by {spread:,.1f};"
            " W_o of the layers " + ", ".join(f"{size:.3f}" for size in sizes)
        )


def print_moved(before: np.ndarray, after: np.ndarray) -> None:
    """The three kernels that fine-tuning moved most; arrays are (layers, 2, L).

    >>> before = np.ones((1, 2, 4))
    >>> print_moved(before, before * np.array([1.5, 1])[:, None])
    layer 0, forward: fine-tuning moved it by 50.0% of its norm
    layer 0, backward: fine-tuning moved it by 0.0% of its norm
    """
    for change, layer, side in bigs.movement(before, after)[:3]:
        name = ("forward", "backward")[side]
        print(
            f"layer {layer}, {name}: fine-tuning moved it by {change:.1%} of its norm"
        )


def command_inspect(
    model: str = str(bigs.BOXED),
    finetuned: str | None = None,
    run: Path | None = None,
    heldout: tuple[str, ...] = (),
    output: Path | None = None,
) -> None:
    """Read a model's kernels: where they look, what moved them, and what the model
    loses without them.

    Args:
        model: folder or hub name of a model with SSMs; default: the model in
            data/bigs-boxed.
        finetuned: the same model after fine-tuning.
        run: the run of pretrain that made it, for the start and the way.
        heldout: texts that it has not read, to measure the loss on, with all kernels
            and without.
        output: folder for kernels.npz and, with held-out texts, reading.json.
    """
    network = bigs.from_pretrained(model, "masked_lm")
    tokenizer = bigs.load_tokenizer(model)
    found = studies.way_of(run) if run else {}
    found["pretrained"] = bigs.kernels_of(network)
    bigs.print_reading(found.get("start"), found["pretrained"])
    if run:
        print_way(found)
    if finetuned:
        found["finetuned"] = bigs.kernels_of(pretrained_model(finetuned))
        print_moved(found["pretrained"], found["finetuned"])

    readings = studies.readings_of(network, tokenizer, heldout)
    for text, losses in readings.get("losses", {}).items():
        print(text)
        bigs.print_silenced(losses)
        print(f"word frequencies alone: {readings['frequencies'][text]:.3f}")
    if readings:
        studies.print_shortened(readings["shortened"])

    if output is not None:
        with bigs.write_folder_whole(output) as part:
            np.savez_compressed(part / "kernels.npz", **found)
            if readings:
                bigs.keep_results(part / "reading.json", **readings)


def command_compare(
    reading: Reading,
    plan: comparison.Plan,
    arms: tuple[str, ...] = tuple(of_one_size(bigs.tiny)),
    seeds: int = 3,
    first_seed: int = 0,
    output: Path = bigs.RUNS / "compare",
    record: Path = bigs.RUNS / "compare.jsonl",
) -> None:
    """Pretrain architectures of equal size with several seeds, by the recipe annotated
    with a table of positions, fine-tune them, and compare losses and scores; resumes if
    killed.

    Args:
        arms: which to run, also frozen SSM, free kernels, an SSM a channel, lin or
            inv; differences are to the first.
        seeds: runs of each arm.
        first_seed: the seed of the first.
        output: folder for the runs.
        record: file of JSON lines, one for each finished run; what stands there is not
            run again, but fine-tuned on tasks that it lacks.
    """
    check_positive(seeds=seeds)
    for arm in arms:
        bigs.choose(ARMS, "arms", arm)
    for name in plan.task:
        bigs.choose(bigs.GLUE, "task", name)
    size = bigs.choose(bigs.SIZES, "size", plan.size)
    tasks = plan.texts()
    rows = reading.dataset(bigs.RECIPES["annotated"].length)
    every_arm = all_arms(replace(size, vocab_size=len(rows.tokenizer)))
    chosen = {arm: every_arm[arm] for arm in arms}
    every = range(first_seed, first_seed + seeds)
    runs = comparison.compare(chosen, plan, rows, tasks, every, output, record)
    bigs.print_contrasts(runs)


def command_fill_mask(
    text: str, /, model: str = str(bigs.BOXED), top: int = 10
) -> None:
    """Show the likeliest words for every [MASK] of a text.

    Args:
        text: a text with at least one [MASK].
        model: folder or hub name, e.g. JunxiongWang/BiGS_128; default: the model in
            data/bigs-boxed.
        top: how many words.
    """
    check_positive(top=top)
    network = masked_model(model)
    tokenizer = bigs.load_tokenizer(model)
    for number, words in enumerate(bigs.fill_mask(network, tokenizer, text, top), 1):
        print(f"[MASK] {number}")
        for word, p in words:
            print(f"  {word:20s}{p:9.4%}")


def command_grammar(
    pairs: Path,
    model: str = str(bigs.BOXED),
    every: int = 1,
    paradigms: tuple[str, ...] = (),
    json: Path | None = None,
    name: str | None = None,
) -> None:
    """Count minimal pairs of sentences, as BLiMP has them, of which the model finds the
    grammatical one likelier.

    Args:
        pairs: file of pairs, JSON lines, plain or gzip.
        model: folder or hub name of a model with a head for masked words; default: the
            model in data/bigs-boxed.
        every: take each so many-th pair, for a quick look.
        paradigms: only these, by BLiMP's names (its field UID); default: all.
        json: also write the accuracies to this file.
        name: what to call the model there, beside others; default: the file is about
            one model.
    """
    check_positive(every=every)
    if name == "measured":
        raise bigs.UserError("name: measured is kept for the date; choose another")
    chosen = grammar.of_paradigms(grammar.read_pairs(pairs), paradigms)
    network = masked_model(model)
    tokenizer = bigs.load_tokenizer(model)
    found = {"model": model}
    found |= grammar.accuracy(network, tokenizer, chosen[::every])
    grammar.print_accuracy(found)
    if json is not None:
        bigs.keep_results(json, **({name: found} if name else found))


@dataclass(frozen=True)
class Grid:
    """Settings of fine-tuning; with several values of one, the best combination is
    searched first.

    Args:
        learning_rate: its peak (the paper: 1e-5 to 6e-5); default: 3e-5 at a width of
            1024, in inverse proportion.
        weight_decay: of all but biases and scales (the paper: 0.01 or 0.1).
        batch: examples in a batch (the paper: 16 or 32).
        epochs: times that the training set is read (the paper: 3, 5 or 8).
    """

    learning_rate: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    batch: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()

    def tunings(self, search: bool, width: int, **changes: Any) -> list[bigs.Tuning]:
        """All combinations; what is not given is usual, or the paper's whole grid where
        that is to be searched.
        """
        usual = asdict(bigs.Tuning(learning_rate=3e-5 * 1024 / width))
        given = [
            getattr(self, field) or (bigs.GRID[field] if search else (usual[field],))
            for field in bigs.GRID
        ]
        return [
            bigs.Tuning(**dict(zip(bigs.GRID, values, strict=True)), **changes)
            for values in itertools.product(*given)
        ]


def starting_point(model: str, start: str | None, name: str, output: Path) -> str:
    """The folder that a task starts from: the model, or, for some tasks, one fine-tuned
    on another task.
    """
    after = bigs.GLUE[name].after
    if after is None:
        return model
    if start:
        return start
    bigs.finish_writing(output / after)
    is_there = (output / after / "config.json").exists()
    return str(output / after) if is_there else model


def finetuned_task(
    name: str,
    splits: dict[str, bigs.Texts],
    origin: str,
    grid: Grid,
    search: bool,
    freeze_kernels: bool,
    variants: tuple[str, ...],
    seeds: int,
    output: Path,
) -> dict[str, Any]:
    """The runs of one task in its folder, which belongs to one model, text and grid;
    their `summary`.
    """
    network = pretrained_model(origin, None)
    tokenizer = bigs.load_tokenizer(origin)
    tunings = grid.tunings(
        search, network.config.hidden_size, freeze_kernels=freeze_kernels
    )
    weights = running.weights_of(network)

    def whole(texts):
        return (
            f"{texts.texts} {None if texts.labels is None else texts.labels.tolist()}"
        )

    data = corpora.fingerprint(
        *(f"{split} {whole(texts)}" for split, texts in splits.items())
    )
    settings = {
        "model": {"model": f"{Path(origin).name} ({weights})"},
        "data": {"data": data},
        "grid": {
            field: sorted({asdict(tuning)[field] for tuning in tunings})
            for field in asdict(tunings[0])
        },
    }
    with running.claimed(output / name, settings, True):
        tuning = glue.searched(
            name, splits, network, tokenizer, tunings, variants, output / name
        )
        records = glue.run_task(
            name, splits, network, tokenizer, tuning, variants, seeds, output / name
        )
    return {"model": origin} | glue.summary(name, records, splits)


def command_finetune(
    output: Path,
    grid: Grid,
    task: tuple[str, ...] = ("order",),
    model: str = str(bigs.BOXED),
    data: Path | None = None,
    seeds: int = 1,
    start: str | None = None,
    search: bool = False,
    freeze_kernels: bool = False,
    variants: tuple[str, ...] = ("pretrained",),
    json: Path | None = None,
) -> None:
    """Fine-tune a model on tasks of GLUE; finished runs in the output folder are kept.

    Args:
        output: folder for models, records of runs, and answers to the test sets.
        task: mnli, qnli, qqp, rte, sst2, mrpc, cola, stsb, wnli, all, or order,
            which needs no download.
        model: folder or hub name of a pretrained model; default: the model in
            data/bigs-boxed.
        data: folder of GLUE's official files; default: nyu-mll/glue from the hub.
        seeds: runs of each task (the paper: 6).
        start: model fine-tuned on mnli, from which rte, mrpc and stsb start; default:
            that of the output folder.
        search: search the paper's grid where no values are given.
        freeze_kernels: leave the SSMs as they are.
        variants: pretrained, not pretrained, padded (to the full length), frozen
            kernels; what to compare.
        json: also write a summary to this file.
    """
    for field, table, given in (
        ("task", bigs.GLUE | {"all": None}, task),
        ("variants", glue.GLUE_VARIANTS, variants),
    ):
        for name in given:
            bigs.choose(table, field, name)
    names = [
        name for name in bigs.GLUE if name in task or "all" in task and name != "order"
    ]
    check_positive(seeds=seeds)
    keep_programs()
    found = {}
    texts = {name: glue.task_texts(name, data) for name in names}
    for name, splits in texts.items():
        missing = glue.missing_split(splits)
        if missing:
            if len(names) == 1:
                raise bigs.UserError(
                    f"data: there is no {missing} set of {name} in"
                    f" {data or glue.HUB}; fetch it"
                )
            print(
                f"{name}: left out, there is no {missing} set in {data or glue.HUB}",
                file=sys.stderr,
            )
            continue
        origin = starting_point(model, start, name, output)
        found[name] = finetuned_task(
            name, splits, origin, grid, search, freeze_kernels, variants, seeds, output
        )
        bigs.keep_results(output / "results.json", **found)
    if not found:
        raise bigs.UserError(
            f"data: no task has both a train and a dev set in {data or glue.HUB}"
        )
    bigs.print_glue(found)
    if json is not None:
        bigs.keep_results(json, **found)


def print_seconds(what: str, seconds: dict[str, list[float]]) -> None:
    """A line for each kind.

    >>> print_seconds("recipe", {"annotated": [0.25, 0.3]})
    recipe annotated: 0.250, 0.300 s
    """
    for kind, values in seconds.items():
        print(f"{what} {kind}: {', '.join(f'{value:.3f}' for value in values)} s")


def published_and_ours(size: str, tokens: int, repeats: int) -> dict[str, Any]:
    """What `benchmark --published` measures, printed too."""
    recipe = bigs.Recipe(batch=max(1, tokens // 128))
    steps = benchmark.factor_speeds(bigs.SIZES[size], recipe, repeats)
    for kind, found in steps.items():
        print(
            f"{kind:42s}{found['speed']:6.2f} x"
            f" {found['tokens_per_second']:8,.0f}/s, loss {found['loss']:.4f}"
        )
    memory = benchmark.kept_memory_speed(size, recipe.batch, repeats)
    print_seconds("memory", memory)
    return {"size": size, "batch": recipe.batch, "steps": steps, "memory": memory}


def on_tpu(tpu: str, lengths: tuple[int, ...]) -> dict[str, Any]:
    """What `benchmark --tpu` measures, printed too."""
    results = {"rows": layers_on_tpu(tpu, lengths), "memory": steps_on_tpu(tpu)}
    for row in results["memory"]:
        fits = "does not fit"
        if row["gigabytes"] is not None:
            fits = f"{row['gigabytes']:6.2f} of {row['available']:.0f} GB"
        print(f"{row['what']:32s}{fits}")
    benchmark.print_benchmark(results["rows"])
    return results


def command_benchmark(
    size: str = "tiny",
    lengths: tuple[int, ...] = (),
    tokens: int = 2048,
    repeats: int = 5,
    kinds: tuple[str, ...] = benchmark.KINDS,
    json: Path | None = None,
    tpu: str | None = None,
    published: bool = False,
    recipes: tuple[str, ...] = (),
    sizes: tuple[str, ...] = (),
) -> None:
    """Time no routing, FFT, Toeplitz, blocks and attention on this device, or estimate
    them for a TPU.

    Args:
        size: tiny, small, boxed, mini, base or large (the paper's); with --tpu
            always large.
        lengths: tokens of a text; default: 128 to 8192, doubling.
        tokens: tokens in a batch, unless one text is longer.
        repeats: rounds of which the median is taken.
        kinds: what to time; whole models of size large need an accelerator.
        json: also write the results to this file.
        tpu: compile for one device of a TPU without having one: v3, v4, v5e or v6e
            (needs the package libtpu).
        published: time a pretraining step the published way and ours instead, and what
            each change gains.
        recipes: time a pretraining step of each of these instead, in turns.
        sizes: time a pretraining step of each of these by the recipe annotated
            instead, in turns.
    """
    if sum(map(bool, (published, recipes, sizes, tpu))) > 1:
        raise bigs.UserError("published, recipes, sizes, tpu: give one of them")
    options = {
        "recipes": (recipes, bigs.RECIPES),
        "sizes": (sizes, bigs.SIZES),
        "kinds": (kinds, dict.fromkeys(benchmark.KINDS)),
    }
    for option, (names, known) in options.items():
        for name in names:
            bigs.choose(known, option, name)
    config = bigs.choose(bigs.SIZES, "size", size)
    lengths = lengths or tuple(2**k for k in range(7, 14))
    if min(*lengths, tokens, repeats) < 1:
        raise bigs.UserError("lengths, tokens, repeats: must be at least 1")
    if published:
        results = published_and_ours(size, tokens, repeats)
    elif recipes:
        cases = {name: (size, bigs.RECIPES[name]) for name in recipes}
        seconds = benchmark.step_speeds(cases, repeats)
        results = {"size": size, "seconds": seconds}
        print_seconds("recipe", seconds)
    elif sizes:
        cases = {name: (name, bigs.annotated) for name in sizes}
        seconds = benchmark.step_speeds(cases, repeats)
        results = {"seconds": seconds}
        print_seconds("size", seconds)
    elif tpu is not None:
        results = on_tpu(tpu, lengths)
    else:
        config = replace(config, dtype=usual_precision())
        rows = benchmark.benchmark(config, lengths, tokens, repeats, kinds)
        results = {"size": size, "rows": rows}
        benchmark.print_benchmark(rows)
    if json is not None:
        bigs.keep_results(json, **results)


COMMANDS = {
    "figures": command_figures,
    "pretrain": command_pretrain,
    "export": command_export,
    "inspect": command_inspect,
    "compare": command_compare,
    "finetune": command_finetune,
    "fill-mask": command_fill_mask,
    "grammar": command_grammar,
    "benchmark": command_benchmark,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command.

    >>> main(["pretrain", "--output", "runs/x", "--size", "huge"])
    Traceback (most recent call last):
    SystemExit: 2
    """
    import tyro

    bigs.keep_memory()
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="annotated_bigs.py",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except (bigs.UserError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

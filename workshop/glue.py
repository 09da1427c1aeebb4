"""GLUE around the fine-tuning of the story: its files and its data sets on the hub,
runs of tasks over seeds and grids, records, and answers for the server.
"""

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

import annotated_bigs as bigs
from workshop import corpora

# CoLA's files for training and development have no header.
COLA = ("source", "label", "mark", "sentence")

RAGGED = ("QQP",)  # its official files hold some broken lines


def check_header(file: Path, names: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """UserError unless each wanted column stands in the header once."""
    for name in wanted:
        if names.count(name) != 1:
            raise bigs.UserError(
                f"{file}, line 1: {names.count(name)} columns {name!r}, but the header"
                " of this file should have one; restore the header, or fetch the file"
                " again"
            )


def read_tsv(
    file: Path, wanted: tuple[str, ...], header: tuple[str, ...] = (), rows: int = 0
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line number and wanted columns of each row; the header is the file's first line
    unless it is given.

    Raises UserError that names the line for a row of another width, a header that is
    missing or repeated, and an end in the middle of a line; official files of so many
    rows may lack the last line feed.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "dev.tsv"
    >>> _ = file.write_text('index\\tsentence\\n0\\tA "first" one\\n1\\n')
    >>> list(read_tsv(file, ("sentence",)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_bigs.UserError: .../dev.tsv, line 3: 1 columns instead of 2; ...
    """
    names = header
    number = 0
    line = "\n"
    short = 0
    found = []
    for number, line in enumerate(corpora.text_lines(file, "\n"), 1):
        cells = tuple(line.rstrip("\r\n").split("\t"))
        if not names:
            names = cells
            check_header(file, names, wanted)
        elif cells == names:
            raise bigs.UserError(
                f"{file}, line {number}: the header again; delete the line"
            )
        elif len(cells) == len(names):
            found.append((number, tuple(cells[names.index(name)] for name in wanted)))
        elif file.parent.name in RAGGED:
            short += 1
        else:
            raise bigs.UserError(
                f"{file}, line {number}: {len(cells)} columns instead of {len(names)};"
                " restore the line, or fetch the file again"
            )
    if not found:
        raise bigs.UserError(f"{file}: there is no row in it; fetch the file again")
    if not line.endswith("\n") and len(found) != rows:
        raise bigs.UserError(
            f"{file}, line {number}: the file ends within this line; fetch it again, or"
            " end the line with a line feed if it is whole"
        )
    if short or rows not in (0, len(found)):
        print(
            f"{file}: {len(found)} rows"
            + (f", the official file has {rows}" if rows else "")
            + (f"; {short} broken lines were skipped" if short else ""),
            file=sys.stderr,
        )
    yield from found


def label_of(task: bigs.Task, word: str) -> int | float:
    """The number of a label, or a score between 0 and 5; ValueError says what it should
    be.

    >>> label_of(bigs.GLUE["mnli"], "neutral"), label_of(bigs.GLUE["stsb"], "3.8")
    (1, 3.8)
    """
    if task.labels:
        if word not in task.labels:
            raise ValueError(f"{word!r} should be one of {', '.join(task.labels)}")
        return task.labels.index(word)
    with contextlib.suppress(ValueError):
        if 0 <= float(word) <= 5:
            return float(word)
    raise ValueError(f"{word!r} should be a number from 0 to 5")


def official_split(name: str, split: str, data: Path) -> bigs.Texts | None:
    """A split of a task from its official file, plain or compressed, or None if there
    is no such file.
    """
    task = bigs.GLUE[name]
    tested = split.startswith(("test", "diagnostic"))
    pattern = (
        "*/diagnostic.tsv*" if split == "diagnostic" else f"{task.folder}/{split}*.tsv*"
    )
    files = sorted(data.glob(pattern))
    if not files:
        return None
    header = COLA if name == "cola" and not tested else ()
    texts = []
    labels = []
    wanted = task.texts + (() if tested else (task.label,))
    for number, row in read_tsv(files[0], wanted, header, task.rows.get(split, 0)):
        texts.append(row[: len(task.texts)])
        try:
            labels.append(None if tested else label_of(task, row[-1]))
        except ValueError as error:
            raise bigs.UserError(
                f"{files[0]}, line {number}: {task.label} {error}; restore the line"
            ) from None
    return bigs.Texts(texts, None if tested else np.array(labels))


HUB = "nyu-mll/glue"


HUB_TEXTS = {
    "mnli": ("premise", "hypothesis"),
    "mrpc": bigs.PAIR,
    "ax": ("premise", "hypothesis"),
}


def hub_split(name: str, split: str) -> bigs.Texts | None:
    """A split of a task from the hub, through `datasets`."""
    import datasets

    which, columns = (
        ("ax", "test")
        if split == "diagnostic"
        else (name, split.replace("dev", "validation"))
    )
    try:
        table = datasets.load_dataset(HUB, which, split=columns)
    except Exception as error:
        if isinstance(error, ValueError) and "split" in str(error).lower():
            return None
        raise bigs.UserError(
            f"data: {HUB} cannot be had ({type(error).__name__}); pass the folder of"
            " GLUE's official files with --data, or take --task order, whose"
            " sentences come from installed documentation"
        ) from None
    texts = zip(
        *(table[column] for column in HUB_TEXTS.get(which, bigs.GLUE[name].texts)),
        strict=True,
    )
    return bigs.Texts(
        list(texts), None if "test" in columns else np.array(table["label"])
    )


def task_texts(name: str, data: Path | None) -> dict[str, bigs.Texts]:
    """All splits of a task that are there, from a folder or the hub; or the embedded
    sentences.
    """
    if name == "order":
        parts = zip(("train", "dev"), bigs.order_task(), strict=True)
        return dict(parts)
    if data is not None and not data.is_dir():
        raise bigs.UserError(
            f"data: {data} is no folder; pass the one that holds CoLA, SST-2 and the"
            " others"
        )
    splits = {"train": 0, "dev": 0, "test": 0} | bigs.GLUE[name].rows
    splits = [
        split for split in splits if name != "mnli" or split not in ("dev", "test")
    ]
    found = {
        split: official_split(name, split, data) if data else hub_split(name, split)
        for split in splits
    }
    return {split: texts for split, texts in found.items() if texts is not None}


def missing_split(splits: Iterable[str]) -> str | None:
    """Which one of the two that fine-tuning needs is not among the splits.

    >>> missing_split(["dev", "test"])
    'train'
    >>> missing_split(["train", "dev_matched"]) is None
    True
    """
    for kind in ("train", "dev"):
        if not any(split.startswith(kind) for split in splits):
            return kind
    return None


def no_skill(task: bigs.Task, train: bigs.Texts, dev: bigs.Texts) -> dict[str, float]:
    """The score of a uniform guess, on average of 100, and of the commonest label or
    the mean of the training set.

    >>> train, dev = (
    ...     bigs.Texts([], np.array([1, 1, 0])),
    ...     bigs.Texts([], np.array([1, 0, 1, 1])),
    ... )
    >>> no_skill(bigs.GLUE["sst2"], train, dev)["majority"]
    0.75
    """
    rng = np.random.default_rng(0)
    n = len(dev.labels)
    k = max(1, len(task.labels))
    guesses = [rng.random((n, k), np.float32) for _ in range(100)]
    usual = (
        np.bincount(train.labels, minlength=k)
        if task.labels
        else np.array([train.labels.mean()])
    )

    def score(outputs):
        return bigs.task_scores(task, outputs, dev.labels)[task.metrics[0]]

    return {
        "chance": float(np.mean([score(guess) for guess in guesses])),
        "majority": score(np.tile(usual.astype(np.float32), (n, 1))),
    }


GLUE_VARIANTS = {
    "pretrained": {},
    "not pretrained": {},
    "padded": {"cut": False},
    "frozen kernels": {"freeze_kernels": True},
}


def tune(
    name: str,
    splits: dict[str, bigs.Texts],
    start: bigs.BiGS,
    tokenizer,
    tuning: bigs.Tuning,
    variant: str,
    seed: int,
) -> tuple[dict[str, Any], bigs.BiGS]:
    """Fine-tune on a task: a record of the run, and the model that scored best on the
    development set.
    """
    task = bigs.GLUE[name]
    most = start.config.max_position_embeddings
    encoded = {
        split: bigs.encode(texts.texts, texts.labels, tokenizer, most)
        for split, texts in splits.items()
        if texts.labels is not None
    }
    train = encoded.pop("train")
    first = next(iter(encoded.values()))
    if variant == "not pretrained":
        start = bigs.BiGS(start.config, seed=seed)
    tuning = replace(tuning, **GLUE_VARIANTS[variant])
    model = bigs.classifier_on(
        start,
        bigs.Examples(*(a[:64] for a in train)),
        seed,
        max(1, len(task.labels)),
    )

    def score(model):
        return bigs.task_scores(task, bigs.predict(model, first), first.labels)[
            task.metrics[0]
        ]

    began = time.perf_counter()
    tuned = bigs.finetune(model, train, tuning, seed, score)
    seconds = time.perf_counter() - began
    both = {"best": tuned.best, "last": tuned.last}
    outputs = {
        kind: {split: bigs.predict(model, own) for split, own in encoded.items()}
        for kind, model in both.items()
    }
    scores = {
        kind: {
            split: bigs.task_scores(task, found, encoded[split].labels)
            for split, found in own.items()
        }
        for kind, own in outputs.items()
    }
    answers = {}
    for kind, own in outputs.items():
        answers[kind] = answers_of(task, next(iter(own.values())))
    return {
        "task": name,
        "variant": variant,
        "seed": seed,
        "tuning": asdict(tuning),
        "seconds": round(seconds, 1),
        "examples": {split: len(texts.texts) for split, texts in splits.items()},
        "evaluations": tuned.scores,
        **scores,
        "answers": answers,
        "measured": bigs.circumstances(),
    }, tuned.best


def answers_of(task: bigs.Task, outputs: np.ndarray) -> list[int] | list[float]:
    """The label or the score that a model gives to each example.

    >>> answers_of(bigs.GLUE["sst2"], np.array([[0.1, 0.9], [0.8, 0.2]]))
    [1, 0]
    """
    if task.labels:
        return outputs.argmax(1).tolist()
    return [round(float(score), 4) for score in outputs[:, 0]]


def paired_gain(
    task: bigs.Task,
    labels: np.ndarray,
    ours: list[list[int]] | list[list[float]],
    theirs: list[list[int]] | list[list[float]],
    draws: int = 1000,
) -> tuple[float, float, float]:
    """By how much the mean score of `ours` is above that of `theirs`, and a 95 %
    interval over the examples: both answer the same ones, drawn anew with replacement.
    An answer list for each seed; what another seed would change is not in the interval.

    >>> right = [0, 1] * 50
    >>> paired_gain(bigs.GLUE["sst2"], np.array(right), [right], [right])
    (0.0, 0.0, 0.0)
    """

    def outputs(answers):
        answers = np.asarray(answers)
        return np.eye(len(task.labels))[answers] if task.labels else answers[:, None]

    ours, theirs = ([outputs(run) for run in runs] for runs in (ours, theirs))

    def difference(chosen):
        means = [
            np.mean(
                [
                    bigs.task_scores(task, run[chosen], labels[chosen])[task.metrics[0]]
                    for run in runs
                ]
            )
            for runs in (ours, theirs)
        ]
        return means[0] - means[1]

    rng = np.random.default_rng(0)
    n = len(labels)
    found = [difference(rng.integers(n, size=n)) for _ in range(draws)]
    low, high = np.percentile(found, (2.5, 97.5))
    return float(difference(np.arange(n))), float(low), float(high)


ANSWERS = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", "diagnostic": "AX"}


def write_answers(
    name: str, splits: dict[str, bigs.Texts], model: bigs.BiGS, tokenizer, folder: Path
) -> None:
    """One file for each test set: the number of a row, a tab, its label or score."""
    task = bigs.GLUE[name]
    for split, (texts, labels) in splits.items():
        if labels is None:
            examples = bigs.encode(
                texts,
                np.zeros(len(texts), np.int32),
                tokenizer,
                model.config.max_position_embeddings,
            )
            outputs = bigs.predict(model, examples)
            words = (
                [task.labels[i] for i in outputs.argmax(1)]
                if task.labels
                else [f"{score:.3f}" for score in outputs[:, 0].clip(0, 5)]
            )
            file = folder / f"{ANSWERS.get(split, task.folder)}.tsv"
            lines = [f"{i}\t{word}\n" for i, word in enumerate(words)]
            with bigs.write_whole(file) as part:
                part.write_text("index\tprediction\n" + "".join(lines))


def run_task(
    name: str,
    splits: dict[str, bigs.Texts],
    start: bigs.BiGS,
    tokenizer,
    tuning: bigs.Tuning,
    variants: tuple[str, ...],
    seeds: int,
    output: Path,
    keep: bool = True,
) -> list[dict[str, Any]]:
    """All runs of a task that are not done yet; the records of all of them."""
    first = variants[0].replace(" ", "-")
    records = []
    best = max(
        (
            max(json.loads(file.read_text())["evaluations"])
            for file in output.glob(f"{first}-*.json")
        ),
        default=-np.inf,
    )
    for seed, variant in itertools.product(range(seeds), variants):
        file = output / f"{variant.replace(' ', '-')}-{seed}.json"
        if not file.exists():
            record, model = tune(name, splits, start, tokenizer, tuning, variant, seed)
            if keep and variant == variants[0] and max(record["evaluations"]) > best:
                best = max(record["evaluations"])
                bigs.save_pretrained(model, output, tokenizer=tokenizer)
                write_answers(name, splits, model, tokenizer, output.parent / "answers")
            with bigs.write_whole(file) as part:
                part.write_text(json.dumps(record, indent=1))
        records.append(json.loads(file.read_text()))
    return records


def searched(
    name: str,
    splits: dict[str, bigs.Texts],
    start: bigs.BiGS,
    tokenizer,
    tunings: list[bigs.Tuning],
    variants: tuple[str, ...],
    output: Path,
) -> bigs.Tuning:
    """The best of several settings on the development set, by one run each. That choice
    flatters the development set a little.
    """
    if len(tunings) == 1:
        return tunings[0]
    found = []
    for tuning in tunings:
        folder = (
            output
            / "search"
            / "-".join(f"{value:g}" for value in asdict(tuning).values())
        )
        folder.mkdir(parents=True, exist_ok=True)
        (record,) = run_task(
            name, splits, start, tokenizer, tuning, variants[:1], 1, folder, keep=False
        )
        found.append(max(record["evaluations"]))
        print(
            f"{name:6s}"
            + ", ".join(f"{key} {asdict(tuning)[key]:g}" for key in bigs.GRID)
            + f": {found[-1]:.3f}"
        )
    return tunings[int(np.argmax(found))]


def summary(
    name: str, records: list[dict[str, Any]], splits: dict[str, bigs.Texts]
) -> dict[str, Any]:
    """What the runs of a task found: scores by variant, seed by seed, and those of no
    skill.
    """
    task = bigs.GLUE[name]
    dev = next(split for split in splits if split.startswith("dev"))
    table = {}
    for variant in dict.fromkeys(record["variant"] for record in records):
        own = [record for record in records if record["variant"] == variant]
        table[variant] = {
            "seconds": [r["seconds"] for r in own],
            "tuning": own[0]["tuning"],
        }
        table[variant] |= {
            kind: {
                split: {
                    metric: [r[kind][split][metric] for r in own]
                    for metric in task.metrics
                }
                for split in own[0][kind]
            }
            for kind in ("best", "last")
        }
    answers = {
        (variant, kind): [
            record["answers"][kind]
            for record in records
            if record["variant"] == variant
        ]
        for variant in table
        for kind in ("best", "last")
    }
    first = next(iter(table))
    for variant, kind in answers:
        if variant != first:
            gains = table[variant].setdefault("gains", {first: {}})
            gains[first][kind] = paired_gain(
                task, splits[dev].labels, answers[first, kind], answers[variant, kind]
            )
    return {
        "examples": records[0]["examples"],
        "dev": dev,
        "metric": task.metrics[0],
        "no skill": no_skill(task, splits["train"], splits[dev]),
        "variants": table,
    }

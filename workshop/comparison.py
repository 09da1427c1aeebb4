"""Architectures of equal size, pretrained and fine-tuned alike, for the section of the
story on what gates are worth.

A record is a file of JSON lines, one for each finished run, so that a comparison can be
made in pieces: what stands in the record is not run again. Each architecture gets the
best of a few learning rates, found in short runs with a seed that is used for nothing
else. Runs of one seed read the same rows, in the same order, under the same masks.
"""

import itertools
import json
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import annotated_bigs as bigs
from workshop import glue, running
from workshop.arms import Arm

RATE_SEED = 100  # of the runs that choose a learning rate


@dataclass(frozen=True)
class Plan:
    """What all runs of a comparison share.

    Args:
        size: tiny, small, boxed, mini, base or large.
        steps: steps of a run.
        batch: rows of 128 tokens in a batch.
        rates: learning rates to choose from, as multiples of the recipe's; the best of
            each architecture is found by short runs with a seed of their own.
        rate_steps: steps of these short runs.
        task: tasks of GLUE to fine-tune on.
        data: folder of GLUE's official files; default: nyu-mll/glue from the hub.
        most: training examples of a task at most.
    """

    size: str = "tiny"
    steps: int = 2441
    batch: int = 32
    rates: tuple[float, ...] = (1.0,)
    rate_steps: int = 977
    task: tuple[str, ...] = ()
    data: Path | None = None
    most: int = 20_000

    def texts(self) -> dict[str, dict[str, bigs.Texts]]:
        """The splits of each task, training sets cut to what is fine-tuned on."""
        tasks = {}
        for name in self.task:
            splits = glue.task_texts(name, self.data)
            missing = glue.missing_split(splits)
            if missing:
                raise bigs.UserError(
                    f"data: there is no {missing} set of {name} in"
                    f" {self.data or glue.HUB}; fetch it, or leave the task out"
                )
            texts, labels = splits["train"]
            train = bigs.Texts(texts[: self.most], labels[: self.most])
            tasks[name] = splits | {"train": train}
        return tasks


FIELDS = frozenset({"arm", "seed"})


def read_record(file: Path, fields: Set[str] = FIELDS) -> list[dict[str, Any]]:
    """The finished runs of a record, which have these fields; none if there is no file
    yet.

    >>> read_record(Path("no/such/record.jsonl"))
    []
    """
    runs = []
    lines = file.read_text().splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        run = read_run(line, fields)
        if run is None:
            raise bigs.UserError(
                f"{file}, line {number}: no finished run; delete the line, or choose"
                " another record"
            )
        runs.append(run)
    return runs


def read_run(line: str, fields: Set[str] = FIELDS) -> dict[str, Any] | None:
    """The run of a line, or None if there is none with these fields.

    >>> read_run('{"arm": "gated SSM", "seed": 0}')["seed"]
    0
    >>> read_run("[]") is None
    True
    """
    try:
        run = json.loads(line)
    except ValueError:
        return None
    is_run = isinstance(run, dict) and fields <= run.keys()
    return run if is_run else None


def add_to_record(
    file: Path, run: dict[str, Any], instead_of: dict[str, Any] | None = None
) -> None:
    """Add a line to a record, or put it in place of a run that is there, replacing the
    file as a whole.
    """
    runs = read_record(file)
    if instead_of in runs:
        runs[runs.index(instead_of)] = run
    else:
        runs.append(run)
    with bigs.write_whole(file) as part:
        part.write_text("".join(json.dumps(known) + "\n" for known in runs))


def recipe_of(
    plan: Plan, arm: Arm, steps: int, rate: float, seed: int, length: int
) -> bigs.Recipe:
    """The recipe `annotated` with the changes of an arm, and with a table of positions,
    without which attention cannot tell places apart.
    """
    annotated = bigs.RECIPES["annotated"]
    recipe = replace(
        annotated,
        steps=steps,
        batch=plan.batch,
        length=length,
        learning_rate=rate * annotated.learning_rate,
        matrix_rate=rate * annotated.matrix_rate,
        positions=True,
        seed=seed,
        evaluate_every=max(1, steps // 10),
        save_every=max(1, steps // 5),
        keep=1,
    )
    return replace(recipe, **arm.recipe)


def task_score(
    name: str, splits: dict[str, bigs.Texts], model: bigs.BiGS, tokenizer, seed: int
) -> dict[str, Any]:
    """Fine-tune a model on a task: the score after the last epoch, and the answers."""
    tuning = bigs.Tuning(learning_rate=3e-5 * 1024 / model.config.hidden_size)
    run, _ = glue.tune(name, splits, model, tokenizer, tuning, "pretrained", seed)
    dev = next(iter(run["last"]))
    metric = bigs.GLUE[name].metrics[0]
    return {
        "metric": metric,
        "examples": run["examples"],
        "score": run["last"][dev][metric],
        "answers": run["answers"]["last"],
    }


def without_score(
    tasks: dict[str, dict[str, bigs.Texts]], scores: dict[str, dict[str, Any]]
) -> dict[str, dict[str, bigs.Texts]]:
    """The tasks that have no score after so many training examples.

    >>> tasks = {"cola": {"train": bigs.Texts([("A",), ("B",)], None)}}
    >>> list(without_score(tasks, {"cola": {"examples": {"train": 1}}}))
    ['cola']
    >>> list(without_score(tasks, {"cola": {"examples": {"train": 2}}}))
    []
    """
    return {
        name: splits
        for name, splits in tasks.items()
        if name not in scores
        or scores[name]["examples"]["train"] != len(splits["train"].texts)
    }


def one_run(
    config: bigs.Config,
    recipe: bigs.Recipe,
    data: bigs.Dataset,
    folder: Path,
    tasks: dict[str, dict[str, bigs.Texts]],
    scores: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Pretrain in a folder, where a finished run is only read, and fine-tune on tasks:
    what a record keeps of it, beside the scores it has.
    """
    loss = bigs.fast_loss_of(recipe)
    run = running.pretrain(config, recipe, data, folder, resume=True, loss=loss)
    each = recipe.batch * recipe.length
    losses = bigs.heldout_losses(run.history)
    curve = [[step * each, round(loss, 4)] for step, loss in losses.items()]
    new = {
        name: task_score(name, splits, run.model, data.tokenizer, recipe.seed)
        for name, splits in tasks.items()
    }
    return {
        "heldout": curve[-1][1],
        "curve": curve,
        "parameters": bigs.parameters(config),
        "tasks": scores | new,
        "measured": bigs.circumstances(),
    }


def compare(
    arms: dict[str, Arm],
    plan: Plan,
    data: bigs.Dataset,
    tasks: dict[str, dict[str, bigs.Texts]],
    seeds: range,
    output: Path,
    record: Path,
) -> list[dict[str, Any]]:
    """Make what runs the record still lacks, and fine-tune its runs on tasks, the texts
    of `plan.texts`, that they lack; all runs of full length.
    """
    length = data.heldout[0].input_ids.shape[1]

    def done(name, steps, rate, seed, tasks):
        key = {
            "arm": name,
            "seed": seed,
            "size": plan.size,
            "batch": plan.batch,
            "tokens": steps * plan.batch * length,
            "rate": rate,
            "text": data.identity,
        }
        runs = [run for run in read_record(record) if key.items() <= run.items()]
        known = runs[0] if runs else None
        scores = known["tasks"] if known else {}
        missing = without_score(tasks, scores)
        if known and not missing:
            return known
        about = f"{plan.size}-{seed}-{rate:g}-{steps}x{plan.batch}"
        folder = output / f"{name.replace(' ', '-')}-{about}"
        config = arms[name].config
        recipe = recipe_of(plan, arms[name], steps, rate, seed, length)
        found = key | one_run(config, recipe, data, folder, missing, scores)
        add_to_record(record, found, instead_of=known)
        return found

    best = dict.fromkeys(arms, plan.rates[0])
    if len(plan.rates) > 1:
        for name in arms:
            tried = [
                done(name, plan.rate_steps, rate, RATE_SEED, {}) for rate in plan.rates
            ]
            best[name] = min(tried, key=lambda run: run["heldout"])["rate"]
    return [
        done(name, plan.steps, best[name], seed, tasks)
        for seed, name in itertools.product(seeds, arms)
    ]

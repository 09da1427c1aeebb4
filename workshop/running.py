"""Folders of runs: claimed by one process, resumed after a kill, logged line by line.

`pretrain` is the loop of the story with what a run of days needs around it. A run that
was killed goes on, to the bit, as if nothing had happened.
"""

import contextlib
import functools
import json
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import annotated_bigs as bigs
from workshop import corpora

# A run can be resumed with other values of these; they change nothing but rounding.
FREE = (
    "remat",
    "shard",
    "log_every",
    "evaluate_every",
    "save_every",
    "keep",
)


def contents(directory: Path) -> list[str]:
    """What a folder holds, but for the lock and what was left unfinished.

    >>> contents(Path("no/such/run"))
    []
    """
    if not directory.is_dir():
        return []
    names = sorted(path.name for path in directory.iterdir())
    return [name for name in names if name != "lock" and not name.startswith(bigs.PART)]


def check_owner(directory: Path, resume: bool) -> None:
    """UserError if a folder holds a run that is not to be resumed, or anything else.

    >>> check_owner(bigs.DATA, True)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_bigs.UserError: output: ...data holds README.md, but no run.json ...
    """
    names = contents(directory)
    if "run.json" in names and not resume:
        raise bigs.UserError(
            f"{directory} holds a run; resume it with --resume, or choose another"
            " --output"
        )
    if names and "run.json" not in names:
        raise bigs.UserError(
            f"output: {directory} holds {names[0]}, but no run.json that tells whose it"
            " is; choose another --output, or put back the run.json of the run"
        )


def read_settings(directory: Path) -> dict[str, dict[str, Any]]:
    """What was asked for when the run in a folder began.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "run.json").write_text("[]")
    >>> read_settings(folder)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_bigs.UserError: .../run.json: not the settings of a run ...
    """
    file = directory / "run.json"
    try:
        parts = json.loads(file.read_text())
        return {part: dict(values) for part, values in parts.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise bigs.UserError(
            f"{file}: not the settings of a run ({error}); put back the file that was"
            " there, or choose another --output"
        ) from None


def run_settings(run: Path) -> tuple[bigs.Config, bigs.Recipe]:
    """Config and recipe of a run of `pretrain`; UserError if a folder holds none.

    >>> run_settings(Path("no/such/run"))
    Traceback (most recent call last):
    annotated_bigs.UserError: run: no/such/run holds no run, run.json is missing
    """
    if not (run / "run.json").exists():
        raise bigs.UserError(f"run: {run} holds no run, run.json is missing")
    settings = read_settings(run)
    try:
        return bigs.Config(**settings["config"]), bigs.Recipe(**settings["recipe"])
    except (KeyError, TypeError) as error:
        raise bigs.UserError(f"run: {run} is no run of pretrain ({error!r})") from None


def weights_of(model: bigs.BiGS) -> str:
    """A name for the weights of a model; it changes when one of them does.

    >>> model = bigs.BiGS(bigs.Config(50, 8, 1, 24, num_ssm=4))
    >>> weights_of(model) == weights_of(model)
    True
    """
    leaves = (np.asarray(leaf) for _, leaf in bigs.named_parameters(model))
    return corpora.fingerprint(*(zlib.crc32(leaf.tobytes()) for leaf in leaves))


def check_settings(directory: Path, settings: dict[str, dict[str, Any]]) -> None:
    """UserError if the run in a folder began with other settings, or does not tell.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "run.json").write_text("{}")
    >>> check_settings(folder, {"recipe": {"seed": 0}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_bigs.UserError: .../run.json: recipe lacks seed; add what ...
    """
    began = read_settings(directory)
    for part, values in settings.items():
        for field, value in values.items():
            if field in FREE:
                continue
            if field not in began.get(part, {}):
                raise bigs.UserError(
                    f"{directory / 'run.json'}: {part} lacks {field}; add what the run"
                    " began with, or choose another --output"
                )
            was = began[part][field]
            if was != value:
                raise bigs.UserError(
                    f"{field}: {value}, but the run in {directory} began with {was};"
                    " resume it with that, or choose another --output"
                )


@contextlib.contextmanager
def claimed(directory: Path, settings: dict[str, Any], resume: bool) -> Iterator[None]:
    """Hold the folder of a run with these settings; UserError if it is held, or not
    that run's.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with claimed(folder, {"recipe": {"seed": 0, "keep": 2}}, False):
    ...     (folder / "run.json").exists()
    True
    >>> with claimed(folder, {"recipe": {"seed": 1, "keep": 9}}, True):
    ...     pass  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_bigs.UserError: seed: 1, but the run in ... began with 0; ...
    """
    import shutil

    from filelock import FileLock, Timeout

    try:
        check_owner(directory, resume)
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / "lock").acquire(blocking=False)
    except Timeout:
        raise bigs.UserError(
            f"output: another process is writing to {directory}; wait for it, or choose"
            " another"
        ) from None
    except OSError as error:
        raise bigs.UserError(
            f"output: {directory} cannot be written ({error.strerror}); choose another"
        ) from None
    with lock:
        if (directory / "run.json").exists():
            check_settings(directory, settings)
        for left in directory.glob(f"{bigs.PART}*"):  # by a process that was killed
            shutil.rmtree(left)
        bigs.finish_writing(directory)
        with bigs.write_whole(directory / "run.json") as part:
            part.write_text(json.dumps(settings, indent=1))
        yield


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The records of a run, whole lines only; none if it has not begun.

    >>> read_log(Path("no/such/run"))
    []
    """
    file = directory / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                record = dict(json.loads(line))
                record["step"] = int(record["step"])
            except (KeyError, TypeError, ValueError) as error:
                raise bigs.UserError(
                    f"{file}, line {number}: no record of a run ({error!r}); delete"
                    " the line"
                ) from None
            records.append(record)
    return records


class Journal:
    """The records of a run, in memory and in log.jsonl; it starts with those up to a
    step.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> journal = Journal(folder, 0)
    >>> journal.record(10, loss=2.5)
    >>> journal.record(20, loss=2.0)
    >>> Journal(folder, 10).history
    [{'step': 10, 'loss': 2.5}]
    """

    def __init__(self, directory: Path, until: int):
        self.file = directory / "log.jsonl"
        self.writes = jax.process_index() == 0
        self.history = [
            record for record in read_log(directory) if record["step"] <= until
        ]
        if self.writes:
            lines = [json.dumps(record) + "\n" for record in self.history]
            with bigs.write_whole(self.file) as part:
                part.write_text("".join(lines))

    def record(self, step: int, **values: float | int) -> None:
        self.history.append({"step": step, **values})
        if self.writes:
            with self.file.open("a") as file:
                file.write(json.dumps(self.history[-1]) + "\n")


def checkpoints(directory: Path, keep: int = 2, read_only: bool = False):
    """Orbax's manager for the states of a run; it keeps the last ones.

    >>> import tempfile
    >>> checkpoints(Path(tempfile.mkdtemp())).latest_step() is None
    True
    """
    import logging

    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, read_only=read_only)
    return ocp.CheckpointManager((directory / "checkpoints").resolve(), options=options)


@contextlib.contextmanager
def writing(manager, step: int) -> Iterator[None]:
    """While this holds, what goes wrong is a UserError: the state of this step could
    not be written, and why.
    """
    try:
        yield
    except Exception as error:
        last = manager.latest_step()
        again = (
            "begin again" if last is None else f"go on from step {last} with --resume"
        )
        raise bigs.UserError(
            f"{manager.directory}: the state of step {step} could not be written "
            f"({' '.join(str(error).split())}); make room, then {again}"
        ) from error


def save(manager, state: bigs.State, before: int) -> int:
    """Write a checkpoint under its step once the one before is whole; orbax finishes it
    in the background.

    Raises FloatingPointError for parameters that are not finite: the next loss would
    not be, either.
    """
    import orbax.checkpoint as ocp

    step = int(state.step)
    finite_mean(
        [jax.jit(optax.global_norm)(state.model)],
        step + 1,
        Path(manager.directory).parent,
    )
    with writing(manager, before):
        manager.wait_until_finished()
    with writing(manager, step):
        manager.save(step, args=ocp.args.StandardSave(state))
    return step


def restore(manager, state: bigs.State, step: int | None = None) -> bigs.State:
    """A saved state, the last if no step is given, in the places of the given one; that
    itself if none was saved.

    Raises UserError if the saved one is damaged, and says how to go on from the one
    before.
    """
    import orbax.checkpoint as ocp

    step = manager.latest_step() if step is None else step
    if step is None:
        return state
    try:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return manager.restore(step, args=ocp.args.StandardRestore(shapes))
    except Exception as error:
        raise bigs.UserError(
            f"{manager.directory / str(step)}: this checkpoint cannot be read"
            f" ({type(error).__name__}); delete that folder to go on from the one"
            " before"
        ) from error


def check_checkpoints(directory: Path) -> None:
    """UserError if a run must have had a checkpoint and has none.

    >>> check_checkpoints(Path("no/such/run"))
    """
    folder = directory / "checkpoints"
    finished = [path for path in folder.glob("*") if path.name.isdigit()]
    if finished or "run.json" not in contents(directory):
        return
    most = 0
    if folder.is_dir():
        recipe = read_settings(directory).get("recipe", {})
        most = 2 * recipe.get("save_every", 0)
    reached = max((record["step"] for record in read_log(directory)), default=0)
    if reached > most:
        found = f"log.jsonl has reached step {reached}"
    elif (directory / "config.json").exists():
        found = "the finished model is there"
    else:
        return
    raise bigs.UserError(
        f"{folder}: no checkpoint is left, but {found}; put the checkpoints back, or"
        " choose another --output to begin anew"
    )


def states_of(run: Path, every: bool = False) -> Iterator[tuple[int, bigs.BiGS]]:
    """(step, model) at the last checkpoint of a run; of every one that was kept, and
    of a fresh start, if asked.

    >>> next(states_of(Path("no/such/run")))
    Traceback (most recent call last):
    annotated_bigs.UserError: run: no/such/run holds no run, run.json is missing
    """
    config, recipe = run_settings(run)
    state = bigs.fresh_state(config, recipe)
    if every and read_settings(run)["data"].get("start") is None:
        yield 0, state.model
    with checkpoints(run, read_only=True) as manager:
        if manager.latest_step() is None:
            raise bigs.UserError(
                f"run: {run} has no checkpoint yet; they come every"
                f" {recipe.save_every} steps"
            )
        for step in sorted(manager.all_steps()) if every else [manager.latest_step()]:
            yield step, restore(manager, state, step).model


def finite_mean(losses: list[bigs.Array], step: int, directory: Path) -> float:
    """The mean of the losses up to a step, if all are finite; else FloatingPointError
    names the first that is not.

    >>> finite_mean(
    ...     [jnp.array(1.0), jnp.array(jnp.nan)], 20, Path("runs/mine")
    ... )  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FloatingPointError: the loss is not finite at step 20; runs/mine keeps ...
    """
    values = np.array(jax.device_get(losses))
    if not np.isfinite(values).all():
        bad = step - len(values) + 1 + int(np.argmin(np.isfinite(values)))
        raise FloatingPointError(
            f"the loss is not finite at step {bad}; {directory} keeps the last good"
            " state; export it, and pretrain --model from there with a smaller"
            " --learning-rate"
        )
    return float(values.mean())


def step_operations(config: bigs.Config, recipe: bigs.Recipe) -> float:
    """Floating-point operations of a training step: products forward, and twice as many
    backward. Where the last layer mixes channels at the masked positions alone, the
    others are not counted; nor is what is recomputed. (What of a device's best a run
    reaches by this count is its *model FLOPs utilization*.)

    >>> recipe = bigs.RECIPES["demonstration"]
    >>> forward = recipe.batch * bigs.operations(bigs.tiny, 128)
    >>> 3 * forward < step_operations(bigs.tiny, recipe) < 6 * forward
    True
    """
    d = config.hidden_size
    wide = config.intermediate_size
    masked = bigs.masked_of(recipe.length, recipe.masked)
    head = 2 * masked * d * (d + config.vocab_size)
    forward = bigs.operations(config, recipe.length, config.convolution) + head
    if bigs.unrolled(config.num_hidden_layers):
        left_out = recipe.length - masked
        if config.block == "stack":
            channels = d * d + 2 * d * wide
        elif config.routing == "attention":
            channels = d * d + 3 * d * wide
        else:
            channels = 2 * d * d + 3 * d * wide
        forward -= 2 * left_out * channels
    return 3 * recipe.batch * forward


@functools.cache
def product_rate(dtype: str) -> float:
    """Operations a second of all devices together in products of large square matrices,
    the best of eight.

    >>> product_rate("float32") > 1e8
    True
    """
    n = 2048 if jax.default_backend() == "cpu" else 8192
    product = jax.jit(jnp.matmul)
    a = jnp.ones((n, n), dtype)
    product(a, a).block_until_ready()
    times = []
    for _ in range(8):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) * len(jax.devices())


def train(
    config: bigs.Config,
    recipe: bigs.Recipe,
    data: bigs.Dataset,
    directory: Path,
    start: bigs.BiGS | None,
    stop: Callable[[], bool],
    loss: Callable,
) -> tuple[bigs.State, Journal]:
    """The loop of `pretrain`: from the last checkpoint, or from the start, to the last
    step or to `stop`.
    """
    from tqdm import tqdm

    possible = product_rate(config.dtype) / step_operations(config, recipe)
    with checkpoints(directory, recipe.keep) as manager:
        state = restore(manager, bigs.fresh_state(config, recipe, start))
        first = int(state.step)
        saved = first
        journal = Journal(directory, first or -1)  # without a checkpoint: anew
        if first == 0:
            heldout = bigs.evaluate(state.model, data, loss)
            journal.record(0, heldout=heldout)
        losses = []
        clock = time.perf_counter()
        bar = tqdm(
            bigs.training(state, recipe, data.train, loss),
            total=recipe.steps,
            initial=first,
            unit="step",
            mininterval=1,
            disable=not journal.writes,
        )
        for number, state, value in bar:
            losses.append(value)
            leave = stop() or manager.reached_preemption(number)
            last = number == recipe.steps
            saves = leave or last or number % recipe.save_every == 0
            if saves or number % recipe.log_every == 0:
                mean = finite_mean(losses, number, directory)
                pace = len(losses) / (time.perf_counter() - clock)  # steps a second
                speed = pace * recipe.batch * recipe.length
                share = pace / possible
                journal.record(
                    number,
                    loss=mean,
                    tokens_per_second=round(speed),
                    share=round(share, 3),
                )
                bar.set_postfix_str(
                    f"loss {mean:.3f}, {speed:,.0f} tokens/s, {share:.0%} of products"
                )
                losses = []
                clock = time.perf_counter()
            if last or number % recipe.evaluate_every == 0:
                heldout = bigs.evaluate(state.model, data, loss)
                journal.record(number, heldout=heldout)
            if saves:
                saved = save(manager, state, saved)
            if leave:
                break
        with writing(manager, saved):
            manager.wait_until_finished()
    return state, journal


def export(
    model: bigs.BiGS, directory: Path, tokenizer: Any = None, compact: bool = False
) -> None:
    """Write a model, wherever its parameters lie, in the published format, with its
    tokenizer.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> export(bigs.BiGS(bigs.Config(50, 8, 1, 24, num_ssm=4)), folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['config.json', 'flax_model.msgpack']
    """
    whole = jax.jit(lambda model: model, out_shardings=bigs.place())(model)
    if jax.process_index() == 0:
        bigs.save_pretrained(whole, directory, compact, tokenizer)


def pretrain(
    config: bigs.Config,
    recipe: bigs.Recipe,
    data: bigs.Dataset,
    directory: Path,
    resume: bool = False,
    start: bigs.BiGS | None = None,
    stop: Callable[[], bool] = lambda: False,
    loss: Callable = bigs.batch_loss,
) -> bigs.Run:
    """Pretrain into a folder: run.json, checkpoints, log.jsonl, and the finished model
    in the published format.

    Raises UserError if the folder is another's, holds anything but a run, holds a run
    that is not to be resumed or one that has lost its checkpoints, and
    FloatingPointError, naming the step, if the loss is not finite. Tested at tiny size
    in `tests/test_training.py`.
    """
    config = bigs.configured(config, recipe)
    if recipe.batch % len(jax.devices()):
        raise bigs.UserError(
            f"batch: {recipe.batch} sequences cannot be shared by {len(jax.devices())}"
            " devices evenly"
        )
    began = None if start is None else weights_of(start)
    settings = {
        "config": asdict(config),
        "recipe": asdict(recipe),
        "data": {"text": data.identity, "start": began},
    }
    if jax.process_index() == 0:
        check_checkpoints(directory)
    with (
        claimed(directory, settings, resume)
        if jax.process_index() == 0
        else contextlib.nullcontext()
    ):
        if jax.process_index() == 0 and not (directory / "tokenizer.json").exists():
            with bigs.write_folder_whole(directory) as part:
                data.tokenizer.save_pretrained(part)
        state, journal = train(config, recipe, data, directory, start, stop, loss)
        if int(state.step) == recipe.steps:
            export(state.model, directory, data.tokenizer)
    return bigs.Run(state.model, journal.history)

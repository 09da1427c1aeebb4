"""What a run survives: kills, signals, a full disk, damage, a rival, other devices,
other processes.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
import shell
import small

import annotated_bigs as bigs
from workshop import commands, running

LONG = dict(steps=60, save_every=5, log_every=5, evaluate_every=20)
SHARED = dict(batch=8, evaluate_every=5)  # rows for up to eight devices


@pytest.fixture(scope="module")
def begin():
    """Starts process.py, one process of a run; at the end it kills what still lives."""
    living = []

    def start(output, recipe, devices=1, **plan):
        plan |= {"output": str(output), "recipe": recipe}
        flags = f"--xla_force_host_platform_device_count={devices}"
        process = subprocess.Popen(
            [sys.executable, small.ROOT / "tests" / "process.py", json.dumps(plan)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ
            | {
                "PYTHONPATH": str(small.ROOT),
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
                "JAX_PLATFORMS": "cpu",
            },
        )
        living.append(process)
        return process

    yield start
    for process in living:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(*processes, status=0, seconds=180):
    found = [process.communicate(timeout=seconds) for process in processes]
    for process, (_, err) in zip(processes, found, strict=True):
        assert process.returncode == status, err[-3000:]
    return found[0]


def run_here(output, recipe, leave=None, make_step=small.make_step):
    """Begin the run or go on with it, in this process, and leave after a step if told
    to.
    """
    stops = iter(step == leave for step in range(1, 1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "product_rate", lambda dtype: 1e9)
        patch.setattr(bigs, "make_step", make_step)
        recipe = replace(small.RECIPE, **recipe)
        running.pretrain(
            small.CONFIG,
            recipe,
            small.dataset(),
            output,
            resume=True,
            stop=lambda: next(stops),
        )


def wait_for(condition, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.002)


def records(output, *kinds):
    """The log without what measures time; of the given kinds only, if any."""
    return [
        {key: record[key] for key in ("step", "loss", "heldout") if key in record}
        for record in running.read_log(output)
        if not kinds or any(kind in record for kind in kinds)
    ]


def reached(output):
    return max((record["step"] for record in running.read_log(output)), default=-1)


def last_state(output, recipe):
    empty = bigs.fresh_state(small.CONFIG, replace(small.RECIPE, **recipe))
    with running.checkpoints(output) as manager:
        return running.restore(manager, empty)


def assert_same_run(a, b, recipe, log=True):
    """Bitwise: the published parameters, and step, parameters and moments of the last
    checkpoint.
    """
    models = [(output / "flax_model.msgpack").read_bytes() for output in (a, b)]
    assert models[0] == models[1]
    states = [small.leaves(last_state(output, recipe)) for output in (a, b)]
    for one, other in zip(*states, strict=True):
        assert one.tobytes() == other.tobytes()
    if log:
        assert records(a) == records(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole")
    run_here(output, LONG)
    steps = [record["step"] for record in records(output, "loss")]
    assert steps == list(range(5, 61, 5))
    return output


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    output = tmp_path_factory.mktemp("left")
    run_here(output, LONG, leave=12)
    saved = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert saved == ["10", "12"]
    return output


@pytest.fixture
def half(left, tmp_path):
    """The same run, left at step 12."""
    return shutil.copytree(left, tmp_path / "half")


# Kills and signals


@pytest.mark.slow
def test_ten_kills_leave_no_trace(begin, whole, tmp_path):
    chance = random.Random(0)
    output = tmp_path / "killed"
    leftovers = 0

    def is_saving():
        return list(output.glob("checkpoints/*tmp*"))

    for kill in range(10):
        process = begin(output, LONG)
        if kill in (0, 4, 7):  # at start-up, from Python's to the first step
            time.sleep(chance.uniform(0.2, 3))
        else:
            wait_for(lambda goal=5 * kill: reached(output) >= goal, process)
            if kill % 2:  # while stepping
                time.sleep(chance.uniform(0, 0.2))
            else:
                wait_for(is_saving, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        leftovers += bool(is_saving())
    assert leftovers, "no kill fell into a save"
    run_here(output, LONG)
    assert_same_run(output, whole, LONG)


@pytest.mark.slow
def test_a_request_to_leave_is_followed(project):
    text = ("--corpus", "corpus.txt", "--steps", "40")
    pretrain = ("pretrain", *shell.TINY, *text)
    whole = project / "runs/whole"
    left = project / "runs/left"
    finish(shell.start(project, *pretrain, "--output", whole))
    process = shell.start(project, *pretrain, "--output", left)
    wait_for(lambda: reached(left) >= 10, process)

    process.terminate()
    asked = time.monotonic()
    out, err = finish(process, status=143)

    assert time.monotonic() - asked < 20
    assert "Traceback" not in err
    step = reached(left)
    assert 10 < step < 40
    assert f"stopped at step {step} of 40; go on with --resume" in out
    assert [path.name for path in (left / "checkpoints").iterdir()] == [str(step)]

    finish(shell.start(project, *pretrain, "--output", left, "--resume"))
    models = [(run / "flax_model.msgpack").read_bytes() for run in (whole, left)]
    assert models[0] == models[1]
    assert records(whole, "heldout") == records(left, "heldout")


@pytest.mark.slow
def test_a_folder_has_one_writer_until_it_is_killed(begin, whole, tmp_path):
    first = begin(tmp_path, LONG, hold=8)
    wait_for((tmp_path / "held").exists, first)
    files = [tmp_path / name for name in ("run.json", "log.jsonl", "tokenizer.json")]
    before = [file.read_bytes() for file in files]

    rival = f"another process is writing to {tmp_path}"
    with pytest.raises(bigs.UserError, match=rival):
        run_here(tmp_path, LONG)
    assert [file.read_bytes() for file in files] == before

    (tmp_path / "go").touch()
    wait_for(lambda: reached(tmp_path) >= 20, first)  # undisturbed
    first.kill()
    first.communicate()
    run_here(tmp_path, LONG)
    assert_same_run(tmp_path, whole, LONG)


# Settings


CHANGES = {
    "seed": {"recipe": {"seed": 1}},
    "batch": {"recipe": {"batch": 8}},
    "steps": {"recipe": {"steps": 70}},
    "hidden_size": {"config": {"hidden_size": 32}},
    "text": {"data": {"identity": "other"}},
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_run_is_resumed_as_what_it_was(tmp_path, field):
    changes = {"config": {}, "recipe": {}, "data": {}} | CHANGES[field]
    data = small.dataset()._replace(identity="one")
    settings = {
        "config": asdict(small.CONFIG),
        "recipe": asdict(small.RECIPE),
        "data": {"text": "one", "start": None},
    }
    with running.claimed(tmp_path, settings, False):
        before = (tmp_path / "run.json").read_bytes()

    with pytest.raises(bigs.UserError, match=f"^{field}: .* began with"):
        running.pretrain(
            replace(small.CONFIG, **changes["config"]),
            replace(small.RECIPE, **changes["recipe"]),
            data._replace(**changes["data"]),
            tmp_path,
            resume=True,
        )

    assert (tmp_path / "run.json").read_bytes() == before
    assert not (tmp_path / "log.jsonl").exists()


def test_a_run_without_a_checkpoint_has_no_state(tmp_path):
    settings = {
        "config": asdict(small.CONFIG),
        "recipe": asdict(small.RECIPE),
        "data": {},
    }
    with running.claimed(tmp_path, settings, False):
        (tmp_path / "checkpoints").mkdir()
    with pytest.raises(bigs.UserError, match="has no checkpoint yet"):
        next(running.states_of(tmp_path))


def test_a_run_is_resumed_from_the_model_that_it_began_with(tmp_path):
    """Also one that has no checkpoint yet."""
    first, second = (bigs.BiGS(small.CONFIG, seed=seed) for seed in (1, 2))
    settings = {
        "config": asdict(small.CONFIG),
        "recipe": asdict(small.RECIPE),
        "data": {"text": small.dataset().identity, "start": running.weights_of(first)},
    }
    with running.claimed(tmp_path, settings, False):
        pass
    for start in (second, None):
        with pytest.raises(bigs.UserError, match="^start: .* began with"):
            running.pretrain(
                small.CONFIG,
                small.RECIPE,
                small.dataset(),
                tmp_path,
                resume=True,
                start=start,
            )


def test_what_changes_no_number_may_change(whole, half):
    run_here(half, LONG | {"save_every": 20, "remat": True, "keep": 3})

    curves = [
        [(record["step"], record["heldout"]) for record in records(output, "heldout")]
        for output in (half, whole)
    ]
    np.testing.assert_allclose(*curves, rtol=1e-5)


# Checkpoints


def test_a_half_written_checkpoint_is_not_taken(whole, half):
    last = whole / "checkpoints" / "60"
    # One is whole but for its name, of the other its files are cut.
    unfinished = half / "checkpoints" / "60.orbax-checkpoint-tmp"
    cut = half / "checkpoints" / "15.orbax-checkpoint-tmp"
    shutil.copytree(last, unfinished)
    shutil.copytree(last, cut)
    for file in cut.rglob("d/*"):
        os.truncate(file, 10)

    run_here(half, LONG)

    assert_same_run(half, whole, LONG, log=False)
    # It went through all steps.
    assert records(half, "heldout") == records(whole, "heldout")
    assert not unfinished.exists()
    assert not cut.exists()


def test_a_damaged_checkpoint_is_named(whole, half):
    damaged = half / "checkpoints" / "12"
    for file in damaged.rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    message = f"{damaged}: this checkpoint cannot be read.* delete that"
    with pytest.raises(bigs.UserError, match=message):
        run_here(half, LONG)
    shutil.rmtree(damaged)
    run_here(half, LONG)
    assert_same_run(half, whole, LONG)


# At step 15 the run waits for its last checkpoint, at step 20 it does not.
@pytest.mark.slow
@pytest.mark.parametrize("steps", [15, 20])
def test_a_full_disk_keeps_the_last_checkpoint(begin, tmp_path, steps):
    recipe = LONG | {"steps": steps}

    _, err = finish(begin(tmp_path, recipe, full=14), status=1)

    assert int(last_state(tmp_path, recipe).step) == 10
    # Around the message, orbax's threads report, too.
    message = err.partition("error: ")[2].partition("\n")[0]
    for part in (str(tmp_path), "step 15 could not be written", "too large", "step 10"):
        assert part in message, err[-3000:]
    run_here(tmp_path, recipe)
    logged = [record["step"] for record in records(tmp_path, "loss")]
    assert logged == list(range(5, steps + 1, 5))


def test_a_full_disk_keeps_the_log(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 5.0}) for step in range(0, 100, 10)]
    log.write_text("\n".join(lines) + "\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(bigs.UserError, match="log.jsonl: cannot be written"):
            running.Journal(tmp_path, 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.read_text().splitlines() == lines


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for output in (file, file / "run"):
        with pytest.raises(bigs.UserError, match=f"output: {output} cannot be written"):
            running.pretrain(small.CONFIG, small.RECIPE, small.dataset(), output)
    assert file.read_text() == ""


def poisoned_after(number, make_step):
    """make_step whose step leaves NaN for parameters after the given number."""

    def make(recipe, loss):
        step = make_step(recipe, loss)

        def once(state, batch):
            state, loss = step(state, batch)
            if state.step == number:
                bad = jax.tree.map(lambda x: x * np.nan, state.model)
                state = state._replace(model=bad)
            return state, loss

        return once

    return make


@pytest.mark.parametrize(
    ("after", "save_every", "named", "kept"),
    [(6, 5, 7, 5), (5, 5, 6, 0), (4, 3, 5, 3)],
)
def test_a_loss_that_is_not_finite_is_named(tmp_path, after, save_every, named, kept):
    """Also where parameters turn into NaN after a step whose state is to be saved."""
    recipe = dict(steps=30, save_every=save_every)
    make_step = poisoned_after(after, small.make_step)

    with pytest.raises(FloatingPointError, match=f"step {named};") as raised:
        run_here(tmp_path, recipe, make_step=make_step)

    assert str(tmp_path) in str(raised.value)
    state = last_state(tmp_path, recipe)
    assert int(state.step) == kept
    assert all(np.isfinite(leaf).all() for leaf in small.leaves(state))


# Devices and processes


def together(begin, output, recipe, **plan):
    """Two processes of one run, joined at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        begin(output, recipe, distributed=f"{address},2,{index}", **plan)
        for index in (0, 1)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    run_here(output, SHARED)
    return output


def assert_same_curve(a, b):
    assert reached(a) == small.RECIPE.steps
    for x, y in zip(records(a), records(b), strict=True):
        assert list(x) == list(y)
        np.testing.assert_allclose(list(x.values()), list(y.values()), rtol=1e-5)
    models = [small.leaves(bigs.from_pretrained(output)) for output in (a, b)]
    for x, y in zip(*models, strict=True):
        difference = np.abs(x - y)  # as in test_one_device_equals_eight
        assert difference.max() < 1e-3
        assert np.median(difference) < 1e-6


@pytest.mark.slow
def test_eight_devices_that_split_the_model_train_the_same_curve(
    begin, alone, tmp_path
):
    finish(begin(tmp_path, SHARED | {"shard": True}, devices=8))
    assert_same_curve(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("one_began", [False, True])
def test_two_processes_train_the_same_curve(begin, alone, tmp_path, shard, one_began):
    if one_began:
        run_here(tmp_path, SHARED, leave=10)
    finish(*together(begin, tmp_path, SHARED | {"shard": shard}))
    assert_same_curve(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_two_processes_leave_together_if_one_is_asked(begin, tmp_path, index):
    recipe = SHARED | {"steps": 200, "save_every": 100, "evaluate_every": 100}
    pair = together(begin, tmp_path, recipe, pause=0.05)
    wait_for(lambda: reached(tmp_path) >= 10, pair[0])
    pair[index].terminate()
    out, _ = finish(*pair, seconds=60)
    step = reached(tmp_path)
    assert 10 < step < 100
    assert out.split()[-1] == str(step)
    assert int(last_state(tmp_path, recipe).step) == step


def test_an_unfinished_run_can_be_exported(half, tmp_path):
    tokenizer = bigs.train_tokenizer(["to be or not to be"] * 20, 60)
    tokenizer.save_pretrained(half)
    # A save that another process is about to finish.
    going_on = half / "checkpoints" / "15.orbax-checkpoint-tmp"
    going_on.mkdir()

    commands.command_export(half, tmp_path / "model")

    assert going_on.exists(), "exporting a run destroyed what it was writing"
    assert not (half / "flax_model.msgpack").exists()
    state = last_state(half, LONG)
    assert int(state.step) == 12
    model = bigs.from_pretrained(tmp_path / "model")
    for a, b in zip(*map(small.leaves, (model, state.model)), strict=True):
        assert np.array_equal(a, b)
    exported = bigs.load_tokenizer(str(tmp_path / "model"))
    assert exported.get_vocab() == tokenizer.get_vocab()

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
from test_commands import PRETRAIN, project  # noqa: F401, a fixture
from test_training import RECIPE, ROOT, SMALL, bigs, dataset, leaves

LONG = dict(steps=60, save_every=5, log_every=5, evaluate_every=20)
SHARED = dict(batch=8, evaluate_every=5)  # rows for up to eight devices

# One process of a run. The plan may hold it at a step until a file "go" appears, fill
# the disk before a step, or leave.
WORKER = """
import json, resource, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from test_training import RECIPE, SMALL, Path, bigs, dataset, jax, replace
plan = json.loads(sys.argv[2])
output, make, number = Path(plan["output"]), bigs.make_step, 0
jax.config.update("jax_compilation_cache_dir", plan["compiled"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
bigs.join_processes(plan.get("distributed", ""))
bigs.product_rate = lambda dtype: 1e9

def make_step(recipe):
    step = make(recipe)
    def once(state, batch):
        global number
        number = int(state.step) + 1
        while number == plan.get("hold") and not (output / "go").exists():
            (output / "held").touch()
            time.sleep(0.05)
        if number == plan.get("full"):
            while not (output / "checkpoints" / "10").exists():
                time.sleep(0.05)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        time.sleep(plan.get("pause", 0))
        return step(state, batch)
    return once

bigs.make_step = make_step
try:
    with bigs.leaving_on_request() as asked:
        stop = lambda: asked() or number == plan.get("leave")
        recipe = replace(RECIPE, **plan["recipe"])
        run = bigs.pretrain(SMALL, recipe, dataset(), output, True, stop=stop)
except bigs.UserError as error:
    sys.exit(f"error: {error}")
print("stopped at", run.history[-1]["step"])
"""


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """Starts one process of a run; what still lives at the end is killed."""
    compiled = str(tmp_path_factory.mktemp("compiled"))
    living = []

    def start(output, recipe, devices=1, **plan):
        plan |= {"output": str(output), "recipe": recipe, "compiled": compiled}
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')}"
            f" --xla_force_host_platform_device_count={devices}"
        )
        living.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(ROOT), json.dumps(plan)],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            )
        )
        return living[-1]

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


def wait_for(condition, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.002)


def records(output, *kinds):
    """The log without what measures time; of the given kinds only, if any."""
    return [
        {k: r[k] for k in ("step", "loss", "heldout") if k in r}
        for r in bigs.read_log(output)
        if not kinds or any(kind in r for kind in kinds)
    ]


def reached(output):
    return max((record["step"] for record in bigs.read_log(output)), default=-1)


def last_state(output, recipe):
    with bigs.checkpoints(output) as manager:
        return bigs.restore(manager, bigs.fresh_state(SMALL, replace(RECIPE, **recipe)))


def assert_same_run(a, b, recipe, log=True):
    """Bitwise: the published parameters, and step, parameters and moments of the last
    checkpoint.
    """
    assert (a / "flax_model.msgpack").read_bytes() == (
        b / "flax_model.msgpack"
    ).read_bytes()
    for one, other in zip(
        leaves(last_state(a, recipe)), leaves(last_state(b, recipe)), strict=True
    ):
        assert one.tobytes() == other.tobytes()
    assert not log or records(a) == records(b)


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """A run that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole")
    finish(begin(output, LONG))
    assert [r["step"] for r in records(output, "loss")] == list(range(5, 61, 5))
    return output


@pytest.fixture(scope="module")
def left(begin, tmp_path_factory):
    output = tmp_path_factory.mktemp("left")
    finish(begin(output, LONG, leave=12))
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "10",
        "12",
    ]
    return output


@pytest.fixture
def half(left, tmp_path):
    """The same run, left at step 12."""
    return shutil.copytree(left, tmp_path / "half")


@pytest.mark.slow
def test_ten_kills_leave_no_trace(begin, whole, tmp_path):
    luck = random.Random(0)
    output = tmp_path / "killed"
    leftovers = 0
    for kill in range(10):
        process = begin(output, LONG)
        if kill in (0, 4, 7):  # at start-up, from Python's to the first step
            time.sleep(luck.uniform(0.2, 3))
        else:
            wait_for(lambda goal=5 * kill: reached(output) >= goal, process)
            if kill % 2:  # while stepping
                time.sleep(luck.uniform(0, 0.2))
            else:  # while saving
                wait_for(lambda: list(output.glob("checkpoints/*tmp*")), process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        leftovers += bool(list(output.glob("checkpoints/*tmp*")))
    assert leftovers, "no kill fell into a save"
    finish(begin(output, LONG))
    assert_same_run(output, whole, LONG)


@pytest.mark.slow
def test_a_request_to_leave_is_followed(project):  # noqa: F811
    def start(output, *more):
        command = [
            sys.executable,
            "annotated_bigs.py",
            *PRETRAIN,
            "--corpus",
            "corpus.txt",
            "--steps",
            "40",
        ]
        return subprocess.Popen(
            [*command, "--output", output, *more],
            cwd=project,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )

    finish(start("runs/whole"))
    left = start("runs/left")
    wait_for(lambda: reached(project / "runs/left") >= 10, left)
    left.terminate()
    asked = time.monotonic()
    out, err = finish(left, status=143)
    assert time.monotonic() - asked < 20
    assert "Traceback" not in err
    step = reached(project / "runs/left")
    assert 10 < step < 40
    assert f"stopped at step {step} of 40; go on with --resume" in out
    assert [path.name for path in (project / "runs/left/checkpoints").iterdir()] == [
        str(step)
    ]
    finish(start("runs/left", "--resume"))
    ends = [
        (project / name / "flax_model.msgpack").read_bytes()
        for name in ("runs/whole", "runs/left")
    ]
    assert ends[0] == ends[1]
    assert records(project / "runs/whole", "heldout") == records(
        project / "runs/left", "heldout"
    )


def test_a_folder_has_one_writer_until_it_is_killed(begin, whole, tmp_path):
    first = begin(tmp_path, LONG, hold=8)
    wait_for((tmp_path / "held").exists, first)
    before = {
        name: (tmp_path / name).read_bytes()
        for name in ("run.json", "log.jsonl", "tokenizer.json")
    }
    with pytest.raises(
        bigs.UserError, match=f"another process is writing to {tmp_path}"
    ):
        bigs.pretrain(SMALL, replace(RECIPE, **LONG), dataset(), tmp_path, True)
    assert all(
        (tmp_path / name).read_bytes() == content for name, content in before.items()
    )
    (tmp_path / "go").touch()
    wait_for(lambda: reached(tmp_path) >= 20, first)  # undisturbed
    first.kill()
    first.communicate()
    finish(begin(tmp_path, LONG))
    assert_same_run(tmp_path, whole, LONG)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("seed", {"seed": 1}),
        ("batch", {"batch": 8}),
        ("steps", {"steps": 70}),
        ("hidden_size", {}),
        ("text", {}),
    ],
)
def test_a_run_is_resumed_as_what_it_was(tmp_path, field, changes):
    data = dataset()._replace(identity="one")
    settings = {
        "config": asdict(SMALL),
        "recipe": asdict(RECIPE),
        "data": {"text": "one"},
    }
    with bigs.claimed(tmp_path, settings, False):
        before = (tmp_path / "run.json").read_bytes()
    config = replace(SMALL, hidden_size=32) if field == "hidden_size" else SMALL
    other = data._replace(identity="other") if field == "text" else data
    with pytest.raises(bigs.UserError, match=f"^{field}: .* began with"):
        bigs.pretrain(config, replace(RECIPE, **changes), other, tmp_path, True)
    assert (tmp_path / "run.json").read_bytes() == before
    assert not (tmp_path / "log.jsonl").exists()


def test_what_changes_no_number_may_change(begin, whole, half):
    finish(begin(half, LONG | {"save_every": 20, "remat": True, "keep": 3}))
    curves = [
        [(r["step"], r["heldout"]) for r in records(output, "heldout")]
        for output in (half, whole)
    ]
    np.testing.assert_allclose(*curves, rtol=1e-5)


def test_a_half_written_checkpoint_is_not_taken(begin, whole, half):
    unfinished = (
        half / "checkpoints" / "60.orbax-checkpoint-tmp"
    )  # whole, but for its name
    shutil.copytree(whole / "checkpoints" / "60", unfinished)
    cut = shutil.copytree(
        whole / "checkpoints" / "60", half / "checkpoints" / "15.orbax-checkpoint-tmp"
    )
    for file in cut.rglob("d/*"):
        os.truncate(file, 10)
    finish(begin(half, LONG))
    assert_same_run(half, whole, LONG, log=False)
    assert records(half, "heldout") == records(
        whole, "heldout"
    )  # it went through all steps
    assert not unfinished.exists()
    assert not cut.exists()


def test_a_damaged_checkpoint_is_named(begin, whole, half):
    for file in (half / "checkpoints" / "12").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    _, err = finish(begin(half, LONG), status=1)
    assert (
        f"error: {half / 'checkpoints' / '12'}: this checkpoint cannot be read" in err
    )
    assert "delete that" in err
    shutil.rmtree(half / "checkpoints" / "12")
    finish(begin(half, LONG))
    assert_same_run(half, whole, LONG)


@pytest.mark.parametrize(
    "steps", [15, 20]
)  # the end of the run, where it waits for the last checkpoint; or a step
def test_a_full_disk_keeps_the_last_checkpoint(begin, tmp_path, steps):
    recipe = LONG | {"steps": steps}
    _, err = finish(begin(tmp_path, recipe, full=14), status=1)
    assert int(last_state(tmp_path, recipe).step) == 10
    message = err.partition("error: ")[2].partition("\n")[
        0
    ]  # around it, orbax's threads report, too
    assert str(tmp_path) in message and "step 15 could not be written" in message, err[
        -3000:
    ]
    assert "too large" in message
    assert "step 10" in message
    finish(begin(tmp_path, recipe))
    assert [r["step"] for r in records(tmp_path, "loss")] == list(
        range(5, steps + 1, 5)
    )


def test_a_full_disk_keeps_the_log(tmp_path):
    content = "".join(
        json.dumps({"step": step, "loss": 5.0}) + "\n" for step in range(0, 100, 10)
    )
    (tmp_path / "log.jsonl").write_text(content)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises((OSError, bigs.UserError)):
            bigs.Journal(tmp_path, 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "log.jsonl").read_text() == content


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(bigs.UserError, match=f"output: {output} cannot be written"):
            bigs.pretrain(SMALL, RECIPE, dataset(), output)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("after", "named"), [(6, "step 7;"), (5, "step 6;"), (4, "step 5;")]
)
def test_a_loss_that_is_not_finite_is_named(tmp_path, monkeypatch, after, named):
    """Parameters turn into NaN after a step, also after one whose state is saved."""
    make = bigs.make_step

    def poisoned(recipe):
        step = make(recipe)

        def once(state, batch):
            state, loss = step(state, batch)
            poison = np.nan if state.step == after else 1.0
            return (
                state._replace(model=jax.tree.map(lambda x: x * poison, state.model)),
                loss,
            )

        return once

    monkeypatch.setattr(bigs, "make_step", poisoned)
    monkeypatch.setattr(bigs, "product_rate", lambda dtype: 1e9)
    recipe = dict(steps=30, save_every=5 if after > 4 else 3)
    with pytest.raises(FloatingPointError, match=named) as raised:
        bigs.pretrain(SMALL, replace(RECIPE, **recipe), dataset(), tmp_path)
    assert str(tmp_path) in str(raised.value)
    state = last_state(tmp_path, recipe)
    assert int(state.step) == {6: 5, 5: 0, 4: 3}[after]
    assert all(np.isfinite(x).all() for x in leaves(state))


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
def alone(begin, tmp_path_factory):
    finish(begin(output := tmp_path_factory.mktemp("alone"), SHARED))
    return output


def assert_same_curve(a, b):
    assert reached(a) == RECIPE.steps
    for x, y in zip(records(a), records(b), strict=True):
        assert list(x) == list(y)
        np.testing.assert_allclose(list(x.values()), list(y.values()), rtol=1e-5)
    models = [leaves(bigs.from_pretrained(output)) for output in (a, b)]
    for x, y in zip(*models, strict=True):  # as in test_one_device_equals_eight
        assert np.abs(x - y).max() < 1e-3
        assert np.median(np.abs(x - y)) < 1e-6


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
        finish(begin(tmp_path, SHARED, leave=10))
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


def test_an_unfinished_run_can_be_exported(begin, half, tmp_path):
    (
        tokenizer := bigs.train_tokenizer(
            ["to be or not to be that is the question"] * 20, 60
        )
    ).save_pretrained(half)
    going_on = (
        half / "checkpoints" / "15.orbax-checkpoint-tmp"
    )  # a save that another process is about to finish
    going_on.mkdir()
    bigs.command_export(half, tmp_path / "model")
    assert going_on.exists(), "exporting a run destroyed what it was writing"
    model = bigs.from_pretrained(tmp_path / "model")
    state = last_state(half, LONG)
    assert int(state.step) == 12
    for a, b in zip(leaves(model), leaves(state.model), strict=True):
        assert np.array_equal(a, b)
    assert (
        bigs.load_tokenizer(str(tmp_path / "model")).get_vocab()
        == tokenizer.get_vocab()
    )
    assert not (half / "flax_model.msgpack").exists()

"""Nothing whole is ever lost: every writing operation, killed at each of its writes.

Python announces whatever it is about to do to the disk to an audit hook (`sys.audit`).
A hook that raises stops it. So a kill is tried before each opening for writing, folder,
renaming and removal, and within each file, of which a part is then written. After the
kill nothing reaches the disk any more, as in a process that is gone: no clearing up, no
other thread.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_bigs as bigs
from workshop import commands, corpora, glue, running, studies

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Killed(BaseException):
    """What nobody catches."""


class Disk:
    """Counts the writes below a folder, and lets one of them be the last."""

    def __init__(self):
        self.folder = None

    def watch(self, folder, last=None, torn=False):
        self.folder = os.path.realpath(folder)
        self.last = last
        self.torn = torn
        self.count = 0
        self.killed = False

    def __call__(self, event, args):
        if self.folder is None or not self.is_write(event, args):
            return
        if self.killed:
            raise Killed
        counted = self.is_ours(args[0]) and (event == "open" or not self.torn)
        if counted and self.count == self.last:
            self.killed = True
            if self.torn:
                self.tear(args[0], args[2])
            raise Killed
        self.count += counted

    def is_write(self, event, args):
        if event == "open":
            return isinstance(args[0], str | bytes | os.PathLike) and (
                bool(args[2] & WRITES) and self.is_below(args[0])
            )
        # Removing a folder names its files without the folder.
        return event in CHANGES and (self.is_below(args[0]) or args[-1] != -1)

    def is_below(self, path):
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder + os.sep)

    def is_ours(self, path):
        """Orbax's writes are not."""
        return f"{os.sep}checkpoints" not in os.fsdecode(path)

    def tear(self, path, flags):
        """Leave half of what would be written."""
        folder = self.folder
        self.folder = None
        mode = "ab" if flags & os.O_APPEND else "wb"
        with open(path, mode) as file:
            file.write(b'{"half of it')
        self.folder = folder


DISK = Disk()
sys.addaudithook(DISK)


@contextlib.contextmanager
def killed_at(folder, last, torn):
    """Run what follows until its write number `last`, or to the end."""
    DISK.watch(folder, last, torn)
    try:
        yield
    except BaseException:
        if not DISK.killed:
            raise
    finally:
        DISK.folder = None


def kill_everywhere(tmp_path, prepare, write, check, finished):
    """Kill a writing operation at each of its writes; the number of kills.

    After each kill the folder is checked, and writing again must succeed.
    """
    kills = 0
    for torn in (False, True):
        last = 0
        while True:
            folder = tmp_path / f"{'torn' if torn else 'before'}{last}"
            folder.mkdir()
            prepare(folder)
            with killed_at(folder, last, torn):
                write(folder)
            if not DISK.killed:
                break
            check(folder)
            write(folder)
            finished(folder)
            last += 1
        finished(folder)
        kills += last
    print(f"{kills} kills")
    return kills


def kill_between_old_and_new(tmp_path, prepare, write, state):
    """The same for what is replaced as a whole: it is the old or the new thing."""
    once = tmp_path / "once"
    once.mkdir()
    prepare(once)
    old = state(once)
    write(once)
    new = state(once)
    assert old != new
    seen = []

    def check(folder):
        found = state(folder)
        assert found in (old, new)
        seen.append(found == new)

    def finished(folder):
        assert state(folder) == new

    kills = kill_everywhere(tmp_path, prepare, write, check, finished)
    assert False in seen
    return kills


# Small things to write


PIECES = 48
CONFIG = bigs.Config(PIECES, 8, 1, 24, 16, num_ssm=4, initializer_range=0.5)
TEXT = "to [MASK] or not"


@functools.cache
def tokenizer(which):
    """Two vocabularies of one size: only the answers tell them apart."""
    text = {
        "old": "to be or not to be that is the question whether it is nobler",
        "new": "in the mind to suffer the slings and arrows or not to take arms",
    }[which]
    found = bigs.train_tokenizer([text] * 20, PIECES)
    assert len(found) == PIECES
    return found


@functools.cache
def model(which):
    return bigs.BiGS(CONFIG, seed=("old", "new").index(which))


def save(folder, which):
    bigs.save_pretrained(model(which), folder, tokenizer=tokenizer(which))


ANSWERS = {}


def answer(folder):
    """What someone gets who loads a model with its tokenizer and asks it.

    The same files are asked once.
    """
    bigs.finish_writing(folder)  # as loading does
    files = sorted(path for path in folder.iterdir() if path.is_file())
    content = tuple((file.name, file.read_bytes()) for file in files)
    if content not in ANSWERS:
        words = bigs.load_tokenizer(folder)
        found = bigs.fill_mask(bigs.from_pretrained(folder), words, TEXT)
        ANSWERS[content] = found, words.get_vocab(), words.special_tokens_map
    return ANSWERS[content]


def json_of(file):
    """What was kept, but for when."""
    found = json.loads(file.read_text())
    found.pop("measured", None)
    return found


# The hook itself


def test_writing_in_place_is_noticed(tmp_path):
    def prepare(folder):
        (folder / "file").write_text("old")

    def write(folder):
        (folder / "file").write_text("new")

    def state(folder):
        return (folder / "file").read_text()

    with pytest.raises(AssertionError):
        kill_between_old_and_new(tmp_path, prepare, write, state)


def test_two_files_in_turn_are_noticed(tmp_path):
    def write(folder, content="new"):
        for name in ("weights", "words"):
            with bigs.write_whole(folder / name) as part:
                part.write_text(content)

    def state(folder):
        return [(folder / name).read_text() for name in ("weights", "words")]

    with pytest.raises(AssertionError):
        prepare = functools.partial(write, content="old")
        kill_between_old_and_new(tmp_path, prepare, write, state)


# Operations


def test_keep_results(tmp_path):
    def prepare(folder):
        bigs.keep_results(folder / "found.json", width=1)

    def write(folder):
        bigs.keep_results(folder / "found.json", length=2)

    def state(folder):
        return json_of(folder / "found.json")

    assert kill_between_old_and_new(tmp_path, prepare, write, state) >= 4


def test_a_figure(tmp_path):
    def draw(folder, size):
        @bigs.figure(name="dot", alt="a dot", caption="A dot.")
        def dot():
            return bigs.canvas(size=(size, 1.0))[0]

        bigs.show(dot, folder)

    def state(folder):
        return (folder / "dot.png").read_bytes()

    old = functools.partial(draw, size=1.0)
    new = functools.partial(draw, size=2.0)
    assert kill_between_old_and_new(tmp_path, old, new, state) >= 4


def prepare_model(folder):
    """A model whose tokenizer comes from an earlier release, with a file more."""
    save(folder / "model", "old")
    special = json.dumps({"sep_token": "[PAD]"})
    (folder / "model" / "special_tokens_map.json").write_text(special)
    (folder / "model" / "notes.txt").write_text("mine")


def state_of_model(folder):
    assert (folder / "model" / "notes.txt").read_text() == "mine"
    return answer(folder / "model")


def test_a_model_over_another(tmp_path):
    def write(folder):
        save(folder / "model", "new")

    kills = kill_between_old_and_new(tmp_path, prepare_model, write, state_of_model)
    assert kills >= 12


def test_an_export_over_another_model(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "states_of", lambda run: iter([(3, model("new"))]))
    run = tmp_path / "run"
    tokenizer("new").save_pretrained(run)

    def write(folder):
        commands.command_export(run, folder / "model")

    kills = kill_between_old_and_new(tmp_path, prepare_model, write, state_of_model)
    assert kills >= 12
    assert answer(tmp_path / "once" / "model")[1] == tokenizer("new").get_vocab()


def test_a_model_where_there_is_none(tmp_path):
    def write(folder):
        save(folder / "model", "new")

    def state(folder):
        there = (folder / "model").exists()
        return answer(folder / "model") if there else None

    kills = kill_between_old_and_new(tmp_path, lambda folder: None, write, state)
    assert kills >= 8


def test_what_inspect_reads(tmp_path, monkeypatch):
    losses = {
        "old": {"nothing": 5.0, "all": 7.0},
        "new": {"nothing": 6.0, "all": 8.0},
    }

    def reading(network, tokenizer, text):
        return {
            "losses": losses[text],
            "shortened": {"-1": 6.0, "127": 5.0},
            "frequencies": 6.5,
        }

    monkeypatch.setattr(studies, "reading_of", reading)
    monkeypatch.setattr(bigs, "from_pretrained", lambda name, task: model(name))
    monkeypatch.setattr(bigs, "load_tokenizer", lambda name: None)
    monkeypatch.setattr(bigs, "print_reading", lambda *_: None)

    def inspect(folder, which):
        commands.command_inspect(which, heldout=(which,), output=folder / "read")

    def state(folder):
        bigs.finish_writing(folder / "read")
        kernels = np.load(folder / "read" / "kernels.npz")["pretrained"]
        return kernels.tobytes(), json_of(folder / "read" / "reading.json")

    old = functools.partial(inspect, which="old")
    new = functools.partial(inspect, which="new")
    assert kill_between_old_and_new(tmp_path, old, new, state) >= 8


def test_a_vocabulary(tmp_path, monkeypatch):
    import datasets

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The number {i} is not {i + 1}." for i in range(200)))
    found = []

    def write(folder):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        found.append(corpora.trained_vocabulary([str(text)], 60).get_vocab())

    def check(folder):
        for vocabulary in folder.glob("annotated_bigs/[!.]*"):
            assert bigs.load_tokenizer(vocabulary).get_vocab() == found[0]

    def finished(folder):
        assert len(list(folder.glob("annotated_bigs/[!.]*"))) == 1
        assert found[-1] == found[0]

    write(tmp_path / "once")
    kills = kill_everywhere(tmp_path, lambda folder: None, write, check, finished)
    assert kills >= 6


@pytest.fixture
def fine_tuned(monkeypatch):
    """Runs a task with some seeds; none is trained, the second is better."""
    splits = {"test": bigs.Texts([("to be", None)] * 3, None)}

    def tune(name, splits, start, tokenizer, tuning, variant, seed):
        which = ("old", "new")[seed]
        return {"evaluations": [0.5 + seed / 4], "seed": seed}, model(which)

    def predict(network, examples):
        first = same(network, model("new"))
        return np.eye(2)[[first, 1 - first, first]]

    monkeypatch.setattr(glue, "tune", tune)
    monkeypatch.setattr(bigs, "predict", predict)
    monkeypatch.setattr(bigs, "encode", lambda *_: None)

    def run(folder, seeds):
        given = model("old"), tokenizer("old"), bigs.Tuning()
        variants = ("pretrained",)
        output = folder / "sst2"
        records = glue.run_task("sst2", splits, *given, variants, seeds, output)
        assert [record["seed"] for record in records] == list(range(seeds))

    return run


def parts_of_task(folder):
    return {
        "model": answer(folder / "sst2"),
        "answers": (folder / "answers" / "SST-2.tsv").read_text(),
        "first": json_of(folder / "sst2" / "pretrained-0.json"),
    }


def test_records_and_answers_of_fine_tuning(tmp_path, fine_tuned):
    prepare = functools.partial(fine_tuned, seeds=1)
    write = functools.partial(fine_tuned, seeds=2)
    once = tmp_path / "once"
    prepare(once)
    old = parts_of_task(once)
    write(once)
    new = parts_of_task(once)
    assert old["model"] != new["model"]
    assert old["answers"] != new["answers"]

    def check(folder):
        found = parts_of_task(folder)
        assert all(found[name] in (old[name], new[name]) for name in found)
        second = folder / "sst2" / "pretrained-1.json"
        if second.exists():  # it is written last
            assert json_of(second)["seed"] == 1
            assert found == new

    def finished(folder):
        assert parts_of_task(folder) == new
        assert (folder / "sst2" / "pretrained-1.json").exists()

    assert kill_everywhere(tmp_path, prepare, write, check, finished) >= 20


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


# Runs


RECIPE = bigs.Recipe(
    steps=4,
    batch=4,
    length=16,
    learning_rate=1e-2,
    log_every=1,
    save_every=2,
    evaluate_every=4,
)


def dataset():
    tokens = np.random.default_rng(0).integers(5, PIECES, (40, 16))
    tokens[:, 0] = 2
    tokens[:, -1] = 3
    rows = bigs.Rows(tokens, PIECES, 4, (0, 2, 3))
    return bigs.Dataset(tokenizer("old"), rows, [bigs.batch_at(rows, 8, 9, 0)], "words")


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


class States:
    """Stands in for orbax, whose threads cannot be killed without their process.

    A state is a function of its step, so it is kept in memory, and a folder tells that
    it is there. Orbax's own writes are tried in tests/test_recovery.py.
    """

    kept = {}

    def __init__(self, directory, keep=2, read_only=False):
        self.directory = directory / "checkpoints"
        self.directory.mkdir(exist_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def latest_step(self):
        return max((int(path.name) for path in self.directory.iterdir()), default=None)

    def save(self, step, args):
        self.kept[step] = copied(args.item)
        (self.directory / str(step)).mkdir()

    def restore(self, step, args):
        return copied(self.kept[step])

    def wait_until_finished(self):
        pass

    def reached_preemption(self, step):
        return False


@pytest.fixture(scope="module")
def compiled():
    """The step and the first state of a run, which take seconds to compile."""
    return functools.cache(bigs.make_step), bigs.fresh_state(CONFIG, RECIPE)


@pytest.fixture
def pretrain(monkeypatch, compiled):
    """`pretrain` at its smallest."""
    make_step, first = compiled
    monkeypatch.setattr(bigs, "make_step", make_step)
    monkeypatch.setattr(bigs, "fresh_state", lambda *_: copied(first))
    monkeypatch.setattr(running, "checkpoints", States)
    monkeypatch.setattr(running, "product_rate", lambda dtype: 1e9)

    def run(folder, resume=True, recipe=RECIPE, **options):
        return running.pretrain(CONFIG, recipe, dataset(), folder, resume, **options)

    return run


def records(folder):
    """The log without what measures time."""
    kept = ("step", "loss", "heldout")
    log = running.read_log(folder)
    return [{name: r[name] for name in kept if name in r} for r in log]


def finished_run(folder):
    return records(folder), answer(folder)


@pytest.fixture
def undisturbed(pretrain, tmp_path):
    pretrain(tmp_path / "undisturbed")
    return finished_run(tmp_path / "undisturbed")


def check_run(folder, log, tokens):
    """What is there is whole; of the log, what the run must not lose."""
    if (folder / "run.json").exists():
        running.read_settings(folder)
    assert records(folder)[: len(log)] == log
    bigs.finish_writing(folder)
    for name, content in tokens.items():
        if (folder / name).exists():
            assert (folder / name).read_bytes() == content


def test_a_run_killed_at_each_of_its_writes(pretrain, undisturbed, tmp_path):
    words = {
        name: (tmp_path / "undisturbed" / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json")
    }

    def write(folder):
        pretrain(folder / "run")

    def check(folder):
        check_run(folder / "run", [], words)

    def finished(folder):
        assert finished_run(folder / "run") == undisturbed
        names = {path.name for path in (folder / "run").iterdir()}
        assert not [name for name in names if name.startswith(".part")]

    kills = kill_everywhere(tmp_path, lambda folder: None, write, check, finished)
    assert kills >= 40


@pytest.mark.slow
def test_a_resumed_run_killed_at_each_of_its_writes(pretrain, undisturbed, tmp_path):
    half = tmp_path / "half"
    steps = iter([False, True])
    pretrain(half, stop=lambda: next(steps))
    log = records(half)
    assert log[-1]["step"] == 2
    words = {"tokenizer.json": (half / "tokenizer.json").read_bytes()}
    words["run.json"] = (half / "run.json").read_bytes()

    def prepare(folder):
        shutil.copytree(half, folder / "run")

    def write(folder):
        pretrain(folder / "run")

    def check(folder):
        assert (folder / "run" / "tokenizer.json").exists()
        check_run(folder / "run", log, words)

    def finished(folder):
        assert finished_run(folder / "run") == undisturbed

    assert kill_everywhere(tmp_path, prepare, write, check, finished) >= 30


# What is refused


def everything(folder):
    """All files of a folder, to see that none is touched."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


FOREIGN = {
    "a finished model": lambda folder: save(folder, "new"),
    "the model that comes along": lambda folder: shutil.copytree(bigs.BOXED, folder),
    "a log": lambda folder: write_log(folder, 3),
    "a note": lambda folder: write_file(folder / "notes.txt", "mine"),
}


def write_file(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


def write_log(folder, until):
    lines = [
        json.dumps({"step": step, "loss": 5.0}) + "\n" for step in range(until + 1)
    ]
    write_file(folder / "log.jsonl", "".join(lines))


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_of_something_else_is_not_touched(pretrain, tmp_path, what, resume):
    folder = tmp_path / "here"
    FOREIGN[what](folder)
    before = everything(folder)
    with pytest.raises(bigs.UserError, match=f"output: {folder} holds .* no run.json"):
        pretrain(folder, resume)
    assert everything(folder) == before


def test_fine_tuning_does_not_touch_another_model(tmp_path):
    folder = tmp_path / "cola"
    save(folder, "new")
    before = everything(folder)
    settings = {"grid": {"batch": [16]}}
    with pytest.raises(bigs.UserError, match="but no run.json"):
        with running.claimed(folder, settings, True):
            pass
    assert everything(folder) == before


def test_a_start_that_was_killed_at_once_is_begun_again(pretrain, tmp_path):
    write_file(tmp_path / "run" / "lock", "")
    write_file(tmp_path / "run" / ".part-abc" / "run.json", "{")
    pretrain(tmp_path / "run", resume=False)
    assert (tmp_path / "run" / "config.json").exists()
    assert not list((tmp_path / "run").glob(".part*"))


@pytest.fixture
def half(pretrain, tmp_path):
    """A run that was left at step 2 of 4."""
    steps = iter([False, True])
    pretrain(tmp_path / "half", stop=lambda: next(steps))
    return tmp_path / "half"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "run.json: config lacks vocab_size; add what the run began with"),
        ("[]", "run.json: not the settings of a run"),
        ('{"config": 3}', "run.json: not the settings of a run"),
        ('{"config": {"voc', "run.json: not the settings of a run"),
        (None, "half holds checkpoints, but no run.json that tells whose it is"),
    ],
)
def test_a_run_that_does_not_tell_what_it_was_is_not_resumed(
    pretrain, half, content, message
):
    (half / "run.json").unlink()
    if content is not None:
        (half / "run.json").write_text(content)
    before = everything(half)
    with pytest.raises(bigs.UserError, match=message):
        pretrain(half, recipe=replace(RECIPE, seed=1))
    assert everything(half) == before


def test_a_seed_that_is_missing_is_not_made_up(pretrain, half):
    settings = json.loads((half / "run.json").read_text())
    del settings["recipe"]["seed"]
    (half / "run.json").write_text(json.dumps(settings))
    before = everything(half)
    with pytest.raises(bigs.UserError, match="run.json: recipe lacks seed"):
        pretrain(half, recipe=replace(RECIPE, seed=1))
    assert everything(half) == before


def test_what_changes_no_number_may_be_missing(pretrain, half, undisturbed):
    settings = json.loads((half / "run.json").read_text())
    for field in running.FREE:
        del settings["recipe"][field]
    (half / "run.json").write_text(json.dumps(settings))
    pretrain(half)
    assert finished_run(half) == undisturbed


def lose_folder(half):
    shutil.rmtree(half / "checkpoints")


def lose_states(half):
    shutil.rmtree(half / "checkpoints" / "2")
    write_log(half, 5)  # beyond the second checkpoint


def lose_all_but_the_model(half):
    lose_folder(half)
    (half / "log.jsonl").unlink()
    save(half, "new")


@pytest.mark.parametrize(
    ("lose", "found"),
    [
        (lose_folder, "log.jsonl has reached step 2"),
        (lose_states, "log.jsonl has reached step 5"),
        (lose_all_but_the_model, "the finished model is there"),
    ],
)
def test_a_run_that_lost_its_checkpoints_is_not_begun_anew(pretrain, half, lose, found):
    lose(half)
    before = everything(half)
    message = f"{half / 'checkpoints'}: no checkpoint is left, but {found}; put "
    for _ in range(2):  # nor the second time, with fewer checkpoints
        with pytest.raises(bigs.UserError, match=message):
            pretrain(half, recipe=replace(RECIPE, save_every=100))
    assert everything(half) == before


@pytest.mark.parametrize("until", [0, 1, 2, 4])
def test_a_run_killed_before_a_checkpoint_was_whole_begins_anew(
    pretrain, half, undisturbed, until
):
    """The first is finished in the background, until the second is begun at step 4."""
    shutil.rmtree(half / "checkpoints" / "2")
    write_log(half, until)
    pretrain(half)
    assert finished_run(half) == undisturbed


def test_a_tokenizer_is_not_written_again(pretrain, half):
    before = (half / "tokenizer.json").stat()
    steps = iter([True])
    pretrain(half, stop=lambda: next(steps))
    after = (half / "tokenizer.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_damaged_log_is_named(pretrain, half):
    for line in ('{"step": 1', "[]", '{"loss": 3.0}', '{"step": "x"}'):
        (half / "log.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(bigs.UserError, match="log.jsonl, line 2: no record of a"):
            pretrain(half)


# Readers, and the disk


def left_ready(tmp_path):
    """What a process leaves that is killed when no new file is moved yet."""
    folder = tmp_path / "model"
    save(folder, "old")
    save(tmp_path / "other", "new")
    (tmp_path / "other").rename(folder / bigs.INCOMING)
    return folder


def test_who_loads_a_model_gets_the_new_one(tmp_path):
    assert same(bigs.from_pretrained(left_ready(tmp_path)), model("new"))
    assert not (tmp_path / "model" / bigs.INCOMING).exists()


def test_who_loads_a_tokenizer_gets_the_new_one(tmp_path):
    found = bigs.load_tokenizer(left_ready(tmp_path))
    assert found.get_vocab() == tokenizer("new").get_vocab()


def test_a_task_starts_from_a_model_that_is_ready(tmp_path):
    save(tmp_path / "model", "new")
    (tmp_path / "mnli").mkdir()
    (tmp_path / "model").rename(tmp_path / "mnli" / bigs.INCOMING)
    found = commands.starting_point("elsewhere", None, "rte", tmp_path)
    assert found == str(tmp_path / "mnli")


def test_two_processes_may_finish_the_same_writing(tmp_path, monkeypatch):
    """Another one is faster with every file, and with the folder."""
    folder = left_ready(tmp_path)
    replace_file = Path.replace

    def replace_after_another(file, target):
        monkeypatch.setattr(Path, "replace", replace_file)
        bigs.finish_writing(folder)
        return replace_file(file, target)

    monkeypatch.setattr(Path, "replace", replace_after_another)
    bigs.finish_writing(folder)
    assert same(bigs.from_pretrained(folder), model("new"))


def test_new_files_that_cannot_be_moved_are_named(tmp_path):
    folder = left_ready(tmp_path)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    message = (
        f"{folder / bigs.INCOMING}: a killed process left new files.*move them into"
    )
    with pytest.raises(bigs.UserError, match=message):
        bigs.from_pretrained(folder)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    write_file(tmp_path / "file", "mine")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    save_here = functools.partial(bigs.save_pretrained, model("new"))

    def write_here(place):
        with bigs.write_whole(place) as part:
            part.write_text("new")

    for write, place in (
        (save_here, tmp_path / "file"),
        (save_here, tmp_path / "file" / "model"),
        (write_here, tmp_path / "folder"),
    ):
        with pytest.raises(
            bigs.UserError, match=f"{place}: cannot be written .*; make"
        ):
            write(place)
    assert everything(tmp_path) == {"file": b"mine"}
    assert (tmp_path / "folder" / "inner").exists()


@pytest.mark.parametrize("content", ["{", "[1]", "3", None])
def test_results_that_are_none_are_not_replaced(tmp_path, content):
    file = tmp_path / "found.json"
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    before = everything(tmp_path)
    with pytest.raises(bigs.UserError, match="found.json: not JSON, or no object"):
        bigs.keep_results(file, width=1)
    assert everything(tmp_path) == before


def test_what_fails_leaves_nothing(tmp_path):
    save(tmp_path / "model", "old")
    before = everything(tmp_path)
    for writing in (bigs.write_whole, bigs.write_folder_whole):
        for place in (tmp_path / "model", tmp_path / "new"):
            with pytest.raises(ZeroDivisionError), writing(place) as part:
                part.parent.joinpath("half").write_text("half")
                raise ZeroDivisionError
    assert everything(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_can_be_read_by_whom_others_can_be(tmp_path):
    """The mode is that of a file that is written in place."""
    write_file(tmp_path / "plain" / "file", "")
    bigs.keep_results(tmp_path / "model" / "found.json", width=1)
    save(tmp_path / "model", "new")
    save(tmp_path / "fresh", "new")
    for file in ("model/found.json", "model/config.json", "fresh/config.json"):
        for path in (tmp_path / file, (tmp_path / file).parent):
            plain = tmp_path / "plain"
            plain = plain / "file" if path.is_file() else plain
            assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("annotated_bigs.py", "annotated_bigs.py train --steps 3"),
        ("elsewhere/annotated_bigs.py", "annotated_bigs.py train --steps 3"),
        ("here/workshop/__main__.py", "annotated_bigs.py train --steps 3"),
        ("here/workshop/screening.py", "workshop/screening.py train --steps 3"),
        ("site-packages/pytest/__main__.py", "annotated_bigs.py"),
        ("bin/jupyter", "annotated_bigs.py"),
    ],
)
def test_circumstances_name_the_program_and_no_folder(monkeypatch, program, wanted):
    monkeypatch.setattr("sys.argv", [program, "train", "--steps", "3"])
    assert bigs.circumstances()["command"] == f"python {wanted}"

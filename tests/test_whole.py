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
import numpy as np
import pytest

import annotated_bigs as bigs

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
        """Orbax's writes are tried in tests/test_recovery.py."""
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
    """Two vocabularies of one size, so that nothing but the answers tells them apart."""
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
    monkeypatch.setattr(bigs, "states_of", lambda run: iter([(3, model("new"))]))
    run = tmp_path / "run"
    tokenizer("new").save_pretrained(run)

    def write(folder):
        bigs.command_export(run, folder / "model")

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
    losses = {"old": {"nothing": 5.0}, "new": {"nothing": 6.0}}
    monkeypatch.setattr(
        bigs, "losses_without", lambda network, tokenizer, text: losses[Path(text).name]
    )
    for which in losses:
        save(tmp_path / which, which)
    kernels = [bigs.kernels_of(model(which)) for which in ("old", "new")]
    monkeypatch.setattr(
        bigs, "kernels_of", lambda network: kernels[same(network, model("new"))]
    )
    monkeypatch.setattr(bigs, "print_reading", lambda *_: None)

    def inspect(folder, which):
        name = str(tmp_path / which)
        bigs.command_inspect(name, heldout=(which,), output=folder / "read")

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
        found.append(bigs.trained_vocabulary([str(text)], 60).get_vocab())

    def check(folder):
        for vocabulary in folder.glob("annotated_bigs/[!.]*"):
            assert bigs.load_tokenizer(vocabulary).get_vocab() == found[0]

    def finished(folder):
        assert len(list(folder.glob("annotated_bigs/[!.]*"))) == 1
        assert found[-1] == found[0]

    write(tmp_path / "once")
    kills = kill_everywhere(tmp_path, lambda folder: None, write, check, finished)
    assert kills >= 6


def test_records_and_answers_of_fine_tuning(tmp_path, monkeypatch):
    splits = {"test": bigs.Texts([("to be", None)] * 3, None)}

    def tune(name, splits, start, tokenizer, tuning, variant, seed):
        which = ("old", "new")[seed]
        return {"evaluations": [0.5 + seed / 4], "seed": seed}, model(which)

    def predict(network, examples):
        first = same(network, model("new"))
        return np.eye(2)[[first, 1 - first, first]]

    monkeypatch.setattr(bigs, "tune", tune)
    monkeypatch.setattr(bigs, "predict", predict)
    monkeypatch.setattr(bigs, "encode", lambda *_: None)

    def run(folder, seeds):
        return bigs.run_task(
            "sst2",
            splits,
            model("old"),
            tokenizer("old"),
            bigs.Tuning(),
            ("pretrained",),
            seeds,
            folder / "sst2",
        )

    def prepare(folder):
        run(folder, 1)

    def write(folder):
        assert [record["seed"] for record in run(folder, 2)] == [0, 1]

    def parts(folder):
        answers = (folder / "answers" / "SST-2.tsv").read_text()
        return {
            "model": answer(folder / "sst2"),
            "answers": answers,
            "first": json_of(folder / "sst2" / "pretrained-0.json"),
        }

    once = tmp_path / "once"
    prepare(once)
    old = parts(once)
    write(once)
    new = parts(once)
    assert old["model"] != new["model"] and old["answers"] != new["answers"]

    def check(folder):
        found = parts(folder)
        for name, part in found.items():
            assert part in (old[name], new[name]), name
        second = folder / "sst2" / "pretrained-1.json"
        if second.exists():
            assert json_of(second)["seed"] == 1
            assert found == new

    def finished(folder):
        assert parts(folder) == new
        assert (folder / "sst2" / "pretrained-1.json").exists()

    assert kill_everywhere(tmp_path, prepare, write, check, finished) >= 20


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)

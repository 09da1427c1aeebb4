"""The command line as a user meets it: every command at tiny size, and every mistake as
one line.
"""

import functools
import itertools
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from commands import PRETRAIN, run
from small import ROOT

import annotated_bigs as bigs

FILL = ("fill-mask", "a [MASK] b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*PRETRAIN, "--output", "runs/bad", "--corpus", "missing.txt"),
            "corpus: missing.txt does not exist",
        ),
        (
            (*PRETRAIN, "--output", "runs/bad", "--corpus", "empty.txt"),
            "empty.txt holds no document",
        ),
        (
            (*PRETRAIN, "--output", "runs/bad", "--corpus", "binary.txt"),
            "line 1: binary data",
        ),
        ((*PRETRAIN, "--output", "runs/bad", "--corpus", "latin.txt"), "not UTF-8"),
        (
            ("pretrain", "--output", "runs/bad", "--size", "huge"),
            "size: 'huge' does not exist; choose one of tiny",
        ),
        (
            ("pretrain", "--output", "runs/bad", "--recipe", "soup"),
            "recipe: 'soup' does not exist",
        ),
        (
            (*PRETRAIN, "--output", "runs/bad", "--steps", "0"),
            "steps: 0 is not positive",
        ),
        (
            (*FILL, "--model", "no/folder/here"),
            "no such folder, and the hub does not give it",
        ),
        ((*FILL, "--model", "halfmodel"), "flax_model.msgpack is missing"),
        ((*FILL, "--model", "data"), "config.json is missing"),
        (
            ("benchmark", "--tpu", "v99"),
            "tpu: 'v99' does not exist; choose one of v3, v4, v5e, v6e",
        ),
        (("benchmark", "--kinds", "sprint"), "kinds: 'sprint' does not exist"),
        (("benchmark", "--lengths", "0"), "must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(project, arguments, message):
    (project / "empty.txt").write_text("")
    (project / "binary.txt").write_bytes(b"\0\1\2")
    (project / "latin.txt").write_bytes("Stra\xdfe\n\n".encode("latin1") * 40)
    (project / "halfmodel").mkdir(exist_ok=True)
    shutil.copy(
        ROOT / "tests" / "golden" / "mlm" / "config.json", project / "halfmodel"
    )
    result = run(project, *arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert (
        len([line for line in result.stderr.splitlines() if line.startswith("error:")])
        == 1
    )
    assert not (project / "runs" / "bad").exists()
    assert not result.stdout


def test_unknown_command_and_help(project):
    assert run(project, "dance").returncode == 2
    for command in (
        "figures",
        "pretrain",
        "export",
        "compare",
        "inspect",
        "finetune",
        "fill-mask",
        "benchmark",
    ):
        result = run(project, command, "--help")
        assert result.returncode == 0
        assert "usage" in result.stdout


def written_commands():
    """Every command that README and document show, as arguments."""
    for name in ("README.md", "annotated_bigs.py"):
        text = (ROOT / name).read_text().replace("\n# ", "\n").replace("\\\n", " ")
        for line in re.findall(
            r"^ *(?:JAX_PLATFORMS=cpu )?python annotated_bigs\.py (.+)$",
            text,
            re.MULTILINE,
        ):
            yield tuple(shlex.split(line, comments=True))


@pytest.mark.parametrize("arguments", dict.fromkeys(written_commands()), ids=" ".join)
def test_commands_that_are_shown_exist(arguments, monkeypatch):
    """Names, options and types are right; what they do is tested elsewhere."""
    called = []

    def stub(command):
        return functools.wraps(command)(lambda *_, **__: called.append(command))

    monkeypatch.setattr(
        bigs,
        "COMMANDS",
        {name: stub(command) for name, command in bigs.COMMANDS.items()},
    )
    bigs.main(list(arguments))
    assert len(called) == 1


def test_the_box_answers_at_once(project):
    """The README's first two commands after installation and run."""
    filled = run(project, "fill-mask", "He opened the [MASK] and walked into the room.")
    assert filled.returncode == 0, filled.stderr
    assert "door" in filled.stdout
    read = run(project, "inspect")
    assert read.returncode == 0, read.stderr
    assert "strongest position" in read.stdout
    assert run(project, "fill-mask", "one of [MASK]", "--top", "0").returncode == 2


def test_figures_are_redrawn(project):
    result = run(project, "figures")
    assert result.returncode == 0, result.stderr
    drawn = {path.name for path in (project / "figures").glob("*.png")}
    assert drawn == {path.name for path in (ROOT / "figures").glob("*.png")}
    assert len(drawn) >= 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a small untrained model and its tokenizer, and one with a
    classifier.
    """
    tokenizer = bigs.train_tokenizer(
        ["to be or not to be that is the question"] * 20, 60
    )
    config = bigs.Config(len(tokenizer), 8, 1, 24, 16, num_ssm=4)
    folder = tmp_path_factory.mktemp("models")
    for name, task in (
        ("filler", "masked_lm"),
        ("classifier", "sequence_classification"),
    ):
        bigs.save_pretrained(bigs.BiGS(config, task), folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_fill_mask_prints_a_table_for_each_mask(models, capsys):
    bigs.main(
        [
            "fill-mask",
            "to [MASK] or not to [MASK]",
            "--model",
            str(models / "filler"),
            "--top",
            "4",
        ]
    )
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("[MASK]")] == [
        "[MASK] 1",
        "[MASK] 2",
    ]
    assert len(lines) == 10
    for first in (1, 6):
        shares = [
            float(line.split()[1].removesuffix("%"))
            for line in lines[first : first + 4]
        ]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) < 100
    assert "error" not in err


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("to be", (), "there is no [MASK] in it; write [MASK] where"),
        (
            "[MASK] " + "to be " * 10,
            (),
            "22 tokens|23 tokens, but this model reads at most 16; cut the text",
        ),
        ("[MASK]", ("--top", "0"), "top: 0 is not positive"),
        (
            "[MASK]",
            ("--model", "classifier"),
            "this model has no head for masked words",
        ),
        ("[MASK]", ("--model", "bare"), "tokenizer.json is missing; copy it from"),
    ],
)
def test_fill_mask_helps(models, capsys, text, options, message):
    if "bare" in options:
        shutil.copytree(
            models / "filler",
            models / "bare",
            ignore=shutil.ignore_patterns("tokenizer*"),
        )
    options = [
        str(models / word) if word in ("classifier", "bare") else word
        for word in options
    ]
    options += [] if "--model" in options else ["--model", str(models / "filler")]
    with pytest.raises(SystemExit, match="2"):
        bigs.main(["fill-mask", text, *options])
    out, err = capsys.readouterr()
    assert any(part in err for part in message.split("|"))
    assert err.startswith("error: ")
    assert not out


@pytest.mark.slow
def test_pretrain_resume_fill_mask_finetune(project):
    tiny = (
        *PRETRAIN,
        "--corpus",
        "corpus.txt",
        "--output",
        "runs/mine",
        "--steps",
        "3",
    )
    first = run(project, *tiny)
    assert first.returncode == 0, first.stderr
    assert "held-out loss" in first.stdout
    assert run(project, *tiny).returncode == 2  # the folder holds a run
    again = run(project, *tiny, "--resume")
    assert again.returncode == 0, again.stderr
    log = [
        json.loads(line)
        for line in (project / "runs/mine/log.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in log] == [0, 3, 3]
    filled = run(
        project,
        "fill-mask",
        "The sum is an [MASK] number.",
        "--model",
        "runs/mine",
        "--top",
        "3",
    )
    assert filled.returncode == 0, filled.stderr
    assert filled.stdout.count("%") == 3
    long = run(
        project, "fill-mask", "sum [MASK] " + "number " * 300, "--model", "runs/mine"
    )
    assert long.returncode == 2
    assert "reads at most 128" in long.stderr
    unmasked = run(project, "fill-mask", "The sum.", "--model", "runs/mine")
    assert unmasked.returncode == 2
    assert "no [MASK]" in unmasked.stderr


@pytest.mark.slow
def test_the_whole_document_runs_without_network(project):
    """The README's first command, after its installation."""
    result = run(project, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "everything" in result.stdout.splitlines()[-1]
    found = json.loads((project / "data" / "tiny.json").read_text())
    heldout = [record["heldout"] for record in found["history"] if "heldout" in record]
    assert heldout[0] > 8.9
    assert heldout[-1] < 6.2
    assert sorted(heldout, reverse=True) == heldout
    accuracy = {name: values[0] for name, values in found["pairs"]["accuracy"].items()}
    assert set(accuracy) == {
        "pretrained",
        "not pretrained",
        "word overlap",
        "always yes",
    }
    assert all(0.4 < value < 0.9 for value in accuracy.values())
    assert accuracy["word overlap"] > 0.6
    assert found["step"]["ratio"] < 2, (
        "a training step takes more than twice its own matrix products"
    )
    assert len(list((project / "figures").glob("*.png"))) == len(
        list((ROOT / "figures").glob("*.png"))
    )
    assert (project / "runs" / "tiny" / "flax_model.msgpack").exists()
    filled = run(project, "fill-mask", "The function [MASK] a new array.")
    assert filled.returncode == 0
    assert filled.stdout.count("%") == 10


@pytest.mark.timing
def test_a_second_run_on_the_same_text_starts_at_once(
    project, tmp_path, monkeypatch, timed
):
    """From the command to the first step: text, vocabulary and compiled programs are
    there already.
    """
    for name in list(os.environ):
        if name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT")):
            monkeypatch.delenv(name)
    texts = [document.text for document in bigs.embedded_english().train]
    with (project / "large.jsonl").open("w") as file:  # some 20 MB, no document twice
        for turn, (number, text) in itertools.product(range(8), enumerate(texts)):
            file.write(json.dumps({"text": f"{turn} {number} {text}"}) + "\n")
    command = ("pretrain", "--size", "mini", "--recipe", "demonstration")
    options = ("--corpus", "large.jsonl", "--steps", "1", "--batch", "8")

    def seconds(output):
        start = time.perf_counter()
        result = run(project, *command, *options, "--output", output)
        assert result.returncode == 0, result.stderr
        return time.perf_counter() - start

    def ratio():
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        shutil.rmtree(project / "runs" / "compiled", ignore_errors=True)
        first = seconds(folder / "first")
        second = seconds(folder / "second")
        losses = [
            bigs.read_log(folder / name)[-1]["heldout"] for name in ("first", "second")
        ]
        assert losses[0] == losses[1]
        return second / first

    timed("starting again by starting first", ratio, most=0.7, rounds=1)

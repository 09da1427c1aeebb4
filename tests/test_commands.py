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

import jax
import pytest
from shell import TINY, run
from small import ROOT

import annotated_bigs as bigs
from workshop import commands, running


@pytest.fixture
def main(project, monkeypatch):
    """A command in this process, in the folder of the project; returns its status."""
    compiled = jax.config.jax_compilation_cache_dir
    monkeypatch.chdir(project)
    monkeypatch.setattr(bigs, "RUNS", project / "runs")

    def run_here(*arguments):
        with pytest.raises(SystemExit) as left:
            commands.main(list(arguments))
        return left.value.code

    yield run_here
    jax.config.update("jax_compilation_cache_dir", compiled)


# Mistakes

BAD = ("pretrain", "--output", "runs/bad")
MISTAKES = {
    "empty.txt holds no document": (*BAD, "--corpus", "empty.txt"),
    "line 1: binary data": (*BAD, "--corpus", "binary.txt"),
    "not UTF-8": (*BAD, "--corpus", "latin.txt"),
    "size: 'huge' does not exist; choose one of tiny": (*BAD, "--size", "huge"),
    "recipe: 'soup' does not exist": (*BAD, "--recipe", "soup"),
    "precision: 'double' does not exist": (*BAD, "--precision", "double"),
    "steps: 0 is not positive": (*BAD, "--steps", "0"),
    "block: 'cube' is unknown; choose one of gated": (*BAD, "--block", "cube"),
    "there is no stack layer with routing free": (
        *BAD,
        *("--block", "stack", "--routing", "free"),
    ),
    "routing, pooler: these are given by --model": (
        *BAD,
        *("--model", "data/bigs-boxed", "--routing", "none"),
    ),
    "flax_model.msgpack is missing": ("fill-mask", "[MASK]", "--model", "halfmodel"),
    "config.json is missing": ("fill-mask", "[MASK]", "--model", "data"),
    "top: 0 is not positive": ("fill-mask", "one of [MASK]", "--top", "0"),
    "distributed: 'x' is neither auto nor": (*BAD, "--distributed", "x"),
    "seeds: 0 is not positive": ("compare", "--seeds", "0"),
    "parts: 0 is not positive": (*BAD, "--corpus", "empty.txt", "--parts", "0"),
    "length: 2 leaves no room between [CLS] and [SEP]": (*BAD, "--length", "2"),
    "heldout, parts: these need a --corpus": (*BAD, "--heldout", "README.md"),
    "latin.txt, after line 0: not UTF-8": (*BAD, "--vocabulary", "latin.txt"),
    "no/such holds no run": ("inspect", "--run", "no/such"),
    "ofatask is no run of pretrain": (
        *("export", "--run", "ofatask", "--output", "runs/bad"),
    ),
    "no run of pretrain": ("figures", "--runs", "ofatask"),
    "there is no pair in it": ("grammar", "--pairs", "empty.txt"),
    "tpu: 'v99' does not exist; choose one of v3, v4, v5e, v6e": (
        *("benchmark", "--tpu", "v99"),
    ),
    "kinds: 'sprint' does not exist": ("benchmark", "--kinds", "sprint"),
    "recipes: 'quick' does not exist": ("benchmark", "--recipes", "quick"),
    "sizes: 'huge' does not exist": ("benchmark", "--sizes", "huge"),
    "published, recipes, sizes, tpu: give one of them": (
        *("benchmark", "--published", "--sizes", "tiny"),
    ),
    "must be at least 1": ("benchmark", "--lengths", "0"),
}


def assert_one_line(project, message, out, err):
    """Nothing but an error is said, and nothing is written."""
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, err
    assert message in errors[0]
    assert "Traceback" not in err
    assert not out
    assert not (project / "runs" / "bad").exists()


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(project, main, capsys, message):
    (project / "empty.txt").write_text("")
    (project / "binary.txt").write_bytes(b"\0\1\2")
    (project / "latin.txt").write_bytes("Stra\xdfe\n\n".encode("latin1") * 40)
    (project / "halfmodel").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests/golden/mlm/config.json", project / "halfmodel")
    (project / "ofatask").mkdir(exist_ok=True)
    (project / "ofatask/run.json").write_text('{"model": {}, "data": {}}')

    status = main(*MISTAKES[message])

    assert status == 2
    assert_one_line(project, message, *capsys.readouterr())


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (
            "corpus: missing.txt does not exist",
            (*BAD, *TINY, "--corpus", "missing.txt"),
        ),
        (
            "no such folder, and the hub does not give it",
            ("fill-mask", "a [MASK] b", "--model", "no/folder/here"),
        ),
    ],
)
def test_a_mistake_ends_a_process_with_status_2(project, message, arguments):
    result = run(project, *arguments)
    assert result.returncode == 2
    assert_one_line(project, message, result.stdout, result.stderr)


def test_an_unknown_command_ends_a_process_with_status_2(project):
    assert run(project, "dance").returncode == 2


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_has_help(main, capsys, command):
    assert main(command, "--help") == 0
    assert "usage" in capsys.readouterr().out


# What is shown


def written_commands():
    """Every command that README and document show, as arguments."""
    shown = re.compile(
        r"^ *(?:JAX_PLATFORMS=cpu )?python annotated_bigs\.py (.+)$", re.MULTILINE
    )
    for name in ("README.md", "annotated_bigs.py"):
        text = (ROOT / name).read_text()
        text = text.replace("\n# ", "\n").replace("\\\n", " ")
        for line in shown.findall(text):
            yield tuple(shlex.split(line, comments=True))


@pytest.mark.parametrize("arguments", dict.fromkeys(written_commands()), ids=" ".join)
def test_commands_that_are_shown_exist(arguments, monkeypatch):
    """Names, options and types are right; what they do is tested elsewhere."""
    called = []

    def stub(command):
        return functools.wraps(command)(lambda *_, **__: called.append(command))

    stubs = {name: stub(command) for name, command in commands.COMMANDS.items()}
    monkeypatch.setattr(commands, "COMMANDS", stubs)
    commands.main(list(arguments))
    assert len(called) == 1


def printed(project, *arguments):
    """What a command prints that succeeds."""
    result = run(project, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_box_answers_at_once(project):
    """The README's first two commands after installation and run."""
    sentence = "He opened the [MASK] and walked into the room."
    assert "door" in printed(project, "fill-mask", sentence)
    assert "strongest position" in printed(project, "inspect")


@pytest.mark.slow
def test_a_new_model_may_have_another_architecture():
    asked = commands.Architecture("stack", "attention", "cls")
    config = asked.of(bigs.tiny)
    wanted = bigs.RIVALS["stacked, attention (BERT)"]
    for field in ("block", "routing", "pooler_type"):
        assert getattr(config, field) == getattr(wanted, field)
    assert config.intermediate_size == 4 * config.hidden_size
    layer = bigs.one_layer(config, bigs.nnx.Rngs(0))
    assert isinstance(layer, bigs.StackAttentionLayer)
    assert commands.Architecture().of(bigs.tiny) == bigs.tiny


def test_figures_are_redrawn(project):
    printed(project, "figures")
    drawn = {path.name for path in (project / "figures").glob("*.png")}
    assert drawn == {path.name for path in (ROOT / "figures").glob("*.png")}
    assert len(drawn) >= 8


# fill-mask


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a small untrained model and its tokenizer, and one with a
    classifier.
    """
    tokenizer = bigs.train_tokenizer(["to be or not to be"] * 20, 60)
    config = bigs.Config(len(tokenizer), 8, 1, 24, 16, num_ssm=4)
    folder = tmp_path_factory.mktemp("models")
    tasks = {"filler": "masked_lm", "classifier": "sequence_classification"}
    for name, task in tasks.items():
        bigs.save_pretrained(bigs.BiGS(config, task), folder / name)
        tokenizer.save_pretrained(folder / name)
    bigs.save_pretrained(bigs.BiGS(config), folder / "bare")
    return folder


def test_fill_mask_prints_a_table_for_each_mask(models, capsys):
    text = "to [MASK] or not to [MASK]"
    commands.main(["fill-mask", text, "--model", str(models / "filler"), "--top", "4"])
    out, err = capsys.readouterr()
    assert "error" not in err
    lines = out.splitlines()
    assert len(lines) == 10
    for number, table in enumerate((lines[:5], lines[5:]), 1):
        assert table[0] == f"[MASK] {number}"
        shares = [float(line.split()[1].removesuffix("%")) for line in table[1:]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) < 100


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        ("to be", "filler", r"there is no \[MASK\] in it; write \[MASK\] where"),
        (
            "[MASK] " + "to be " * 10,
            "filler",
            "2[23] tokens, but this model reads at most 16; cut the text",
        ),
        ("[MASK]", "classifier", "this model has no head for masked words"),
        ("[MASK]", "bare", "tokenizer.json is missing; copy it from"),
    ],
)
def test_fill_mask_helps(models, capsys, text, model, message):
    with pytest.raises(SystemExit, match="2"):
        commands.main(["fill-mask", text, "--model", str(models / model)])
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert re.search(message, err)
    assert not out


# Whole runs


@pytest.mark.slow
def test_pretrain_resume_fill_mask(project):
    tiny = ("pretrain", *TINY, "--corpus", "corpus.txt", "--steps", "3")
    output = ("--output", "runs/mine")
    assert "held-out loss" in printed(project, *tiny, *output)
    assert run(project, *tiny, *output).returncode == 2  # the folder holds a run
    printed(project, *tiny, *output, "--resume")
    log = running.read_log(project / "runs/mine")
    assert [record["step"] for record in log] == [0, 3, 3]

    model = ("--model", "runs/mine")
    text = "The sum is an [MASK] number."
    assert printed(project, "fill-mask", text, *model, "--top", "3").count("%") == 3
    long = run(project, "fill-mask", "sum [MASK] " + "number " * 300, *model)
    assert long.returncode == 2
    assert "reads at most 128" in long.stderr
    unmasked = run(project, "fill-mask", "The sum.", *model)
    assert unmasked.returncode == 2
    assert "no [MASK]" in unmasked.stderr


@pytest.fixture(scope="module")
def document_run(project):
    """What the README's first command prints, after its installation."""
    result = run(project, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def found(document_run, project):
    """The results that the document measured while it ran."""
    return json.loads((project / "runs" / "data" / "tiny.json").read_text())


@pytest.mark.slow
def test_the_whole_document_runs_without_network(document_run, project):
    assert "everything" in document_run.splitlines()[-1]
    drawn = {path.name for path in (project / "runs/figures").glob("*.png")}
    assert drawn == {path.name for path in (ROOT / "figures").glob("*.png")}
    assert (project / "runs" / "tiny" / "flax_model.msgpack").exists()
    text = "The function [MASK] a new array."
    assert printed(project, "fill-mask", text).count("%") == 10


@pytest.mark.slow
def test_the_documents_model_learns(found):
    losses = [record["heldout"] for record in found["history"] if "heldout" in record]
    assert losses[0] > 8.9
    assert losses[-1] < 4.8
    assert sorted(losses, reverse=True) == losses


@pytest.mark.slow
def test_the_documents_model_gains_by_its_pretraining(found):
    accuracy = found["order"]["accuracy"]
    assert set(accuracy) == {"pretrained", "not pretrained"}
    assert len(accuracy["pretrained"]) == len(accuracy["not pretrained"]) == 3
    assert min(accuracy["pretrained"]) > max(accuracy["not pretrained"]) + 0.1
    assert 0.4 < min(accuracy["not pretrained"])


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
            running.read_log(folder / name)[-1]["heldout"]
            for name in ("first", "second")
        ]
        assert losses[0] == losses[1]
        return second / first

    timed("starting again by starting first", ratio, most=0.7, rounds=1)

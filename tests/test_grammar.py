"""Minimal pairs: the fast scores against plain ones, and what is said of bad input."""

import gzip
import json

import jax
import numpy as np
import pytest

import annotated_bigs as bigs
from workshop import commands, grammar

TEXTS = ["to be or not to be", "or be", "not be to or"]


@pytest.fixture(scope="module")
def tokenizer():
    return bigs.train_tokenizer(["to be or not to be"] * 20, 60)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = bigs.Config(len(tokenizer), 8, 2, 24, 16, num_ssm=4, initializer_range=0.5)
    return bigs.BiGS(config, seed=1)


def line(good: str, bad: str, kind: str = "one") -> str:
    pair = {
        "UID": kind,
        "linguistics_term": f"term of {kind}",
        "sentence_good": good,
        "sentence_bad": bad,
    }
    return json.dumps(pair) + "\n"


def plain_score(model, tokenizer, text: str) -> float:
    """The score by its definition: one text, one mask, the plain encoder."""
    pieces = tokenizer(text)["input_ids"]
    total = 0.0
    for place in range(1, len(pieces) - 1):
        masked = [*pieces[:place], tokenizer.mask_token_id, *pieces[place + 1 :]]
        logits = model(np.array([masked]))[0, place]
        total += float(jax.nn.log_softmax(logits)[pieces[place]])
    return total


def test_scores_are_those_of_the_definition(model, tokenizer):
    expected = [plain_score(model, tokenizer, text) for text in TEXTS]
    found = grammar.sentence_scores(model, tokenizer, TEXTS, batch=4)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_tie_is_an_error_and_paradigms_count_alike(model, tokenizer, tmp_path):
    scores = grammar.sentence_scores(model, tokenizer, TEXTS)
    better = TEXTS[int(scores.argmax())]
    worse = TEXTS[int(scores.argmin())]
    file = tmp_path / "pairs.jsonl"
    lines = [line(better, worse), line(worse, better), line(better, better)]
    lines += [line(better, worse, "two")]
    file.write_text("".join(lines))
    found = grammar.accuracy(model, tokenizer, grammar.read_pairs(file))
    assert found["paradigms"] == {"one": 33.3, "two": 100.0}
    assert found["accuracy"] == pytest.approx(66.67)
    assert found["terms"] == {"term of one": 33.3, "term of two": 100.0}
    assert found["pairs"] == 4


@pytest.mark.parametrize("bad", ["{", "[]", "{}", json.dumps({"UID": "one"})])
def test_a_bad_line_is_named(tmp_path, bad):
    file = tmp_path / "pairs.jsonl.gz"
    with gzip.open(file, "wt") as out:
        out.write(line("a", "b") + bad + "\n")
    with pytest.raises(bigs.UserError, match=r"pairs.jsonl.gz, line 2: .*needs UID"):
        grammar.read_pairs(file)


def test_the_command(model, tokenizer, tmp_path, capsys):
    folder = tmp_path / "model"
    bigs.save_pretrained(model, folder, tokenizer=tokenizer)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(line("to be", "be be") * 4)
    result = tmp_path / "found.json"
    arguments = ["grammar", "--pairs", str(pairs), "--model", str(folder)]
    commands.main([*arguments, "--every", "2", "--json", str(result)])
    assert "all 2 pairs" in capsys.readouterr().out
    assert json.loads(result.read_text())["pairs"] == 2
    pairs.write_text(line("to be", "be be") + line("be", "be", "two"))
    named = [*arguments, "--paradigms", "two", "--json", str(result), "--name"]
    for name in ("first", "file"):
        commands.main([*named, name])
    kept = json.loads(result.read_text())
    assert kept["first"] == kept["file"]
    assert kept["first"]["paradigms"] == {"two": 0.0}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        commands.main([*named, "measured"])
    assert "name: measured is kept for the date; choose another" in (
        capsys.readouterr().err
    )
    pairs.write_text(line("to be " * 9, "be"))
    with pytest.raises(SystemExit, match="2"):
        commands.main(arguments)
    said = capsys.readouterr().err
    assert "a sentence has 20 tokens, and this model reads at most 16" in said

"""Comparisons of architectures: what a record keeps, and what is not run again."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import small

import annotated_bigs as bigs
from workshop import arms, comparison

ARMS = ("gated SSM", "no routing")
# Large weights, so that the kernels make a difference.
CONFIG = replace(
    small.CONFIG, initializer_range=0.3, num_hidden_layers=1, num_attention_heads=2
)


def plan(**changes):
    usual = comparison.Plan("small", steps=4, batch=8, rate_steps=2, most=64)
    return replace(usual, **changes)


def compare(plan, seeds, folder, data=None):
    all_of_them = arms.of_one_size(CONFIG)
    configs = {arm: all_of_them[arm] for arm in ARMS}
    record = folder / "record.jsonl"
    rows = data or small.dataset()
    return comparison.compare(
        configs, plan, rows, plan.texts(), seeds, folder / "runs", record
    )


@pytest.mark.slow
def test_what_stands_in_the_record_is_not_run_again(tmp_path, monkeypatch):
    first = compare(plan(), range(1), tmp_path)

    both = compare(plan(), range(2), tmp_path)

    assert both[:2] == first
    expected = [(arm, seed) for seed in range(2) for arm in ARMS]
    found = [(run["arm"], run["seed"]) for run in both]
    assert found == expected
    losses = {run["heldout"] for run in both}
    assert len(losses) == 4

    def no_run(*_, **__):
        pytest.fail("a finished run is not run again")

    monkeypatch.setattr(comparison.running, "pretrain", no_run)
    assert compare(plan(), range(2), tmp_path) == both


@pytest.mark.slow
def test_as_many_tokens_in_other_batches_are_another_run(tmp_path):
    first = compare(plan(), range(1), tmp_path)
    second = compare(plan(batch=4, steps=8), range(1), tmp_path)
    assert [run["tokens"] for run in first] == [run["tokens"] for run in second]
    assert [run["batch"] for run in first + second] == [8, 8, 4, 4]


@pytest.mark.slow
def test_each_arm_gets_the_best_of_its_rates(tmp_path):
    chosen = compare(plan(rates=(1e-6, 1.0)), range(1), tmp_path)

    record = comparison.read_record(tmp_path / "record.jsonl")
    tried = [run for run in record if run["seed"] == comparison.RATE_SEED]
    assert len(tried) == 4
    assert {run["tokens"] for run in tried} == {2 * 8 * 32}
    for run in chosen:
        own = [other for other in tried if other["arm"] == run["arm"]]
        best = min(own, key=lambda other: other["heldout"])
        assert run["rate"] == best["rate"]


@pytest.mark.slow
def test_runs_of_one_seed_read_the_same(tmp_path, monkeypatch):
    read = [[]]  # before the first run, and in each
    ours = bigs.batch_at
    pretrain = comparison.running.pretrain

    def spy(*arguments, **named):
        batch = ours(*arguments, **named)
        read[-1].append(batch.input_ids.tobytes())
        return batch

    def one_run(*arguments, **named):
        read.append([])
        return pretrain(*arguments, **named)

    monkeypatch.setattr(bigs, "batch_at", spy)
    monkeypatch.setattr(comparison.running, "pretrain", one_run)
    compare(plan(), range(1), tmp_path)

    _, first, second = read
    assert len(set(first)) >= 4
    assert first == second


@pytest.mark.slow
def test_an_arm_is_fine_tuned_on_the_first_examples_of_a_task(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    letters = rng.choice(list("abcd"), (96, 6))
    sentences = [(" ".join(row),) for row in letters]
    labels = rng.integers(0, 2, 96)
    texts = bigs.Texts(sentences, labels)
    splits = {"train": texts, "dev": texts}
    monkeypatch.setattr(comparison.glue, "task_texts", lambda name, data: splits)

    tokenizer = bigs.train_tokenizer(["a b c d"] * 9, 40)
    data = small.dataset()._replace(tokenizer=tokenizer)

    runs = compare(plan(task=("sst2",)), range(1), tmp_path, data)

    for run in runs:
        found = run["tasks"]["sst2"]
        assert found["examples"] == {"train": 64, "dev": 96}
        answers = np.array(found["answers"])
        assert found["score"] == pytest.approx(np.mean(answers == texts.labels))

    again = compare(plan(task=("sst2", "cola")), range(1), tmp_path, data)

    record = comparison.read_record(tmp_path / "record.jsonl")
    assert record == again
    for before, after in zip(runs, again, strict=True):
        assert after["heldout"] == before["heldout"]
        assert after["tasks"]["sst2"] == before["tasks"]["sst2"]
        assert "cola" in after["tasks"]

    fewer = compare(plan(task=("sst2",), most=32), range(1), tmp_path, data)
    for run in fewer:
        assert run["tasks"]["sst2"]["examples"] == {"train": 32, "dev": 96}


def test_a_task_without_a_training_set_is_refused(tmp_path, monkeypatch):
    texts = bigs.Texts([("a b",)], np.array([0]))
    monkeypatch.setattr(comparison.glue, "task_texts", lambda *_: {"dev": texts})
    with pytest.raises(bigs.UserError, match="no train set of qnli"):
        plan(task=("qnli",), data=tmp_path / "nowhere").texts()


@pytest.mark.parametrize("bad", ["{", "[]", json.dumps({"arm": "gated SSM"})])
def test_a_bad_line_of_a_record_is_named(tmp_path, bad):
    file = tmp_path / "record.jsonl"
    good = json.dumps({"arm": "a", "seed": 0})
    file.write_text(f"{good}\n{bad}\n")
    message = r"record.jsonl, line 2: .*delete the"
    with pytest.raises(bigs.UserError, match=message):
        comparison.read_record(file)


def test_the_kept_record_compares_like_with_like():
    runs = comparison.read_record(bigs.DATA / "gates.jsonl")
    runs += comparison.read_record(bigs.DATA / "lengths.jsonl")
    assert len({run["text"] for run in runs}) == 1
    counts = [run["parameters"] for run in runs]
    assert max(counts) / min(counts) < 1.02
    tried = [run for run in runs if run["seed"] == comparison.RATE_SEED]
    assert len({run["tokens"] for run in tried}) == 1
    best = {}
    for arm in {run["arm"] for run in tried}:
        own = [run for run in tried if run["arm"] == arm]
        assert len(own) == 4
        best[arm] = min(own, key=lambda other: other["heldout"])["rate"]
    for run in runs:
        if run in tried:
            continue
        arm = run["arm"]
        nearest = bigs.NEAREST.get(arm, arm)
        assert run["rate"] == best[nearest]


def test_every_length_has_every_architecture():
    runs = comparison.read_record(bigs.DATA / "lengths.jsonl")
    arms = {run["arm"] for run in runs}
    lengths = {run["tokens"] for run in runs}
    made = [(run["arm"], run["seed"], run["tokens"]) for run in runs]
    assert len(made) == len(set(made))
    assert set(itertools.product(arms, [0], lengths)) <= set(made)
    for _, seed, tokens in made:  # what is compared with the gated SSM
        assert ("gated SSM", seed, tokens) in made

    for arm in arms:
        tokens = [run["tokens"] for run in bigs.by_length(arm).values()]
        assert tokens == sorted(tokens)
        more = set(tokens) - lengths  # that of gates.jsonl
        assert len(more) == 1

"""The embedded English, packing, pairs."""

import time

import numpy as np
import pytest

import annotated_bigs as bigs


@pytest.fixture(scope="module")
def english():
    return bigs.embedded_english()


def test_embedded_english_is_prose(english):
    texts = [d.text for d in english.train + english.heldout]
    assert 2e6 < sum(map(len, texts)) < 6e6
    letters = np.mean([sum(c.isalpha() or c == " " for c in t) / len(t) for t in texts])
    assert letters > 0.93
    assert not any(">>>" in t or "----" in t or "Parameters:" in t for t in texts)


def test_nothing_is_on_both_sides(english):
    sides = [{d.module for d in part} for part in (english.train, english.heldout)]
    assert not sides[0] & sides[1]
    texts = [
        {d.text.lower() for d in part} for part in (english.train, english.heldout)
    ]
    assert not texts[0] & texts[1]
    share = sum(len(d.text) for d in english.heldout) / sum(
        len(d.text) for d in english.train + english.heldout
    )
    assert 0.02 < share < 0.15
    packages = {d.module.split("/")[0] for d in english.train}
    assert packages == set(bigs.PACKAGES) == set(sorted(bigs.PACKAGES))
    assert list(bigs.PACKAGES) == sorted(bigs.PACKAGES)


def test_gathering_repeats_itself(english):
    assert bigs.embedded_english.__wrapped__() == english


@pytest.mark.timing
def test_gathering_takes_at_most_twenty_seconds(timed):
    def seconds():
        start = time.perf_counter()
        bigs.embedded_english.__wrapped__()
        return time.perf_counter() - start

    timed("seconds of gathering the English", seconds, most=20)


def test_two_vocabularies_of_one_text_are_equal(english):
    texts = [d.text for d in english.train[:3000]]
    first, second = (bigs.train_tokenizer(texts, 2000).get_vocab() for _ in range(2))
    assert first == second


def test_packing_keeps_every_token():
    texts = ["one two three four"] * 50
    tokenizer = bigs.train_tokenizer(texts, 60)
    rows = bigs.pack(texts, tokenizer, 16)
    assert (rows[:, 0] == tokenizer.cls_token_id).all()
    assert (rows[:, -1] == tokenizer.sep_token_id).all()
    stream = rows[:, 1:-1].ravel()
    ids = [
        *tokenizer("one two three four", add_special_tokens=False)["input_ids"],
        tokenizer.sep_token_id,
    ]
    assert stream.tolist() == (ids * 50)[: len(stream)]
    assert len(stream) > len(ids) * 50 - 14


def test_pairs_are_balanced_and_honest(english):
    pairs = bigs.make_pairs(english.heldout, 1, 1000)
    together = [set(bigs.sentences(d.text)) for d in english.heldout]
    assert abs(np.mean([p.label for p in pairs]) - 0.5) < 0.05
    for pair in pairs[:200]:
        assert any({pair.first, pair.second} <= s for s in together) == bool(pair.label)


def test_overlap_baseline_can_be_beaten_and_beats_chance(english):
    train = bigs.make_pairs(english.train, 0, 2000)
    test = bigs.make_pairs(english.heldout, 1, 1000)
    assert 0.5 < bigs.overlap_baseline(train, test) < 0.95


def test_the_demonstrations_data(english):
    data = bigs.tiny_dataset()
    (train, test) = bigs.pair_task()
    assert data.train.vocab_size == 8192
    assert data.train.tokens.shape[1] == 128
    assert len(data.train.tokens) > 3000
    assert len(data.heldout) >= 3
    assert len(train) > 9000
    assert len(test) > 900

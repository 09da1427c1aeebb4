"""The embedded English, packing, pairs."""

import collections
import inspect
import time

import numpy as np
import pytest

import annotated_bigs as bigs


@pytest.fixture(scope="module")
def english():
    return bigs.embedded_english()


def test_embedded_english_is_prose(english):
    texts = [document.text for document in english.train + english.heldout]
    assert 2e6 < sum(map(len, texts)) < 6e6
    shares = []
    for text in texts:
        letters = sum(sign.isalpha() or sign == " " for sign in text)
        shares.append(letters / len(text))
        for remains in (">>>", "----", "Parameters:"):
            assert remains not in text
    assert np.mean(shares) > 0.93


def test_nothing_is_on_both_sides(english):
    parts = (english.train, english.heldout)
    modules = [{document.module for document in part} for part in parts]
    texts = [{document.text.lower() for document in part} for part in parts]
    assert not modules[0] & modules[1]
    assert not texts[0] & texts[1]


def test_a_small_share_is_held_out(english):
    parts = (english.train, english.heldout)
    letters = [sum(len(document.text) for document in part) for part in parts]
    assert 0.02 < letters[1] / sum(letters) < 0.15


def test_every_package_gives_text(english):
    packages = {document.module.split("/")[0] for document in english.train}
    assert packages == set(bigs.PACKAGES)
    assert list(bigs.PACKAGES) == sorted(bigs.PACKAGES)


@pytest.mark.slow
def test_gathering_repeats_itself(english):
    assert inspect.unwrap(bigs.embedded_english)() == english


@pytest.mark.timing
def test_most_of_gathering_is_parsing(timed):
    """What Python itself needs to read and parse the same files is the least."""

    def seconds(task):
        start = time.perf_counter()
        task()
        return time.perf_counter() - start

    def parse():
        for package in bigs.PACKAGES:
            collections.deque(bigs.docstrings(package), maxlen=0)

    def ratio():
        gather = inspect.unwrap(bigs.embedded_english)
        return seconds(gather) / seconds(parse)

    timed("gathering the English by parsing its files", ratio, most=2)


def test_two_vocabularies_of_one_text_are_equal(english):
    texts = [document.text for document in english.train[:3000]]
    first, second = (bigs.train_tokenizer(texts, 2000).get_vocab() for _ in range(2))
    assert first == second


def test_packing_keeps_every_token():
    text = "one two three four"
    tokenizer = bigs.train_tokenizer([text] * 50, 60)

    rows = bigs.pack([text] * 50, tokenizer, 16)

    assert np.all(rows[:, 0] == tokenizer.cls_token_id)
    assert np.all(rows[:, -1] == tokenizer.sep_token_id)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = [*ids, tokenizer.sep_token_id] * 50
    stream = rows[:, 1:-1].ravel().tolist()
    assert stream == wanted[: len(stream)]
    assert len(stream) > len(wanted) - 14


def test_half_of_the_sentences_have_two_words_exchanged(english):
    train, test = bigs.order_task()
    for part, documents in ((train, english.train), (test, english.heldout)):
        known = " ".join(document.text for document in documents)
        for (text,), label in zip(part.texts[:200], part.labels, strict=False):
            assert len(text.split()) >= 8
            if label:
                assert text in known
        assert 0.49 < part.labels.mean() < 0.51
        wrong = [text for (text,), label in zip(*part, strict=True) if not label]
        assert np.mean([text in known for text in wrong]) < 0.02  # "very very"


def test_an_exchange_moves_two_neighbours_and_no_end():
    sentence = "one two three four five six"
    rng = np.random.default_rng(0)
    found = {bigs.exchanged(sentence, rng) for _ in range(200)}
    words = sentence.split()
    wanted = {
        " ".join([*words[:k], words[k + 1], words[k], *words[k + 2 :]])
        for k in range(1, 4)
    }
    assert found == wanted


def test_the_demonstrations_data():
    data = bigs.tiny_dataset()
    train, test = bigs.order_task()
    assert data.train.vocab_size == 8192
    assert data.train.tokens.shape[1] == 128
    assert len(data.train.tokens) > 3000
    assert len(data.heldout) >= 3
    assert len(train.labels) == len(test.labels) == 1000


def test_too_little_text_for_a_row_is_named():
    tokenizer = bigs.train_tokenizer(["a b"] * 20, 30)
    with pytest.raises(bigs.UserError, match="do not fill one row of 16"):
        bigs.pack(["a b"], tokenizer, 16)

"""The embedded English, corpora from files, packing, pairs."""

import gzip
import json
import lzma

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
    texts = [{d.text.lower() for d in part} for part in (english.train, english.heldout)]
    assert not texts[0] & texts[1]
    share = sum(len(d.text) for d in english.heldout) / sum(len(d.text) for d in english.train + english.heldout)
    assert 0.02 < share < 0.15
    packages = {d.module.split("/")[0] for d in english.train}
    assert packages == set(bigs.PACKAGES) == set(sorted(bigs.PACKAGES)) and list(bigs.PACKAGES) == sorted(bigs.PACKAGES)


def test_gathering_takes_at_most_twenty_seconds_and_repeats_itself(english):
    import time
    seconds = []
    while not seconds or (seconds[-1] > 20 and len(seconds) < 3):  # machines are shared; the best of three counts
        start = time.perf_counter()
        again = bigs.embedded_english.__wrapped__()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 20
    assert again == english


def test_two_vocabularies_of_one_text_are_equal(english):
    texts = [d.text for d in english.train[:3000]]
    first, second = (bigs.train_tokenizer(texts, 2000).get_vocab() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.xz", "jsonl", "jsonl.gz"])
def test_files(tmp_path, suffix):
    texts = [f"Text number {i} is\nnot long." for i in range(40)]
    joined = "\n".join(json.dumps({"text": t}) for t in texts) if "jsonl" in suffix else "\n\n".join(texts)
    opener = {"gz": gzip.open, "xz": lzma.open}.get(suffix.split(".")[-1], open)
    with opener(tmp_path / f"a.{suffix}", "wt") as file:
        file.write(joined)
    corpus = bigs.load_corpus(str(tmp_path))
    found = [d.text.split() for d in sorted(corpus.train + corpus.heldout, key=lambda d: int(d.text.split()[2]))]
    assert found == [t.split() for t in texts]
    assert len(corpus.heldout) == 3


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", b"", "holds 0 documents"),
    ("binary.txt", b"abc\n\0\1\2", "line 2: binary"),
    ("latin.txt", "Stra\xdfe".encode("latin1"), "not UTF-8"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": ', 'line 2: not a JSON object with a field "text"'),
    ("field.jsonl", b'{"words": "a"}\n', 'line 1: not a JSON object with a field "text"'),
    ("cut.txt.gz", gzip.compress(b"text " * 99)[:-9], "cannot be read"),
    ("not.txt.gz", b"plain text", "cannot be read"),
])
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(bigs.UserError, match=message):
        bigs.load_corpus(str(tmp_path / name))


@pytest.mark.parametrize("name", ["owner/texts", "wikimedia/wikipedia:20231101.en"])
def test_a_name_on_the_hub_is_streamed(name, monkeypatch):
    texts = [f"Text number {i} is not long." for i in range(40)]
    hub = {name: [bigs.Document("m", text) for text in texts]}
    monkeypatch.setattr(bigs, "stream_documents", lambda wanted: iter(hub[wanted]))
    corpus = bigs.load_corpus(name)
    assert len(corpus.train) + len(corpus.heldout) == 40


@pytest.mark.parametrize("name", ["texts.txt", "folder/texts.txt", "no/such/folder", "/data/texts"])
def test_a_missing_file_is_no_name_on_the_hub(name):
    with pytest.raises(bigs.UserError, match="does not exist"):
        bigs.load_corpus(name)


def test_packing_keeps_every_token():
    texts = ["one two three four"] * 50
    tokenizer = bigs.train_tokenizer(texts, 60)
    rows = bigs.pack(texts, tokenizer, 16)
    assert (rows[:, 0] == tokenizer.cls_token_id).all() and (rows[:, -1] == tokenizer.sep_token_id).all()
    stream = rows[:, 1:-1].ravel()
    ids = [*tokenizer("one two three four", add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
    assert stream.tolist() == (ids * 50)[:len(stream)] and len(stream) > len(ids) * 50 - 14


def test_pairs_are_balanced_and_honest(english):
    pairs = bigs.make_pairs(english.heldout, 1, 1000)
    together = [set(bigs.sentences(d.text)) for d in english.heldout]
    assert abs(np.mean([p.label for p in pairs]) - 0.5) < 0.05
    for pair in pairs[:200]:
        assert any({pair.first, pair.second} <= s for s in together) == bool(pair.label)


def test_overlap_baseline_can_be_beaten_and_beats_chance(english):
    train, test = bigs.make_pairs(english.train, 0, 2000), bigs.make_pairs(english.heldout, 1, 1000)
    assert 0.5 < bigs.overlap_baseline(train, test) < 0.95


def test_the_demonstrations_data(english):
    data, (train, test) = bigs.tiny_dataset(), bigs.pair_task()
    assert data.train.vocab_size == 8192 and data.train.tokens.shape[1] == 128
    assert len(data.train.tokens) > 3000 and len(data.heldout) >= 3
    assert len(train) > 9000 and len(test) > 900

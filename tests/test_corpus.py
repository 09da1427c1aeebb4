"""Text of one's own: files, shards and the hub; their rows, their batches, and the
vocabulary.
"""

import gzip
import itertools
import json
import lzma
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import datasets
import h5py
import numpy as np
import pyarrow
import pytest
import transformers

import annotated_bigs as bigs
from workshop import corpora, studies

ROOT = Path(__file__).parents[1]
BERT = ROOT.parent / "shared/data/vocab/bert-base-uncased-vocab.txt"
L = 16


def zstd(data):
    with pyarrow.BufferOutputStream() as sink:
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def random_texts(count):
    """Each of twenty words of three syllables, and a number."""
    syllables = ("ba", "do", "ki", "lu", "me", "no", "ra", "si", "tu", "we")
    texts = []
    for number, words in enumerate(
        np.random.default_rng(0).choice(syllables, (count, 20, 3))
    ):
        text = " ".join(map("".join, words))
        texts.append(f"{text} {number}.")
    return texts


TEXTS = random_texts(750)
OTHERS = TEXTS[600:]
TEXTS = TEXTS[:600]
THIRDS = (TEXTS[:200], TEXTS[200:400], TEXTS[400:600])


def write(file, texts):
    """The texts in the format that the name of the file asks for; a text file breaks
    its lines.
    """
    body = "\n\n\n".join(text.replace(" ", "\n", 2) for text in texts) + "\n"
    if ".jsonl" in file.name:
        body = "".join(
            json.dumps({"text": text, "title": "x"}) + "\n" for text in texts
        )
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(COMPRESS.get(file.suffix, bytes)(body.encode()))
    return str(file)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, which `from_generator` is seen to use."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    probe = datasets.Dataset.from_generator(lambda: iter([{"x": 1}]))
    assert [
        Path(file["filename"]).is_relative_to(tmp_path / "cache")
        for file in probe.cache_files
    ] == [True]
    shutil.rmtree(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer():
    return bigs.train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tokenizer):
    """Training rows on disk."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        return corpora.prepare([write(folder / "a.txt", TEXTS)], tokenizer, 32).train


def is_held(text):
    return zlib.crc32(text.encode()) % 64 == 0


def row_list(texts, tokenizer):
    """Packing in other words: one stream, cut."""
    first = tokenizer.cls_token_id
    last = tokenizer.sep_token_id
    stream = []
    for text in texts:
        stream += [*tokenizer.encode(text, add_special_tokens=False), last]
    inside = L - 2
    rows = []
    for cut in range(0, len(stream) - inside + 1, inside):
        rows.append([first, *stream[cut : cut + inside], last])
    return rows


def restored(batch):
    """The rows of a batch as they were before they were masked."""
    ids = np.array(batch.input_ids)
    for row, positions, labels in zip(ids, batch.positions, batch.labels, strict=True):
        row[positions[labels > 0]] = labels[labels > 0]
    return ids.tolist()


def check(data, parts, tokenizer):
    """The rows of a data set are those of these texts, in order; the held-out ones in
    the order of their batch.
    """
    train = []
    held = []
    for texts in parts:
        train += row_list([text for text in texts if not is_held(text)], tokenizer)
        held += row_list([text for text in texts if is_held(text)], tokenizer)
    assert data.train.tokens[:].tolist() == train
    assert 0 < len(held) <= 64
    order = bigs.epoch_order(len(held), 0, 0)
    (batch,) = data.heldout
    assert restored(batch) == [held[number] for number in order]


def refused(message, function, *arguments):
    with pytest.raises(bigs.UserError, match=message) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "suffix", [kind + packing for kind in (".txt", ".jsonl") for packing in COMPRESS]
)
def test_a_file(tmp_path, tokenizer, suffix):
    source = write(tmp_path / f"a{suffix}", TEXTS)
    assert [d.text for d in corpora.read_documents(Path(source))] == TEXTS
    check(corpora.prepare([source], tokenizer, L), [TEXTS], tokenizer)


def test_folders_and_several_sources(tmp_path, tokenizer):
    folder = str(tmp_path / "texts")
    other = write(tmp_path / "other.txt", OTHERS)
    for name, texts in zip(["b.jsonl.xz", "c/a.txt.zst", "d.md"], THIRDS, strict=True):
        write(Path(folder, name), texts)
    Path(folder, "e.png").write_bytes(b"\0")
    Path(folder, "f.txt").touch()
    write(Path(folder, "g.txt"), ["Too short for a row"])
    for _ in range(2):
        check(
            corpora.prepare([folder, other], tokenizer, L), [*THIRDS, OTHERS], tokenizer
        )
    check(corpora.prepare([folder], tokenizer, L, parts=1), THIRDS[:1], tokenizer)
    data = corpora.prepare([folder], tokenizer, L, heldout=[other])
    rows = row_list(OTHERS, tokenizer)
    assert data.train.tokens[:].tolist() == [
        row for texts in THIRDS for row in row_list(texts, tokenizer)
    ]
    assert sum(map(restored, data.heldout), []) == [
        rows[i] for i in bigs.epoch_order(len(rows), 0, 0)[:448]
    ]


def test_blocks_and_lines_do_not_show_in_the_rows(tokenizer):
    texts = [text.replace(" ", "\n", 3) + "\n" for text in TEXTS[:50]]
    for megabytes in (1e-5, 1e-3, 1.0):
        assert np.concatenate(
            list(
                bigs.cut_rows(
                    bigs.running_tokens(texts, tokenizer, megabytes), tokenizer, L
                )
            )
        ).tolist() == row_list(texts, tokenizer)


def test_a_few_broken_lines_are_counted_and_skipped(tmp_path, capsys):
    lines = [json.dumps({"text": text}) for text in TEXTS[:300]]
    file = tmp_path / "a.jsonl"
    lines[6] = "{"
    lines[99] = '{"words": "a"}'
    lines[199] = '{"text": 3}'
    file.write_text(
        "\n".join(lines), "utf-8-sig"
    )  # the mark at its beginning is no text
    found = [d.text for d in corpora.read_documents(file)]
    assert found == [
        text for number, text in enumerate(TEXTS[:300]) if number not in (6, 99, 199)
    ]
    told = capsys.readouterr().err
    assert told.startswith(f"{file}: 3 of 300 lines")
    assert told.endswith("first is line 7\n")
    assert told.count("\n") == 1
    file.write_text("\n".join([*lines[:-1], "null"]))  # now more than one in a hundred
    refused(
        f"{file}, line 7: not a JSON object .* one of 4 ",
        list,
        corpora.read_documents(file),
    )


LONG = np.random.default_rng(0).bytes(200_000).hex("\n", 40).encode()
CUT, NOT = (
    f"after line {number}: cannot be read .* fetch it again"
    for number in (r"[1-9]\d*", 0)
)


BAD_FILES = [
    (
        "binary.txt",
        b"abc\n\0\1\2",
        "line 2: binary data, not text; give a text file",
    ),
    ("latin.txt", b"Stra\xdfe", "after line 0: not UTF-8; convert it"),
    (
        "bad.jsonl",
        b'{"text": "a"}\n{"text": ',
        'line 2: not a JSON object with a field "text".* mend',
    ),
    (
        "field.jsonl",
        b'{"words": "a"}\n',
        'line 1: not a JSON object with a field "text"',
    ),
    *(
        (f"cut.txt{suffix}", COMPRESS[suffix](LONG)[:100_000], CUT)
        for suffix in (".gz", ".xz", ".zst")
    ),
    *((f"plain.txt{suffix}", b"plain text", NOT) for suffix in (".gz", ".xz", ".zst")),
    ("damaged.txt.gz", gzip.compress(b"text")[:10] + b"\xff" * 99, NOT),
]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    BAD_FILES,
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_bad_files_are_named_and_leave_nothing(
    tmp_path, cache, tokenizer, name, content, message
):
    (tmp_path / name).write_bytes(content)
    for function, *rest in 2 * [
        (corpora.prepare, tokenizer, L),
        (corpora.trained_vocabulary, 300),
    ]:
        refused(
            f"{tmp_path / name}, {message}", function, [str(tmp_path / name)], *rest
        )
        assert not list(cache.rglob("*.arrow"))
        assert not list(cache.rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (name, "does not exist; give a text file, a folder")
            for name in (
                "texts.txt",
                "folder/texts.txt",
                "folder/texts.jsonl.gz",
                "no/such/folder",
                "/no/texts",
            )
        ),
        ("empty", "holds no file that ends in .txt, "),
        ("pictures", "holds no file that ends in .txt, "),
        ("empty.txt", "gave 0 rows of 16 .* give more text"),
        ("spaces.jsonl", "gave 0 rows of 16 .* give more text"),
    ],
)
def test_nothing_to_read(tmp_path, tokenizer, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)  # nobody asks the hub
    Path("empty").mkdir()
    for file, text in (
        ("pictures/a.png", ""),
        ("empty.txt", ""),
        ("spaces.jsonl", "\n \n"),
    ):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(text)
    for function, *rest in 2 * [
        (corpora.prepare, tokenizer, L),
        (corpora.trained_vocabulary, 300),
    ]:
        refused(f"{name} ({message}|holds no document)", function, [name], *rest)


@pytest.fixture
def reader(monkeypatch):
    """Which files are read, and what is raised after the fiftieth text of some."""
    read = corpora.read_documents
    calls = []
    ends = {}

    def reading(file):
        calls.append(file.stem)
        for number, document in enumerate(read(file)):
            if number == 50 and file.stem in ends:
                raise ends[file.stem]
            yield document

    monkeypatch.setattr(corpora, "read_documents", reading)
    return calls, ends


@pytest.mark.parametrize(
    "end",
    [KeyboardInterrupt(), SystemExit("killed"), bigs.UserError("bad"), OSError("full")],
    ids=["interrupted", "killed", "bad", "disk"],
)
def test_an_interrupted_preparation_goes_on(
    tmp_path, tokenizer, reader, monkeypatch, end
):
    files = [
        write(tmp_path / f"{name}.txt", texts)
        for name, texts in zip("abc", THIRDS, strict=True)
    ]
    calls, ends = reader
    ends["c"] = end
    with (
        monkeypatch.context() as patch,
        pytest.raises((KeyboardInterrupt, SystemExit, bigs.UserError)),
    ):
        if str(end) == "killed":  # then nobody clears up
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        corpora.prepare(files, tokenizer, L)
    ends.clear()
    for read in ("abcc", "abcc"):
        check(corpora.prepare(files, tokenizer, L), THIRDS, tokenizer)
        assert "".join(calls) == read


def test_only_what_changed_is_read_again(tmp_path, tokenizer, reader):
    files = [
        write(tmp_path / f"{name}.txt", texts)
        for name, texts in zip("abc", THIRDS, strict=True)
    ]
    identities = []
    before = os.stat(files[1])
    calls = reader[0]

    def reads(wanted, tokenizer=tokenizer, L=L):
        calls.clear()
        identities.append(corpora.prepare(files, tokenizer, L).identity)
        assert "".join(calls) == wanted

    reads("abc")
    os.utime(
        files[1], ns=(before.st_atime_ns, before.st_mtime_ns + 1000)
    )  # another time, the same size
    reads("")
    text = Path(files[1]).read_bytes()
    Path(files[1]).write_bytes(text.swapcase())
    os.utime(
        files[1], ns=(before.st_atime_ns, before.st_mtime_ns)
    )  # the old time, the same size, another text
    reads("b")
    files[1] = str(Path(files[1]).rename(tmp_path / "d.txt"))
    Path(files[1]).write_bytes(text)
    reads("")
    write(Path(files[1]), THIRDS[1] + ["One text more."])
    reads("d")
    check(
        corpora.prepare(files, tokenizer, L),
        [THIRDS[0], THIRDS[1] + ["One text more."], THIRDS[2]],
        tokenizer,
    )
    reads("adc", L=L + 1)
    reads("adc", bigs.train_tokenizer(TEXTS, 200))
    assert [identities.index(one) for one in identities] == [0, 0, 2, 0, 4, 5, 6]
    reads("")
    assert identities[-1] == identities[4]


def shard_rows(n=130, L=128, V=300):
    """Rows as the toolkit academic-budget-bert makes them: [CLS], tokens, [SEP], and
    perhaps padding; every fifth row is full.
    """
    random = np.random.default_rng(n)
    tokens = random.integers(5, V, (n, L))
    lengths = random.integers(40, 97, n).clip(0, L - 2)
    lengths[::5] = L
    tokens[:, 0] = 2
    tokens[np.arange(n), lengths - 1] = 3
    return np.where(np.arange(L) < lengths[:, None], tokens, 0), lengths


def shard_fields(n=130, L=128, P=20, V=300):
    """What that toolkit writes of such rows: up to P tokens of each are masked."""
    tokens, lengths = shard_rows(n, L, V)
    random = np.random.default_rng(n + 1)
    positions = np.sort(random.random((n, 38)).argsort(1)[:, :P] + 1)
    counts = random.integers(1, P + 1, (n, 1))
    positions[np.arange(P) >= counts] = 0
    words = np.where(positions > 0, np.take_along_axis(tokens, positions, 1), 0)
    masked = tokens.copy()
    row, place = np.nonzero(positions)
    masked[row, positions[row, place]] = random.choice([4, 7], len(row))
    return {
        "input_ids": masked.astype("i4"),
        "input_mask": (np.arange(L) < lengths[:, None]).astype("i1"),
        "segment_ids": np.zeros((n, L), "i1"),
        "masked_lm_positions": positions.astype("i4"),
        "masked_lm_ids": words.astype("i4"),
    }


def write_shard(file, fields):
    with h5py.File(file, "w") as shard:
        for name, values in fields.items():
            shard.create_dataset(
                name, data=values, dtype=values.dtype, compression="gzip"
            )
    return str(file)


def packed_by_hand(tokens, lengths, L):
    """Rows of L tokens of some rows of a shard, one token after another."""
    stream = []
    for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        stream += row[1 : length - 1]
        if length < len(row):
            stream.append(3)
    count = len(stream) // (L - 2)
    body = np.array(stream[: count * (L - 2)]).reshape(count, L - 2)
    return np.pad(body, [(0, 0), (1, 1)], constant_values=[(0, 0), (2, 3)])


@pytest.mark.parametrize("L", [128, 50])
def test_shards_are_unmasked_and_packed_again(tmp_path, tokenizer, L):
    """Of 130 and of 70 rows, 3 and 2 are held out, at the end."""
    files = [
        write_shard(tmp_path / f"{n}.hdf5", shard_fields(n, P=38)) for n in (130, 70)
    ]

    data = corpora.prepare(files, tokenizer, L)

    wanted = []
    for n, cut in ((130, 127), (70, 68)):
        tokens, lengths = shard_rows(n)
        wanted.append(packed_by_hand(tokens[:cut], lengths[:cut], L))
    assert np.array_equal(data.train.tokens[:], np.concatenate(wanted))
    own = bigs.batch_at(data.train, 8, 3, 0)
    assert np.array_equal(own.input_ids[:, [0, -1]], [[2, 3]] * 8)


def test_a_shard_may_be_held_out_for_texts(tmp_path, tokenizer):
    shard = write_shard(tmp_path / "a.h5", shard_fields())
    text = write(tmp_path / "a.txt", TEXTS)
    data = corpora.prepare([text], tokenizer, 32, [shard])
    rows = packed_by_hand(*shard_rows(), 32)
    held = [row for batch in data.heldout for row in restored(batch)]
    order = bigs.epoch_order(len(rows), 0, 0)[: len(held)]
    assert len(held) >= 64
    assert held == rows[order].tolist()


def test_a_shard_has_no_texts_to_inspect(tmp_path):
    shard = write_shard(tmp_path / "a.h5", shard_fields())
    with pytest.raises(bigs.UserError, match="heldout: .*a.h5 is of HDF5 shards"):
        studies.texts_of(str(shard))


BAD_SHARDS = [
    (lambda f: f.pop("masked_lm_ids"), "masked_lm_ids is missing"),
    (lambda f: f.pop("input_ids"), "input_ids is missing"),
    (
        lambda f: f.update(input_mask=f["input_mask"][:-1]),
        "input_mask is missing or shorter",
    ),
    (lambda f: f.update(shard_fields(V=999)), "input_ids .*99[678].* (299|300)"),
    (
        lambda f: f["masked_lm_positions"].__setitem__((3, 0), 128),
        "masked_lm_positions .*128.*",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"),
    BAD_SHARDS,
    ids=["field", "rows", "shorter", "vocabulary", "position"],
)
def test_bad_shards_are_named(tmp_path, tokenizer, change, message):
    fields = shard_fields()
    change(fields)
    for _ in range(2):
        refused(
            f"a.hdf5: {message}",
            corpora.prepare,
            [write_shard(tmp_path / "a.hdf5", fields)],
            tokenizer,
            128,
        )


def test_shards_are_no_texts(tmp_path, tokenizer):
    shard = write_shard(tmp_path / "a.hdf5", shard_fields())
    (tmp_path / "b.h5").write_bytes(b"nothing")
    refused(
        "b.h5: no HDF5 file", corpora.prepare, [str(tmp_path / "b.h5")], tokenizer, 128
    )
    refused("name it with --vocabulary", corpora.trained_vocabulary, [shard], 300)


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set in three shards: its field, the shard that fails, who
    asked, what was read.
    """
    state = {"field": "text", "failing": None, "asked": [], "read": []}

    def generate(shards):
        for shard in shards:
            state["read"].append(shard)
            for number, text in enumerate(THIRDS[shard]):
                if shard == state["failing"] and number == 100:
                    raise ConnectionError("gone\naway")
                yield {state["field"]: text}

    def load(*names, **options):
        state["asked"].append((*names, options))
        return datasets.IterableDataset.from_generator(
            generate, gen_kwargs={"shards": [0, 1, 2]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    return state


def test_the_hub_is_streamed_once(tokenizer, hub, monkeypatch):
    name = "owner/texts:20231101.en"
    check(corpora.prepare([name], tokenizer, L, parts=1), THIRDS[:1], tokenizer)
    assert hub["asked"] == [
        ("owner/texts", "20231101.en", {"split": "train", "streaming": True})
    ]
    hub["failing"] = 2
    refused("shard 2.*gone", corpora.prepare, [name], tokenizer, L)
    refused("shard 2.*gone", corpora.trained_vocabulary, [name], 300)
    hub["failing"] = None
    hub["read"][:] = hub["read"][:3]
    for _ in range(2):
        check(corpora.prepare([name], tokenizer, L), THIRDS, tokenizer)
        assert hub["read"] == [0, 1, 2, 2]  # what had arrived is not fetched again
    hub["field"] = "words"
    for function, *rest in (
        (corpora.prepare, tokenizer, L),
        (corpora.trained_vocabulary, 300),
    ):
        refused(
            'the rows of owner/others have no field "text", but words',
            function,
            ["owner/others"],
            *rest,
        )
    monkeypatch.setattr(datasets, "load_dataset", None)
    refused(
        "owner/gone is neither a file here nor .* give the path",
        corpora.prepare,
        ["owner/gone"],
        tokenizer,
        L,
    )


def test_a_batch_is_a_function_of_seed_and_step(stored):
    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))

    memory = stored._replace(tokens=stored.tokens[:])
    for seed, step, masks in itertools.product((0, 7), (0, 1, 30), (0, 2)):
        batch = bigs.batch_at(stored, 24, seed, step, masks)
        assert same(batch, bigs.batch_at(memory, 24, seed, step, masks))
        parts = [
            bigs.batch_at(stored, 24, seed, step, masks, own=slice(i, i + 6))[:3]
            for i in range(0, 24, 6)
        ]
        assert same(batch, list(map(np.concatenate, zip(*parts, strict=True))))
        assert not any(
            same(batch, bigs.batch_at(stored, 24, *other))
            for other in ((seed + 1, step), (seed, step + 1))
        )


def test_every_row_occurs_once_an_epoch(stored):
    count = len(stored.tokens)
    found = sum(
        (
            restored(bigs.batch_at(stored, 24, 0, step))
            for step in range(-(-2 * count // 24))
        ),
        [],
    )
    assert count % 24  # so a batch lies in two epochs
    assert (
        sorted(found[:count])
        == sorted(found[count : 2 * count])
        == sorted(stored.tokens[:].tolist())
    )
    assert found[:count] != found[count : 2 * count]


@pytest.mark.parametrize("masks", [0, 2])
def test_masks_take_turns(stored, masks):
    epochs = []
    for epoch in range(4):
        batch = bigs.batch_at(stored, len(stored.tokens), 0, epoch, masks)
        epochs.append(
            {
                tuple(row): (*positions, *ids)
                for row, positions, ids in zip(
                    restored(batch), batch.positions, batch.input_ids, strict=True
                )
            }
        )
    assert len(epochs[0]) == len(stored.tokens)
    for a, b in itertools.combinations(range(4), 2):
        equal = np.mean([epochs[a][row] == epochs[b][row] for row in epochs[0]])
        assert equal == 1 if masks and a % masks == b % masks else equal < 0.1


def test_random_words_are_any_words_and_special_ones_are_never_asked(stored):
    rows = stored._replace(vocab_size=60)
    original = []
    shown = []
    for step in range(40):
        batch = bigs.batch_at(rows, len(rows.tokens), 0, step)
        assert batch.labels.shape[1] == 5
        assert not np.isin(batch.labels, rows.special_ids).any()
        original.append(
            np.take_along_axis(np.array(restored(batch)), batch.positions, 1).ravel()
        )
        shown.append(np.take_along_axis(batch.input_ids, batch.positions, 1).ravel())
    original = np.concatenate(original)
    shown = np.concatenate(shown)
    assert not np.isin(original, rows.special_ids).any()
    counts = np.bincount(shown[(shown != original) & (shown != rows.mask_id)])
    expected = len(shown) * 0.1 / 60
    others = np.delete(counts, rows.mask_id)
    assert len(counts) == 60
    assert 0.5 * expected < others.min()
    assert others.max() < 1.5 * expected
    assert expected > 100


def test_a_vocabulary_is_trained_once(tmp_path, cache, monkeypatch):
    source = [write(tmp_path / "a.txt", TEXTS)]
    train = bigs.train_tokenizer
    first = corpora.trained_vocabulary(source, 300)
    assert (
        first.get_vocab()
        == train([text for text in TEXTS if not is_held(text)], 300).get_vocab()
    )
    monkeypatch.setattr(bigs, "train_tokenizer", None)
    again = corpora.trained_vocabulary(source, 300)
    assert again.get_vocab() == first.get_vocab()
    assert again(TEXTS)["input_ids"] == first(TEXTS)["input_ids"]

    def slowly(texts, size):  # while we train, another process is done
        monkeypatch.setattr(bigs, "train_tokenizer", train)
        return corpora.trained_vocabulary(source, size)

    monkeypatch.setattr(bigs, "train_tokenizer", slowly)
    assert len(corpora.trained_vocabulary(source, 250)) == 250
    assert len(list((cache / "annotated_bigs").iterdir())) == 2


def test_a_vocabulary_is_of_the_beginning_of_every_part(tmp_path):
    held = next(filter(is_held, map("ж {}".format, itertools.count())))
    for name, first, last in (("a.txt", "α", "β"), ("b.txt", "γ", "δ")):
        write(tmp_path / "texts" / name, [held, first, *TEXTS, last])
    for megabytes, parts, wanted in (
        (50.0, None, "αβγδ"),
        (0.1, None, "αγ"),
        (50.0, 1, "αβ"),
    ):
        found = corpora.trained_vocabulary(
            [str(tmp_path / "texts")], 300, megabytes, parts
        ).get_vocab()
        assert set("αβγδж") & set(found) == set(wanted)


VOCABULARY = """
import json, sys; sys.path.insert(0, sys.argv[1])
from workshop import corpora
pieces = corpora.trained_vocabulary([sys.argv[2]], 900).get_vocab()
print(json.dumps(sorted(pieces.items())))
"""


def test_two_processes_train_one_vocabulary_of_at_most_400_letters(tmp_path):
    yi = map(chr, range(0xA000, 0xA000 + 1000))
    chinese = map(chr, range(0x4E00, 0x4E00 + 2000))
    letters = [*yi, *chinese]
    words = np.random.default_rng(0).choice(letters, (300, 30, 3))
    texts = [" ".join(map("".join, text)) for text in words]
    source = write(tmp_path / "a.txt", [*TEXTS, *texts])
    runs = []
    for number in range(2):
        own = {"HF_DATASETS_CACHE": str(tmp_path / str(number)), "JAX_PLATFORMS": "cpu"}
        run = subprocess.Popen(
            [sys.executable, "-c", VOCABULARY, str(ROOT), source],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own,
        )
        runs.append(run)
    first, second = [json.loads(run.communicate()[0]) for run in runs]
    pieces = [piece.removeprefix("##") for piece, _ in first if piece[0] != "["]
    found = set("".join(pieces))
    assert first == second
    assert len(found) == 400
    assert set("badokilumenorasituwe.0123456789") < found


@pytest.mark.parametrize(
    "file",
    [
        "small",
        pytest.param(
            BERT,
            marks=pytest.mark.skipif(
                not BERT.exists(), reason="BERT's vocabulary is not beside the project"
            ),
        ),
    ],
    ids=["small", "bert"],
)
def test_a_vocabulary_from_a_file(tmp_path, file):
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz0123456789.,;!'",
        "\x85",
        "low",
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
        "##er",
        "the",
    ]  # \x85 ends no line here
    text = "\n".join(pieces) + "\n" if file == "small" else file.read_text("utf-8")
    (tmp_path / "vocab.txt").write_text(text, "utf-8")
    theirs = transformers.BertTokenizerFast.from_pretrained(
        tmp_path,
        do_lower_case=True,  # the usual, but not in transformers 5.0.0
    )
    ours = corpora.load_vocabulary(str(tmp_path / "vocab.txt"))
    assert len(ours) == len(theirs) == (len(pieces) if file == "small" else 30522)
    for text in [
        "The lower Rhine, 3.5 km wide; don't!",
        "naïve CAFÉ 北京\u200b low\tlowest",
        "[MASK] 😀 " + "x" * 101,
        *(d.text for d in bigs.docstrings("email")),
    ]:
        a, b = (t(text, "a pair", return_token_type_ids=True) for t in (ours, theirs))
        assert a["input_ids"] == b["input_ids"]
        assert a["token_type_ids"] == b["token_type_ids"]


def test_a_vocabulary_is_the_one_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("low\n##er\n[PAD]\n")
    refused(
        r"a.txt lacks \[UNK\], \[CLS\], \[SEP\], \[MASK\]; give",
        corpora.load_vocabulary,
        str(tmp_path / "a.txt"),
    )
    there = {"owner/words": "theirs", "bert-large-uncased": "BERT's"}

    def fetch(name):
        if name not in there:
            raise OSError("not there")
        return there[name]

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fetch)
    assert [corpora.load_vocabulary(name) for name in there] == list(there.values())
    refused("owner/gone", corpora.load_vocabulary, "owner/gone")


@pytest.mark.timing
def test_batches_from_disk_are_quick(tmp_path, tokenizer, timed):
    rows = corpora.prepare(
        [write(tmp_path / "a.txt", TEXTS * 20)], tokenizer, 128
    ).train
    assert len(rows.tokens) > 3000
    in_memory = rows._replace(tokens=np.asarray(rows.tokens[:]))
    steps = itertools.count()

    def seconds(source, step):
        start = time.perf_counter()
        bigs.batch_at(source, 64, 0, step)
        return time.perf_counter() - start

    def ratio():
        step = next(steps)
        return seconds(rows, step) / seconds(in_memory, step)

    timed("a batch from disk by one from memory", ratio, most=3, rounds=101)

"""Any text into rows: files, folders, data sets of the hub, and the authors' shards.

A source is a list of parts, and a part is read once: tokenized by all cores, packed,
and kept in the Arrow cache of `datasets`, under a fingerprint of the part, the
tokenizer and the row length. An interrupted preparation goes on with the first part
that is not finished, and a second run with the same text begins at once. One document
in sixty-four, by a checksum of its text, is held out, so a text that occurs twice is
never on both sides; of a shard, whose texts are already cut, the last rows are.
Held-out rows come last in their part.
"""

import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import annotated_bigs as bigs

BROKEN = 0.01  # share of broken lines that a file may have

# What a folder is searched for.
SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".hdf5", ".h5")


def open_text(file: Path, newline: str | None = None):
    """Open a text file, compressed (.gz, .xz, .zst) or not, as UTF-8; lines end as for
    `open`.
    """
    import pyarrow

    def zst(file, *_, **options):
        return io.TextIOWrapper(pyarrow.input_stream(str(file), "zstd"), **options)

    opener = {".gz": gzip.open, ".xz": lzma.open, ".zst": zst}.get(file.suffix, open)
    return opener(file, "rt", encoding="utf-8-sig", newline=newline)


def text_lines(file: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a text file, compressed or not, that end as for `open`.

    Raises UserError that says at or after which line it cannot be read, or is no text.

    >>> list(text_lines(Path("no/such.txt")))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_bigs.UserError: no/such.txt, after line 0: cannot be read (...
    """
    number = 0
    try:
        with open_text(file, newline) as text:
            for line in text:
                if "\0" in line:
                    raise bigs.UserError(
                        f"{file}, line {number + 1}: binary data, not text; give a text"
                        " file"
                    )
                number += 1
                yield line
    except UnicodeDecodeError:
        raise bigs.UserError(
            f"{file}, after line {number}: not UTF-8; convert it, e.g. with iconv"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise bigs.UserError(
            f"{file}, after line {number}: cannot be read ({error}); fetch it again"
        ) from None


def read_documents(file: Path) -> Iterator[bigs.Document]:
    """Documents of one text or JSON-lines file; a line that is no JSON object with
    "text" is named and skipped.

    Raises UserError where `text_lines` does, or too many lines are broken.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "two.txt"
    >>> _ = file.write_text("A first text,\\non two lines.\\n\\n\\nA second one.")
    >>> [document.text for document in read_documents(file)]
    ['A first text, on two lines.', 'A second one.']
    """
    lines = text_lines(file)
    is_json = ".json" in file.name
    for text in read_objects(lines, file) if is_json else read_paragraphs(lines):
        yield bigs.Document(file.name, text)


def read_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Texts that blank lines separate, each on one line.

    >>> list(read_paragraphs(["A first,", "on two.", "", "A second."]))
    ['A first, on two.', 'A second.']
    """
    for has_words, group in itertools.groupby(lines, lambda line: bool(line.strip())):
        if has_words:
            yield " ".join(line.strip() for line in group)


def read_objects(lines: Iterable[str], file: Path) -> Iterator[str]:
    """The texts of JSON lines; lines without one are named, skipped and counted.

    >>> list(read_objects(['{"text": "one"}', "", '{"text": "two"}'], Path("two.json")))
    ['one', 'two']
    """
    number = 0
    broken = []
    for number, line in enumerate(lines, 1):
        found = text_of(line)
        if found:
            yield found
        elif line.strip():
            broken.append(number)
            too_many(file, broken, max(number, 100_000))  # an end to hopeless files
    too_many(file, broken, number)
    if broken:
        print(
            f"{file}: {len(broken)} of {number} lines are no JSON object with a text"
            f" and were skipped, the first is line {broken[0]}",
            file=sys.stderr,
        )


def text_of(line: str) -> str | None:
    """The field "text" of a JSON line, or None if there is none.

    >>> text_of('{"text": "one"}'), text_of("[1]"), text_of("{")
    ('one', None, None)
    """
    try:
        text = json.loads(line)["text"]
    except (KeyError, TypeError, ValueError):
        return None
    return text if isinstance(text, str) else None


def too_many(file: Path, broken: list[int], lines: int) -> None:
    """UserError, naming the first broken line, if more than BROKEN of so many lines are
    broken.
    """
    if len(broken) > BROKEN * lines:
        raise bigs.UserError(
            f'{file}, line {broken[0]}: not a JSON object with a field "text", one of'
            f" {len(broken)} such lines; more than {BROKEN:.0%} is too many, so mend"
            " the file or leave it out"
        )


SHARD = ("input_ids", "input_mask", "masked_lm_positions", "masked_lm_ids")


def check_shard(file: Path, shard: Any) -> None:
    """UserError if an open HDF5 file lacks a field, or has too few rows of it."""
    for field in SHARD:
        if field not in shard or len(shard[field]) != len(shard["input_ids"]):
            raise bigs.UserError(
                f"{file}: {field} is missing or shorter than input_ids; make the shard"
                " again"
            )


def check_values(file: Path, field: str, values: np.ndarray, end: int) -> None:
    """UserError if values of a field are not in 0 to end - 1.

    >>> check_values(Path("a.h5"), "input_ids", np.array([7]), 5)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_bigs.UserError: a.h5: input_ids holds 7 to 7, not 0 to 4; name the ...
    """
    if values.min() < 0 or values.max() >= end:
        raise bigs.UserError(
            f"{file}: {field} holds {values.min()} to {values.max()}, not 0 to"
            f" {end - 1}; name the vocabulary it was made with, or make the shard again"
        )


def read_shard(file: Path, tokenizer, split: bool) -> Iterator[tuple[bool, np.ndarray]]:
    """(held out, running tokens) of an HDF5 shard, many rows at a time: masks are
    undone, [CLS] and the [SEP] that closes a full row are left out. If it is to be
    split, one row in sixty-four is held out, at the end.

    Raises UserError if a field is missing or does not fit the vocabulary.
    """
    import h5py

    pieces = len(tokenizer)
    try:
        with h5py.File(file) as shard:
            check_shard(file, shard)
            rows, L = shard["input_ids"].shape
            train = rows - (-(-rows // 64) if split else 0)
            for first, end in itertools.pairwise([*range(0, train, 4096), train, rows]):
                ids, mask, positions, words = (
                    shard[field][first:end].astype(np.int32) for field in SHARD
                )
                if first == end:
                    continue
                check_values(file, "input_ids", ids, pieces)
                check_values(file, "masked_lm_positions", positions, L)
                check_values(file, "masked_lm_ids", words, pieces)
                row, place = np.nonzero(words)
                ids[row, positions[row, place]] = words[row, place]
                lengths = (mask > 0).sum(1)
                ends = np.where(lengths == L, L - 1, lengths)
                inside = np.arange(L) < ends[:, None]
                yield first >= train, ids[inside & (ids != tokenizer.cls_token_id)]
    except OSError as error:
        raise bigs.UserError(
            f"{file}: no HDF5 file that can be read ({error})"
        ) from None


class Part(NamedTuple):
    """A part of a corpus: its name, what changes when it changes, how to read it."""

    name: str
    identity: str
    read: Callable[[], Iterator[bigs.Document]]
    is_shard: bool = False


def parts_of(source: str) -> list[Part]:
    """The parts of a file, a folder, or a data set of the hub, "owner/name" or
    "owner/name:configuration".

    >>> parts_of("no/such/file.txt")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_bigs.UserError: corpus: no/such/file.txt does not exist; give ...
    """
    path = Path(source)
    if not path.exists():
        if (
            source.count("/") != 1
            or path.with_suffix("").suffix
            or path.suffix in SUFFIXES
        ):
            raise bigs.UserError(
                f"corpus: {source} does not exist; give a text file, a folder, or a"
                " name on the hub"
            )
        return streamed_parts(source)
    files = [path]
    if path.is_dir():
        files = sorted(
            f
            for f in path.rglob("*")
            if f.is_file() and set(f.suffixes[-2:]) & set(SUFFIXES)
        )
        if not files:
            raise bigs.UserError(
                f"corpus: {source} holds no file that ends in {', '.join(SUFFIXES)},"
                " compressed or not"
            )

    def part(file):
        is_shard = file.suffix in (".hdf5", ".h5")
        with open(file, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        identity = " ".join([content, *(s for s in file.suffixes if s in SUFFIXES)])
        return Part(
            str(file),
            identity,
            functools.partial(read_shard if is_shard else read_documents, file),
            is_shard,
        )

    return [part(file) for file in files]


def streamed_parts(name: str) -> list[Part]:
    """The shards of a data set of the hub; documents arrive while they are read.

    >>> streamed_parts("no/such")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_bigs.UserError: corpus: no/such is neither a file here nor ...
    """
    import datasets

    owner, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(
            owner, configuration or None, split="train", streaming=True
        )
    except Exception as error:
        raise bigs.UserError(
            f"corpus: {name} is neither a file here nor a data set that can be reached "
            f"({type(error).__name__}); give the path of a text file or folder"
        ) from None

    def read(number):
        try:
            for row in rows.shard(rows.num_shards, number):
                if not isinstance(row.get("text"), str):
                    raise bigs.UserError(
                        f'corpus: the rows of {name} have no field "text", but'
                        f" {', '.join(row)}"
                    )
                yield bigs.Document(f"{name}/{number}", row["text"])
        except bigs.UserError:
            raise
        except Exception as error:  # whatever the network does
            raise bigs.UserError(
                f"corpus: {name}, shard {number}: reading broke off"
                f" ({type(error).__name__}: {' '.join(str(error).split())}); start"
                " again, finished shards are kept"
            ) from None

    return [
        Part(
            f"{name}, shard {number}",
            f"{name} {number} of {rows.num_shards}",
            functools.partial(read, number),
        )
        for number in range(rows.num_shards)
    ]


def held_out(text: str) -> bool:
    """One text in sixty-four, by checksum.

    >>> sum(held_out(f"text {i}") for i in range(6400)) in range(60, 140)
    True
    """
    return zlib.crc32(text.encode()) % 64 == 0


def text_tokens(
    part: Part, tokenizer, split: bool
) -> Iterator[tuple[bool, np.ndarray]]:
    """(held out, running tokens) of a part of texts, many texts at a time; those to be
    held out come last.
    """
    later = []

    def train():
        for document in part.read():
            if split and held_out(document.text):
                later.append(document.text)
            else:
                yield document.text

    for heldout, texts in ((False, train()), (True, later)):
        for block in bigs.running_tokens(texts, tokenizer):
            yield heldout, block


def rows_of(part: Part, tokenizer, L: int, split: bool) -> Iterator[dict[str, Any]]:
    """Packed rows of a part, those to be held out last."""
    read = part.read if part.is_shard else functools.partial(text_tokens, part)
    sides = itertools.groupby(read(tokenizer, split), key=lambda found: found[0])
    for heldout, found in sides:
        blocks = (tokens for _, tokens in found)
        for rows in bigs.cut_rows(blocks, tokenizer, L):
            yield from ({"tokens": row, "heldout": heldout} for row in rows)


def fingerprint(*what: Any) -> str:
    """A name for whatever prints the same.

    >>> (
    ...     fingerprint("a", 1) == fingerprint("a", 1),
    ...     fingerprint("a", 1) == fingerprint("a", 2),
    ... )
    (True, False)
    """
    return hashlib.sha256("\0".join(map(str, what)).encode()).hexdigest()[:16]


class Keyed:
    """A function without arguments whose pickle is its key. `datasets` finds a table in
    its cache by the pickled function that makes the rows, so the pickle is to be the
    fingerprint of a part and nothing else.

    >>> import pickle
    >>> pickle.loads(pickle.dumps(Keyed("rows", lambda: iter("ab"))))
    'rows'
    """

    def __init__(self, key: str, make: Callable[[], Iterator[Any]]):
        self.key = key
        self.make = make

    def __call__(self) -> Iterator[Any]:
        return self.make()

    def __reduce__(self):
        return str, (self.key,)


def prepared(part: Part, tokenizer, L: int, split: bool):
    """The rows of a part as a `datasets.Dataset`, from the cache if they are there, and
    their fingerprint.
    """
    import datasets

    columns = {
        "tokens": datasets.features.Sequence(datasets.Value("int32"), length=L),
        "heldout": datasets.Value("bool"),
    }
    kind = (tokenizer.backend_tokenizer.to_str(), split)
    if part.is_shard:
        kind = ("unmasked", *kind)
    make = functools.partial(rows_of, part, tokenizer, L, split)
    key = fingerprint("rows 1", part.identity, kind, L)
    try:
        return (
            datasets.Dataset.from_generator(
                Keyed(key, make), features=datasets.Features(columns)
            ),
            key,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, bigs.UserError):
            raise cause from None
        raise bigs.UserError(
            f"{part.name}: its rows of {L} tokens could not be prepared"
            f" ({type(cause).__name__}: {' '.join(str(cause).split())})"
        ) from None
    except ValueError:  # what `datasets` says of a table without rows
        empty = {name: [] for name in columns}
        return datasets.Dataset.from_dict(empty, datasets.Features(columns)), key


def prepare(
    sources: Iterable[str],
    tokenizer,
    L: int,
    heldout: Iterable[str] = (),
    parts: int | None = None,
) -> bigs.Dataset:
    """Rows of L tokens of some corpora (of their first parts), and held-out batches of
    others or of their own.

    Raises UserError if nothing was held out.
    """
    import datasets
    from tqdm import tqdm

    own, other = (
        [part for source in group for part in parts_of(source)[:parts]]
        for group in (sources, heldout)
    )
    bar = tqdm(
        own + other, desc="preparing text", unit="part", disable=len(own + other) < 2
    )
    tables, keys = zip(
        *(prepared(part, tokenizer, L, not other) for part in bar), strict=True
    )
    if other:
        train = tables[: len(own)]
        held = tables[len(own) :]
    else:
        cuts = [len(table) - held_rows(table) for table in tables]
        train = [
            table.select(range(cut))
            for table, cut in zip(tables, cuts, strict=True)
            if cut
        ]
        held = [
            table.select(range(cut, len(table)))
            for table, cut in zip(tables, cuts, strict=True)
            if cut < len(table)
        ]
    found = [sum(map(len, side)) for side in (train, held)]
    if 0 in found:
        raise bigs.UserError(
            f"corpus: {', '.join(sources)} gave {found[0]} rows of {L} tokens to train"
            f" on and {found[1]} held out; give more text, or held-out text of its own"
            " with --heldout"
        )

    def rows(tables):
        table = datasets.concatenate_datasets(
            [table for table in tables if len(table)]
        ).with_format("numpy")
        return bigs.rows_for(tokenizer, table.select_columns("tokens")["tokens"])

    batches = bigs.fixed_batches(rows(held), 512, max(8, min(64, 8192 // L)))
    return bigs.Dataset(
        tokenizer, rows(train), batches, ", ".join(sources), fingerprint(*keys)
    )


def held_rows(table) -> int:
    """Rows at the end of a part that are held out."""
    return int(np.sum(table.with_format("numpy")["heldout"][:]))


def trained_vocabulary(
    sources: Iterable[str], size: int, megabytes: float = 50.0, parts: int | None = None
):
    """A tokenizer of `size` pieces for some corpora, trained once."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    own = [part for source in sources for part in parts_of(source)[:parts]]
    if any(part.is_shard for part in own):
        raise bigs.UserError(
            "vocabulary: HDF5 shards hold numbers of a vocabulary; name it with"
            " --vocabulary"
        )
    name = fingerprint(
        "vocabulary 1", size, megabytes, *(part.identity for part in own)
    )
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "annotated_bigs" / name
    if not folder.exists():
        texts = [
            text
            for part in own
            for text in bigs.taken(
                (d.text for d in part.read() if not held_out(d.text)),
                megabytes * 1e6 / len(own),
            )
        ]
        if not texts:
            raise bigs.UserError(
                f"corpus: {', '.join(sources)} holds no document; text files separate"
                " them by blank lines, JSON-lines files hold one object with a field"
                ' "text" a line'
            )
        tokenizer = bigs.train_tokenizer(texts, size)
        with bigs.write_folder_whole(folder) as part:
            tokenizer.save_pretrained(part)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load_vocabulary(name: str):
    """A tokenizer from a file with one piece a line, a folder, or the hub.

    >>> load_vocabulary("README.md")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_bigs.UserError: vocabulary: README.md lacks [PAD], [UNK], ...
    """
    path = Path(name)
    if path.is_dir():
        return bigs.load_tokenizer(name)
    if not path.exists():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError):
            raise bigs.UserError(
                f"vocabulary: {name} is neither a file nor a folder here, nor can it be"
                " fetched from the hub; give a file like BERT's vocab.txt"
            ) from None
    pieces = [line.removesuffix("\n") for line in text_lines(path)]
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    lacking = [token for token in special if token not in pieces]
    if lacking:
        raise bigs.UserError(
            f"vocabulary: {name} lacks {', '.join(lacking)}; give a file like BERT's"
            " vocab.txt"
        )
    return bigs.wordpiece({piece: number for number, piece in enumerate(pieces)})

"""Minimal pairs: does a model find the grammatical sentence of two more likely?

A sentence scores the sum of the log-likelihoods of its pieces, each masked alone
(Salazar et al., 2020). A pair counts if its good sentence scores higher; a tie is an
error.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import annotated_bigs as bigs
from workshop import corpora

FIELDS = ("UID", "linguistics_term", "sentence_good", "sentence_bad")


def read_pairs(file: Path) -> list[dict[str, Any]]:
    """The pairs of a file of BLiMP, JSON lines, perhaps packed.

    >>> read_pairs(Path("no/such.jsonl"))
    Traceback (most recent call last):
    annotated_bigs.UserError: no/such.jsonl: no such file; give BLiMP's pairs
    """
    if not file.exists():
        raise bigs.UserError(f"{file}: no such file; give BLiMP's pairs")
    pairs = []
    for number, line in enumerate(corpora.text_lines(file), 1):
        try:
            pair = json.loads(line)
            pairs.append({key: pair[key] for key in FIELDS})
        except (KeyError, TypeError, ValueError) as error:
            raise bigs.UserError(
                f"{file}, line {number}: no pair of BLiMP ({error!r}); each line needs"
                f" {', '.join(FIELDS)}"
            ) from None
    if not pairs:
        raise bigs.UserError(f"{file}: there is no pair in it; give BLiMP's pairs")
    return pairs


def of_paradigms(
    pairs: list[dict[str, Any]], names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The pairs of some paradigms; without names, all.

    >>> of_paradigms([{"UID": "near"}, {"UID": "far"}], ("far",))
    [{'UID': 'far'}]
    >>> of_paradigms([{"UID": "near"}], ("afar",))
    Traceback (most recent call last):
    annotated_bigs.UserError: paradigms: 'afar' does not exist; choose one of near
    """
    known = dict.fromkeys(pair["UID"] for pair in pairs)
    for name in names:
        bigs.choose(known, "paradigms", name)
    return [pair for pair in pairs if not names or pair["UID"] in names]


class MaskedCopy(NamedTuple):
    """A sentence with one of its pieces masked."""

    sentence: int  # its number
    ids: list[int]
    place: int  # of the mask
    piece: int  # that stood there


def masked_copies(
    sentences: list[list[int]], mask_id: int, cls_id: int, sep_id: int
) -> Iterator[MaskedCopy]:
    """Each sentence once for each of its pieces.

    >>> [copy.ids for copy in masked_copies([[7, 8]], 4, 2, 3)]
    [[2, 4, 8, 3], [2, 7, 4, 3]]
    """
    for number, pieces in enumerate(sentences):
        for place, piece in enumerate(pieces, 1):
            ids = [cls_id, *pieces, sep_id]
            ids[place] = mask_id
            yield MaskedCopy(number, ids, place, piece)


@jax.jit
def piece_scores(
    model: bigs.BiGS,
    ids: bigs.Int[bigs.AnyArray, "batch L"],
    lengths: bigs.Int[bigs.AnyArray, " batch"],
    places: bigs.Int[bigs.AnyArray, " batch"],
    pieces: bigs.Int[bigs.AnyArray, " batch"],
) -> bigs.Float[bigs.Array, " batch"]:
    """Log-likelihood of a piece at one place of each text."""
    mask = jnp.arange(ids.shape[1]) < lengths[:, None]
    x = bigs.encode_at(model.encoder, ids, mask, positions=places[:, None])
    logits = model.head(x, model.encoder.words)[:, 0]
    chosen = jnp.take_along_axis(logits, pieces[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)


def copy_scores(
    model: bigs.BiGS, copies: list[MaskedCopy], L: int, batch: int
) -> np.ndarray:
    """Log-likelihood of the masked piece of each of at most `batch` copies."""
    filled = copies + copies[:1] * (batch - len(copies))  # one shape for each length
    ids = np.zeros((batch, L), np.int32)
    for row, copy in zip(ids, filled, strict=True):
        row[: len(copy.ids)] = copy.ids
    lengths = np.array([len(copy.ids) for copy in filled])
    places = np.array([copy.place for copy in filled])
    pieces = np.array([copy.piece for copy in filled])
    scores = piece_scores(model, ids, lengths, places, pieces)
    return np.asarray(scores)[: len(copies)]


def sentence_scores(
    model: bigs.BiGS, tokenizer, texts: list[str], batch: int = 256
) -> np.ndarray:
    """The score of each text, in nats."""
    from tqdm import tqdm

    most = model.config.max_position_embeddings
    sentences = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, sentences)) + 2
    if longest > most:
        raise bigs.UserError(
            f"pairs: a sentence has {longest} tokens, and this model reads at most"
            f" {most}; leave it out"
        )
    special = tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id
    by_shape: dict[int, list[MaskedCopy]] = {}
    for copy in masked_copies(sentences, *special):
        by_shape.setdefault(bigs.shape_of(len(copy.ids), most), []).append(copy)
    scores = np.zeros(len(texts))
    bar = tqdm(total=sum(map(len, sentences)), desc="pieces", mininterval=1)
    for L, copies in by_shape.items():
        for first in range(0, len(copies), batch):
            part = copies[first : first + batch]
            numbers = [copy.sentence for copy in part]
            np.add.at(scores, numbers, copy_scores(model, part, L, batch))
            bar.update(len(part))
    return scores


def accuracy(
    model: bigs.BiGS, tokenizer, pairs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Percent of pairs whose good sentence scores higher: in all paradigms together,
    each counting as much as any other, by term, and by paradigm.
    """
    both = [pair[side] for side in ("sentence_good", "sentence_bad") for pair in pairs]
    distinct = list(dict.fromkeys(both))
    found = sentence_scores(model, tokenizer, distinct)
    scores = dict(zip(distinct, found, strict=True))
    right: dict[str, list[bool]] = {}
    paradigms_of: dict[str, set[str]] = {}
    for pair in pairs:
        better = scores[pair["sentence_good"]] > scores[pair["sentence_bad"]]
        right.setdefault(pair["UID"], []).append(bool(better))
        paradigms_of.setdefault(pair["linguistics_term"], set()).add(pair["UID"])
    paradigms = {name: 100 * float(np.mean(found)) for name, found in right.items()}
    terms = {}
    for term in sorted(paradigms_of):
        own = [paradigms[name] for name in paradigms_of[term]]
        terms[term] = round(float(np.mean(own)), 1)
    return {
        "accuracy": round(float(np.mean(list(paradigms.values()))), 2),
        "pairs": len(pairs),
        "terms": terms,
        "paradigms": {name: round(value, 1) for name, value in paradigms.items()},
    }


def print_accuracy(found: dict[str, Any]) -> None:
    """What `accuracy` found, by term.

    >>> print_accuracy({"accuracy": 70.0, "pairs": 9, "terms": {"binding": 70.0}})
    binding                      70.0
    all 9 pairs                  70.0
    """
    for term, value in found["terms"].items():
        print(f"{term:28s}{value:5.1f}")
    total = f"all {found['pairs']:,} pairs"
    print(f"{total:28s}{found['accuracy']:5.1f}")

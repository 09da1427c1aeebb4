"""Minimal pairs: does a model find the grammatical sentence of two more likely?

A sentence scores the sum of the log-likelihoods of its pieces, each masked alone
(Salazar et al., 2020). A pair counts if its good sentence scores higher; a tie is an
error.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import annotated_bigs as bigs

LENGTHS = (12, 16, 24, 32, 64, 128)  # texts are padded to one of these


def read_pairs(file: Path) -> list[dict[str, Any]]:
    """The pairs of a file of BLiMP, JSON lines, perhaps packed.

    >>> read_pairs(Path("no/such.jsonl"))
    Traceback (most recent call last):
    annotated_bigs.UserError: no/such.jsonl: no such file; give BLiMP's pairs
    """
    if not file.exists():
        raise bigs.UserError(f"{file}: no such file; give BLiMP's pairs")
    opened = gzip.open if file.suffix == ".gz" else open
    pairs = []
    with opened(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                pair = json.loads(line)
                pairs.append({key: pair[key] for key in FIELDS})
            except (KeyError, TypeError, ValueError) as error:
                raise bigs.UserError(
                    f"{file}, line {number}: no pair of BLiMP ({error!r}); each line"
                    f" needs {', '.join(FIELDS)}"
                ) from None
    return pairs


FIELDS = ("UID", "linguistics_term", "sentence_good", "sentence_bad")


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


def masked_copies(
    sentences: list[list[int]], mask_id: int, cls_id: int, sep_id: int
) -> Iterator[tuple[int, list[int], int, int]]:
    """Each sentence once for each of its pieces, which is masked: the sentence's
    number, the text, the place, the piece.

    >>> list(masked_copies([[7, 8]], 4, 2, 3))
    [(0, [2, 4, 8, 3], 1, 7), (0, [2, 7, 4, 3], 2, 8)]
    """
    for number, pieces in enumerate(sentences):
        whole = [cls_id, *pieces, sep_id]
        for place, piece in enumerate(pieces, 1):
            yield number, [*whole[:place], mask_id, *whole[place + 1 :]], place, piece


def sentence_scores(
    model: bigs.BiGS, tokenizer, texts: list[str], batch: int = 256
) -> np.ndarray:
    """The score of each text, in nats."""
    from tqdm import tqdm

    sentences = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, sentences)) + 2
    if longest > model.config.max_position_embeddings:
        raise bigs.UserError(
            f"pairs: a sentence has {longest} tokens, and this model reads at most"
            f" {model.config.max_position_embeddings}; leave it out"
        )
    special = tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id
    copies = sorted(masked_copies(sentences, *special), key=lambda copy: len(copy[1]))
    scores = np.zeros(len(texts))
    bar = tqdm(total=len(copies), desc="pieces", mininterval=1)
    for L in LENGTHS:
        fitting = [copy for copy in copies if L >= len(copy[1])]
        copies = copies[len(fitting) :]
        for first in range(0, len(fitting), batch):
            part = fitting[first : first + batch]
            filled = part + part[:1] * (batch - len(part))  # one shape for each length
            ids = np.zeros((batch, L), np.int32)
            for row, (_, text, _, _) in zip(ids, filled, strict=True):
                row[: len(text)] = text
            lengths = np.array([len(text) for _, text, _, _ in filled])
            numbers, _, places, pieces = map(list, zip(*filled, strict=True))
            found = piece_scores(
                model, ids, lengths, np.array(places), np.array(pieces)
            )
            np.add.at(scores, numbers[: len(part)], np.asarray(found)[: len(part)])
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
    terms = {}
    for pair in pairs:
        better = scores[pair["sentence_good"]] > scores[pair["sentence_bad"]]
        right.setdefault(pair["UID"], []).append(bool(better))
        terms[pair["UID"]] = pair["linguistics_term"]
    paradigms = {name: 100 * float(np.mean(found)) for name, found in right.items()}
    by_term = {
        term: float(np.mean([paradigms[name] for name in terms if terms[name] == term]))
        for term in sorted(set(terms.values()))
    }
    return {
        "accuracy": round(float(np.mean(list(paradigms.values()))), 2),
        "pairs": len(pairs),
        "terms": {term: round(value, 1) for term, value in by_term.items()},
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

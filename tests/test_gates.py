"""Toy layers that look something up, and the statistics of what gates are worth."""

import itertools

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

import annotated_bigs as bigs
from annotated_bigs import contrast, toy_attention, toy_gelu, toy_product, toy_sum

PAIRS = np.array([[0, 9, 18, 27, 36, 45], [47, 38, 29, 20, 11, 2]])
TURNED = PAIRS[0][::-1]
STATIC = (toy_sum, toy_gelu, toy_product)


def toy_logits(way, pairs, name, places=True):
    toy = bigs.start_toy(jax.random.key(1), 8)
    # Larger vectors than at the start, and a weight of its own for each place.
    weights = jax.random.normal(jax.random.key(2), (7,))
    toy = toy._replace(E=10 * toy.E, K=weights)
    if not places:
        toy = toy._replace(P=np.zeros((7, 8)))
    texts = np.append(pairs, 64 + name)[None]
    return np.asarray(bigs.toy_logits(way, toy, texts)[0])


def furthest(found, other):
    """The largest difference of two arrays."""
    return np.abs(found - other).max()


def change_by_name(way, pairs):
    """By how much the logits change when another name is asked for."""
    return toy_logits(way, pairs, 5) - toy_logits(way, pairs, 2)


def test_in_a_sum_the_name_cannot_change_which_pair_counts():
    changes = [change_by_name(toy_sum, pairs) for pairs in PAIRS]
    assert_allclose(*changes, atol=1e-5)


@pytest.mark.parametrize(
    "way",
    [toy_gelu, toy_product, toy_attention],
    ids=lambda w: w.__name__,
)
def test_in_the_others_it_can(way):
    changes = [change_by_name(way, pairs) for pairs in PAIRS]
    assert furthest(*changes) > 0.1


def test_attention_without_places_reads_a_set():
    found = toy_logits(toy_attention, PAIRS[0], 5, places=False)
    turned = toy_logits(toy_attention, TURNED, 5, places=False)
    assert_allclose(found, turned, atol=1e-5)


@pytest.mark.parametrize("way", STATIC, ids=lambda way: way.__name__)
def test_static_layers_read_by_distance(way):
    found = toy_logits(way, PAIRS[0], 5, places=False)
    turned = toy_logits(way, TURNED, 5, places=False)
    assert furthest(found, turned) > 0.1


def test_contrasts_are_paired_by_seed():
    rng = np.random.default_rng(0)
    seeds = rng.permutation(5).tolist()
    values = rng.normal(size=5).tolist()
    ours = dict(zip(seeds, values, strict=True))
    theirs = {seed: float(rng.normal()) for seed in range(6)}

    found = contrast(ours, theirs)

    first = [ours[seed] for seed in range(5)]
    second = [theirs[seed] for seed in range(5)]
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(0.95)
    assert found.p == pytest.approx(test.pvalue)
    assert found.mean - found.half == pytest.approx(interval.low)
    assert found.mean + found.half == pytest.approx(interval.high)


def test_one_seed_has_no_interval():
    found = contrast({0: 2.0, 1: 9.0}, {0: 1.5})
    assert found.mean == 0.5
    assert np.isnan([found.half, found.p]).all()


def test_no_difference_is_claimed_where_the_90_percent_interval_lies_within():
    """That is what two one-sided tests at 5 % come to."""
    rng = np.random.default_rng(0)
    claimed = []
    for _ in range(200):
        differences = rng.normal(rng.uniform(-0.05, 0.05), 0.01, size=4)
        error = differences.std(ddof=1) / 2
        reach = stats.t.ppf(0.95, 3) * error
        within = abs(differences.mean()) + reach < 0.03
        assert (bigs.no_difference(differences, 0.03) < 0.05) == within
        claimed.append(within)
    assert 20 < sum(claimed) < 180


def test_holm_rejects_as_the_procedure_does():
    """Down from the smallest p value, until one is above its share of 5 %."""
    rng = np.random.default_rng(0)
    for n in itertools.chain([1, 2], rng.integers(3, 7, 100)):
        p = rng.uniform(0, 0.06, n)
        rejected = np.zeros(n, bool)
        for rank, index in enumerate(np.argsort(p)):
            if p[index] >= 0.05 / (n - rank):
                break
            rejected[index] = True
        corrected = np.array(bigs.holm(p.tolist()))
        assert (corrected < 0.05).tolist() == rejected.tolist()


SEEDS = {3: "three", 4: "four", 5: "five"}


def test_the_readme_tells_what_was_measured():
    none = bigs.loss_above("no product")
    stacked = bigs.loss_above("stacked SSM, GELU")
    frozen = bigs.loss_above("frozen SSM", "routings").differences
    last = {arm: bigs.above_gated(40, arm) for arm in bigs.longer_arms()}
    again = bigs.above_gated(40, "no product", seed=1)
    sentences = [
        f"without products {last['no product']:.2f} and {again:.2f} above the gated SSM"
        f" (two seeds), the stacked SSM {last['stacked SSM, GELU']:.2f} above,"
        " attention, which had hardly begun"
        f" to learn after ten, {-last['stacked attention']:.2f} below (one seed each)",
        f"{-none.mean:.2f} nats below the gated SSM"
        f" ({SEEDS[len(none.differences)]} seeds,"
        f" plus or minus {none.half:.2f})",
        f"a stacked SSM {stacked.mean:.2f} above it (plus or minus {stacked.half:.2f})",
        f"start cost {min(frozen):.1f} to {max(frozen):.1f} nats ({SEEDS[len(frozen)]}",
    ]

    readme = (bigs.HERE / "README.md").read_text()
    words = " ".join(readme.split())
    for sentence in sentences:
        assert sentence in words


@pytest.mark.parametrize("study", ["gates", "routings"])
def test_the_kept_runs_are_of_equal_length_on_one_text(study):
    runs = bigs.longest(bigs.runs_of(study))
    first = runs[0]
    keys = set()
    for run in runs:
        _, last_loss = run["curve"][-1]
        assert run["heldout"] == last_loss
        assert run["tokens"] == first["tokens"]
        assert run["text"] == first["text"]
        assert len(run["curve"]) == len(first["curve"])
        keys.add((run["arm"], run["seed"]))
    assert len(keys) == len(runs)


def test_static_kernels_are_compared_on_the_same_seeds_at_one_rate():
    runs = bigs.runs_of("routings")
    seeds = {}
    for run in runs:
        seeds.setdefault(run["arm"], set()).add(run["seed"])
    assert len(seeds) == 6
    assert all(found == {0, 1, 2} for found in seeds.values())
    assert len({run["rate"] for run in runs}) == 1
    # An SSM for each channel has more parameters, as the text says.
    counts = {run["arm"]: run["parameters"] for run in runs}
    more = counts.pop("an SSM a channel")
    assert max(counts.values()) / min(counts.values()) < 1.02
    assert 1.1 < more / counts["gated SSM"] < 1.2

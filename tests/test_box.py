"""The model that comes with the document: its folder, what its kernels do, and the
figures of any model.
"""

import json
import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util
from numpy.testing import assert_allclose

import annotated_bigs as bigs
from annotated_bigs import BOXED, RECIPES, BiGS, kernels_of, silenced
from workshop import commands, running, studies

SMALL = bigs.Config(60, 16, 2, 48, 32, num_ssm=4, mask_padding=True)
SENTENCE = "to be or not to be that is the question"


@pytest.fixture(scope="module")
def model():
    return bigs.from_pretrained()


def arrays(folder):
    content = (folder / "flax_model.msgpack").read_bytes()
    tree = serialization.msgpack_restore(content)
    return traverse_util.flatten_dict(tree, sep="/")


# The folder


def test_the_box_is_small_and_holds_what_it_says(model):
    sizes = {path.name: path.stat().st_size for path in BOXED.iterdir()}
    assert set(sizes) == {
        "README.md",
        "config.json",
        "flax_model.msgpack",
        "kernels.npz",
        "reading.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(sizes.values()) < 12e6
    assert model.config == bigs.configured(bigs.boxed, RECIPES["boxed"])
    assert model.config.vocab_size == len(bigs.load_tokenizer()) == 8192
    stored = sum(array.size for array in arrays(BOXED).values())
    assert stored == bigs.parameters(bigs.boxed)
    assert stored < 6e6


def test_matrices_are_kept_in_bfloat16_and_ssms_in_float32():
    for name, array in arrays(BOXED).items():
        is_matrix = name.endswith(("/kernel", "/embedding"))
        assert array.dtype == (jnp.bfloat16 if is_matrix else np.float32), name


def test_the_kept_kernels_are_those_of_the_model(model):
    kept = bigs.boxed_kernels()
    fresh = bigs.fresh_state(bigs.boxed, RECIPES["boxed"]).model
    for name, own in (("pretrained", model), ("start", fresh)):
        tolerance = 1e-5 * np.abs(kept[name]).max()
        found = kernels_of(own)
        assert_allclose(kept[name], found, atol=tolerance)
        assert found.shape == (8, 2, 128)
    assert kept["finetuned"].shape == (8, 2, 128)


@pytest.mark.parametrize("name", ["documented-small", "annotated"])
def test_the_kept_ways_are_those_of_their_recipes(name):
    kept = bigs.checkpoints_of(name)
    recipe = RECIPES[name]
    checkpoints = len(kept["tokens"])
    assert kept["step_sizes"].shape == (checkpoints, 6, 2)
    assert kept["poles"].shape == (checkpoints, 6, 2, bigs.small.num_ssm)
    assert kept["tokens"][0] == 0
    assert kept["tokens"][-1] == recipe.tokens
    fresh = bigs.fresh_state(bigs.small, recipe).model
    for side, ssm in enumerate(
        (fresh.encoder.layers.forward, fresh.encoder.layers.backward)
    ):
        steps = np.exp(ssm.log_step[...][:, 0])
        assert_allclose(kept["step_sizes"][0, :, side], steps, rtol=1e-5)
    start = kernels_of(fresh)
    assert_allclose(kept["start"], start, atol=1e-5 * np.abs(start).max())


@pytest.mark.parametrize(
    ("name", "size", "file"),
    [
        ("boxed", "boxed", "bigs-boxed/training"),
        ("documented-small", "small", "documented-small"),
        ("annotated", "small", "annotated"),
    ],
)
def test_a_training_was_its_recipe_and_went_down(name, size, file):
    run = bigs.measured(file)[name]
    recipe = bigs.asdict(RECIPES[name])
    for field, value in run["recipe"].items():
        assert value == recipe[field], field
    assert run["size"] == size
    assert run["parameters"] == bigs.parameters(bigs.SIZES[size])
    heldout = [record["heldout"] for record in run["history"] if "heldout" in record]
    assert abs(heldout[0] - np.log(8192)) < 0.3
    assert heldout[-1] == min(heldout)
    assert heldout[-1] < 3.5


# What card and README say

HELDOUT = {
    "books": "books",
    "enwiki": "English Wikipedia",
    "simplewiki": "Simple English Wikipedia",
}


@pytest.fixture(scope="module")
def card():
    return (BOXED / "README.md").read_text()


@pytest.fixture(scope="module")
def readme():
    return (bigs.HERE / "README.md").read_text()


def test_losses_that_are_told_were_measured(card, readme):
    """The rows of the card's two tables: held-out texts, and tokens read."""
    reading = bigs.boxed_reading()
    rows = []
    for text, losses in reading["losses"].items():
        loss = losses["nothing"]
        bits = loss * reading["pieces_a_character"][text] / np.log(2)
        rows.append(f"| {HELDOUT[text.split('-')[0]]} | {loss:.3f} | {bits:.2f} |")
    run = bigs.boxed_training()
    each = run["recipe"]["batch"] * run["recipe"]["length"] / 1e6
    for record in run["history"]:
        if "heldout" in record:
            rows.append(f"| {record['step'] * each:.1f} | {record['heldout']:.3f} |")
    told = re.findall(r"^\| .* \| \d\.\d{3} .*\|$", card, re.MULTILINE)
    assert set(rows[:3]) < set(told) <= set(rows)
    numbers = re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", card)
    assert len(numbers) == len(told)
    last = run["history"][-1]["heldout"]
    assert f"reaches {last:.1f} nats per masked word" in readme


def test_what_short_kernels_cost_was_measured(readme):
    """Each kernel of the model, cut off behind 32 tokens, on three texts."""
    losses = bigs.boxed_reading()["shortened"].values()
    costs = [found["32"] - found["127"] for found in losses]
    told = f"after 32 tokens cost {min(costs):.2f} to {max(costs):.2f} nats"
    assert told in " ".join(readme.split())


def test_scores_that_are_told_were_measured(card, readme):
    means = {}
    for task, found in bigs.glue().items():
        with_it = bigs.mean_score(task, "pretrained")
        without = bigs.mean_score(task, "not pretrained")
        majority = 100 * found["no skill"]["majority"]
        assert f"| {with_it:.1f} | {without:.1f} | {majority:.1f} |" in card, task
        means[task] = (with_it, without)
    with_it, without = means["mnli"]
    assert f"{with_it:.0f} % on a sample of MNLI ({without:.0f} % without)" in readme
    with_it, without = means["cola"]
    assert f"{with_it / 100:.2f} on CoLA ({without / 100:.2f} without" in readme


def test_grammar_that_is_told_was_measured(card, readme):
    found = bigs.measured("grammar")
    assert f"in {found['accuracy']:.1f} % (chance" in " ".join(card.split())
    assert f"the grammatical one in {found['accuracy']:.0f} %" in " ".join(
        readme.split()
    )
    for term, value in found["terms"].items():
        assert f"| {term.replace('_', ' ')} | {value:.1f} |" in card


@pytest.mark.parametrize("budget", [0, 1])
def test_sizes_were_given_about_the_same_time(budget):
    """Seconds by the speed of a core that has nothing else to do."""
    spent = {}
    for size, seconds in bigs.measured("sizes-speed")["seconds"].items():
        run = bigs.sized(size)[budget]
        spent[size] = run["tokens"] / run["batch"] / 128 * np.median(seconds)
    assert len(spent) == 3
    assert spent["tiny"] == min(spent.values())
    assert max(spent.values()) < 1.15 * spent["tiny"]


def test_speeds_that_are_told_were_measured(readme):
    rows = json.loads((bigs.DATA / "tpu-v3.json").read_text())["rows"]
    ratios = {row["route"]: row["ratio"] for row in rows if row["length"] == 4096}
    assert f"{ratios['blocks']:.2f} times" in readme
    assert f"{ratios['fft']:.1f} times" in readme
    assert "a third of the time of one made the published way" in readme
    assert 2.8 < bigs.factors()["ours"]["speed"] < 3.2


def test_the_card_tells_how_it_was_made_and_what_it_is_not_for(card):
    assert "pretrain --size boxed --recipe boxed" in card
    assert "must not" in card


def test_the_model_reads_english(model):
    """It fills a closed-class word rightly, which no model does that has not read."""
    tokenizer = bigs.load_tokenizer()

    def fill(text):
        return [word for word, _ in bigs.fill_mask(model, tokenizer, text, 3)[0]]

    assert "door" in fill("He opened the [MASK] and walked into the room.")
    assert fill("The book was published [MASK] 1998.")[0] == "in"


# Compact files


def test_a_compact_file_is_half_as_large_and_nearly_the_same(tmp_path):
    whole = BiGS(replace(SMALL, vocab_size=4000))
    bigs.save_pretrained(whole, tmp_path / "whole")
    bigs.save_pretrained(whole, tmp_path / "compact", compact=True)
    sizes = [
        (tmp_path / name / "flax_model.msgpack").stat().st_size
        for name in ("whole", "compact")
    ]
    assert sizes[1] < 0.6 * sizes[0]

    again = bigs.from_pretrained(tmp_path / "compact")

    old = dict(bigs.named_parameters(whole))
    for path, leaf in bigs.named_parameters(again):
        rounding = 2**-8 if path[-1] in ("kernel", "embedding") else 0
        assert leaf.dtype == jnp.float32
        assert_allclose(leaf, old[path], rtol=rounding, err_msg=str(path))
    rounded = again.encoder.words.embedding[...]
    assert not np.array_equal(rounded, whole.encoder.words.embedding[...])


def test_what_others_read_is_float32(tmp_path):
    bigs.save_pretrained(BiGS(SMALL), tmp_path / "compact", compact=True)
    again = bigs.from_pretrained(tmp_path / "compact")
    bigs.save_pretrained(again, tmp_path / "again")
    kinds = {array.dtype for array in arrays(tmp_path / "again").values()}
    assert kinds == {np.dtype("float32")}


# Without kernels


@pytest.fixture
def pair():
    """A model whose kernels weigh, and two texts that differ behind their sixth token
    in order alone.
    """
    some = BiGS(replace(SMALL, initializer_range=0.3))
    ids = np.random.default_rng(0).integers(5, 60, (1, 12))
    turned = ids.copy()
    turned[0, 6:] = ids[0, :5:-1]
    return some, ids, turned


def test_without_kernels_the_order_of_other_words_is_lost(pair):
    """D stays: every token still reaches its own place."""
    some, ids, turned = pair
    none = silenced(some, np.ones((2, 2), bool))
    first_six = np.s_[0, :6]
    change = some(ids)[first_six] - some(turned)[first_six]
    assert np.abs(change).max() > 1e-3
    assert_allclose(none(ids)[first_six], none(turned)[first_six], atol=1e-6)


def test_with_kernels_of_one_side_the_other_side_is_lost(pair):
    some, ids, turned = pair
    none = silenced(some, np.ones((2, 2), bool))
    backward = np.array([[False, True], [False, True]])
    past = silenced(some, backward)
    first_six = np.s_[0, :6]
    last_six = np.s_[0, 6:]
    assert_allclose(past(ids)[first_six], past(turned)[first_six], atol=1e-5)
    gained = past(ids)[last_six] - none(ids)[last_six]
    assert np.abs(gained).max() > 1e-3


def test_with_all_kernels_the_model_is_the_same(pair):
    some, ids, _ = pair
    same = silenced(some, np.zeros((2, 2), bool))
    np.testing.assert_array_equal(same(ids), some(ids))


@pytest.mark.slow
def test_losses_without_kernels(model):
    texts = [
        f"In {year} the town had a school, a church and {year % 90} people."
        for year in range(900, 1900)
    ]
    data = studies.dataset_of(texts, bigs.load_tokenizer(), 128, 16)

    losses = studies.losses_without(model, data)

    layers = len(bigs.boxed_kernels()["start"])
    assert len(losses) == 2 + 3 * layers
    assert losses["all"] > losses["nothing"] + 0.5


def test_chosen_kernels_are_silenced_and_the_others_stay(model):
    before = kernels_of(model)
    chosen = np.arange(16).reshape(8, 2) % 3 == 0

    after = kernels_of(silenced(model, chosen))

    assert np.all(after[chosen] == 0)
    np.testing.assert_array_equal(after[~chosen], before[~chosen])


def test_shortened_kernels_reach_as_far_as_is_said(pair):
    """Behind the lag of each of two layers a word is not heard; whole ones are those of
    the model, and none is silence.
    """
    some, ids, _ = pair
    changed = ids.copy()
    changed[0, 8] = 7
    short = studies.shortened(some, 2)
    heard = np.abs(short(ids) - short(changed))[0].max(-1) > 1e-6
    assert heard.tolist() == [abs(8 - place) <= 4 for place in range(12)]

    whole = studies.shortened(some, 31)
    none = studies.shortened(some, -1)
    silent = silenced(some, np.ones((2, 2), bool))
    assert_allclose(whole(ids), some(ids), atol=1e-5)
    assert_allclose(none(ids), silent(ids), atol=1e-5)
    for one in (short, whole):
        fast = bigs.encode_at(one.encoder, ids, ids > 0)
        assert_allclose(fast, one.encoder(ids, ids > 0), atol=1e-5)


def test_inspect_writes_what_it_read(tmp_path, capsys):
    tokenizer = bigs.train_tokenizer([SENTENCE] * 20, 60)
    config = replace(SMALL, vocab_size=len(tokenizer))
    for seed, name in enumerate(("model", "tuned")):
        bigs.save_pretrained(BiGS(config, seed=seed), tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(f"{SENTENCE}\n\n" * 300)

    inspect(
        model=tmp_path / "model",
        finetuned=tmp_path / "tuned",
        heldout=tmp_path / "text.txt",
        output=tmp_path / "found",
    )

    printed = capsys.readouterr().out
    for words in ("strongest position", "of its norm", "without"):
        assert words in printed
    with np.load(tmp_path / "found" / "kernels.npz") as file:
        assert set(file) == {"pretrained", "finetuned"}
        assert file["finetuned"].shape == (2, 2, 32)
    found = json.loads((tmp_path / "found" / "reading.json").read_text())
    losses = found["losses"]["text.txt"]
    assert {"nothing", "all", "layer 1, both"} < set(losses)
    words = len(tokenizer(SENTENCE, add_special_tokens=False)["input_ids"])
    assert 0 < found["frequencies"]["text.txt"] < np.log(words) + 0.1
    shortened = found["shortened"]["text.txt"]
    assert shortened["-1"] == pytest.approx(losses["all"], abs=1e-4)
    assert shortened["127"] == pytest.approx(losses["nothing"], abs=1e-4)


def options_of(options):
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def inspect(**options):
    commands.main(["inspect", *map(str, options_of(options))])


def figures(**options):
    commands.main(["figures", *map(str, options_of(options))])


def six_steps(folder, start=None):
    """Recipe and last model of a run of six steps that keeps its checkpoints."""
    tokens = np.random.default_rng(0).integers(5, 60, (64, 32))
    rows = bigs.Rows(tokens, 60, 4, (0, 2, 3))
    letters = " ".join(map(chr, range(97, 123)))
    tokenizer = bigs.train_tokenizer([letters] * 20, 60)
    heldout = bigs.fixed_batches(rows, 8, 8)
    data = bigs.Dataset(tokenizer, rows, heldout, "numbers", "numbers")
    recipe = bigs.Recipe(
        steps=6,
        batch=8,
        length=32,
        learning_rate=0.05,
        warmup=0.1,
        save_every=2,
        keep=5,
    )
    return recipe, running.pretrain(SMALL, recipe, data, folder, start=start).model


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Folder, recipe and last model of `six_steps`."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *six_steps(folder)


def test_the_way_of_a_run_is_that_of_its_kernels(short_run):
    """Start, checkpoints and end of a run, as kept."""
    folder, recipe, last = short_run
    fresh = bigs.fresh_state(SMALL, recipe).model

    way = studies.way_of(folder)

    assert way["tokens"].tolist() == [0, 512, 1024, 1536]
    np.testing.assert_array_equal(way["start"], kernels_of(fresh))
    for when, one in ((0, fresh), (-1, last)):
        layers = one.encoder.layers
        steps = np.exp(layers.backward.log_step[...][:, 0])
        turns = layers.forward.A_im[...]
        assert_allclose(way["step_sizes"][when, :, 1], steps, rtol=1e-6)
        assert_allclose(way["poles"][when, :, 0].imag, turns, rtol=1e-6)
    assert np.unique(way["step_sizes"][:, 0, 0]).size == 4


def test_the_way_of_a_run_is_that_of_its_sizes(short_run):
    folder, _, last = short_run
    ids = np.random.default_rng(0).integers(5, 60, (8, 32))
    everything = np.ones(ids.shape, bool)

    way = studies.way_of(folder)

    assert way["spread"].shape == (4,)
    assert way["sizes"].shape == (4, 2)
    matrix = np.asarray(last.encoder.layers.W_o.kernel[...])[0]
    size = np.sqrt(np.mean(matrix**2))
    assert_allclose(way["sizes"][-1, 0], size, rtol=1e-5)
    spread = np.std(np.asarray(last.encoder(ids, everything)))
    assert way["spread"][-1] == pytest.approx(spread, rel=1e-4)


def test_the_way_of_a_run_that_began_with_a_model(tmp_path):
    """What it began with is not kept, so the way has the checkpoints alone."""
    six_steps(tmp_path, BiGS(SMALL, seed=9))
    way = studies.way_of(tmp_path)
    assert way["tokens"].tolist() == [512, 1024, 1536]
    assert "start" not in way


def test_the_way_of_a_run_is_told(short_run, capsys):
    folder, *_ = short_run
    inspect(model=folder, run=folder)
    assert capsys.readouterr().out.count("the output spreads by") == 4


# Figures of any model


@pytest.mark.parametrize(
    ("layers", "places"), [(2, None), (23, [(14, 1), (18, 0), (17, 0)])]
)
def test_figures_of_any_model(tmp_path, layers, places):
    config = replace(
        SMALL, num_hidden_layers=layers, hidden_size=8, intermediate_size=24
    )
    names = [str(tmp_path / name) for name in ("one", "two")]
    tasks = ("masked_lm", "sequence_classification")
    for seed, (name, task) in enumerate(zip(names, tasks, strict=True)):
        bigs.save_pretrained(BiGS(config, task, seed), name)
    before, after = (kernels_of(commands.pretrained_model(name)) for name in names)
    if places is None:
        places = [place for _, *place in bigs.movement(before, after)[:3]]

    rows, pairs = (draw() for draw in commands.model_figures(*names))

    assert len(rows.axes) == layers
    titles = [ax.get_title().partition(":")[0] for ax in pairs.axes]
    sides = ("forward", "backward")
    assert titles == [f"layer {layer}, {sides[side]}" for layer, side in places]

    figures(model=names[0], finetuned=names[1], output=tmp_path / "drawn")
    drawn = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert drawn == {"kernels.png", "finetuned.png"}


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"finetuned": "one"}, "finetuned: give the model before fine-tuning, too"),
        (
            {"model": "one", "finetuned": "deep"},
            r"has kernels of shape \(3, 2, 32\).*give the same model",
        ),
        ({"model": "attending"}, "routes by attention; only SSMs have kernels"),
    ],
)
def test_figures_need_two_models_with_kernels_of_one_shape(
    tmp_path, capsys, models, message
):
    configs = {
        "one": SMALL,
        "deep": replace(SMALL, num_hidden_layers=3),
        "attending": replace(SMALL, routing="attention", num_attention_heads=2),
    }
    for name in models.values():
        bigs.save_pretrained(BiGS(configs[name]), tmp_path / name)
    folders = {option: tmp_path / name for option, name in models.items()}

    with pytest.raises(SystemExit, match="2"):
        figures(output=tmp_path / "drawn", **folders)

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "drawn").exists()

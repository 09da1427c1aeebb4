"""The model that comes with the document: its folder, what its kernels do, and the
figures of any model.
"""

import json
import re
import urllib.request
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util

import annotated_bigs as bigs

SMALL = bigs.Config(60, 16, 2, 48, 32, num_ssm=4, mask_padding=True)


@pytest.fixture(scope="module")
def model():
    return bigs.from_pretrained()


def arrays(folder):
    tree = serialization.msgpack_restore((folder / "flax_model.msgpack").read_bytes())
    return traverse_util.flatten_dict(tree, sep="/")


# The folder


def test_the_box_is_small_and_holds_what_it_says(model):
    files = {path.name: path.stat().st_size for path in bigs.BOXED.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "flax_model.msgpack",
        "kernels.npz",
        "reading.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(files.values()) < 12e6
    assert model.config == bigs.boxed
    assert len(bigs.load_tokenizer()) == model.config.vocab_size == 8192
    assert (
        3e6
        < sum(array.size for array in arrays(bigs.BOXED).values())
        == bigs.parameters(bigs.boxed)
        < 6e6
    )


def test_matrices_are_kept_in_bfloat16_and_ssms_in_float32():
    for name, array in arrays(bigs.BOXED).items():
        assert array.dtype == (
            jnp.bfloat16 if name.endswith(("/kernel", "/embedding")) else np.float32
        ), name


def test_the_kept_kernels_are_those_of_the_model(model):
    found = bigs.boxed_kernels()
    fresh = bigs.fresh_state(bigs.boxed, bigs.RECIPES["boxed"]).model
    for kept, own in ((found["pretrained"], model), (found["start"], fresh)):
        np.testing.assert_allclose(
            kept, bigs.kernels_of(own), atol=1e-5 * np.abs(kept).max()
        )
    assert found["finetuned"].shape == found["start"].shape == (6, 2, 128)
    checkpoints = len(found["tokens"])
    N = bigs.boxed.num_ssm
    assert found["step_sizes"].shape == (checkpoints, 6, 2)
    assert found["poles"].shape == (checkpoints, 6, 2, N)
    assert found["tokens"][0] == 0
    assert found["tokens"][-1] == bigs.RECIPES["boxed"].tokens
    steps = np.stack(
        [
            np.exp(side.log_step[...][:, 0])
            for side in (model.encoder.layers.forward, model.encoder.layers.backward)
        ],
        1,
    )
    np.testing.assert_allclose(found["step_sizes"][-1], steps, rtol=1e-5)


def test_its_training_was_the_recipe_and_went_down():
    run = bigs.boxed_training()
    assert run["recipe"] == bigs.asdict(bigs.RECIPES["boxed"])
    assert run["parameters"] == bigs.parameters(bigs.boxed)
    assert bigs.RECIPES["boxed"].tokens > 60e6
    heldout = [record["heldout"] for record in run["history"] if "heldout" in record]
    assert abs(heldout[0] - np.log(8192)) < 0.1
    assert heldout[-1] == min(heldout) < 4.5


def test_card_and_readme_say_what_was_measured():
    """Every number with three decimals is a measured loss, or what silence costs."""
    losses = bigs.boxed_reading()["losses"]
    run = bigs.boxed_training()
    values = [record["heldout"] for record in run["history"] if "heldout" in record]
    wiki = losses["enwiki-valid.jsonl.xz"]
    values += [wiki[kind] - wiki["nothing"] for kind in ("local", "long")]
    known = {
        f"{value:.3f}"
        for value in [*values, *(found["nothing"] for found in losses.values())]
    }
    card, readme = (
        path.read_text() for path in (bigs.BOXED / "README.md", bigs.HERE / "README.md")
    )
    for text, least in ((card, 20), (readme, 3)):
        numbers = re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", text)
        assert len(numbers) >= least
        assert set(numbers) <= known
    assert "pretrain --size boxed --recipe boxed" in card
    assert "must not" in card
    means = {}
    for task, found in bigs.glue().items():
        means[task] = tuple(
            100
            * np.mean(found["variants"][variant]["best"][found["dev"]][found["metric"]])
            for variant in ("pretrained", "not pretrained")
        )
        assert (
            "| {:.1f} | {:.1f} | {:.1f} |".format(
                *means[task], 100 * found["no skill"]["majority"]
            )
            in card
        ), task
    assert "{:.1f} % of SST-2 right ({:.1f} % without".format(*means["sst2"]) in readme
    assert "{:.2f} on CoLA ({:.2f}".format(*np.array(means["cola"]) / 100) in readme
    ratios = {
        row["route"]: row["ratio"]
        for row in json.loads((bigs.DATA / "tpu-v3.json").read_text())["rows"]
        if row["length"] == 4096
    }
    assert f"{ratios['blocks']:.2f} times" in readme
    assert f"{ratios['fft']:.1f} times" in readme
    assert 2.5 < bigs.factors()["ours"]["speed"] < 3


def test_the_model_reads_english(model):
    """It fills a closed-class word rightly, which no model does that has not read."""
    tokenizer = bigs.load_tokenizer()
    words = [
        bigs.fill_mask(model, tokenizer, text, 3)[0]
        for text in (
            "He opened the [MASK] and walked into the room.",
            "The book was published [MASK] 1998.",
        )
    ]
    assert "door" in dict(words[0])
    assert words[1][0][0] == "in"


# Compact files


def test_a_compact_file_is_half_as_large_and_nearly_the_same(tmp_path):
    config = replace(SMALL, vocab_size=4000)
    whole = bigs.BiGS(config)
    bigs.save_pretrained(whole, tmp_path / "whole")
    bigs.save_pretrained(whole, tmp_path / "compact", compact=True)
    sizes = [
        (tmp_path / name / "flax_model.msgpack").stat().st_size
        for name in ("whole", "compact")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    again = bigs.from_pretrained(tmp_path / "compact")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(again))
    for (path, leaf), (_, old) in zip(
        bigs.named_parameters(again), bigs.named_parameters(whole), strict=True
    ):
        exact = path[-1] not in ("kernel", "embedding")
        np.testing.assert_allclose(
            leaf, old, rtol=0 if exact else 2**-8, err_msg=str(path)
        )
    assert not np.array_equal(*(m.encoder.words.embedding[...] for m in (whole, again)))
    bigs.save_pretrained(again, tmp_path / "again")  # what others read is float32
    assert {array.dtype for array in arrays(tmp_path / "again").values()} == {
        np.dtype("float32")
    }


# Silence


def test_a_silenced_kernel_hears_the_token_and_nothing_else():
    """Without its kernels a model cannot tell the order of the words around a token; D
    stays.
    """
    some = bigs.BiGS(replace(SMALL, initializer_range=0.3))
    ids = np.random.default_rng(0).integers(5, 60, (1, 12))
    turned = ids.copy()
    turned[0, 6:] = ids[0, :5:-1]
    deaf = bigs.silenced(some, np.ones((2, 2), bool))
    assert np.abs(some(ids)[0, :6] - some(turned)[0, :6]).max() > 1e-3
    np.testing.assert_allclose(deaf(ids)[0, :6], deaf(turned)[0, :6], atol=1e-6)
    half = bigs.silenced(
        some, np.array([[False, True], [False, True]])
    )  # hears the past only
    np.testing.assert_allclose(half(ids)[0, :6], half(turned)[0, :6], atol=1e-5)
    assert np.abs(half(ids)[0, 6:] - deaf(ids)[0, 6:]).max() > 1e-3
    np.testing.assert_array_equal(
        bigs.silenced(some, np.zeros((2, 2), bool))(ids), some(ids)
    )


def test_losses_without_kernels(tmp_path, model):
    text = tmp_path / "text.txt"
    lines = (
        f"In {year} the town had a school, a church and {year % 90} people."
        for year in range(900, 1900)
    )
    text.write_text("\n\n".join(lines))
    losses = bigs.losses_without(model, bigs.load_tokenizer(), str(text), 16)
    layers = len(bigs.boxed_kernels()["start"])
    assert len(losses) == 4 + 3 * layers
    assert losses["all"] > losses["nothing"] + 0.5
    local = bigs.reaches(bigs.kernels_of(model)) <= 10
    silent = bigs.silenced(model, local)
    assert (
        bigs.reaches(bigs.kernels_of(model))[local].size + np.sum(~local) == 2 * layers
    )
    assert (np.abs(bigs.kernels_of(silent)).max(-1) == 0).tolist() == local.tolist()


def test_inspect_writes_what_it_read(tmp_path, capsys):
    tokenizer = bigs.train_tokenizer(
        ["to be or not to be that is the question"] * 20, 60
    )
    bigs.save_pretrained(
        bigs.BiGS(replace(SMALL, vocab_size=len(tokenizer))), tmp_path / "model"
    )
    bigs.save_pretrained(
        bigs.BiGS(replace(SMALL, vocab_size=len(tokenizer)), seed=1), tmp_path / "tuned"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(
        "to be or not to be that is the question\n\n" * 300
    )
    bigs.main(
        [
            "inspect",
            "--model",
            str(tmp_path / "model"),
            "--finetuned",
            str(tmp_path / "tuned"),
            "--heldout",
            str(tmp_path / "text.txt"),
            "--output",
            str(tmp_path / "found"),
        ]
    )
    printed = capsys.readouterr().out
    assert "strongest position" in printed
    assert "of its norm" in printed
    assert "without" in printed
    with np.load(tmp_path / "found" / "kernels.npz") as file:
        assert set(file) == {"pretrained", "finetuned"}
        assert file["finetuned"].shape == (
            2,
            2,
            32,
        )
    losses = json.loads((tmp_path / "found" / "reading.json").read_text())["losses"][
        "text.txt"
    ]
    assert {"nothing", "all", "local", "long", "layer 1, both"} < set(losses)


def test_the_way_of_a_run(tmp_path, capsys):
    """Start, checkpoints and end of a run, as kept."""
    rows = bigs.Rows(
        np.random.default_rng(0).integers(5, 60, (64, 32)), 60, 4, (0, 2, 3)
    )
    tokenizer = bigs.train_tokenizer([" ".join(map(chr, range(97, 123)))] * 20, 60)
    data = bigs.Dataset(
        tokenizer, rows, bigs.fixed_batches(rows, 8, 8), "numbers", "numbers"
    )
    recipe = bigs.Recipe(
        steps=6,
        batch=8,
        length=32,
        learning_rate=0.05,
        warmup=0.1,
        save_every=2,
        keep=5,
    )
    last = bigs.pretrain(SMALL, recipe, data, tmp_path).model
    way = bigs.way_of(tmp_path)
    assert way["tokens"].tolist() == [0, 512, 1024, 1536]
    fresh = bigs.fresh_state(SMALL, recipe).model
    np.testing.assert_array_equal(way["start"], bigs.kernels_of(fresh))
    for when, one in ((0, fresh), (-1, last)):
        layers = one.encoder.layers
        steps = np.exp(layers.backward.log_step[...][:, 0])
        np.testing.assert_allclose(way["step_sizes"][when, :, 1], steps, rtol=1e-6)
        np.testing.assert_allclose(
            way["poles"][when, :, 0].imag, layers.forward.A_im[...], rtol=1e-6
        )
    assert len(np.unique(way["step_sizes"][:, 0, 0])) == 4
    assert way["spread"].shape == (4,)
    assert way["sizes"].shape == (4, 2)
    matrix = np.asarray(last.encoder.layers.W_o.kernel[...])[0]
    np.testing.assert_allclose(
        way["sizes"][-1, 0], np.sqrt(np.mean(matrix**2)), rtol=1e-5
    )
    ids = np.random.default_rng(0).integers(5, 60, (8, 32))
    assert way["spread"][-1] == pytest.approx(
        np.std(np.asarray(last.encoder(ids, np.ones(ids.shape, bool)))), rel=1e-4
    )
    bigs.main(["inspect", "--model", str(tmp_path), "--run", str(tmp_path)])
    assert capsys.readouterr().out.count("the output spreads by") == 4


# Figures of any model


@pytest.mark.parametrize(
    ("layers", "places"), [(2, None), (23, [(14, 1), (18, 0), (17, 0)])]
)
def test_figures_of_any_model(tmp_path, layers, places):
    config = replace(
        SMALL, num_hidden_layers=layers, hidden_size=8, intermediate_size=24
    )
    for seed, name in enumerate(("one", "two")):
        bigs.save_pretrained(
            bigs.BiGS(config, ("masked_lm", "sequence_classification")[seed], seed),
            tmp_path / name,
        )
    names = [str(tmp_path / name) for name in ("one", "two")]
    before, after = (bigs.kernels_of(bigs.pretrained_model(name)) for name in names)
    chosen = places or [one[1:] for one in bigs.movement(before, after)[:3]]
    rows, pairs = (draw() for draw in bigs.model_figures(*names))
    assert len(rows.axes) == layers
    titles = [ax.get_title().split(":")[0] for ax in pairs.axes]
    assert titles == [
        f"layer {layer}, {('forward', 'backward')[side]}" for layer, side in chosen
    ]
    bigs.main(
        [
            "figures",
            "--model",
            names[0],
            "--finetuned",
            names[1],
            "--output",
            str(tmp_path / "drawn"),
        ]
    )
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        "kernels.png",
        "finetuned.png",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--finetuned", "one"), "finetuned: give the model before fine-tuning, too"),
        (
            ("--model", "one", "--finetuned", "deep"),
            "has kernels of shape \\(3, 2, 32\\).*give the same model",
        ),
        (("--model", "attending"), "routes by attention; only SSMs have kernels"),
    ],
)
def test_figures_need_two_models_with_kernels_of_one_shape(
    tmp_path, capsys, options, message
):
    configs = {
        "one": SMALL,
        "deep": replace(SMALL, num_hidden_layers=3),
        "attending": replace(SMALL, routing="attention", num_attention_heads=2),
    }
    for name, config in configs.items():
        bigs.save_pretrained(bigs.BiGS(config), tmp_path / name)
    with pytest.raises(SystemExit, match="2"):
        bigs.main(
            [
                "figures",
                "--output",
                str(tmp_path / "drawn"),
                *(
                    str(tmp_path / word) if word in configs else word
                    for word in options
                ),
            ]
        )
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "drawn").exists()


# The paper's own figures


# Figure 3, read off by eye: where each row, 0 at the bottom, is strongest, and some of
# its other values.
STRONGEST = {
    0: (1,),
    1: (-1,),
    2: (-1,),
    4: (-2, -1),
    5: (-1,),
    6: (-2,),
    7: (0,),
    8: (0,),
    12: (-1,),
    13: (0,),
    15: (1,),
    16: (-2, -1),
    19: (0,),
    20: (-1,),
    21: (-1,),
    22: (0,),
}
VALUES = {
    4: {-3: 0.29, 0: 0.47},
    6: {-3: 0.43, -1: 0.39},
    12: {1: 0.5, 2: 0.5},
    15: {-1: 0.82, 0: 0.62},
    22: {-2: 0.88},
}
# Figure 4: (pretrained, after MNLI) at some lags, each curve scaled to a peak of one.
CURVES = {
    (14, 1): {16: (0.83, 0.92), 32: (0.59, 0.75), 64: (0.38, 0.54), 96: (0.3, 0.41)},
    (17, 0): {16: (0.77, 0.95), 32: (0.54, 0.81), 64: (0.36, 0.65), 96: (0.28, 0.55)},
    (18, 0): {8: (0.24, 0.42), 16: (0.11, 0.19), 32: (0.02, 0.08)},
}


@pytest.mark.slow
def test_the_published_kernels_are_those_of_the_papers_figures():
    names = "JunxiongWang/BiGS_128", "JunxiongWang/BiGS_128_MNLI"
    try:
        urllib.request.urlopen(
            f"https://huggingface.co/{names[0]}/resolve/main/config.json", timeout=10
        ).close()
    except OSError as error:
        pytest.skip(
            f"the hub cannot be reached, so the kernels of {names[0]} were NOT compared"
            f" ({error})"
        )
    before, after = (bigs.kernels_of(bigs.pretrained_model(name)) for name in names)
    for layer, places in STRONGEST.items():
        assert bigs.around(before[layer]).argmax() - 10 in places, f"layer {layer}"
    for layer, values in VALUES.items():
        for place, value in values.items():
            assert bigs.around(before[layer])[10 + place] == pytest.approx(
                value, abs=0.1
            ), f"layer {layer}, {place}"
    for (layer, side), values in CURVES.items():
        for lag, pair in values.items():
            found = [
                np.abs(kernels[layer, side]) / np.abs(kernels[layer, side]).max()
                for kernels in (before, after)
            ]
            assert [curve[lag] for curve in found] == pytest.approx(pair, abs=0.08), (
                f"layer {layer}, lag {lag}"
            )

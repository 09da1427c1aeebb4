"""Masks, schedule, batches as functions of (seed, step), resuming, many devices."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_bigs as bigs

ROOT = Path(__file__).parents[1]
SMALL = replace(
    bigs.tiny,
    vocab_size=200,
    hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=2,
    max_position_embeddings=32,
    num_ssm=8,
)
RECIPE = bigs.Recipe(
    steps=12, batch=4, length=32, learning_rate=1e-2, save_every=5, evaluate_every=6
)


def random_rows(n=64, L=128, V=1000):
    tokens = np.random.default_rng(0).integers(5, V, (n, L))
    tokens[:, 0] = 2
    tokens[:, -1] = 3
    tokens[:, min(40, L - 2)] = 3
    return bigs.Rows(tokens, V, 4, (0, 2, 3))


class FakeTokenizer:
    """Stands in for a tokenizer where only saving is asked of it."""

    def save_pretrained(self, directory):
        (Path(directory) / "tokenizer.json").write_text("{}")


def dataset():
    rows = random_rows(40, 32, 200)
    return bigs.Dataset(
        FakeTokenizer(), rows, [bigs.batch_at(rows, 8, 9, 0)], "random tokens"
    )


def test_masking_statistics():
    rows = random_rows(2000)
    batch = bigs.mask_tokens(
        rows,
        np.arange(2000),
        np.random.default_rng(1).random((2000, 3, 128), np.float32),
    )
    asked = batch.labels > 0
    original = np.take_along_axis(rows.tokens, batch.positions, 1)
    shown = np.take_along_axis(batch.input_ids, batch.positions, 1)
    assert batch.positions.shape == (2000, 19)
    assert asked.sum(1).max() == 19
    assert np.array_equal(batch.labels[asked], original[asked])
    n = asked.sum()
    masked = (shown == 4)[asked].mean()
    kept = (shown == original)[asked].mean()
    for share, expected in ((masked, 0.8), (kept, 0.1), (1 - masked - kept, 0.1)):
        assert (
            abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n) + 0.001
        )
    changed = batch.input_ids != rows.tokens
    assert not changed[:, [0, 40, 127]].any()  # special tokens stay
    assert all(
        len(set(p[a])) == a.sum() for p, a in zip(batch.positions, asked, strict=True)
    )  # no position twice
    untouched = np.ones(rows.tokens.shape, bool)
    np.put_along_axis(untouched, batch.positions, False, 1)
    assert not (changed & untouched)[:, 1:].any()
    counts = np.bincount(batch.positions[asked], minlength=128)
    assert counts[[0, 40, 127]].sum() == 0
    inner = np.delete(counts, [0, 40, 127])
    assert inner.min() > 0.7 * inner.mean()
    assert inner.max() < 1.3 * inner.mean()


def test_every_row_is_seen_once_an_epoch_and_orders_differ():
    rows = random_rows(16, 32, 200)
    rows = rows._replace(tokens=np.arange(16)[:, None] + np.full((16, 32), 100))
    seen = [
        np.median(bigs.batch_at(rows, 4, 0, step).input_ids, axis=1).tolist()
        for step in range(8)
    ]
    first = sum(seen[:4], [])
    second = sum(seen[4:], [])
    assert sorted(first) == sorted(second) == list(range(100, 116))
    assert first != second


def test_batches_may_cross_epochs():
    rows = random_rows(6, 32, 200)
    assert bigs.batch_at(rows, 4, 0, 1).input_ids.shape == (4, 32)
    assert bigs.batch_at(rows, 16, 0, 0).input_ids.shape == (16, 32)


def test_schedule_endpoints():
    for recipe in bigs.RECIPES.values():
        rate = bigs.schedule(recipe)
        warm = round(recipe.warmup * recipe.steps)
        found = [
            float(rate(step)) for step in (0, warm, recipe.steps, recipe.steps + 5)
        ]
        np.testing.assert_allclose(
            found, np.array([0, 1, 0.1, 0.1]) * recipe.learning_rate, rtol=1e-5
        )
        assert float(rate(warm // 2)) < recipe.learning_rate


def test_loss_ignores_what_is_not_asked():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 7)))
    labels = np.array([[1, 2, 0], [3, 0, 0]])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    by_hand = -(log_p[0, 0, 1] + log_p[1, 0, 2] + log_p[0, 1, 3]) / 3
    np.testing.assert_allclose(bigs.masked_loss(logits, labels), by_hand, rtol=1e-6)
    assert float(bigs.masked_loss(logits, np.zeros((2, 3), int))) == 0


def test_groups_cover_all_parameters():
    model = jax.eval_shape(lambda: bigs.BiGS(SMALL))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(model)]
    ssm = [p for p in paths if bigs.is_ssm(p)]
    assert len(ssm) == 10
    assert {bigs.names_of(p)[-1] for p in ssm} == {"A_re", "A_im", "C", "D", "log_step"}
    assert {bigs.names_of(p)[-1] for p in paths if bigs.is_decayed(p, False)} == {
        "kernel",
        "embedding",
    }
    assert {bigs.names_of(p)[-1] for p in paths if not bigs.is_decayed(p, True)} == {
        "bias",
        "scale",
    }


def test_a_batch_is_learned_by_heart():
    rows = random_rows(4, 32, 200)
    recipe = replace(RECIPE, steps=150, learning_rate=2e-2, weight_decay=0.0)
    state = bigs.fresh_state(replace(SMALL, hidden_dropout_prob=0.0), recipe)
    step = bigs.make_step(recipe)
    batch = None
    batch = bigs.batch_at(rows, 4, 0, 0)
    first = None
    for _ in range(150):
        state, loss = step(state, batch)
        first = first or float(loss)
    assert first > 5
    assert float(loss) < 0.1


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, monkeypatch):
    whole = bigs.pretrain(SMALL, RECIPE, dataset(), tmp_path / "whole")

    class Killed(Exception):
        pass

    steps = []
    make = bigs.make_step

    def mortal(recipe):
        step = make(recipe)

        def once(state, batch):
            steps.append(1)
            if len(steps) == 8:
                raise Killed
            return step(state, batch)

        return once

    monkeypatch.setattr(bigs, "make_step", mortal)
    with pytest.raises(Killed):
        bigs.pretrain(SMALL, RECIPE, dataset(), tmp_path / "cut")
    monkeypatch.setattr(bigs, "make_step", make)
    assert bigs.checkpoints(tmp_path / "cut").latest_step() == 5
    again = bigs.pretrain(SMALL, RECIPE, dataset(), tmp_path / "cut", resume=True)
    for a, b in zip(leaves(whole.model), leaves(again.model), strict=True):
        assert np.array_equal(a, b)
    log = [
        json.loads(line)
        for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in log if "heldout" in r] == [0, 6, 12]
    losses = [[r["heldout"] for r in h if "heldout" in r] for h in (whole.history, log)]
    assert losses[0] == losses[1]


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    old = [
        {"step": 0, "heldout": 9.0},
        {"step": 10, "loss": 8.0},
    ]  # killed before a checkpoint was finished
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in old)
    )
    history = bigs.pretrain(SMALL, RECIPE, dataset(), tmp_path, resume=True).history
    assert [record["step"] for record in history if "heldout" in record] == [0, 6, 12]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "log.jsonl").write_text("{}")
    with pytest.raises(bigs.UserError, match="--resume"):
        bigs.pretrain(SMALL, RECIPE, dataset(), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="step"):
        bigs.pretrain(
            SMALL, replace(RECIPE, steps=30, learning_rate=1e12), dataset(), tmp_path
        )


DEVICES = """
import sys; sys.path.insert(0, sys.argv[1])
import jax, numpy as np
sys.path.insert(0, sys.argv[1] + "/tests")
from test_training import SMALL, RECIPE, random_rows, bigs, leaves
recipe = bigs.replace(RECIPE, batch=8)
state = bigs.fresh_state(bigs.replace(SMALL, hidden_dropout_prob=0.0), recipe)
step = bigs.make_step(recipe)
rows = random_rows(40, 32, 200)
for number in range(4):
    state, loss = step(state, bigs.on_devices(bigs.batch_at(rows, 8, 0, number), 8))
np.savez(sys.argv[2], *leaves(state.model), loss=loss, devices=len(jax.devices()))
"""


def test_one_device_equals_eight(tmp_path):
    found = []
    for count in (1, 8):
        flags = f"--xla_force_host_platform_device_count={count}"
        subprocess.run(
            [sys.executable, "-c", DEVICES, str(ROOT), str(tmp_path / f"{count}.npz")],
            check=True,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
        found.append(np.load(tmp_path / f"{count}.npz"))
    assert [int(f["devices"]) for f in found] == [1, 8]
    for name in set(found[0].files) - {"devices"}:
        # Adam divides by the gradient's own size, so rounding in a tiny gradient may
        # move a parameter by a share of the learning rate; four steps of 1e-2 at most,
        # most parameters not at all.
        difference = np.abs(found[0][name] - found[1][name])
        assert difference.max() < 1e-3 and np.median(difference) < 1e-6, name


def test_adamw_is_optax_adamw():
    """Without groups of its own, the optimizer is the library's AdamW."""
    import optax

    recipe = replace(RECIPE, ssm_decay=True)
    ours = bigs.make_optimizer(recipe)
    theirs = optax.adamw(
        bigs.schedule(recipe),
        b1=0.9,
        b2=0.98,
        eps=1e-6,
        weight_decay=recipe.weight_decay,
        mask={"kernel": True, "bias": False, "forward": {"A_re": True}},
    )
    params = {
        "kernel": jnp.ones(3),
        "bias": jnp.ones(3),
        "forward": {"A_re": -jnp.ones(3)},
    }
    a = ours.init(params)
    b = theirs.init(params)
    for step in range(5):
        grads = jax.tree.map(lambda p, s=step: jnp.sin(p * (s + 1)), params)
        (u, a) = ours.update(grads, a, params)
        (v, b) = theirs.update(grads, b, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), u, v)


def test_recipes_are_those_of_the_paper():
    tokens = {
        name: bigs.RECIPES[name].tokens
        for name in ("documented", "short", "medium", "full", "longer")
    }
    rows = 1048 * 128
    assert tokens["documented"] == 13_414_400_000
    assert tokens["longer"] == 10_000 * 53_248
    for name, wanted in (("short", 11e9), ("medium", 29e9), ("full", 97e9)):
        assert abs(tokens[name] - wanted) <= rows / 2
        assert tokens[name] % rows == 0
    published, annotated = (
        replace(RECIPE, **bigs.GROUPS[name]) for name in ("published", "annotated")
    )
    assert (published.ssm_rate, published.ssm_decay) == (1.0, True)
    assert annotated.ssm_rate > 1
    assert not annotated.ssm_decay


def test_accumulating_equals_the_large_batch():
    rows = random_rows(40, 32, 200)
    plain = replace(SMALL, hidden_dropout_prob=0.0)
    found = []
    for parts in (1, 2, 4):
        recipe = replace(RECIPE, batch=8, accumulate=parts)
        state = bigs.fresh_state(plain, recipe)
        step = bigs.make_step(recipe)
        for number in range(4):
            state, loss = step(state, bigs.batch_at(rows, 8, 0, number))
        found.append([*leaves(state.model), np.asarray(loss)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_remat_gives_the_same_step():
    rows = random_rows(8, 32, 200)
    found = []
    for remat in (False, True):
        recipe = replace(RECIPE, batch=8, remat=remat)
        state, loss = bigs.make_step(recipe)(
            bigs.fresh_state(SMALL, recipe), bigs.batch_at(rows, 8, 0, 0)
        )
        found.append([*leaves(state.model), np.asarray(loss)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_parameters_and_moments_in_float32():
    recipe = replace(RECIPE, batch=8)
    state = bigs.fresh_state(replace(SMALL, dtype="bfloat16"), recipe)
    state, _ = bigs.make_step(recipe)(
        state, bigs.batch_at(random_rows(8, 32, 200), 8, 0, 0)
    )
    kinds = {
        str(leaf.dtype)
        for leaf in jax.tree.leaves(state)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    assert kinds == {"float32"}


def test_the_log_tells_speed_and_share(tmp_path):
    config = replace(SMALL, convolution="toeplitz")
    recipe = replace(RECIPE, log_every=4)
    history = bigs.pretrain(config, recipe, dataset(), tmp_path).history
    lines = [
        json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert lines == history
    assert [r["step"] for r in lines if "loss" in r] == [
        4,
        5,
        8,
        10,
        12,
    ]
    for record in (r for r in lines if "loss" in r):
        flops = (
            record["tokens_per_second"]
            / 32
            * bigs.step_operations(config, recipe)
            / recipe.batch
        )
        assert record["share"] == pytest.approx(
            flops / bigs.product_rate("float32"), rel=0.05, abs=0.001
        )


def test_continuing_on_longer_text_starts_from_the_weights(tmp_path):
    start = bigs.extend(bigs.BiGS(SMALL, seed=5), 64)
    rows = random_rows(40, 64, 200)
    data = bigs.Dataset(
        FakeTokenizer(), rows, [bigs.batch_at(rows, 8, 9, 0)], "random tokens"
    )
    recipe = replace(RECIPE, steps=1, length=64, learning_rate=1e-30)
    run = bigs.pretrain(start.config, recipe, data, tmp_path, start=start)
    for a, b in zip(leaves(start), leaves(run.model), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert bigs.from_pretrained(tmp_path).config.max_position_embeddings == 64


def test_variants_are_compared_seed_by_seed_and_kept(tmp_path, monkeypatch):
    recipe = replace(RECIPE, steps=4, evaluate_every=4)
    loud = replace(SMALL, initializer_range=0.3)  # so that the kernels are heard
    arguments = (
        loud,
        recipe,
        dataset(),
        ("published", "annotated", "bfloat16"),
        2,
        tmp_path,
    )
    first = bigs.compare_variants(*arguments)
    assert [len(found) for found in first.values()] == [2, 2, 2]
    assert len({loss for found in first.values() for loss in found}) == 6
    began = [
        bigs.read_log(tmp_path / f"{name}-1")[0]["heldout"]
        for name in ("published", "annotated")
    ]
    assert began[0] == began[1]  # the same start

    def step(recipe):
        return lambda *_: pytest.fail("a finished run takes no step")

    monkeypatch.setattr(bigs, "make_step", step)
    assert bigs.compare_variants(*arguments) == first


def test_the_published_way_gives_the_same_loss():
    found = bigs.factor_speeds(
        replace(SMALL, num_hidden_layers=1), replace(RECIPE, batch=2), repeats=2
    )
    assert len(found) == 2 + 2 * len(bigs.WAYS)
    assert found["the published way"]["speed"] == 1
    for step in found.values():
        assert step["loss"] == pytest.approx(found["ours"]["loss"], rel=1e-4)
        assert step["seconds"] > 0


def test_losses_of_runs_are_drawn_beside_each_other(tmp_path, capsys):
    for seed in (0, 1):
        bigs.pretrain(
            SMALL,
            replace(RECIPE, steps=4, seed=seed),
            dataset(),
            tmp_path / f"seed{seed}",
        )
    bigs.command_figures((tmp_path / "seed0", tmp_path / "seed1"), output=tmp_path)
    assert (tmp_path / "losses.png").stat().st_size > 5000
    assert "seed1" in capsys.readouterr().out
    curves = bigs.compare_runs((tmp_path / "seed0", tmp_path / "seed1"))().axes[0].lines
    assert len(curves) == 4
    assert curves[0].get_xdata()[-1] == 4 * 4 * 32 / 1e6
    with pytest.raises(bigs.UserError, match="holds no run"):
        bigs.command_figures((tmp_path,))

"""Masks, schedule, batches as functions of (seed, step), resuming, many devices."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import annotated_bigs as bigs
from workshop import benchmark, commands, running

PLAIN = replace(small.CONFIG, hidden_dropout_prob=0.0)
pytestmark = pytest.mark.usefixtures("one_step")


def steps_of(config, recipe, count):
    """The parameters and the loss after some steps, each on a batch of its own."""
    rows = small.random_rows()
    state = bigs.fresh_state(config, recipe)
    step = bigs.make_step(recipe, bigs.fast_loss_of(recipe))
    for number in range(count):
        batch = bigs.batch_at(rows, recipe.batch, 0, number)
        state, loss = step(state, batch)
    return [*small.leaves(state.model), np.asarray(loss)]


def log_of(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# Batches


@pytest.fixture(scope="module")
def masked():
    """Two thousand rows of 128 tokens, and the batch that masks them."""
    rows = small.random_rows(2000, 128, 1000)
    numbers = np.random.default_rng(1).random((2000, 3, 128), np.float32)
    return rows, bigs.mask_tokens(rows, np.arange(2000), numbers)


def test_masking_statistics(masked):
    """Of the masked positions 80 % show [MASK], 10 % their own token, 10 % another."""
    rows, batch = masked
    asked = batch.labels > 0
    original = np.take_along_axis(rows.tokens, batch.positions, 1)
    shown = np.take_along_axis(batch.input_ids, batch.positions, 1)

    assert batch.positions.shape == (2000, 19)  # 15 % of 128
    assert asked.sum(1).max() == 19
    assert np.array_equal(batch.labels[asked], original[asked])
    count = asked.sum()
    mask = (shown == 4)[asked].mean()
    kept = (shown == original)[asked].mean()
    for share, expected in ((mask, 0.8), (kept, 0.1), (1 - mask - kept, 0.1)):
        deviation = np.sqrt(expected * (1 - expected) / count)
        assert abs(share - expected) < 4 * deviation + 0.001


def test_nothing_but_masked_positions_changes(masked):
    rows, batch = masked
    untouched = np.ones(rows.tokens.shape, bool)
    np.put_along_axis(untouched, batch.positions, False, 1)

    changed = batch.input_ids != rows.tokens

    assert not (changed & untouched)[:, 1:].any()
    assert not changed[:, [0, 40, 127]].any()  # special tokens stay


def test_masked_positions_are_drawn_evenly_and_none_twice(masked):
    _, batch = masked
    asked = batch.labels > 0

    counts = np.bincount(batch.positions[asked], minlength=128)

    assert counts[[0, 40, 127]].sum() == 0
    inner = np.delete(counts, [0, 40, 127])
    assert inner.min() > 0.7 * inner.mean()
    assert inner.max() < 1.3 * inner.mean()
    for positions, chosen in zip(batch.positions, asked, strict=True):
        assert np.unique(positions[chosen]).size == chosen.sum()


def test_every_row_is_seen_once_an_epoch_and_orders_differ():
    numbers = np.arange(100, 116)
    numbered = np.repeat(numbers[:, None], 32, axis=1)
    rows = small.random_rows(16)._replace(tokens=numbered)

    batches = [bigs.batch_at(rows, 4, 0, step) for step in range(8)]

    seen = np.median([batch.input_ids for batch in batches], axis=2)
    first = seen[:4].ravel().tolist()
    second = seen[4:].ravel().tolist()
    assert sorted(first) == list(range(100, 116))
    assert sorted(second) == list(range(100, 116))
    assert first != second


def test_batches_may_cross_epochs():
    rows = small.random_rows(6)
    beyond = bigs.batch_at(rows, 4, 0, 1)
    larger = bigs.batch_at(rows, 16, 0, 0)
    assert beyond.input_ids.shape == (4, 32)
    assert larger.input_ids.shape == (16, 32)


# Schedule, loss, optimizer


@pytest.mark.parametrize("name", bigs.RECIPES)
def test_schedule_endpoints(name):
    recipe = bigs.RECIPES[name]
    rate = bigs.schedule(recipe)
    warm = round(recipe.warmup * recipe.steps)

    steps = (0, warm, recipe.steps, recipe.steps + 5)
    found = [float(rate(step)) for step in steps]

    wanted = np.array([0, 1, recipe.end, recipe.end]) * recipe.learning_rate
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert float(rate(warm // 2)) < recipe.learning_rate


def test_loss_ignores_what_is_not_asked():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 7)))
    labels = np.array([[1, 2, 0], [3, 0, 0]])

    loss = bigs.masked_loss(logits, labels)

    log_p = np.asarray(jax.nn.log_softmax(logits))
    asked = [log_p[0, 0, 1], log_p[0, 1, 2], log_p[1, 0, 3]]
    np.testing.assert_allclose(loss, -np.mean(asked), rtol=1e-6)


def test_loss_of_nothing_is_zero():
    logits = jnp.ones((2, 3, 7))
    assert bigs.masked_loss(logits, np.zeros((2, 3), int)) == 0


def test_groups_cover_all_parameters():
    model = jax.eval_shape(lambda: bigs.BiGS(small.CONFIG))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(model)]

    def last_names(chosen):
        return {bigs.names_of(path)[-1] for path in chosen}

    ssm = [path for path in paths if bigs.is_ssm(path)]
    decayed = [path for path in paths if bigs.is_decayed(path, False)]
    spared = [path for path in paths if not bigs.is_decayed(path, True)]
    assert len(ssm) == 10
    assert last_names(ssm) == {"A_re", "A_im", "C", "D", "log_step"}
    assert last_names(decayed) == {"kernel", "embedding"}
    assert last_names(spared) == {"bias", "scale"}


def test_adamw_is_optax_adamw():
    """Without groups of its own, the optimizer is the library's AdamW."""
    recipe = replace(small.RECIPE, ssm_decay=True)
    ours = bigs.make_optimizer(recipe)
    theirs = optax.adamw(
        bigs.schedule(recipe),
        b1=0.9,
        b2=0.98,
        eps=1e-6,
        weight_decay=recipe.weight_decay,
        mask={"kernel": True, "bias": False, "forward": {"A_re": True}},
    )
    ones = jnp.ones(3)
    params = {"kernel": ones, "bias": ones, "forward": {"A_re": -ones}}
    our_state = ours.init(params)
    their_state = theirs.init(params)
    for step in range(1, 6):
        grads = jax.tree.map(lambda p, s=step: jnp.sin(p * s), params)
        our_update, our_state = ours.update(grads, our_state, params)
        their_update, their_state = theirs.update(grads, their_state, params)
        for a, b in zip(*map(small.leaves, (our_update, their_update)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_recipes_are_those_of_the_paper():
    """Their tokens, to the nearest step of 1048 rows of 128 tokens."""
    step = 1048 * 128
    assert bigs.RECIPES["documented"].tokens == 13_414_400_000
    assert bigs.RECIPES["documented"].warmup == 0.02
    assert bigs.RECIPES["longer"].tokens == 10_000 * 53_248
    for name, tokens in (("short", 11e9), ("medium", 29e9), ("full", 97e9)):
        found = bigs.RECIPES[name].tokens
        assert abs(found - tokens) <= step / 2
        assert found % step == 0
    for name in ("documented", "documented-small"):
        assert bigs.RECIPES[name].ssm_rate == 1.0
        assert bigs.RECIPES[name].ssm_decay
        assert bigs.RECIPES[name].start == 0.02
        assert not bigs.RECIPES[name].matrix_rate
    assert not bigs.RECIPES["annotated"].ssm_decay


@pytest.mark.parametrize("kind", [bigs.Recipe, bigs.Tuning])
def test_a_negative_decay_is_refused(kind):
    with pytest.raises(bigs.UserError, match="weight_decay: -1.0 is negative"):
        kind(weight_decay=-1.0)


# Steps


def test_a_batch_is_learned_by_heart():
    recipe = replace(small.RECIPE, steps=150, learning_rate=2e-2, weight_decay=0.0)
    state = bigs.fresh_state(PLAIN, recipe)
    step = bigs.make_step(recipe)
    batch = bigs.batch_at(small.random_rows(4), 4, 0, 0)
    losses = []
    for _ in range(150):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert losses[0] > 5
    assert losses[-1] < 0.1


@pytest.mark.slow
def test_accumulating_equals_the_large_batch():
    at_once, *in_parts = (
        steps_of(PLAIN, replace(small.RECIPE, batch=8, accumulate=parts), 4)
        for parts in (1, 2, 4)
    )
    for found in in_parts:
        for a, b in zip(at_once, found, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_remat_gives_the_same_step():
    stored, computed_again = (
        steps_of(small.CONFIG, replace(small.RECIPE, batch=8, remat=remat), 1)
        for remat in (False, True)
    )
    for a, b in zip(stored, computed_again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_parameters_and_moments_in_float32():
    recipe = replace(small.RECIPE, batch=8)
    state = bigs.fresh_state(replace(small.CONFIG, dtype="bfloat16"), recipe)
    batch = bigs.batch_at(small.random_rows(), 8, 0, 0)

    state, _ = bigs.make_step(recipe)(state, batch)

    kinds = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert {kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)} == {
        jnp.dtype("float32")
    }


def test_one_device_equals_eight(tmp_path):
    found = {}
    for count in (1, 8):
        file = tmp_path / f"{count}.npz"
        flags = f"--xla_force_host_platform_device_count={count}"
        subprocess.run(
            [sys.executable, small.ROOT / "tests" / "devices.py", file],
            check=True,
            env=os.environ
            | {
                "PYTHONPATH": str(small.ROOT),
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
                "JAX_PLATFORMS": "cpu",
            },
        )
        found[count] = dict(np.load(file))
        assert found[count].pop("devices") == count
    for name, alone in found[1].items():
        # Adam divides by the gradient's own size, so rounding in a tiny gradient may
        # move a parameter by a share of the learning rate; four steps of 1e-2 at most,
        # most parameters not at all.
        difference = np.abs(alone - found[8][name])
        assert difference.max() < 1e-3, name
        assert np.median(difference) < 1e-6, name


# Runs


class Killed(Exception):
    pass


def killed_at(count, make_step):
    """make_step whose step raises instead of being taken for the count-th time."""
    taken = []

    def mortal(recipe, loss):
        step = make_step(recipe, loss)

        def once(state, batch):
            taken.append(1)
            if len(taken) == count:
                raise Killed
            return step(state, batch)

        return once

    return mortal


def heldout_of(log):
    found = {}
    for record in log:
        if "heldout" in record:
            found[record["step"]] = record["heldout"]
    return found


def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, monkeypatch):
    data = small.dataset()
    whole = running.pretrain(small.CONFIG, small.RECIPE, data, tmp_path / "whole")
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(bigs, "make_step", killed_at(8, bigs.make_step))
        running.pretrain(small.CONFIG, small.RECIPE, data, cut)
    assert running.checkpoints(cut).latest_step() == 5

    again = running.pretrain(small.CONFIG, small.RECIPE, data, cut, resume=True)

    for a, b in zip(*map(small.leaves, (whole.model, again.model)), strict=True):
        assert np.array_equal(a, b)
    assert list(heldout_of(whole.history)) == [0, 6, 12]
    assert heldout_of(log_of(cut)) == heldout_of(whole.history)


def test_a_batch_that_devices_cannot_share_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 3)
    message = "batch: 4 sequences cannot be shared by 3"
    with pytest.raises(bigs.UserError, match=message):
        running.pretrain(small.CONFIG, small.RECIPE, small.dataset(), tmp_path)


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    """It was killed before its first checkpoint was finished."""
    settings = {
        "config": asdict(small.CONFIG),
        "recipe": asdict(small.RECIPE),
        "data": {"text": small.dataset().identity, "start": None},
    }
    with running.claimed(tmp_path, settings, False):
        (tmp_path / "checkpoints").mkdir()
    old = [{"step": 0, "heldout": 9.0}, {"step": 10, "loss": 8.0}]
    lines = [json.dumps(record) + "\n" for record in old]
    (tmp_path / "log.jsonl").write_text("".join(lines))

    run = running.pretrain(
        small.CONFIG, small.RECIPE, small.dataset(), tmp_path, resume=True
    )

    assert list(heldout_of(run.history)) == [0, 6, 12]
    assert run.history[0]["heldout"] != 9.0


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(bigs.UserError, match="--resume"):
        running.pretrain(small.CONFIG, small.RECIPE, small.dataset(), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    recipe = replace(small.RECIPE, steps=30, learning_rate=1e12)
    with pytest.raises(FloatingPointError, match="step"):
        running.pretrain(small.CONFIG, recipe, small.dataset(), tmp_path)


def test_a_run_in_a_folder_is_the_loop_of_the_story(tmp_path):
    told = bigs.pretrain(small.CONFIG, small.RECIPE, small.dataset())
    kept = running.pretrain(small.CONFIG, small.RECIPE, small.dataset(), tmp_path)

    for a, b in zip(*map(small.leaves, (told.model, kept.model)), strict=True):
        np.testing.assert_array_equal(a, b)
    heldout = [
        [(r["step"], r["heldout"]) for r in run.history if "heldout" in r]
        for run in (told, kept)
    ]
    assert heldout[0] == heldout[1]


def test_the_log_tells_speed_and_share(tmp_path):
    config = replace(small.CONFIG, convolution="toeplitz")
    recipe = replace(small.RECIPE, log_every=4)

    history = running.pretrain(config, recipe, small.dataset(), tmp_path).history

    assert log_of(tmp_path) == history
    steps = [record for record in history if "loss" in record]
    assert [record["step"] for record in steps] == [4, 5, 8, 10, 12]
    operations = running.step_operations(config, recipe) / recipe.batch
    for record in steps:
        rows_per_second = record["tokens_per_second"] / 32
        share = rows_per_second * operations / running.product_rate("float32")
        assert record["share"] == pytest.approx(share, rel=0.05, abs=0.001)


def test_continuing_on_longer_text_starts_from_the_weights(tmp_path):
    start = bigs.extend(bigs.BiGS(small.CONFIG, seed=5), 64)
    recipe = replace(small.RECIPE, steps=1, length=64, learning_rate=1e-30)

    run = running.pretrain(
        start.config, recipe, small.dataset(64), tmp_path, start=start
    )

    for a, b in zip(*map(small.leaves, (start, run.model)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert bigs.from_pretrained(tmp_path).config.max_position_embeddings == 64


@pytest.mark.slow
def test_the_published_way_takes_the_same_steps():
    config = replace(small.CONFIG, num_hidden_layers=1)
    recipe = replace(small.RECIPE, batch=2)
    losses = []
    for ways in (benchmark.WAYS, ()):
        own = replace(config, convolution="fft" if ways else "auto")
        state = bigs.fresh_state(own, recipe)
        step = benchmark.step_by(ways, recipe)
        for number in range(3):
            batch = bigs.batch_at(small.random_rows(), 2, 0, number)
            state, loss = step(state, batch)
            losses.append(float(loss))
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)


@pytest.mark.slow
def test_every_change_of_the_published_way_gives_the_same_loss():
    config = replace(small.CONFIG, num_hidden_layers=1)

    recipe = replace(small.RECIPE, batch=2)
    found = benchmark.factor_speeds(config, recipe, repeats=2)

    assert len(found) == 4 + 2 * len(benchmark.WAYS)
    ours = found["ours"]["loss"]
    for step in found.values():
        assert step["loss"] == pytest.approx(ours, rel=1e-4)
        assert step["seconds"] > 0


@pytest.mark.slow
def test_losses_of_runs_are_drawn_beside_each_other(tmp_path, capsys):
    runs = (tmp_path / "seed0", tmp_path / "seed1")
    for seed, output in enumerate(runs):
        recipe = replace(small.RECIPE, steps=4, seed=seed)
        running.pretrain(small.CONFIG, recipe, small.dataset(), output)

    commands.command_figures(runs, output=tmp_path)

    assert (tmp_path / "losses.png").stat().st_size > 5000
    assert "seed1" in capsys.readouterr().out
    curves = commands.compare_runs(runs)().axes[0].lines
    assert len(curves) == 4
    tokens = 4 * small.RECIPE.batch * small.RECIPE.length
    assert curves[0].get_xdata()[-1] == tokens / 1e6


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(bigs.UserError, match="holds no run"):
        commands.command_figures((tmp_path,))

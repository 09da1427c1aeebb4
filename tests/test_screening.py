"""The screening of recipes: what each way changes, and that finished runs are kept."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_bigs as bigs
from workshop import screening

SMALL = replace(
    bigs.boxed,
    vocab_size=60,
    hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=2,
    num_ssm=8,
)


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setattr(bigs, "boxed", SMALL)


@pytest.fixture
def data():
    tokens = np.random.default_rng(0).integers(5, 60, (64, 128))
    rows = bigs.Rows(tokens, 60, 4, (0, 2, 3))
    return bigs.Dataset(None, rows, [bigs.batch_at(rows, 8, 9, 0)], "random", "r")


def moved(way: screening.Way, gradient: float) -> bigs.BiGS:
    """How far two steps move each parameter under the same gradient for all."""
    optimizer = screening.make_optimizer(way, steps=4)
    model = screening.initial_model(way, seed=0)
    moments = optimizer.init(model)
    gradients = jax.tree.map(lambda w: jnp.full_like(w, gradient), model)
    for _ in range(2):
        updates, moments = optimizer.update(gradients, moments, model)
    return updates


def test_muon_takes_the_matrices_of_the_layers_and_adam_all_else():
    updates = moved(screening.Way(rate=1.0, adam_rate=1e-3, decay=0.0), 1.0)
    layers = updates.encoder.layers
    assert float(abs(layers.W_u.kernel[...]).max()) > 0.01
    for other in (layers.W_u.bias, layers.norm.scale, updates.encoder.words.embedding):
        np.testing.assert_allclose(abs(other[...]), 1e-3, rtol=1e-3)


def test_each_layer_is_orthogonalized_by_itself():
    updates = moved(screening.Way(rate=1.0, decay=0.0), 1.0)
    kernel = np.asarray(updates.encoder.layers.W_v.kernel[...])
    np.testing.assert_allclose(kernel[0], kernel[1], rtol=1e-4)
    assert np.linalg.matrix_rank(kernel[0], tol=1e-3) == 1  # as the gradient's is


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("ssm_decay", [False, True])
def test_decay_reaches_the_ssms_only_if_asked(optimizer, ssm_decay):
    way = screening.Way(optimizer=optimizer, decay=0.5, ssm_decay=ssm_decay)
    updates = moved(way, 0.0)
    layers = updates.encoder.layers
    assert bool(layers.W_u.kernel[...].any())
    assert bool(layers.forward.A_re[...].any()) == ssm_decay
    assert not layers.W_u.bias[...].any()


def test_frozen_positions_stay_at_zero():
    way = screening.Way(positions=False)
    assert not screening.initial_model(way, 0).encoder.positions.embedding[...].any()
    assert not moved(way, 1.0).encoder.positions.embedding[...].any()
    assert moved(screening.Way(), 1.0).encoder.positions.embedding[...].any()


def test_steps_are_spread_evenly_over_layers_and_directions():
    layers = screening.initial_model(screening.Way(even_steps=True), 0).encoder.layers
    both = [side.log_step[...].ravel() for side in (layers.forward, layers.backward)]
    found = np.sort(np.concatenate(both))
    np.testing.assert_allclose(np.diff(found), np.log(100) / 4, rtol=1e-5)
    assert np.log(0.01) < found[0] < found[-1] < 0


@pytest.mark.parametrize(
    ("schedule", "last"), [("cosine", 0.1), ("zero", 0), ("wsd", 0)]
)
def test_schedules_rise_and_end(schedule, last):
    way = screening.Way(schedule=schedule, warmup=0.1)
    rate = screening.learning_rate(way, 100, 2.0)
    found = [float(rate(step)) for step in (0, 5, 10, 100)]
    np.testing.assert_allclose(found, [0.0, 1.0, 2.0, 2.0 * last], atol=1e-6)
    assert (float(rate(75)) == 2.0) == (schedule == "wsd")


def test_the_share_of_chosen_and_of_kept_words(data):
    numbers = np.arange(64)
    batch = screening.masked_batch(data.train, numbers, 0, 0.3, 0.0)
    shown = np.take_along_axis(batch.input_ids, batch.positions, 1)
    assert batch.positions.shape == (64, 38)
    assert (shown == data.train.mask_id).all()


@pytest.mark.slow
def test_a_finished_run_is_not_made_again(tmp_path, data, monkeypatch):
    made = []

    def train(run, _):
        made.append(run)
        return {"heldout": 5.0 - run.way.rate}

    monkeypatch.setattr(screening, "train", train)
    output = tmp_path / "runs.jsonl"
    runs = screening.screen(data, output)
    first = [next(runs) for _ in range(3)]
    runs.close()  # killed
    rest = list(screening.screen(data, output))
    assert made == first + rest
    assert len({run.key() for run in made}) == len(made)
    assert {run.key() for run in made} == set(screening.finished(output))
    base = next(run for run in rest if run.name == "none")
    assert base.way.rate == 0.04  # the best of the three
    assert base.seed != screening.SEED_OF_RATES


@pytest.mark.slow
def test_a_run_learns(data):
    run = screening.Run("small", screening.Way(batches=(4,)), 0, tokens=16 * 128 * 4)
    found = screening.train(run, data)
    assert found["steps"] == 16
    assert [point["tokens"] for point in found["curve"]][-1] == 16 * 128 * 4
    assert found["heldout"] < found["curve"][0]["heldout"]


def test_a_folder_without_held_out_shards_is_named(tmp_path):
    (tmp_path / "one.jsonl.xz").touch()
    with pytest.raises(bigs.UserError, match=f"text: {tmp_path} needs shards"):
        screening.text_files(tmp_path)

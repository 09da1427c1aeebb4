"""The screening of recipes: what each way changes, that runs made side by side are
those made alone, and that finished runs are kept.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import annotated_bigs as bigs
from workshop import arms, screening
from workshop.screening import Run, Way

SMALL = replace(
    bigs.small,
    vocab_size=60,
    hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=2,
    num_ssm=8,
)


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setattr(bigs, "small", SMALL)


@pytest.fixture
def data():
    tokens = np.random.default_rng(0).integers(5, 60, (64, 128))
    rows = bigs.Rows(tokens, 60, 4, (0, 2, 3))
    heldout = [bigs.batch_at(rows, 8, 9, 0)]
    return bigs.Dataset(None, rows, heldout, "random", "r")


def numbers(way: Way, seed: int = 0, steps: int = 4) -> screening.Numbers:
    return screening.in_numbers(Run("", way, seed), SMALL, steps)


def fresh(way: Way) -> bigs.BiGS:
    return screening.initial_model(SMALL, numbers(way))


def moved(way: Way, gradient: float) -> bigs.BiGS:
    """How far the second step moves each parameter under the same gradient for all."""
    model = fresh(way)
    inside = numbers(way)
    moments = screening.make_optimizer(way.optimizer, inside).init(model)
    gradients = jax.tree.map(lambda w: jnp.full_like(w, gradient), model)
    for step in range(2):
        optimizer = screening.make_optimizer(way.optimizer, inside, step)
        updates, moments = optimizer.update(gradients, moments, model)
    return updates


def assert_alike(found, wanted, rtol, atol=1e-7):
    """Two trees, leaf by leaf."""
    found = jax.tree.leaves(found)
    wanted = jax.tree.leaves(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert_allclose(a, b, rtol=rtol, atol=atol)


def test_muon_takes_the_matrices_of_the_layers_and_adam_all_else():
    way = Way(rate=1.0, adam_rate=1e-3, decay=0.0)
    updates = moved(way, 1.0)
    layers = updates.encoder.layers
    assert float(abs(layers.W_u.kernel[...]).max()) > 0.01
    for other in (layers.W_u.bias, layers.norm.scale, updates.encoder.words.embedding):
        assert_allclose(abs(other[...]), 1e-3, rtol=1e-3)


def test_each_layer_is_orthogonalized_by_itself():
    way = Way(rate=1.0, decay=0.0)
    updates = moved(way, 1.0)
    kernel = np.asarray(updates.encoder.layers.W_v.kernel[...])
    assert_allclose(kernel[0], kernel[1], rtol=1e-4)
    assert np.linalg.matrix_rank(kernel[0], tol=1e-3) == 1  # as the gradient's is


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("ssm_decay", [False, True])
def test_decay_reaches_the_ssms_only_if_asked(optimizer, ssm_decay):
    way = Way(optimizer=optimizer, decay=0.5, ssm_decay=ssm_decay)
    updates = moved(way, 0.0)
    layers = updates.encoder.layers
    matrix = layers.W_u.kernel[...]
    poles = layers.forward.A_re[...]
    bias = layers.W_u.bias[...]
    assert matrix.any()
    assert poles.any() == ssm_decay
    assert not bias.any()


def test_frozen_positions_stay_at_zero():
    way = Way(positions=False)
    assert not fresh(way).encoder.positions.embedding[...].any()
    assert not moved(way, 1.0).encoder.positions.embedding[...].any()
    assert moved(Way(), 1.0).encoder.positions.embedding[...].any()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_optimizer_is_that_of_pretraining(optimizer):
    """Where the recipe can say the same: two steps, parameter by parameter."""
    muon = optimizer == "muon"
    way = Way(optimizer=optimizer, ssm_rate=2.0, ssm_decay=True, warmup=0.25)
    recipe = bigs.Recipe(
        steps=4,
        learning_rate=way.adam_rate,
        matrix_rate=way.rate if muon else 0.0,
        ssm_rate=2.0,
        weight_decay=way.decay,
        warmup=0.25,
        beta2=way.b2,
        epsilon=way.eps,
    )
    model = fresh(way)
    theirs = bigs.make_optimizer(recipe)
    moments = theirs.init(model)
    gradients = jax.tree.map(jnp.ones_like, model)
    for _ in range(2):
        wanted, moments = theirs.update(gradients, moments, model)
    assert_alike(moved(way, 1.0), wanted, rtol=1e-4)


def test_a_start_is_that_of_the_model():
    start = fresh(Way(start=0.02))
    config = replace(SMALL, initializer_range=0.02)
    wanted = bigs.BiGS(config, seed=0)
    wanted.head.dense.kernel[...] *= 0.02  # as its docstring says
    assert_alike(start, wanted, rtol=1e-5)


def test_steps_are_spread_evenly_over_layers_and_directions():
    layers = fresh(Way(even_steps=True)).encoder.layers
    both = [side.log_step[...].ravel() for side in (layers.forward, layers.backward)]
    found = np.sort(np.concatenate(both))
    assert_allclose(np.diff(found), np.log(100) / 4, rtol=1e-5)
    assert np.log(0.01) < found[0] < found[-1] < 0


@pytest.mark.parametrize(
    ("schedule", "last"), [("cosine", 0.1), ("zero", 0), ("wsd", 0)]
)
def test_schedules_rise_and_end(schedule, last):
    way = Way(schedule=schedule, warmup=0.1)
    rate = screening.learning_rate(way, 100, 2.0)
    found = [float(rate(step)) for step in (0, 5, 10, 100)]
    wanted = [0.0, 1.0, 2.0, 2.0 * last]
    assert_allclose(found, wanted, atol=1e-6)
    stays = float(rate(75)) == 2.0
    assert stays == (schedule == "wsd")


def test_the_share_of_chosen_and_of_kept_words(data):
    rows = np.arange(64)
    random = np.stack([bigs.random_numbers(0, 0, row, 128) for row in range(64)])
    shares = np.where(rows < 32, 0.3, 0.15)
    batch = screening.masked_batch(data.train, rows, random, shares, 0.0, 38)
    asked = batch.labels > 0
    assert asked.sum(1).tolist() == [38] * 32 + [19] * 32
    shown = np.take_along_axis(batch.input_ids, batch.positions, 1)
    assert (shown[asked] == data.train.mask_id).all()
    whole = np.take_along_axis(data.train.tokens, batch.positions, 1)
    assert (shown[~asked] == whole[~asked]).all()


def test_batches_follow_the_order_of_pretraining(data):
    kind = (5, (0.15,), 0.1)
    made = screening.masked_rows(data, kind, range(1, 3), [4] * 8, 19)
    for step, number in enumerate((1, 2)):
        wanted = bigs.batch_at(data.train, 4, 5, number)
        np.testing.assert_array_equal(made.input_ids[step], wanted.input_ids)
        assert sorted(made.labels[step].ravel()) == sorted(wanted.labels.ravel())


@pytest.mark.slow
def test_runs_side_by_side_are_those_made_alone(data):
    ways = [
        Way(batches=(4,)),
        Way(batches=(4,), rate=0.01, masking=(0.3,)),
    ]
    tokens = 8 * 128 * 4
    runs = [Run("small", way, seed, tokens) for seed, way in enumerate(ways)]
    together = screening.train(runs, data)
    for run, found in zip(runs, together, strict=True):
        (alone,) = screening.train([run], data)
        assert found["heldout"] == pytest.approx(alone["heldout"], abs=1e-4)
    assert together[0]["heldout"] != together[1]["heldout"]


@pytest.mark.slow
def test_a_run_learns(data):
    kept = []
    way = Way(batches=(4,))
    run = Run("small", way, 0, tokens=16 * 128 * 4)
    (found,) = screening.train([run], data, kept.append)
    assert found["steps"] == 16
    last = found["curve"][-1]
    assert last["tokens"] == run.tokens
    assert found["heldout"] < np.log(60)
    model = jax.tree.map(lambda leaf: leaf[0], kept[0])
    losses = [bigs.fast_loss(model, batch) for batch in data.heldout]
    assert found["heldout"] == pytest.approx(float(np.mean(losses)), abs=1e-4)


@pytest.mark.slow
def test_a_finished_run_is_not_made_again(tmp_path, data, monkeypatch):
    made = []

    def train(runs, _):
        made.extend(runs)
        return [{"heldout": 5.0 - run.way.rate - run.way.adam_rate} for run in runs]

    monkeypatch.setattr(screening, "train", train)
    output = tmp_path / "runs.jsonl"
    runs = screening.screen(data, output, together=2)
    first = [next(runs) for _ in range(4)]
    runs.close()  # killed
    rest = list(screening.screen(data, output, together=40))
    assert made == first + rest
    assert len({run.key() for run in made}) == len(made)
    assert {run.key() for run in made} == set(screening.finished(output))
    base = next(run for run in rest if run.name == "none")
    assert (base.way.rate, base.way.adam_rate) == (0.04, 8e-3)  # the best
    assert base.seed != screening.SEED_OF_RATES


def test_the_recorded_runs_are_those_of_the_screening():
    """What data/screening.jsonl holds is complete: nothing would be run again."""
    found = screening.finished(bigs.DATA / "screening.jsonl")
    wanted = [run for runs in screening.PHASES.values() for run in runs(found)]
    assert {run.key() for run in wanted} == set(found)


def test_runs_of_another_text_are_not_taken_over(tmp_path, data):
    output = tmp_path / "runs.jsonl"
    output.write_text(json.dumps({"key": "k", "text": "other", "heldout": 5.0}))
    with pytest.raises(bigs.UserError, match="read another text"):
        next(screening.screen(data, output))


def test_a_broken_line_of_the_output_is_named(tmp_path):
    output = tmp_path / "runs.jsonl"
    output.write_text('{"key": "k"}\n')
    with pytest.raises(bigs.UserError, match="runs.jsonl, line 1: no finished run"):
        screening.finished(output)


@pytest.mark.parametrize("phase", ["alone", "changes", "again", "longer"])
def test_rates_come_first(tmp_path, data, phase):
    with pytest.raises(bigs.UserError, match="phases: .* rates"):
        next(screening.screen(data, tmp_path / "runs.jsonl", phases=[phase]))


def test_mistakes_of_the_command_are_lines(tmp_path, monkeypatch, capsys):
    usual = ["screening", "--text", str(tmp_path), "--output", str(tmp_path / "o")]
    for more, message in ((["--together", "0"], "positive"), ([], "needs shards")):
        monkeypatch.setattr("sys.argv", usual + more)
        with pytest.raises(SystemExit, match="2"):
            screening.main()
        assert message in capsys.readouterr().err


def test_a_folder_without_held_out_shards_is_named(tmp_path):
    (tmp_path / "one.jsonl.xz").touch()
    with pytest.raises(bigs.UserError, match=f"text: {tmp_path} needs shards"):
        screening.text_files(tmp_path)


@pytest.mark.parametrize("name", arms.of_one_size(bigs.tiny))
def test_the_layers_of_a_comparison_have_a_plain_and_a_fast_form(name):
    small = replace(SMALL, num_attention_heads=2)
    config = arms.of_one_size(small)[name].config
    model = jax.tree.map(lambda w: 4 * w, bigs.BiGS(config))
    tokens = np.arange(5, 45).reshape(4, 10)
    rows = bigs.Rows(tokens, 60, 4, (0, 2, 3))
    batch = bigs.batch_at(rows, 4, 0, 0)
    plain = jax.value_and_grad(bigs.batch_loss)(model, batch)
    fast = jax.value_and_grad(bigs.fast_loss)(model, batch)
    assert_alike(plain, fast, rtol=2e-3, atol=2e-5)

"""GLUE: official files and broken ones, measures, the loop of fine-tuning, and the
command from files to answers.
"""

import gzip
import itertools
import json
import shutil
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import annotated_bigs as bigs
from workshop import commands, corpora, glue

REAL = Path(__file__).parents[2] / "shared/data/glue"
ROWS = {
    "cola": {"train": 8551, "dev": 1043, "test": 1063},
    "sst2": {"train": 67349, "dev": 872, "test": 1821},
    "mrpc": {"train": 3668, "dev": 408, "test": 1725},
    "stsb": {"train": 5749, "dev": 1500, "test": 1379},
    "rte": {"train": 2490, "dev": 277, "test": 3000},
    "wnli": {"train": 635, "dev": 71, "test": 146},
    "qnli": {"dev": 5463, "test": 5463},
    "mnli": {"train": 9882, "dev_matched": 9815, "diagnostic": 1104},
}
COUNTS = {
    ("mnli", "dev_matched"): [3479, 3123, 3213],
    ("mrpc", "train"): [1194, 2474],
    ("mrpc", "dev"): [129, 279],
}
SPLITS = {
    "mnli": ("train", "dev_matched", "test_matched"),
    "rte": ("train", "dev", "test"),
    "cola": ("train", "dev", "test"),
    "stsb": ("train", "dev", "test"),
}
COLUMNS = {
    "mnli": (
        *("index", "promptID", "pairID", "genre", "parse1", "parse2"),
        *("sentence1", "sentence2", "label1", "gold_label"),
    ),
    "rte": ("index", "sentence1", "sentence2", "label"),
    "cola": ("source", "label", "mark", "sentence"),
    "stsb": (
        *("index", "genre", "filename", "year", "old_index", "source1", "source2"),
        *("sentence1", "sentence2", "score"),
    ),
}
COLA = b"".join(b"gj04\t1\t\tRain %d.\n" % number for number in range(8551))
PACK = {"": bytes, ".gz": gzip.compress}
WORDS = [
    *("red", "blue", "green", "house", "river", "tree"),
    *("bird", "sings", "stands", "flows", "old", "new"),
]
TOKENIZER = bigs.train_tokenizer([" ".join(WORDS)] * 20, 120)
CONFIG = bigs.Config(len(TOKENIZER), 16, 1, 48, 64, num_ssm=4, hidden_dropout_prob=0.0)


def toy_examples():
    """Five batches of eight texts; the first of their words tells the label."""
    rng = np.random.default_rng(0)
    texts = []
    for number in range(40):
        others = rng.choice(WORDS, rng.integers(1, 13))
        texts.append((" ".join([WORDS[number % 6], *others]),))
    labels = np.arange(40) % 6 % 2
    return bigs.encode(texts, labels, TOKENIZER, 64)


TOY = toy_examples()


# Files


@pytest.mark.skipif(
    not REAL.is_dir(), reason="GLUE's official files are not beside the project"
)
@pytest.mark.parametrize("name", ROWS)
def test_official_files_are_read_whole(name, capsys):
    task = bigs.GLUE[name]

    splits = glue.task_texts(name, REAL)

    assert {split: len(found.texts) for split, found in splits.items()} == ROWS[name]
    for split, (texts, labels) in splits.items():
        assert {len(text) for text in texts} == {len(task.texts)}
        assert all(map(all, texts))
        if split in ("test", "diagnostic"):
            assert labels is None
            continue
        assert len(labels) == len(texts)
        if task.labels:
            assert np.unique(labels).tolist() == list(range(len(task.labels)))
        else:
            assert labels.min() == 0
            assert labels.max() == 5
        if (name, split) in COUNTS:
            assert np.bincount(labels).tolist() == COUNTS[name, split]
    told = capsys.readouterr().err
    if name == "mnli":
        sample = REAL / "MNLI_partial/train_sample.tsv.gz"
        assert told == f"{sample}: 9882 rows, the official file has 392702\n"
    else:
        assert told == ""


@pytest.mark.skipif(
    not REAL.is_dir(), reason="GLUE's official files are not beside the project"
)
def test_wnli_asks_again_with_the_other_answer():
    splits = glue.task_texts("wnli", REAL)
    answers = defaultdict(list)
    for (sentence, _), label in zip(*splits["train"], strict=True):
        answers[sentence].append(label)
    known = [
        np.mean(np.equal(answers[sentence], label))
        for (sentence, _), label in zip(*splits["dev"], strict=True)
        if sentence in answers
    ]
    assert len(known) > 0.9 * len(splits["dev"].texts)
    assert np.mean(known) < 0.2


def write(folder, name, split, content, suffix=""):
    file = folder / bigs.GLUE[name].folder.rstrip("*") / f"{split}.tsv{suffix}"
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(content)
    return file


HEAD = b"index\tsentence1\tsentence2\tlabel\n"
ROW = b"0\tIt rains.\tIt is wet.\tentailment\n"
SCORED = HEAD.replace(b"label", b"score")
NOISE = np.random.default_rng(0).bytes(99_999).hex().encode()
BROKEN = [
    (
        "rte",
        HEAD + ROW + b"1\tIt rains.\n",
        "line 3: 2 columns instead of 4; restore the line",
    ),
    (
        "rte",
        HEAD + b"0\tIt\trains.\tWet.\tentailment\n",
        "line 2: 5 columns instead of 4; restore the line",
    ),
    (
        "rte",
        HEAD + ROW + ROW.replace(b"entail", b"Entail"),
        "line 3: label 'Entailment' .* not_entailment; restore",
    ),
    (
        "cola",
        b"gj04\t2\t\tIt rains.\n",
        "line 1: label '2' should be one of 0, 1; restore",
    ),
    ("rte", b"", "there is no row in it; fetch the file again"),
    ("rte", HEAD, "there is no row in it; fetch"),
    ("rte", ROW + ROW, "line 1: 0 columns 'sentence1', .* restore the header"),
    ("rte", HEAD + HEAD + ROW, "line 2: the header again; delete the line"),
    (
        "rte",
        HEAD.replace(b"index", b"label") + ROW,
        "line 1: 2 columns 'label', .* restore the header",
    ),
    (
        "rte",
        HEAD + ROW + ROW[:-4],
        "line 3: the file ends within this line; fetch it again",
    ),
    (
        "rte",
        HEAD + ROW + ROW[:9],
        "line 3: 2 columns instead of 4; .* fetch the file again",
    ),
    (
        "cola",
        COLA[: COLA.index(b"\tRain 8550") - 9],
        "line 8550: the file ends within this line; fetch it again",
    ),
    (
        "rte",
        HEAD + ROW.replace(b"rains", b"r\xe4ins"),
        r"after line \d: not UTF-8; convert it",
    ),
]
for word in ("5.1", "-1", "nan", ""):
    content = SCORED + ROW.replace(b"entailment", word.encode())
    message = f"line 2: score '{word}' should be a number from 0 to 5; restore"
    BROKEN.append(("stsb", content, message))


def assert_refused(file, name, message):
    with pytest.raises(bigs.UserError, match=f"^{file}[,:] {message}"):
        glue.task_texts(name, file.parents[1])


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_files_are_named_with_line_and_remedy(
    tmp_path, name, suffix, content, message
):
    file = write(tmp_path, name, "train", PACK[suffix](content), suffix)
    assert_refused(file, name, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(HEAD + NOISE)[:60_000], r"after line \d: cannot be"),
        (HEAD + ROW, "after line 0: cannot be read .* fetch it again"),
    ],
    ids=["cut", "not packed"],
)
def test_broken_packings_are_named(tmp_path, content, message):
    file = write(tmp_path, "rte", "train", content, ".gz")
    assert_refused(file, "rte", message)


TEXTS = [
    ('"One', "he said."),
    ('A "full" quote', '"'),
    ("", "Lines\x0cend\x85only\u2028there, it's ''said''  "),
]
LINES = [HEAD.decode().strip(), *(f"0\t{a}\t{b}\tentailment" for a, b in TEXTS), ""]
QUESTIONS = [(f"Why {number}?", f"How {number}?") for number in range(9)]
QQP = [f"{i}\t1\t2\t{a}\t{b}\t1" for i, (a, b) in enumerate(QUESTIONS)]
QQP.insert(0, "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate")
QQP.insert(4, "7\t1\t2\tWhy")
QQP.insert(5, "not?\tHow\t1")
FEW = ": 3 rows, the official file has 2490\n"
# Task, content, texts, what is told.
ODDITIES = {
    "plain": ("rte", "\n".join(LINES), TEXTS, FEW),
    "CRLF": ("rte", "\r\n".join(LINES), TEXTS, FEW),
    "BOM": ("rte", "\ufeff" + "\n".join(LINES), TEXTS, FEW),
    "both": ("rte", "\ufeff" + "\r\n".join(LINES), TEXTS, FEW),
    "no last line feed": (
        "cola",
        COLA[:-1].decode(),
        [(f"Rain {number}.",) for number in range(8551)],
        None,
    ),
    "broken lines": (
        "qqp",
        "\n".join([*QQP, ""]),
        QUESTIONS,
        ": 9 rows; 2 broken lines were skipped\n",
    ),
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("oddity", ODDITIES)
def test_oddities_of_official_files_are_read(tmp_path, capsys, oddity, suffix):
    name, content, texts, told = ODDITIES[oddity]
    file = write(tmp_path, name, "train", PACK[suffix](content.encode()), suffix)

    splits = glue.task_texts(name, tmp_path)

    assert list(splits) == ["train"]
    assert splits["train"].texts == texts
    assert len(splits["train"].labels) == len(texts)
    assert capsys.readouterr().err == (f"{file}{told}" if told else "")


def test_the_hub_gives_the_same_in_its_own_columns(monkeypatch):
    texts = {
        "premise": ["Rain.", "Snow."],
        "hypothesis": ["Wet.", "Hot."],
        "idx": [0, 1],
    }
    stored = {
        ("mnli", "train"): [0, 2],
        ("mnli", "validation_matched"): [1, 2],
        ("mnli", "test_matched"): [-1, -1],
        ("ax", "test"): [-1, -1],
    }

    def load_dataset(path, name, split):
        if path != "nyu-mll/glue" or (name, split) not in stored:
            raise ValueError(f'Unknown split "{split}".')
        return datasets.Dataset.from_dict(texts | {"label": stored[name, split]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = glue.task_texts("mnli", None)

    assert list(found) == ["train", "dev_matched", "test_matched", "diagnostic"]
    assert found["train"].labels.tolist() == [0, 2]
    assert found["dev_matched"].labels.tolist() == [1, 2]
    assert found["test_matched"].labels is None
    assert found["diagnostic"].labels is None
    for split in found.values():
        assert split.texts == [("Rain.", "Wet."), ("Snow.", "Hot.")]


# Measures


def spearman(labels, guess):
    return spearmanr(labels, guess)[0]


def pearson(labels, guess):
    return pearsonr(labels, guess)[0]


MEASURES = {
    "qqp": (f1_score, accuracy_score),
    "mrpc": (f1_score, accuracy_score),
    "cola": (matthews_corrcoef,),
    "stsb": (spearman, pearson),
}


@pytest.mark.parametrize("name", bigs.GLUE)
def test_measures_are_those_of_the_libraries(name):
    task = bigs.GLUE[name]
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(50, max(1, len(task.labels))))
    if task.labels:
        labels = rng.integers(0, len(task.labels), 50)
        guess = outputs.argmax(1)
    else:
        labels = rng.uniform(0, 5, 50).round(1)
        guess = outputs[:, 0]

    found = bigs.task_scores(task, outputs, labels)

    measures = MEASURES.get(name, (accuracy_score,))
    wanted = [measure(labels, guess) for measure in measures]
    assert list(found.values()) == pytest.approx(wanted)
    assert min(map(abs, wanted)) > 0.01  # a measure that is always zero would not do


@pytest.mark.parametrize("name", ["cola", "stsb"])
def test_a_constant_answer_correlates_with_nothing(name):
    task = bigs.GLUE[name]
    outputs = np.zeros((50, max(1, len(task.labels))))
    labels = np.arange(50) % 2
    found = bigs.task_scores(task, outputs, labels)
    assert set(found.values()) == {0}


# Training


def classifier(labels=2, seed=0):
    config = replace(CONFIG, num_labels=labels)
    return bigs.BiGS(config, "sequence_classification", seed)


def same(a, b, *parts, atol=0):
    """Whether two models have the same parameters, or the same of those whose path has
    one of these parts.
    """
    a = dict(bigs.named_parameters(a))
    b = dict(bigs.named_parameters(b))
    parts = set(parts or ("encoder", "head"))
    chosen = [path for path in a if parts & set(path)]
    assert chosen
    return all(np.allclose(a[path], b[path], 0, atol) for path in chosen)


def moved(model, scale):
    """The model with noise on every parameter."""

    def noisy(p):
        noise = np.random.default_rng(0).normal(0, scale, p.shape)
        return p + noise.astype(np.float32)

    return jax.tree.map(noisy, model)


def test_an_epoch_shows_each_example_once():
    lengths = np.random.default_rng(0).integers(3, 60, 1003)
    rng = np.random.default_rng(1)
    epochs = np.array([bigs.grouped(lengths, 8, rng) for _ in range(20)])
    assert epochs.shape == (20, 125, 8)
    for epoch in epochs:
        assert np.unique(epoch).size == 1000
    assert np.unique(epochs).size == 1003  # each time others are left out
    assert np.unique(bigs.grouped(lengths[:1000], 8, rng)).size == 1000


def test_batches_are_of_like_length_and_short_ones_come_anywhere():
    lengths = np.random.default_rng(0).integers(3, 60, 1003)
    rng = np.random.default_rng(1)
    rises = []
    for _ in range(20):
        epoch = lengths[bigs.grouped(lengths, 8, rng)]
        assert np.ptp(epoch, axis=1).mean() < 3
        rises.append(np.corrcoef(np.arange(125), epoch.mean(1))[0, 1])
    assert abs(np.mean(rises)) < 0.1


def test_examples_of_one_length_come_in_any_order():
    rng = np.random.default_rng(1)
    ranges = []
    for _ in range(20):
        order = bigs.grouped(np.full(1000, 64), 8, rng)
        correlation = np.corrcoef(order.ravel(), np.arange(1000))[0, 1]
        assert abs(correlation) < 0.15
        ranges.append(np.ptp(order, axis=1))
    assert np.mean(ranges) > 700  # of eight at random: 7/9


def first(count):
    return bigs.Examples(*(values[:count] for values in TOY))


def test_padding_is_silent():
    eight = first(8)
    model = moved(classifier(), 0.3)
    longest = int(eight.lengths.max())
    assert longest < 16

    answers = [
        model(*bigs.cut(TOY, np.arange(7, -1, -1), length))
        for length in (longest, 23, 64)
    ]

    assert np.ptp(answers[0], axis=0).min() > 0.01
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], atol=1e-5)


def test_padding_is_silent_and_padded_training_the_same(monkeypatch):
    cut = bigs.cut
    lengths = []

    def watched(examples, chosen, length):
        lengths.append(length)
        return cut(examples, chosen, length)

    monkeypatch.setattr(bigs, "cut", watched)
    tuning = bigs.Tuning(learning_rate=1e-3, batch=8, epochs=4, cut=True)

    short = bigs.finetune(classifier(), first(8), tuning)
    whole = bigs.finetune(classifier(), first(8), replace(tuning, cut=False))

    assert lengths == [16] * 4 + [64] * 4
    assert same(short.last, whole.last, atol=1e-5)


def test_a_step_is_one_of_adamw():
    ours = classifier()
    theirs = classifier()
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: bigs.is_decayed(path, True), ours
    )
    adamw = optax.adamw(0.01, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1, mask=mask)

    @jax.jit
    @jax.value_and_grad
    def their_loss(model, inputs, labels):
        logits = model(*inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    our_moments = bigs.TUNER.init(ours)
    our_moments.hyperparams["learning_rate"] = jnp.float32(0.01)
    our_moments.hyperparams["weight_decay"] = jnp.float32(0.1)
    their_moments = adamw.init(theirs)
    for chosen in np.arange(32).reshape(4, 8):
        inputs = bigs.cut(TOY, chosen, 16)
        labels = TOY.labels[chosen]
        ours, our_moments, loss = bigs.tuning_step(
            ours, our_moments, inputs, labels, None, frozen=False
        )
        wanted, gradients = their_loss(theirs, inputs, labels)
        updates, their_moments = adamw.update(gradients, their_moments, theirs)
        theirs = optax.apply_updates(theirs, updates)
        assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert same(ours, theirs, atol=1e-5)


def test_padding_may_have_any_number(tmp_path):
    file = tmp_path / "vocab.txt"
    order = ["red", "green", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
    file.write_text("\n".join(order))
    tokenizer = corpora.load_vocabulary(str(file))
    pairs = [("red", "green"), ("red red red", "green")]

    examples = bigs.encode(pairs, np.array([0, 1]), tokenizer, 64)

    assert examples.input_ids[0].tolist() == [2, 0, 3, 1, 3] + [4] * 11
    assert examples.token_type_ids[0].tolist() == [0, 0, 0, 1, 1] + [0] * 11


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_kernels_stay_and_all_else_moves(frozen):
    start = classifier()
    tuning = bigs.Tuning(learning_rate=0.01, batch=8, epochs=1, freeze_kernels=frozen)

    end = bigs.finetune(classifier(), TOY, tuning).last

    after = dict(jax.tree_util.tree_leaves_with_path(end))
    for path, before in jax.tree_util.tree_leaves_with_path(start):
        stays = frozen and bigs.is_ssm(path)
        assert np.array_equal(before, after[path]) == stays, path


def test_regression_learns_a_score():
    scores = TOY._replace(labels=TOY.input_ids[:, 1] % 5 + 0.5)
    tuning = bigs.Tuning(learning_rate=0.01, batch=8, epochs=60)

    tuned = bigs.finetune(classifier(1), scores, tuning)

    found = bigs.predict(tuned.last, scores)[:, 0]
    error = np.square(found - scores.labels).mean()
    assert scores.labels.var() > 1
    assert error < 0.05 * scores.labels.var()


def test_the_best_model_is_that_of_the_best_score():
    script = [0.1, 0.9, -0.3, 0.5]
    seen = []
    start = classifier()
    tuning = bigs.Tuning(learning_rate=0.01, batch=8, epochs=4)

    def score(model):
        seen.append(jax.tree.map(np.array, model))
        return script[len(seen) - 1]

    tuned = bigs.finetune(start, TOY, tuning, 0, score)

    assert tuned.scores == script
    assert same(tuned.best, seen[1])
    assert same(tuned.last, seen[3])
    for a, b in itertools.combinations([start, *seen], 2):
        assert not same(a, b)
    assert same(start, classifier())  # what is given stays as it was

    plain = bigs.finetune(start, TOY, tuning, 0)
    other = bigs.finetune(start, TOY, tuning, 1)
    assert same(plain.last, seen[3])
    assert same(plain.best, seen[3])
    assert not same(other.last, seen[3])


def test_a_classifier_keeps_encoder_and_pooler_of_another():
    start = classifier(3, seed=5)
    found = bigs.classifier_on(start, TOY, 1, 4)
    assert found.config.num_labels == 4
    assert same(start, found, "encoder", "pooler")
    assert same(classifier(4, seed=1), found, "classifier")


def test_a_classifier_on_a_language_model_fits_its_pooler_to_what_it_reads():
    start = moved(bigs.BiGS(CONFIG, seed=5), 3.0)
    fresh = classifier(4, seed=1)

    found = bigs.classifier_on(start, TOY, 1, 4)

    assert same(start, found, "encoder")
    assert same(fresh, found, "classifier")
    ids, mask, types = bigs.cut(TOY, np.arange(40), 16)
    hidden = start.encoder(ids, mask, types)
    spread = np.std(bigs.pool(hidden, mask, "non_padding_mean"))
    assert spread > 10
    drawn = fresh.head.pooler.kernel[...]
    scaled = found.head.pooler.kernel[...]
    np.testing.assert_allclose(scaled * spread, drawn, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rate": 1e30, "batch": 8},
            r"^learning_rate: 1e\+30 is too large",
        ),
        ({"learning_rate": 1e30, "batch": 40, "epochs": 1}, "^learning_rate: "),
        ({"batch": 41}, "^train: 40 examples do not fill a batch of 41"),
    ],
)
def test_hopeless_settings_are_named(changes, message):
    with pytest.raises(bigs.UserError, match=message):
        bigs.finetune(classifier(), TOY, bigs.Tuning(**changes))


# The command


def official_file(name, split):
    """Forty rows that begin with a word that tells the label."""
    rng = np.random.default_rng(len(split))
    task = bigs.GLUE[name]
    is_test = split.startswith("test")
    columns = ["index", *task.texts] if is_test else COLUMNS[name]
    lines = [] if name == "cola" and not is_test else ["\t".join(columns)]
    kinds = rng.permutation(40) % (len(task.labels) or 11)
    for number, kind in enumerate(kinds):
        label = task.labels[kind] if task.labels else f"{kind / 2:.3f}"
        cells = {"index": str(number), task.label: label}
        for text in task.texts:
            cells[text] = " ".join([WORDS[kind], *rng.choice(WORDS[6:], 2)])
        lines.append("\t".join(cells.get(column, "x") for column in columns))
    return "\n".join([*lines, ""]).encode()


def command(folder, output, *arguments, **others):
    """Fine-tune on the small GLUE of a folder; None leaves an option out."""
    options = {
        "data": folder / "glue",
        "model": folder / "model",
        "output": output,
        "batch": 8,
        "epochs": 8,
        "learning_rate": 0.02,
    }
    options |= others
    words = ["finetune"]
    for name, value in options.items():
        if value:
            words += [f"--{name}", str(value)]
    commands.main([*words, *arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small GLUE, a model, and what one run of the command on them left."""
    folder = tmp_path_factory.mktemp("made")
    for name, splits in SPLITS.items():
        for split in splits:
            write(folder / "glue", name, split, official_file(name, split))
    bigs.save_pretrained(bigs.BiGS(CONFIG, seed=3), folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    compiled = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bigs, "RUNS", folder)
        command(folder, folder / "runs", "--task", "all")
        yield folder
    jax.config.update("jax_compilation_cache_dir", compiled)


@pytest.fixture
def asked(monkeypatch):
    """Runs asked for; none is trained, but scores, or raises, what is given for its
    variant, seed, rate or task.
    """
    calls = []
    script = {}

    def tune(name, splits, start, tokenizer, tuning, variant, seed):
        calls.append((name, variant, seed))
        keys = (variant, seed, tuning.learning_rate, name)
        given = [script[key] for key in keys if key in script]
        score = given[0] if given else 0.5
        if isinstance(score, BaseException):
            raise score
        task = bigs.GLUE[name]
        scores = {SPLITS[name][1]: dict.fromkeys(task.metrics, score)}
        answers = splits[SPLITS[name][1]].labels.tolist()
        record = {
            "variant": variant,
            "tuning": asdict(tuning),
            "seconds": 1.0,
            "evaluations": [score],
            "best": scores,
            "last": scores,
            "answers": {"best": answers, "last": answers},
            "examples": dict.fromkeys(splits, 40),
        }
        return record, classifier(len(task.labels) or 1, seed)

    monkeypatch.setattr(glue, "tune", tune)
    return calls, script


def read(output, pattern="*/*-[0-9].json"):
    return {
        str(file.relative_to(output)): json.loads(file.read_text())
        for file in sorted(output.glob(pattern))
    }


def test_tasks_start_where_they_should(made, tmp_path, asked):
    """MRPC, RTE and STS-B start from the model that MNLI left, as in the paper."""
    runs = read(made / "runs", "*/run.json")
    start = {name: runs[f"{name}/run.json"]["model"] for name in SPLITS}
    assert start["mnli"] == start["cola"]
    assert start["rte"] == start["stsb"]
    assert start["mnli"] != start["rte"]

    command(made, tmp_path, "--task", "mnli", "rte", "cola", start=made / "runs/stsb")

    for output, after in (
        (made / "runs", made / "runs/mnli"),
        (tmp_path, made / "runs/stsb"),
    ):
        found = json.loads((output / "results.json").read_text())
        assert next(iter(found)) == "mnli"
        assert found["mnli"]["model"] == str(made / "model")
        assert found["rte"]["model"] == str(after)
        assert found["cola"]["model"] == str(made / "model")


@pytest.fixture(scope="module")
def predict(made):
    """The outputs of a task's saved model on one of its sets."""

    def outputs(name, split):
        model = bigs.from_pretrained(made / "runs" / name)
        texts = glue.task_texts(name, made / "glue")[split].texts
        examples = bigs.encode(texts, np.zeros(40, int), TOKENIZER, 64)
        return bigs.predict(model, examples)

    return outputs


@pytest.mark.parametrize("name", SPLITS)
def test_answers_are_those_of_the_saved_model(made, predict, name):
    task = bigs.GLUE[name]
    outputs = predict(name, SPLITS[name][2])
    if task.labels:
        answers = [task.labels[number] for number in outputs.argmax(1)]
    else:
        answers = [f"{score:.3f}" for score in outputs[:, 0].clip(0, 5)]
    assert len(set(answers)) > 1

    stem = "MNLI-m" if name == "mnli" else task.folder
    lines = (made / "runs/answers" / f"{stem}.tsv").read_text().splitlines()

    assert lines[0] == "index\tprediction"
    assert lines[1:] == [f"{i}\t{answer}" for i, answer in enumerate(answers)]


@pytest.mark.parametrize("name", SPLITS)
def test_scores_are_those_of_the_saved_model(made, predict, name):
    task = bigs.GLUE[name]
    dev = SPLITS[name][1]
    labels = glue.task_texts(name, made / "glue")[dev].labels
    scores = bigs.task_scores(task, predict(name, dev), labels)

    record = read(made / "runs")[f"{name}/pretrained-0.json"]

    assert record["best"][dev] == pytest.approx(scores)
    evaluations = record["evaluations"]
    measure = task.metrics[0]
    assert len(evaluations) == 8
    assert max(evaluations) == record["best"][dev][measure]
    assert evaluations[-1] == record["last"][dev][measure]


def test_a_record_tells_the_best_model_from_the_last(made):
    splits = glue.task_texts("stsb", made / "glue")
    start = bigs.BiGS(CONFIG, seed=4)
    tuning = bigs.Tuning(learning_rate=0.05, batch=8, epochs=4)

    differences = []
    for seed in range(3):
        record, _ = glue.tune(
            "stsb", splits, start, TOKENIZER, tuning, "pretrained", seed
        )
        best = record["best"]["dev"]["spearman"]
        last = record["last"]["dev"]["spearman"]
        assert best == max(record["evaluations"])
        assert last == record["evaluations"][-1]
        differences.append(best - last)
    assert max(differences) > 0


@pytest.fixture
def tuned(monkeypatch):
    """Task and variant of every run that is trained."""
    tune = glue.tune
    calls = []

    def watched(*given):
        calls.append((given[0], given[5]))
        return tune(*given)

    monkeypatch.setattr(glue, "tune", watched)
    return calls


def test_a_second_call_runs_nothing_again(made, tmp_path, tuned, capsys):
    shutil.copytree(made / "runs", tmp_path, dirs_exist_ok=True)
    files = sorted(tmp_path.glob("*/*-[0-9].json"))
    times = [file.stat().st_mtime_ns for file in files]
    assert files

    command(made, tmp_path, "--task", "all")

    assert tuned == []
    assert [file.stat().st_mtime_ns for file in files] == times
    told = capsys.readouterr().err.splitlines()
    missing = "left out, there is no train set in"
    left_out = [line.partition(":")[0] for line in told if missing in line]
    assert left_out == ["qnli", "qqp", "sst2", "mrpc", "wnli"]


def test_a_second_call_runs_what_is_lost_or_new(made, tmp_path, tuned):
    shutil.copytree(made / "runs", tmp_path, dirs_exist_ok=True)
    before = read(tmp_path)
    (tmp_path / "rte/pretrained-0.json").unlink()

    command(made, tmp_path, "--task", "rte", "--variants", *glue.GLUE_VARIANTS)

    assert tuned == [("rte", variant) for variant in glue.GLUE_VARIANTS]
    after = read(tmp_path)
    for file, record in before.items():
        assert after[file] | {"seconds": 0} == record | {"seconds": 0}
    choices = []
    for variant in glue.GLUE_VARIANTS:
        record = after[f"rte/{variant.replace(' ', '-')}-0.json"]
        tuning = record["tuning"]
        choices.append((tuning["cut"], tuning["freeze_kernels"]))
    assert choices == [(True, False), (True, False), (False, False), (True, True)]


@pytest.mark.parametrize(
    ("field", "value", "change"),
    [
        ("batch", 4, (b"", b"")),
        ("epochs", 4, (b"", b"")),
        ("learning_rate", 0.1, (b"", b"")),
        ("model", "runs/cola", (b"", b"")),
        ("data", None, (b"red", b"blue")),
        ("data", None, (b"\t1\t", b"\t0\t")),
    ],
)
def test_a_folder_belongs_to_one_setting(
    made, tmp_path, asked, capsys, field, value, change
):
    calls, _ = asked
    shutil.copytree(made / "runs", tmp_path / "runs")
    train = official_file("cola", "train")
    write(tmp_path, "cola", "train", train.replace(*change))
    write(tmp_path, "cola", "dev", official_file("cola", "dev"))
    others = {"model": made / "runs/cola", "data": tmp_path}
    given = {field: others.get(field, value)}

    with pytest.raises(SystemExit, match="2"):
        command(made, tmp_path / "runs", "--task", "cola", **given)

    assert f"error: {field}: " in capsys.readouterr().err
    assert calls == []


SEARCH = (
    *("--task", "cola", "--search", "--seeds", "3"),
    *("--learning-rate", "0.1", "0.2", "0.3", "--weight-decay", "0.0"),
)


@pytest.fixture
def search(made, tmp_path, asked):
    """A search over three rates, the second of which is best; then of three seeds the
    second.
    """
    calls, script = asked
    script |= {0.1: 0.2, 0.2: 0.7, 0.3: 0.4, 1: 0.9, 2: 0.6, "pretrained": 0.95}
    variants = ("--variants", "padded", "pretrained")
    command(made, tmp_path, *SEARCH, *variants, learning_rate=None)
    return calls


def test_the_best_of_a_search_is_run_with_all_seeds(search, tmp_path):
    found = []
    for record in read(tmp_path, "cola/search/*/*-0.json").values():
        rate = record["tuning"]["learning_rate"]
        found.append((max(record["evaluations"]), rate))
    assert sorted(found) == [(0.2, 0.1), (0.4, 0.3), (0.7, 0.2)]
    assert search[:3] == [("cola", "padded", 0)] * 3
    variants = ("padded", "pretrained")
    turns = itertools.product(range(3), variants)
    assert search[3:] == [("cola", variant, seed) for seed, variant in turns]
    rates = {record["tuning"]["learning_rate"] for record in read(tmp_path).values()}
    assert rates == {0.2}
    assert not list(tmp_path.glob("cola/search/*/config.json"))


def test_the_best_of_all_seeds_is_kept(search, made, tmp_path):
    kept = bigs.from_pretrained(tmp_path / "cola")
    agree = [same(kept, classifier(2, seed)) for seed in range(3)]
    assert agree == [False, True, False]

    (tmp_path / "cola/padded-0.json").unlink()
    command(made, tmp_path, *SEARCH, "--variants", "padded", learning_rate=None)

    assert len(search) == 10  # one more than the nine before
    assert same(bigs.from_pretrained(tmp_path / "cola"), kept)


def test_the_papers_search_has_sixty_settings():
    assert len(commands.Grid().tunings(True, 1024)) == 60
    assert commands.Grid().tunings(False, 1024) == [bigs.Tuning()]


def test_a_killed_command_goes_on_with_the_next_run(made, tmp_path, asked):
    calls, script = asked
    script["rte"] = KeyboardInterrupt()
    tasks = ("--task", "mnli", "rte", "cola")
    with pytest.raises(KeyboardInterrupt):
        command(made, tmp_path, *tasks)
    before = read(tmp_path)
    assert list(before) == ["mnli/pretrained-0.json"]
    assert [call[0] for call in calls] == ["mnli", "rte"]

    script.clear()
    calls.clear()
    command(made, tmp_path, *tasks)

    assert [call[0] for call in calls] == ["rte", "cola"]
    assert before == read(tmp_path, "mnli/*-0.json")


MISTAKES = {
    "task: 'soup' does not exist; choose one of mnli, ": ("--task", "soup"),
    "variants: 'loud' does not exist; choose one of pretrained, ": (
        *("--task", "cola"),
        *("--variants", "loud"),
    ),
    "seeds: 0 is not positive": ("--task", "cola", "--seeds", "0"),
    "data: there is no train set of qnli in ": ("--task", "qnli"),
    "nowhere: no such folder": ("--task", "rte", "--start", "nowhere"),
    "data: no task has both a train and a dev set in tests": (
        *("--task", "all"),
        *("--data", "tests"),
    ),
    "data: nowhere is no folder; pass the one that holds CoLA": (
        *("--task", "rte"),
        *("--data", "nowhere"),
    ),
}


def told_in_one_line(capsys):
    *others, last = capsys.readouterr().err.splitlines()
    for line in others:
        assert "left out" in line or "the official file has" in line
    return last


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told_in_one_line(made, tmp_path, asked, capsys, message):
    calls, _ = asked
    with pytest.raises(SystemExit, match="2"):
        command(made, tmp_path, *MISTAKES[message])
    assert told_in_one_line(capsys).startswith(f"error: {message}")
    assert calls == []


def test_a_hub_out_of_reach_is_told_in_one_line(
    made, tmp_path, asked, monkeypatch, capsys
):
    calls, _ = asked

    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SystemExit, match="2"):
        command(made, tmp_path, "--task", "cola", data=None)
    assert told_in_one_line(capsys).startswith(
        "error: data: nyu-mll/glue cannot be had (ConnectionError); pass the folder of"
        " GLUE's official files with --data, or take --task order"
    )
    assert calls == []


@pytest.mark.parametrize("task", ["cola", "sst2"])
def test_cut_batches_were_measured_to_be_faster_at_equal_scores(task):
    """data/glue-speed.json: three seeds of each task, cut and padded in turns."""
    found = json.loads((bigs.DATA / "glue-speed.json").read_text())[task]

    def scores(variant):
        last = found["variants"][variant]["last"][found["dev"]]
        return np.array(last[found["metric"]])

    cut = scores("pretrained")
    padded = scores("padded")
    assert len(cut) == len(padded) == 3
    assert bigs.cut_speed(task) >= 3
    deviation = np.hypot(cut.std(ddof=1), padded.std(ddof=1))
    assert abs(cut.mean() - padded.mean()) <= 2 * deviation

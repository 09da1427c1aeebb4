"""GLUE: official files and broken ones, measures, the loop of fine-tuning, and the
command from files to answers.
"""

import gzip
import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import jax
import numpy as np
import optax
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import annotated_bigs as bigs

REAL = Path(__file__).parents[2] / "shared/data/glue"
ROWS = {
    "cola": (8551, 1043, 1063),
    "sst2": (67349, 872, 1821),
    "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, 1379),
    "rte": (2490, 277, 3000),
    "wnli": (635, 71, 146),
}
ROWS = {
    name: dict(zip(("train", "dev", "test"), rows, strict=True))
    for name, rows in ROWS.items()
}
ROWS |= {
    "qnli": {"dev": 5463, "test": 5463},
    "mnli": {"train": 9882, "dev_matched": 9815, "diagnostic": 1104},
}
COUNTS = {
    ("mnli", "dev_matched"): [3479, 3123, 3213],
    ("mrpc", "train"): [1194, 2474],
    ("mrpc", "dev"): [129, 279],
}
METRICS = {
    "qqp": (f1_score, accuracy_score),
    "mrpc": (f1_score, accuracy_score),
    "cola": (matthews_corrcoef,),
    "stsb": (lambda *ab: spearmanr(*ab)[0], lambda *ab: pearsonr(*ab)[0]),
}
HEAD = b"index\tsentence1\tsentence2\tlabel\n"
ROW = b"0\tIt rains.\tIt is wet.\tentailment\n"
COLUMNS = {
    "mnli": (
        "index promptID pairID genre parse1 parse2 sentence1 sentence2 label1"
        " gold_label"
    ),
    "rte": "index sentence1 sentence2 label",
    "cola": "source label mark sentence",
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score"
    ),
}
SPLITS = {name: ("train", "dev", "test") for name in COLUMNS} | {
    "mnli": ("train", "dev_matched", "test_matched")
}
COLA = b"".join(b"gj04\t1\t\tRain %d.\n" % i for i in range(8551))
PACK = {"": bytes, ".gz": gzip.compress}
WORDS = "red blue green house river tree bird sings stands flows old new".split()
TOKENIZER = bigs.train_tokenizer([" ".join(WORDS)] * 20, 120)
CONFIG = bigs.Config(len(TOKENIZER), 16, 1, 48, 64, num_ssm=4, hidden_dropout_prob=0.0)
RANDOM = np.random.default_rng(
    0
)  # five batches of eight texts; the first of their words tells the label
TOY = bigs.encode(
    [
        (" ".join([WORDS[i % 6], *RANDOM.choice(WORDS, RANDOM.integers(1, 13))]),)
        for i in range(40)
    ],
    np.arange(40) % 6 % 2,
    TOKENIZER,
    64,
)


@pytest.mark.skipif(
    not REAL.is_dir(), reason="GLUE's official files are not beside the project"
)
@pytest.mark.parametrize("name", ROWS)
def test_official_files_are_read_whole(name, capsys):
    task = bigs.GLUE[name]
    splits = bigs.task_texts(name, REAL)
    assert {split: len(texts) for split, (texts, _) in splits.items()} == ROWS[name]
    for split, (texts, labels) in splits.items():
        assert {len(text) for text in texts} == {len(task.texts)}
        assert all(map(all, texts))
        if split in ("test", "diagnostic"):
            assert labels is None
        elif task.labels:
            count = np.bincount(labels).tolist()
            assert COUNTS.get((name, split), count) == count
            assert sum(count) == len(texts)
        else:
            assert (labels.min(), labels.max(), len(labels)) == (0, 5, len(texts))
    told = (
        f"{REAL}/MNLI_partial/train_sample.tsv.gz: 9882 rows, the official file has"
        " 392702\n"
    )
    assert capsys.readouterr().err == (told if name == "mnli" else "")


@pytest.mark.parametrize("name", bigs.GLUE)
def test_measures_are_those_of_the_libraries(name):
    task = bigs.GLUE[name]
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(50, max(1, len(task.labels))))
    labels = (
        rng.integers(0, len(task.labels), 50)
        if task.labels
        else rng.uniform(0, 5, 50).round(1)
    )
    guess = outputs.argmax(1) if task.labels else outputs[:, 0]
    found = bigs.task_scores(task, outputs, labels)
    wanted = [
        measure(labels, guess) for measure in METRICS.get(name, (accuracy_score,))
    ]
    assert list(found.values()) == pytest.approx(wanted)
    assert min(map(abs, wanted)) > 0.01
    constant = bigs.task_scores(task, 0 * outputs, labels)
    assert all(
        value == 0
        for metric, value in constant.items()
        if metric not in ("accuracy", "f1")
    )


def write(folder, name, split, content, suffix=""):
    file = folder / bigs.GLUE[name].folder.rstrip("*") / f"{split}.tsv{suffix}"
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(content)
    return file


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
    *(
        (
            "stsb",
            HEAD.replace(b"label", b"score")
            + ROW.replace(b"entailment", word.encode()),
            f"line 2: score '{word}' should be a number from 0 to 5; restore",
        )
        for word in ("5.1", "-1", "nan", "")
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


@pytest.mark.parametrize(
    ("name", "suffix", "content", "message"),
    [
        *(
            (name, suffix, pack(content), message)
            for suffix, pack in PACK.items()
            for name, content, message in BROKEN
        ),
        (
            "rte",
            ".gz",
            gzip.compress(HEAD + RANDOM.bytes(99_999).hex().encode())[:60_000],
            r"after line \d: cannot be",
        ),
        ("rte", ".gz", HEAD + ROW, "after line 0: cannot be read .* fetch it again"),
    ],
    ids=itertools.count(),
)
def test_broken_files_are_named_with_line_and_remedy(
    tmp_path, name, suffix, content, message
):
    file = write(tmp_path, name, "train", content, suffix)
    with pytest.raises(bigs.UserError, match=f"^{file}[,:] {message}"):
        bigs.task_texts(name, tmp_path)


TEXTS = [
    ('"One', "he said."),
    ('A "full" quote', '"'),
    ("", "Lines\x0cend\x85only\u2028there, it's ''said''  "),
]
LINES = [HEAD.decode().strip(), *(f"0\t{a}\t{b}\tentailment" for a, b in TEXTS), ""]
WHY = [f"{i}\t1\t2\tWhy {i}?\tHow {i}?\t1" for i in range(9)]
WHY = [
    "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    *WHY[:3],
    "7\t1\t2\tWhy",
    "not?\tHow\t1",
    *WHY[3:],
    "",
]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(
    ("name", "content", "texts", "told"),
    [
        *(
            (
                "rte",
                begin + end.join(LINES),
                TEXTS,
                ": 3 rows, the official file has 2490\n",
            )
            for begin in ("", "\ufeff")
            for end in ("\n", "\r\n")
        ),
        ("cola", COLA[:-1].decode(), [(f"Rain {i}.",) for i in range(8551)], None),
        (
            "qqp",
            "\n".join(WHY),
            [(f"Why {i}?", f"How {i}?") for i in range(9)],
            ": 9 rows; 2 broken lines were skipped\n",
        ),
    ],
    ids=["plain", "CRLF", "BOM", "both", "no last line feed", "broken lines"],
)
def test_oddities_of_official_files_are_read(
    tmp_path, capsys, name, content, texts, told, suffix
):
    file = write(tmp_path, name, "train", PACK[suffix](content.encode()), suffix)
    ((split, found),) = bigs.task_texts(name, tmp_path).items()
    assert split == "train"
    assert found.texts == texts
    assert len(found.labels) == len(texts)
    assert capsys.readouterr().err == (f"{file}{told}" if told else "")


def test_the_hub_gives_the_same_in_its_own_columns(monkeypatch):
    texts = {
        "premise": ["Rain.", "Snow."],
        "hypothesis": ["Wet.", "Hot."],
        "idx": [0, 1],
    }
    labels = {
        "train": [0, 2],
        "validation_matched": [1, 2],
        "test_matched": [-1, -1],
        "test": [-1, -1],
    }

    def load_dataset(path, name, split):
        if split not in labels or (path, name) != (
            "nyu-mll/glue",
            "ax" if split == "test" else "mnli",
        ):
            raise ValueError(f'Unknown split "{split}".')
        return datasets.Dataset.from_dict(texts | {"label": labels[split]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    bigs.task_texts.cache_clear()
    found = bigs.task_texts("mnli", None)
    bigs.task_texts.cache_clear()
    assert {
        split: None if labels is None else labels.tolist()
        for split, (_, labels) in found.items()
    } == {
        "train": [0, 2],
        "dev_matched": [1, 2],
        "test_matched": None,
        "diagnostic": None,
    }
    assert all(
        split.texts == [("Rain.", "Wet."), ("Snow.", "Hot.")]
        for split in found.values()
    )


def classifier(labels=2, seed=0):
    return bigs.BiGS(
        replace(CONFIG, num_labels=labels), "sequence_classification", seed
    )


def same(a, b, *parts, atol=0):
    """Whether two models have the same parameters, or the same of those whose path has
    one of these parts.
    """
    a, b = (dict(bigs.named_parameters(model)) for model in (a, b))
    chosen = [path for path in a if set(parts or ("encoder", "head")) & set(path)]
    return len(chosen) > 0 and all(
        np.allclose(a[path], b[path], 0, atol) for path in chosen
    )


def loud(model, scale):
    return jax.tree.map(
        lambda p: (
            p + np.random.default_rng(0).normal(0, scale, p.shape).astype(np.float32)
        ),
        model,
    )


def test_an_epoch_shows_each_example_once_in_batches_of_like_length():
    lengths = np.random.default_rng(0).integers(3, 60, 1003)
    rng = np.random.default_rng(1)
    epochs = [bigs.grouped(lengths, 8, rng) for _ in range(20)]
    assert all(
        epoch.shape == (125, 8) and np.unique(epoch).size == 1000 for epoch in epochs
    )
    assert np.unique(epochs).size == 1003
    assert np.unique(bigs.grouped(lengths[:1000], 8, rng)).size == 1000
    assert all(np.ptp(lengths[epoch], axis=1).mean() < 3 for epoch in epochs)
    rises = [
        np.corrcoef(np.arange(125), lengths[epoch].mean(1))[0, 1] for epoch in epochs
    ]
    assert abs(np.mean(rises)) < 0.1  # short batches come anywhere
    orders = [bigs.grouped(np.full(1000, 64), 8, rng) for _ in range(20)]
    assert all(
        abs(np.corrcoef(order.ravel(), np.arange(1000))[0, 1]) < 0.15
        for order in orders
    )
    assert (
        np.mean([np.ptp(order, axis=1) for order in orders]) > 700
    )  # of eight at random: 7/9


def test_padding_is_silent_and_padded_training_the_same(monkeypatch):
    chosen = np.arange(7, -1, -1)
    cut = bigs.cut
    lengths = []
    one = bigs.Examples(*(a[:8] for a in TOY))
    outputs = [
        loud(classifier(), 0.3)(*cut(TOY, chosen, L))
        for L in (int(one.lengths.max()), 23, 64)
    ]
    assert one.lengths.max() < 16
    assert np.ptp(outputs[0], axis=0).min() > 0.01
    np.testing.assert_allclose(outputs[1:], [outputs[0]] * 2, atol=1e-5)
    monkeypatch.setattr(
        bigs,
        "cut",
        lambda examples, chosen, L: lengths.append(L) or cut(examples, chosen, L),
    )
    tunings = [
        bigs.Tuning(learning_rate=1e-3, batch=8, epochs=4, cut=short)
        for short in (True, False)
    ]
    assert same(
        *(bigs.finetune(classifier(), one, tuning).last for tuning in tunings),
        atol=1e-5,
    )
    assert lengths == [16] * 4 + [64] * 4


def test_a_step_is_one_of_adamw():
    ours = classifier()
    theirs = classifier()
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: bigs.is_decayed(path, True), ours
    )
    adamw = optax.adamw(0.01, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1, mask=mask)
    loss = jax.jit(
        jax.value_and_grad(
            lambda model, inputs, labels: (
                optax.softmax_cross_entropy_with_integer_labels(
                    model(*inputs), labels
                ).mean()
            )
        )
    )
    moments = bigs.ADAM.init(ours)
    state = adamw.init(theirs)
    for chosen in np.arange(32).reshape(4, 8):
        batch = bigs.cut(TOY, chosen, 16), TOY.labels[chosen]
        ours, moments, found = bigs.tuning_step(
            ours, moments, *batch, None, 0.01, 0.1, frozen=False
        )
        value, gradients = loss(theirs, *batch)
        updates, state = adamw.update(gradients, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        assert float(found) == pytest.approx(float(value), rel=1e-5)
    assert same(ours, theirs, atol=1e-5)


def test_padding_may_have_any_number(tmp_path):
    order = ["red", "green", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(order))
    examples = bigs.encode(
        [("red", "green"), ("red red red", "green")],
        np.array([0, 1]),
        bigs.load_vocabulary(str(tmp_path / "vocab.txt")),
        64,
    )
    assert examples.input_ids[0].tolist() == [2, 0, 3, 1, 3] + [4] * 11
    assert examples.token_type_ids[0].tolist() == [0, 0, 0, 1, 1] + [0] * 11


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_kernels_stay_and_all_else_moves(frozen):
    tuned = bigs.finetune(
        classifier(),
        TOY,
        bigs.Tuning(learning_rate=0.01, batch=8, epochs=1, freeze_kernels=frozen),
    )
    pairs = zip(
        *(
            jax.tree_util.tree_leaves_with_path(model)
            for model in (classifier(), tuned.last)
        ),
        strict=True,
    )
    moved = {
        (bigs.is_ssm(path), not np.array_equal(old, new))
        for (path, old), (_, new) in pairs
    }
    assert moved == {(True, not frozen), (False, True)}


def test_regression_learns_a_score():
    scores = TOY._replace(labels=TOY.input_ids[:, 1] % 5 + 0.5)
    tuned = bigs.finetune(
        classifier(1), scores, bigs.Tuning(learning_rate=0.01, batch=8, epochs=60)
    )
    error = np.square(bigs.predict(tuned.last, scores)[:, 0] - scores.labels).mean()
    assert error < 0.05 * scores.labels.var()
    assert scores.labels.var() > 1


def test_the_best_model_is_that_of_the_best_score():
    script = [0.1, 0.9, -0.3, 0.5]
    seen = []
    start = classifier()

    def score(model):
        seen.append(jax.tree.map(np.array, model))
        return script[len(seen) - 1]

    tuning = bigs.Tuning(learning_rate=0.01, batch=8, epochs=4)
    tuned = bigs.finetune(start, TOY, tuning, 0, score)
    assert tuned.scores == script
    assert same(tuned.best, seen[1])
    assert same(tuned.last, seen[3])
    assert not any(same(a, b) for a, b in itertools.combinations([start, *seen], 2))
    assert same(start, classifier())
    plain, other = (bigs.finetune(start, TOY, tuning, seed) for seed in (0, 1))
    assert same(plain.last, seen[3])
    assert same(plain.best, seen[3])
    assert not same(other.last, seen[3])


def test_a_classifier_keeps_what_fits():
    fresh = classifier(4, seed=1)
    for start in (classifier(3, seed=5), loud(bigs.BiGS(CONFIG, seed=5), 3.0)):
        found = bigs.classifier_on(start, TOY, 1, 4)
        assert same(start, found, "encoder")
        assert same(fresh, found, "classifier")
        assert found.config.num_labels == 4
        assert start.task == "masked_lm" or same(start, found, "pooler")
    ids, mask, types = bigs.cut(TOY, np.arange(40), 16)
    spread = np.std(
        bigs.pool(start.encoder(ids, mask, types), mask, "non_padding_mean")
    )
    old, new = (model.head.pooler.kernel[...] for model in (fresh, found))
    np.testing.assert_allclose(new * spread, old, rtol=1e-4)
    assert spread > 10


def test_hopeless_settings_are_named():
    for tuning, message in (
        (
            bigs.Tuning(learning_rate=1e30, batch=8),
            r"^learning_rate: 1e\+30 is too large",
        ),
        (bigs.Tuning(learning_rate=1e30, batch=40, epochs=1), "^learning_rate: "),
        (bigs.Tuning(batch=41), "^train: 40 examples do not fill a batch of 41"),
    ):
        with pytest.raises(bigs.UserError, match=message):
            bigs.finetune(classifier(), TOY, tuning)


def official_file(name, split):
    """Forty rows that begin with a word that tells the label."""
    rng = np.random.default_rng(len(split))
    task = bigs.GLUE[name]
    tested = split.startswith("test")
    columns = ["index", *task.texts] if tested else COLUMNS[name].split()
    lines = [] if name == "cola" and not tested else ["\t".join(columns)]
    for i, kind in enumerate(rng.permutation(40) % (len(task.labels) or 11)):
        cells = {
            "index": str(i),
            task.label: task.labels[kind] if task.labels else f"{kind / 2:.3f}",
        }
        cells |= {
            text: " ".join([WORDS[kind], *rng.choice(WORDS[6:], 2)])
            for text in task.texts
        }
        lines.append("\t".join(cells.get(column, "x") for column in columns))
    return "\n".join([*lines, ""]).encode()


def command(folder, output, *arguments, **others):
    own = {
        "data": folder / "glue",
        "model": folder / "model",
        "output": output,
        "batch": 8,
        "epochs": 8,
        "learning_rate": 0.02,
    } | others
    bigs.main(
        [
            "finetune",
            *(
                word
                for field, value in own.items()
                if value
                for word in (f"--{field}", str(value))
            ),
            *arguments,
        ]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small GLUE, a model, and what one run of the command on them left."""
    folder = tmp_path_factory.mktemp("made")
    for name, split in (
        (name, split) for name, splits in SPLITS.items() for split in splits
    ):
        write(folder / "glue", name, split, official_file(name, split))
    bigs.save_pretrained(bigs.BiGS(CONFIG, seed=3), folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bigs, "RUNS", folder)
        command(folder, folder / "runs", "--task", "all")
        yield folder
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture
def asked(monkeypatch):
    """Runs asked for; none is trained, but scores, or raises, what is given for its
    variant, seed, rate or task.
    """
    calls = []
    script = {}

    def tune(name, splits, start, tokenizer, tuning, variant, seed):
        calls.append((name, variant, seed))
        score = next(
            (
                script[key]
                for key in (variant, seed, tuning.learning_rate, name)
                if key in script
            ),
            0.5,
        )
        if isinstance(score, BaseException):
            raise score
        dev = {SPLITS[name][1]: dict.fromkeys(bigs.GLUE[name].metrics, score)}
        labels = len(bigs.GLUE[name].labels)
        return {
            "variant": variant,
            "tuning": asdict(tuning),
            "seconds": 1.0,
            "evaluations": [score],
            "best": dev,
            "last": dev,
            "examples": dict.fromkeys(splits, 40),
        }, classifier(max(1, labels), seed)

    monkeypatch.setattr(bigs, "tune", tune)
    return calls, script


def read(output, pattern="*/*-[0-9].json"):
    return {
        str(file.relative_to(output)): json.loads(file.read_text())
        for file in sorted(output.glob(pattern))
    }


def test_tasks_start_where_they_should(made, tmp_path, asked):
    began = [
        read(made / "runs", "*/run.json")[f"{name}/run.json"]["model"]
        for name in COLUMNS
    ]
    assert began[0] == began[2] != began[1] == began[3]  # mnli and cola, rte and stsb
    command(made, tmp_path, "--task", "mnli", "rte", "cola", start=made / "runs/stsb")
    for output, after in (
        (made / "runs", made / "runs/mnli"),
        (tmp_path, made / "runs/stsb"),
    ):
        found = json.loads((output / "results.json").read_text())
        assert next(iter(found)) == "mnli"
        assert {name: found[name]["model"] for name in ("mnli", "rte", "cola")} == {
            "mnli": str(made / "model"),
            "rte": str(after),
            "cola": str(made / "model"),
        }


@pytest.mark.parametrize("name", SPLITS)
def test_answers_are_those_of_the_saved_model(made, name):
    task = bigs.GLUE[name]
    splits = bigs.task_texts(name, made / "glue")
    (_, dev, test) = SPLITS[name]
    model = bigs.from_pretrained(made / "runs" / name)
    outputs = {
        split: bigs.predict(
            model, bigs.encode(splits[split].texts, np.zeros(40, int), TOKENIZER, 64)
        )
        for split in (dev, test)
    }
    words = (
        [task.labels[i] for i in outputs[test].argmax(1)]
        if task.labels
        else [f"{x:.3f}" for x in outputs[test][:, 0].clip(0, 5)]
    )
    file = made / "runs/answers" / f"{'MNLI-m' if name == 'mnli' else task.folder}.tsv"
    assert file.read_text() == "index\tprediction\n" + "".join(
        f"{i}\t{word}\n" for i, word in enumerate(words)
    )
    record = read(made / "runs")[f"{name}/pretrained-0.json"]
    assert record["best"][dev] == pytest.approx(
        bigs.task_scores(task, outputs[dev], splits[dev].labels)
    )
    assert max(record["evaluations"]) == record["best"][dev][task.metrics[0]]
    assert len(set(words)) > 1
    assert record["evaluations"][-1] == record["last"][dev][task.metrics[0]]
    assert len(record["evaluations"]) == 8


def test_a_record_tells_the_best_model_from_the_last(made):
    splits = bigs.task_texts("stsb", made / "glue")
    tuning = bigs.Tuning(learning_rate=0.1, batch=8, epochs=4)
    found, _ = bigs.tune(
        "stsb", splits, bigs.BiGS(CONFIG, seed=3), TOKENIZER, tuning, "pretrained", 0
    )
    best, last = (found[kind]["dev"]["spearman"] for kind in ("best", "last"))
    assert best == max(found["evaluations"]) > found["evaluations"][-1] == last


def test_a_second_call_runs_only_what_is_lost_or_new(
    made, tmp_path, monkeypatch, capsys
):
    shutil.copytree(made / "runs", tmp_path, dirs_exist_ok=True)
    before = read(tmp_path)
    tune = bigs.tune
    calls = []
    times = []
    monkeypatch.setattr(
        bigs, "tune", lambda *given: calls.append((given[0], given[5])) or tune(*given)
    )
    for _ in range(2):
        times.append([(tmp_path / file).stat().st_mtime_ns for file in before])
        command(made, tmp_path, "--task", "all")
    told = capsys.readouterr().err.splitlines()
    left = [
        line.split(":")[0]
        for line in told
        if "left out, there is no train set in" in line
    ]
    assert left == 2 * ["qnli", "qqp", "sst2", "mrpc", "wnli"]
    assert calls == []
    assert times[0] == times[1]
    (tmp_path / "rte/pretrained-0.json").unlink()
    command(made, tmp_path, "--task", "rte", "--variants", *bigs.GLUE_VARIANTS)
    after = {
        file: record | {"seconds": before.get(file, record)["seconds"]}
        for file, record in read(tmp_path).items()
    }
    assert calls == [("rte", variant) for variant in bigs.GLUE_VARIANTS]
    assert before.items() <= after.items()
    tunings = [
        after[f"rte/{variant.replace(' ', '-')}-0.json"]["tuning"]
        for variant in bigs.GLUE_VARIANTS
    ]
    assert [(tuning["cut"], tuning["freeze_kernels"]) for tuning in tunings] == [
        (True, False),
        (True, False),
        (False, False),
        (True, True),
    ]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("batch", ()),
        ("epochs", ()),
        ("learning_rate", ()),
        ("model", ()),
        ("data", (b"red", b"blue")),
        ("data", (b"\t1\t", b"\t0\t")),
    ],
)
def test_a_folder_belongs_to_one_setting(made, tmp_path, asked, capsys, field, change):
    shutil.copytree(made / "runs", tmp_path / "runs")
    write(
        tmp_path,
        "cola",
        "train",
        official_file("cola", "train").replace(*change or (b"", b"")),
    )
    write(tmp_path, "cola", "dev", official_file("cola", "dev"))
    given = {"model": made / "runs/cola", "data": tmp_path, "learning_rate": 0.1}.get(
        field, 4
    )
    with pytest.raises(SystemExit, match="2"):
        command(made, tmp_path / "runs", "--task", "cola", **{field: given})
    assert f"error: {field}: " in capsys.readouterr().err
    assert asked[0] == []


def test_the_best_of_a_search_is_run_with_all_seeds_and_the_best_of_these_kept(
    made, tmp_path, asked
):
    calls, script = asked
    script.update({0.1: 0.2, 0.2: 0.7, 0.3: 0.4, 1: 0.9, 2: 0.6, "pretrained": 0.95})
    command(
        made,
        tmp_path,
        "--task",
        "cola",
        "--search",
        "--learning-rate",
        "0.1",
        "0.2",
        "0.3",
        "--weight-decay",
        "0.0",
        "--seeds",
        "3",
        "--variants",
        "padded",
        "pretrained",
        learning_rate=None,
    )
    searched = sorted(
        (max(record["evaluations"]), record["tuning"]["learning_rate"])
        for record in read(tmp_path, "cola/search/*/*-0.json").values()
    )
    assert searched == [(0.2, 0.1), (0.4, 0.3), (0.7, 0.2)]
    assert calls[:3] == [("cola", "padded", 0)] * 3
    assert calls[3:] == [
        ("cola", variant, seed)
        for seed in range(3)
        for variant in ("padded", "pretrained")
    ]
    assert {
        record["tuning"]["learning_rate"] for record in read(tmp_path).values()
    } == {0.2}
    kept = bigs.from_pretrained(tmp_path / "cola")
    assert [same(kept, classifier(2, seed)) for seed in range(3)] == [
        False,
        True,
        False,
    ]
    (tmp_path / "cola/padded-0.json").unlink()
    command(
        made,
        tmp_path,
        "--task",
        "cola",
        "--search",
        "--learning-rate",
        "0.1",
        "0.2",
        "0.3",
        "--weight-decay",
        "0.0",
        "--seeds",
        "3",
        "--variants",
        "padded",
        learning_rate=None,
    )
    assert same(bigs.from_pretrained(tmp_path / "cola"), kept)
    assert len(calls) == 10
    assert not list(tmp_path.glob("cola/search/*/config.json"))
    assert len(bigs.Grid().tunings(True, 1024)) == 60
    assert bigs.Grid().tunings(False, 1024) == [bigs.Tuning()]


def test_a_killed_command_goes_on_with_the_next_run(made, tmp_path, asked):
    calls, script = asked
    script["rte"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        command(made, tmp_path, "--task", "mnli", "rte", "cola")
    assert calls.pop()[0] == "rte"
    assert list(first := read(tmp_path)) == ["mnli/pretrained-0.json"]
    script.clear()
    command(made, tmp_path, "--task", "mnli", "rte", "cola")
    assert [call[0] for call in calls] == ["mnli", "rte", "cola"]
    assert first == read(tmp_path, "mnli/*-0.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "soup"), "task: 'soup' does not exist; choose one of mnli, "),
        (
            ("--variants", "loud"),
            "variants: 'loud' does not exist; choose one of pretrained, ",
        ),
        (("--seeds", "0"), "seeds: 0 is not positive"),
        (("--task", "qnli"), "data: there is no train set of qnli in "),
        (("--task", "rte", "--start", "nowhere"), "nowhere: no such folder"),
        (
            ("--task", "all", "--data", "tests"),
            "data: no task has both a train and a dev set in tests",
        ),
        (
            ("--task", "rte", "--data", "nowhere"),
            "data: nowhere is no folder; pass the one that holds CoLA",
        ),
        (
            (),
            (
                "data: nyu-mll/glue cannot be had (ConnectionError); pass the folder of"
                " GLUE's official files with --data, or take --task pairs"
            ),
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    made, tmp_path, asked, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: (_ for _ in ()).throw(ConnectionError),
    )
    with pytest.raises(SystemExit, match="2"):
        command(
            made,
            tmp_path,
            *(arguments or ("--task", "cola")),
            **({} if arguments else {"data": None}),
        )
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"error: {message}")
    assert all("left out" in line for line in err[:-1])
    assert asked[0] == []


def test_cut_batches_were_measured_to_be_faster_at_equal_scores():
    """data/glue-speed.json: three seeds of each task, cut and padded in turns."""
    for task, found in (
        (t, f)
        for t, f in json.loads((bigs.DATA / "glue-speed.json").read_text()).items()
        if t in bigs.GLUE
    ):
        cut, padded = (
            np.array(found["variants"][kind]["last"][found["dev"]][found["metric"]])
            for kind in ("pretrained", "padded")
        )
        assert len(cut) == len(padded) == 3
        assert bigs.cut_speed(task) >= 3
        assert abs(cut.mean() - padded.mean()) <= 2 * np.hypot(
            cut.std(ddof=1), padded.std(ddof=1)
        ), task

"""Make tests/golden/net: small models, and what the program says and learns with them.

    python tests/make_net.py --again

tests/test_net.py measures the same again and compares. The stored values were made
once, before the program was rewritten, by the program at commit 3ff9fdc; making them
again from a later program would prove nothing, so it takes the option --again. (When
arrays became batch first, so did the random numbers of the encoder's dropout. The runs
under dropout were then made again, by commit 3ff9fdc with just these numbers laid out
as (batch, L, d) instead of (L, batch, d); all other values stayed.) How far
values differ where nothing but rounding does, from which the tolerances were taken:
with another optimization of the compiler, and every weight moved by an ulp,

    XLA_FLAGS= python tests/make_net.py --ulp --output other.npz
    python tests/make_net.py --compare other.npz

    golden/net/<architecture>/   four models in the published format, their weights
    drawn
                                 by name
    golden/net.npz               for each case of CASES its arrays, as case/array
"""

import argparse
import json
import os
import sys
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # PYTHONPATH comes before it

import net
import numpy as np
from flax import serialization, traverse_util

FOLDER = Path(__file__).parent / "golden" / "net"
FILE = FOLDER.with_suffix(".npz")


# The models: four architectures, stored under FOLDER in the published format

VOCABULARY = 60
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "num_ssm": 8,
    "num_attention_heads": 2,
}
GATED = {"block": "gated", "intermediate_size": 48, "pre_norm": True}
STACK = {"block": "stack", "intermediate_size": 64, "pre_norm": False}
ARCHITECTURES = {
    "gated-ssm": SHAPE | GATED | {"routing": "ssm"},
    "gated-attention": SHAPE | GATED | {"routing": "attention"},
    "stack-ssm": SHAPE | STACK | {"routing": "ssm"},
    "stack-attention": SHAPE | STACK | {"routing": "attention"},
}
DTYPES = ("float32", "bfloat16")
POSITIONS = "s4_bert/embeddings/position_embeddings/embedding"
CLASSES = {
    "masked_lm": "BiGSForMaskedLM",
    "sequence_classification": "BiGSForSequenceClassification",
    "token_classification": "BiGSForTokenClassification",
    "question_answering": "BiGSForQuestionAnswering",
    "multiple_choice": "BiGSForMultipleChoice",
}


def drawn(name, shape):
    """Random weights that depend on nothing but their published name.

    No bias is zero and no scale is one, and the poles fade and turn at many rates. The
    first pole of every SSM would grow, and has to be clipped. NumPy's old generator is
    used because its numbers are promised never to change.
    """
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    kind = name.split("/")[-1]
    if kind == "A_re":
        fades = -0.4 * np.exp(normal)
        fades[0] = 0.05
        return fades.astype(np.float32)
    if kind == "A_im":
        return (np.sign(normal) * np.geomspace(1, 30, len(normal))).astype(np.float32)
    ways = {
        "kernel": lambda: normal * 1.5 / np.sqrt(shape[0]),
        "embedding": lambda: 0.5 * normal,
        "scale": lambda: 1 + 0.3 * normal,
        "bias": lambda: 0.3 * normal,
        "C": lambda: normal,
        "D": lambda: 1 + 0.3 * normal,
        "log_step": lambda: -2 + 0.7 * normal,
    }
    return ways[kind]().astype(np.float32)


def stored_weights(architecture):
    """The arrays of a stored model by published name, read without the program."""
    content = (FOLDER / architecture / "flax_model.msgpack").read_bytes()
    return traverse_util.flatten_dict(serialization.msgpack_restore(content), sep="/")


def stored_config(architecture):
    return json.loads((FOLDER / architecture / "config.json").read_text())


def head_weights(task, labels):
    """The arrays of a head, drawn by name; none for masked_lm, which has its own."""
    d = SHAPE["hidden_size"]
    dense = {"s4_bert/pooler/dense/kernel": (d, d), "s4_bert/pooler/dense/bias": (d,)}
    heads = {
        "sequence_classification": dense | classifier("classifier", labels),
        "token_classification": classifier("classifier", labels),
        "question_answering": classifier("qa_outputs", 2),
        "multiple_choice": dense | classifier("classifier", 1),
    }
    return {name: drawn(name, shape) for name, shape in heads[task].items()}


def classifier(name, labels):
    return {f"{name}/kernel": (SHAPE["hidden_size"], labels), f"{name}/bias": (labels,)}


def model_of(architecture, folder, task="masked_lm", given=None, **changes):
    """A stored model with some fields of its config changed, read from a new folder.

    For another length the table of positions is drawn, for another task the head. With
    fewer layers the last ones are left out. Given weights replace the stored ones.
    """
    weights = stored_weights(architecture) | (given or {})
    config = stored_config(architecture) | changes
    config["architectures"] = [CLASSES[task]]
    for layer in range(config["num_hidden_layers"], SHAPE["num_hidden_layers"]):
        gone = f"s4_bert/encoder/layer/{layer}/"
        weights = {n: w for n, w in weights.items() if not n.startswith(gone)}
    length = config["max_position_embeddings"]
    if length != len(weights[POSITIONS]):
        weights[POSITIONS] = drawn(POSITIONS, (length, config["hidden_size"]))
    if task != "masked_lm":
        weights = {n: w for n, w in weights.items() if not n.startswith("cls/")}
        weights |= head_weights(task, config["num_labels"])
    write_weights(folder, weights)
    (folder / "config.json").write_text(json.dumps(config))
    return net.read(folder)


def write_weights(folder, weights):
    """Write arrays by published name, without the program."""
    if ULP:
        weights = {name: nudged(array) for name, array in weights.items()}
    tree = traverse_util.unflatten_dict(weights, sep="/")
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))


def nudged(array):
    """An array whose every number is off by about an ulp."""
    noise = np.random.RandomState(array.size).standard_normal(array.shape)
    return (array * (1 + 2.0**-24 * noise)).astype(np.float32)


ULP = False  # whether to move the weights of every model that is measured


# The inputs


def random_texts(rows, length):
    """Tokens and segment types; the first token is [CLS], the last [SEP]."""
    draw = np.random.RandomState(length)
    ids = draw.randint(5, VOCABULARY, (rows, length)).astype(np.int32)
    ids[:, 0] = 2
    ids[:, -1] = 3
    types = (np.arange(length) >= draw.randint(1, length + 1, (rows, 1))).astype(int)
    return ids, types


def some_padding(rows, length):
    """A mask: the first text is whole, the others end earlier and earlier."""
    lengths = [max(1, length - row * (length // 3 + 1)) for row in range(rows)]
    return np.arange(length) < np.array(lengths)[:, None]


def masked_texts(length, number=0, rows=4):
    """A batch of masked texts, two of them padded.

    At three places nothing is asked, all in the second and the fourth text: parts of a
    batch do not ask for the same number of words.
    """
    ids, _ = random_texts(rows, length)
    ids = (ids + 7 * number) % (VOCABULARY - 5) + 5
    lengths = np.array([length, length - 3, length, length // 2])[:rows]
    count = max(2, round(0.15 * length))
    draw = np.random.RandomState(1000 * length + number)
    places = [np.sort(draw.permutation(n)[:count]) for n in lengths]
    positions = np.stack(places).astype(np.int32)
    labels = np.take_along_axis(ids, positions, 1)
    labels[1, -1] = 0
    labels[3, 1:3] = 0
    np.put_along_axis(ids, positions[:, ::2], 4, 1)
    return {
        "input_ids": ids,
        "positions": positions,
        "labels": labels,
        "lengths": lengths.astype(np.int32),
    }


def token_rows(rows=10, length=32):
    """Rows to pretrain on, between [CLS] and [SEP], one of them with a [SEP] inside."""
    ids, _ = random_texts(rows, length)
    ids[3, 9] = 3
    return ids


def labelled_texts(rows=24, length=12, labels=2):
    """Texts to fine-tune on: the second token tells the label."""
    ids, types = random_texts(rows, length)
    lengths = np.random.RandomState(5).randint(length // 2, length + 1, rows)
    inside = np.arange(length) < lengths[:, None]
    ids = np.where(inside, ids, 0).astype(np.int32)
    types = np.where(inside, types, 0).astype(np.int32)
    label = ids[:, 1] % 2 if labels > 1 else (ids[:, 1] % 7 / 2).astype(np.float32)
    return ids, types, lengths.astype(np.int32), label


# What is kept of a large array


def sample(array, count=96):
    """Some entries of an array, evenly spread, and its root mean square at the end."""
    flat = np.asarray(array, np.float64).ravel()
    chosen = np.linspace(0, flat.size - 1, min(count, flat.size)).astype(int)
    return np.append(flat[chosen], np.sqrt(np.square(flat).mean())).astype(np.float32)


def summary(arrays):
    """Norm and two random projections of every array, in the order of their names.

    A projection has the size of the norm; together they tell one array from another.
    """
    rows = []
    for name in sorted(arrays):
        flat = np.asarray(arrays[name], np.float64).ravel()
        draw = np.random.RandomState(zlib.crc32(name.encode()) ^ 1)
        directions = draw.standard_normal((2, flat.size))
        rows.append([np.linalg.norm(flat), *directions @ flat])
    return np.array(rows, np.float32)


# What is measured: functions from an empty folder to a dict of arrays


def logits(folder, architecture, lengths, rows=3, **changes):
    """Logits without and with padding, where a text is: padding may say anything."""
    model = model_of(architecture, folder, **changes)
    found = {}
    for length in lengths:
        ids, types = random_texts(rows, length)
        mask = some_padding(rows, length)
        whole = np.asarray(net.outputs(model, ids, None, types))
        padded = np.asarray(net.outputs(model, ids, mask, types))
        found[f"{length}"] = sample(whole)
        found[f"{length} padded"] = sample(padded[mask])
    return found


def answers(folder, task, **changes):
    """What a head answers to padded texts."""
    model = model_of("gated-ssm", folder, task, num_hidden_layers=1, **changes)
    ids, types = random_texts(6, 12)
    mask = some_padding(6, 12)
    if task == "multiple_choice":
        ids, types, mask = (a.reshape(3, 2, 12) for a in (ids, types, mask))
    found = net.outputs(model, ids, mask, types)
    if task == "question_answering":
        start, end = found
        return {"start": np.asarray(start)[mask], "end": np.asarray(end)[mask]}
    if task == "token_classification":
        return {"answers": np.asarray(found)[mask]}
    return {"answers": np.asarray(found)}


def gradient(folder, architecture, length, **changes):
    """Loss and gradient on one batch, without dropout."""
    model = model_of(architecture, folder, **changes)
    loss, found = net.loss_and_gradient(model, masked_texts(length))
    return {"loss": np.float32(loss), "gradient": summary(found)}


def training(folder, architecture, dtype, dropout=0.1, layers=2, **recipe):
    """Twenty training losses, and how the parameters have moved.

    In bfloat16 rounding alone moves parameters elsewhere; there the losses must do.
    """
    changes = {"hidden_dropout_prob": dropout, "num_hidden_layers": layers}
    model = model_of(architecture, folder, dtype=dtype, **changes)
    batches = [masked_texts(32, number) for number in range(20)]
    before = net.by_published_name(model)
    losses, after = net.train(model, batches, TRAINING | recipe)
    if dtype == "bfloat16":
        return {"losses": np.float32(losses)}
    idle = KEY_BIASES if "attention" in architecture else ()
    names = [name for name in before if not name.endswith(idle)]
    moved = {name: after[name] - before[name] for name in names}
    return {"losses": np.float32(losses), "moved": summary(moved)}


def pretraining(folder):
    """Losses of a short run through the whole of pretraining."""
    return losses_of(net.pretrain(folder / "run", *pretraining_arguments(folder)))


def pretraining_arguments(folder):
    model = model_of("gated-attention", folder, num_hidden_layers=1)
    return model, token_rows(), PRETRAINING


def losses_of(log):
    """The losses in the log of a run, by kind."""
    kinds = ("loss", "heldout")
    return {kind: np.float32([v for _, k, v in log if k == kind]) for kind in kinds}


def finetuning(folder, architecture, labels, **tuning):
    """Scores after each epoch, and answers of the last and of the best model."""
    task = "sequence_classification"
    changes = {"num_labels": labels, "num_hidden_layers": 1}
    model = model_of(architecture, folder, task, **changes)
    texts = labelled_texts(labels=labels)
    tuning |= {"batch": 8, "epochs": 3}
    scores, last, best = net.finetune(model, texts, tuning, 3)
    return {"scores": np.float32(scores), "last": last, "best": best}


# Attention does not feel a bias of its keys: what moves it is rounding, and no value.
KEY_BIASES = ("du_backward/bias", "W_k/bias")
TRAINING = {
    "steps": 20,
    "batch": 4,
    "length": 32,
    "learning_rate": 1e-2,
    "warmup": 0.2,
    "weight_decay": 0.3,
}
PRETRAINING = {
    "steps": 7,
    "batch": 4,
    "length": 32,
    "learning_rate": 1e-2,
    "save_every": 3,
    "log_every": 1,
    "evaluate_every": 3,
    "seed": 4,
}


def all_cases():
    """The name of every case, its function, and the function's arguments."""
    cases = {}

    def add(name, function, **arguments):
        cases[name] = (function, arguments)

    for kind in ARCHITECTURES:
        for dtype in DTYPES:
            model = {"architecture": kind, "dtype": dtype}
            add(f"logits {kind} {dtype}", logits, lengths=(32,), **model)
            add(f"gradient {kind} {dtype}", gradient, length=32, **model)
            add(f"training {kind} {dtype}", training, **model)
        add(f"logits {kind} short", logits, architecture=kind, lengths=(1, 7))

    # Beyond 512 tokens the convolution goes by blocks of 256; shorter texts if asked.
    for kind in ("gated-ssm", "stack-ssm"):
        model = {"architecture": kind, "max_position_embeddings": 600, "rows": 2}
        add(f"logits {kind} long", logits, lengths=(512, 513), **model)
        model["convolution"] = "blocks"
        add(f"logits {kind} blocks", logits, lengths=(256, 257), **model)
    long = {"architecture": "gated-ssm", "max_position_embeddings": 600}
    add("gradient gated-ssm long", gradient, length=513, **long)
    long |= {"rows": 2, "dtype": "bfloat16"}
    add("logits gated-ssm bfloat16 long", logits, lengths=(513,), **long)

    # Configurations that change the mathematics of a layer.
    gated = {"architecture": "gated-ssm", "lengths": (7,), "num_hidden_layers": 1}
    add("logits padding as published", logits, mask_padding=False, **gated)
    add("logits gated-ssm post-norm", logits, pre_norm=False, **gated)
    add("logits gated-ssm fft", logits, convolution="fft", **gated)
    stack = gated | {"architecture": "stack-ssm"}
    add("logits stack-ssm pre-norm", logits, pre_norm=True, **stack)

    for pooler in ("non_padding_mean", "mean", "cls"):
        head = {"task": "sequence_classification", "num_labels": 3}
        add(f"answers for texts, {pooler}", answers, pooler_type=pooler, **head)
    for task in ("token_classification", "question_answering", "multiple_choice"):
        add(f"answers, {task}", answers, task=task)

    parts = {"accumulate": 2, "ssm_rate": 2.0, "ssm_decay": False}
    plain = {"architecture": "gated-ssm", "dtype": "float32", "dropout": 0.0}
    add("training in parts", training, layers=1, **plain, **parts)
    add("pretraining", pretraining)
    tuning = {"architecture": "gated-attention", "learning_rate": 3e-3}
    add("finetuning labels", finetuning, labels=2, weight_decay=0.1, **tuning)
    tuning["architecture"] = "gated-ssm"
    add("finetuning scores", finetuning, labels=1, **tuning)
    return cases


CASES = all_cases()
# What runs with --slow only: the default run has one case of a kind.
DEFAULT = {
    *(f"logits {kind} float32" for kind in ARCHITECTURES),
    "logits gated-ssm bfloat16",
    "logits gated-ssm short",
    "logits gated-ssm long",
    "logits gated-ssm blocks",
    "logits gated-ssm fft",
    "logits gated-ssm post-norm",
    "logits stack-ssm pre-norm",
    "logits padding as published",
    "gradient gated-ssm float32",
    "gradient stack-attention float32",
    "training gated-ssm float32",
    "training in parts",
    "answers for texts, non_padding_mean",
    "answers, token_classification",
    "answers, question_answering",
    "answers, multiple_choice",
    "finetuning labels",
    "pretraining",
}


def measure(name):
    """The arrays of a case, by name."""
    function, arguments = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        return function(Path(folder), **arguments)


def exact_values():
    """Whole numbers and rates, which no rounding touches."""
    tokens = token_rows()
    found = {}
    for seed, step, masks in MASKED:
        batch = net.masked_batch(tokens, VOCABULARY, 4, seed, step, masks)
        for part, array in zip(
            ("input_ids", "positions", "labels"), batch, strict=True
        ):
            found[f"batch {seed} {step} {masks}/{part}"] = array
    steps = [0, 1, 2, 3, 10, 19, 20]
    found["rates"] = np.float32(net.learning_rates(TRAINING, steps))
    found["tuning rates"] = np.float32(net.tuning_rates({"warmup": 0.1}, steps, 21))
    return found


MASKED = [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 8, 0), (1, 0, 0), (0, 12, 2)]


def difference(case, array, found, wanted):
    """The largest difference of two arrays of a case, as a share of their size.

    Losses and scores are compared one by one. Of a summary, whose rows are norm and
    projections of a parameter, each row counts by its norm, or by a hundredth of the
    largest norm where that is more. Of answers the size is the root mean square.

    In bfloat16 a single answer may be off by much, and the root mean square of the
    differences is what can be compared.
    """
    found = np.asarray(found, np.float64)
    wanted = np.asarray(wanted, np.float64)
    if "bfloat16" in case:
        return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    if array in ("loss", "losses", "heldout", "scores"):
        size = np.abs(wanted)
    elif array in ("gradient", "moved"):
        norms = wanted[:, :1]
        size = np.maximum(norms, 1e-2 * norms.max())
    else:
        size = np.sqrt(np.square(wanted).mean())
    return (np.abs(found - wanted) / size).max()


def compare(file):
    """Print how far the values in another file lie from the stored ones."""
    with np.load(FILE) as stored, np.load(file) as other:
        for name in stored:
            found = difference(*name.rsplit("/", 1), other[name], stored[name])
            print(f"{name:50s} {found:.1e}")


def store_models():
    """Write the four models in the published format, their weights drawn by name."""
    for name, config in ARCHITECTURES.items():
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        model = net.fresh(config)
        names = net.by_published_name(model)
        weights = {name: drawn(name, array.shape) for name, array in names.items()}
        net.write(model, folder)
        write_weights(folder, weights)
        net.write(net.read(folder), folder)  # as the program orders them


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="replace what is stored")
    parser.add_argument("--output", type=Path, default=FILE, help="of the arrays")
    parser.add_argument("--compare", type=Path, help="another file with the stored one")
    parser.add_argument("--ulp", action="store_true", help="move all weights a little")
    options = parser.parse_args()
    if options.compare:
        compare(options.compare)
        return
    global ULP
    if options.again:
        store_models()
    elif options.output == FILE:
        parser.error("the stored values are kept, unless you say --again")
    ULP = options.ulp
    values = {f"exact/{key}": array for key, array in exact_values().items()}
    for name in CASES:
        print(name, flush=True)
        values |= {f"{name}/{key}": array for key, array in measure(name).items()}
    np.savez_compressed(options.output, **values)


if __name__ == "__main__":
    main()

"""With attention in its place the stacked layer is BERT: our outputs against those of
Hugging Face's BERT.

golden/bert.npz holds small random weights and the answers to them in float64;
make_bert.py made it. The claim is about answers, not about training: BERT drops out
within its layers, too, and starts its heads differently.
"""

from pathlib import Path

import numpy as np
import pytest

import annotated_bigs as bigs

STORED = np.load(Path(__file__).parent / "golden" / "bert.npz")
INPUTS = [STORED[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
CONFIG = bigs.Config(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    intermediate_size=128,
    num_attention_heads=4,
    max_position_embeddings=24,
    block="stack",
    routing="attention",
    pre_norm=False,
    pooler_type="cls",
)

# Left stands our attribute, right the module of Hugging Face.
EMBEDDINGS = {
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "types": "token_type_embeddings",
    "norm": "LayerNorm",
}
LAYER = {
    "W_q": "attention.self.query",
    "W_k": "attention.self.key",
    "W_v": "attention.self.value",
    "W_o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "W_in": "intermediate.dense",
    "W_out": "output.dense",
    "norm2": "output.LayerNorm",
}
HEADS = {
    "dense": "cls.predictions.transform.dense",
    "norm": "cls.predictions.transform.LayerNorm",
    "pooler": "bert.pooler.dense",
    "classifier": "cls.seq_relationship",
}


def names_there(path):
    """The names of a parameter of ours in Hugging Face's BERT: one, or one for each
    layer.
    """
    if path == ("head", "bias"):
        return ["cls.predictions.bias"]
    part, *layers, module, leaf = path
    leaf = "bias" if leaf == "bias" else "weight"
    if layers:
        return [
            f"bert.encoder.layer.{i}.{LAYER[module]}.{leaf}"
            for i in range(CONFIG.num_hidden_layers)
        ]
    return [
        (
            f"{HEADS[module]}.{leaf}"
            if part == "head"
            else f"bert.embeddings.{EMBEDDINGS[module]}.{leaf}"
        )
    ]


def value_there(path):
    """The value of a parameter of ours in the stored BERT, whose dense weights are
    (outputs, inputs).
    """
    found = [STORED[f"weight/{name}"] for name in names_there(path)]
    found = [array.T for array in found] if path[-1] == "kernel" else found
    return np.stack(found) if "layers" in path else found[0]


def bert(task, config=CONFIG):
    """Our model with every parameter from the stored BERT, none as it was drawn."""
    model = bigs.BiGS(config, task)
    return bigs.with_parameters(
        model, {path: value_there(path) for path, _ in bigs.named_parameters(model)}
    )


def hidden(config):
    x = bert("masked_lm", config).encoder(INPUTS[0], INPUTS[1] > 0, INPUTS[2])
    return np.asarray(x)


def pooled(config):
    """A classifier that changes nothing shows what it is given."""
    model = bigs.BiGS(
        bigs.replace(config, num_labels=config.hidden_size), "sequence_classification"
    )
    values = {
        path: value_there(path)
        for path, _ in bigs.named_parameters(model)
        if "classifier" not in path
    }
    values |= {
        ("head", "classifier", "kernel"): np.eye(config.hidden_size),
        ("head", "classifier", "bias"): np.zeros(config.hidden_size),
    }
    return bigs.with_parameters(model, values)(*INPUTS)


ANSWERS = {
    "hidden": hidden,
    "pooled": pooled,
    "token_logits": lambda config: bert("masked_lm", config)(*INPUTS),
    "text_logits": lambda config: bert("sequence_classification", config)(*INPUTS),
}


def difference(answer, config=CONFIG):
    """The largest difference to the float64 answer, at words; in units of Hugging
    Face's own float32 error.
    """
    ours = np.asarray(ANSWERS[answer](config), np.float64)
    theirs = STORED[answer]
    assert ours.shape == theirs.shape
    at = INPUTS[1] > 0 if ours.ndim == 3 else slice(None)
    return np.abs(ours - theirs)[at].max() / STORED[f"error/{answer}"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_outputs_are_berts(answer):
    """On a CPU all four are below 1. GELU by a tanh, the subtlest likely mistake, gives
    380 or more.
    """
    assert difference(answer) < 4


def test_every_weight_of_bert_has_its_place():
    models = [
        bigs.BiGS(CONFIG, task) for task in ("masked_lm", "sequence_classification")
    ]
    ours = {
        name
        for model in models
        for path, _ in bigs.named_parameters(model)
        for name in names_there(path)
    }
    assert ours == {
        name.removeprefix("weight/") for name in STORED if name.startswith("weight/")
    }

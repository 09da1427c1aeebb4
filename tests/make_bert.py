"""Make tests/golden/bert.npz: a small random BERT of Hugging Face, what it is asked,
and what it answers.

tests/test_bert.py gives the same weights to our model. This script is no test and is
run by hand, once:

    python3 -m venv ../torch
    ../torch/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
    ../torch/bin/python tests/make_bert.py

It needs no network beyond that installation, no trained weights and no accelerator. In
the file are

    weight/<name>     the weights in float32, under the names of Hugging Face input_ids,
    attention_mask, token_type_ids    three texts of 20 tokens, two of them with padding
    hidden, pooled, token_logits, text_logits    the answers, computed in float64 from
    those weights error/<answer>    the largest difference between their float32 answer
    and their float64 answer versions          what computed them
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "golden" / "bert.npz"


def make_model(torch, transformers):
    """BERT as it is pretrained, with both heads, every number in it random.

    A fresh BERT has small weights, zero biases and LayerNorms that scale by one, and
    would hide most mistakes: its softmax is flat, its GELU near a line. Here a query
    prefers some keys, and no bias or scale is neutral.
    """
    model = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=24,
            type_vocab_size=2,
            layer_norm_eps=1e-12,
            hidden_act="gelu",
            attn_implementation="eager",
        )
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=0.3)
    return model.eval()


def make_inputs():
    """Three texts: one fills its row; one ends early; one also has a hole, where
    padding stands amid words.

    Tokens are random at padding, too: whoever reads them gets another answer.
    """
    rng = np.random.default_rng(0)
    mask = np.ones((3, 20), np.int64)
    mask[1, 13:] = mask[2, 8:11] = mask[2, 16:] = 0
    types = np.arange(20) >= np.array([[9], [5], [12]])
    return {
        "input_ids": rng.integers(0, 61, mask.shape),
        "attention_mask": mask,
        "token_type_ids": types.astype(np.int64),
    }


def answers(torch, model, inputs):
    """The last hidden state, the pooled output and the logits of both heads."""
    with torch.no_grad():
        inputs = {name: torch.tensor(array) for name, array in inputs.items()}
        base = model.bert(**inputs)
        both = model(**inputs)
    found = {
        "hidden": base.last_hidden_state,
        "pooled": base.pooler_output,
        "token_logits": both.prediction_logits,
        "text_logits": both.seq_relationship_logits,
    }
    return {name: answer.numpy() for name, answer in found.items()}


def main():
    import torch
    import transformers

    model = make_model(torch, transformers)
    inputs = make_inputs()
    weights = {
        f"weight/{name}": weight.detach().numpy().copy()
        for name, weight in model.named_parameters()
    }
    rough = answers(torch, model, inputs)
    exact = answers(torch, model.double(), inputs)
    assert all(answer.dtype == np.float64 for answer in exact.values())
    errors = {
        f"error/{name}": np.abs(rough[name] - exact[name]).max() for name in exact
    }
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, numpy"
        f" {np.__version__}"
    )
    np.savez_compressed(FILE, **weights, **inputs, **exact, **errors, versions=versions)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {versions}")
    for name, answer in exact.items():
        print(
            f"{name}: shape {answer.shape}, std {answer.std():.3f}, float32 error"
            f" {errors['error/' + name]:.1e}"
        )


if __name__ == "__main__":
    main()

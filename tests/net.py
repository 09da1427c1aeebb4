"""The regression net's adapter: the only place where the net touches the program.

Whoever rewrites the program changes these few functions until they speak to the new
names; make_net.py and test_net.py stay as they are, and so do the stored values. A
model is whatever the program calls one; parameters go by their published names.
"""

import functools
from unittest import mock

import jax
import numpy as np

import annotated_bigs as bigs
from workshop import running


def fresh(config):
    """A model of this config, its weights drawn by the program."""
    return bigs.BiGS(bigs.Config(**config))


def read(folder):
    """The model in a folder of the published format."""
    return bigs.from_pretrained(folder)


def write(model, folder):
    """Write a model in the published format."""
    bigs.save_pretrained(model, folder)


def by_published_name(model):
    """The arrays of a model, or of a gradient, by published name."""
    return bigs.published_tree(model)


def outputs(model, input_ids, mask=None, types=None):
    """What a model answers: one array, or several."""
    return model(input_ids, mask, types)


def padded(input_ids, positions, labels, lengths):
    """A batch of texts that are padded with 0 beyond their lengths."""
    inside = np.arange(input_ids.shape[1]) < lengths[:, None]
    return bigs.Batch(np.where(inside, input_ids, 0), positions, labels)


def padded_loss(model, batch, key=None):
    """The masked-LM loss of texts that are padded, which pretraining never has."""
    mask = batch.input_ids != 0
    logits = bigs.masked_logits(model, batch.positions, batch.input_ids, mask, key)
    return bigs.masked_loss(logits, batch.labels)


@functools.cache
def compiled_gradient():
    return jax.jit(jax.value_and_grad(padded_loss))


def loss_and_gradient(model, batch):
    """The masked-LM loss without dropout, and its gradient by published name."""
    loss, gradient = compiled_gradient()(model, padded(**batch))
    return float(loss), by_published_name(gradient)


def train(model, batches, recipe):
    """The loss of a training step on each batch, and the parameters after the last."""
    recipe = bigs.Recipe(**recipe)
    step = bigs.make_step(recipe, padded_loss)
    state = bigs.fresh_state(model.config, recipe, model)
    losses = []
    for batch in batches:
        state, loss = step(state, padded(**batch))
        losses.append(float(loss))
    return losses, by_published_name(state.model)


def updates(recipe, gradients):
    """What the optimizer adds to a kernel of zeros for each of these gradients."""
    optimizer = bigs.make_optimizer(bigs.Recipe(**recipe))
    kernel = {"kernel": np.zeros(np.shape(gradients[0]), np.float32)}
    state = optimizer.init(kernel)
    found = []
    for gradient in gradients:
        given = {"kernel": np.asarray(gradient, np.float32)}
        update, state = optimizer.update(given, state, kernel)
        found.append(np.asarray(update["kernel"]))
    return found


def learning_rates(recipe, steps):
    """The learning rate of a pretraining recipe at some steps."""
    schedule = bigs.schedule(bigs.Recipe(**recipe))
    return [float(schedule(step)) for step in steps]


def tuning_rates(tuning, steps, total):
    """The learning rate of fine-tuning at some of `total` steps, counted from 0."""
    tuning = bigs.Tuning(**tuning)
    return [tuning.rate(step, total) for step in steps]


def as_rows(tokens, vocabulary):
    """Rows of tokens that can be masked: [PAD] 0, [CLS] 2, [SEP] 3, [MASK] 4."""
    return bigs.Rows(tokens, vocabulary, 4, (0, 2, 3))


def masked_batch(tokens, vocabulary, size, seed, step, masks=0):
    """A batch of pretraining: input_ids, positions, labels."""
    batch = bigs.batch_at(as_rows(tokens, vocabulary), size, seed, step, masks)
    return batch.input_ids, batch.positions, batch.labels


class NoTokenizer:
    """Stands in where nothing but saving is asked of a tokenizer."""

    def save_pretrained(self, folder):
        pass


def pretrain(folder, model, tokens, recipe, leave_after=None, resume=False):
    """Pretrain from a model into a folder, which then holds the published format.

    It leaves early, with a checkpoint, after so many steps if asked. Returned are the
    losses of the log, as a list of (step, kind, value).
    """
    taken = []

    def stop():
        taken.append(1)
        return len(taken) == leave_after

    rows = as_rows(tokens, model.config.vocab_size)
    heldout = [bigs.batch_at(rows, 4, 9, 0)]
    data = bigs.Dataset(NoTokenizer(), rows, heldout, "random tokens")
    recipe = bigs.Recipe(**recipe)
    with mock.patch.object(running, "product_rate", lambda dtype: 1e9):  # not measured
        running.pretrain(model.config, recipe, data, folder, resume, model, stop)
    log = running.read_log(folder)
    kinds = ("loss", "heldout")
    return [(r["step"], kind, r[kind]) for r in log for kind in kinds if kind in r]


def finetune(model, texts, tuning, seed):
    """Fine-tune on texts (input_ids, types, lengths, labels) and answer for them.

    Returned are the score after each epoch (the share of right labels, or minus the
    mean squared error), and the answers of the last model and of the best.
    """
    examples = bigs.Examples(*texts)
    labels = texts[3]

    def score(model):
        answers = bigs.predict(model, examples)
        if answers.shape[1] == 1:
            return -float(np.square(answers[:, 0] - labels).mean())
        return float((answers.argmax(1) == labels).mean())

    tuned = bigs.finetune(model, examples, bigs.Tuning(**tuning), seed, score)
    answers = [bigs.predict(model, examples) for model in (tuned.last, tuned.best)]
    return tuned.scores, *answers


def label_names(task):
    """The labels of a task of GLUE, in the order of the model's outputs."""
    return bigs.GLUE[task].labels

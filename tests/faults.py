"""Faults, seeded one at a time into a copy of the project: do the tests catch
them?

    python tests/faults.py                    # all of them, some twenty minutes
    python tests/faults.py --only NAME        # one, or several with --only repeated
    python tests/faults.py --list
    python tests/faults.py --json FILE        # also write what was found to a file

A fault replaces one snippet in the definition of a function, a class or a name of
annotated_bigs.py or of a file of workshop/. Snippets are written as `ast.unparse`
writes code and matched against the unparsed definition without its docstring, so
formatting and comments do not matter. A snippet that is not found exactly once is
reported: the program has moved on, and the fault has to be rewritten, never dropped.
tests/test_faults.py looks at that in every run.

First the tests run on the copy as it is. Then a fault counts as caught if a test fails;
not if the tests pass, take too long, or cannot even be collected. The status is 0 if
all are caught.
"""

import argparse
import ast
import copy
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "annotated_bigs.py"
SECONDS = 600  # for the tests of one fault, and five times that for all of them


@dataclass(frozen=True)
class Fault:
    """One wrong line: in the definition of `where`, `old` becomes `new`."""

    name: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]
    file: str = PROGRAM


def doctest(name):
    return f"{PROGRAM}::annotated_bigs.{name}"


def net(case):
    """A case of the regression net, by the id of its test."""
    return f"tests/test_net.py::test_the_program_says_what_it_said[{case}]"


GATED_LOGITS = net("logits-gated-ssm-float32")
BERT_LOGITS = net("logits-stack-attention-float32")
TRAINING = net("training-gated-ssm-float32")
PARTS = net("training-in-parts")
EXACT = "tests/test_net.py::test_batches_and_rates_are_what_they_were"
FAST = "tests/test_fast.py::test_value_and_gradient_are_those_of_the_plain_form"
FAST_BLOCKS = (
    "tests/test_fast.py::"
    "test_convolutions_of_a_batch_are_those_of_its_sentences_on_every_device"
)
AUTHORS = "tests/test_published.py::test_outputs_are_the_authors"

ROUGH_NORM = """class Rough(nnx.LayerNorm):

        def __call__(self, x):
            x = jnp.asarray(x, self.dtype)
            x = x - x.mean(-1, keepdims=True)
            x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
            scale = self.scale[...].astype(self.dtype)
            return x * scale + self.bias[...].astype(self.dtype)
"""

FAULTS = [
    # State spaces and convolutions
    Fault(
        name="factor of the discretization",
        where="discretize_diagonal",
        old="jnp.expm1(z) / ssm.A",
        new="jnp.expm1(z) / z",
        tests=(
            doctest("discretize_diagonal"),
            "tests/test_ssm.py::test_diagonal_discretization_is_scipys",
            GATED_LOGITS,
        ),
    ),
    Fault(
        name="kernel one token late",
        where="ssm_kernel",
        old="* jnp.arange(L)",
        new="* jnp.arange(1, L + 1)",
        tests=(
            doctest("ssm_kernel"),
            "tests/test_ssm.py::test_kernel_is_the_recurrence",
            GATED_LOGITS,
        ),
    ),
    Fault(
        name="real and imaginary part of C swapped",
        where="SSM.diagonal",
        old="self.C[..., 0] + 1j * self.C[..., 1]",
        new="self.C[..., 1] + 1j * self.C[..., 0]",
        tests=(AUTHORS, GATED_LOGITS),
    ),
    Fault(
        name="poles not clipped",
        where="SSM.diagonal",
        old="jnp.minimum(self.A_re[...], -0.0001)",
        new="self.A_re[...]",
        tests=(
            "tests/test_ssm.py::test_poles_that_would_grow_are_clipped",
            GATED_LOGITS,
        ),
    ),
    Fault(
        name="D dropped",
        where="convolve",
        old="ssm_kernel(ssm, L).at[0].add(ssm.D)",
        new="ssm_kernel(ssm, L)",
        tests=(
            doctest("convolve"),
            AUTHORS,
            GATED_LOGITS,
        ),
    ),
    Fault(
        name="Fourier transform not padded",
        where="convolve_fft",
        old="L = u.shape[-2]\n"
        "    kernel = jnp.fft.rfft(K, 2 * L)[:, None]\n"
        "    if not past:\n"
        "        kernel = kernel.conj()\n"
        "    inputs = jnp.fft.rfft(u.astype(jnp.float32), 2 * L, axis=-2)\n"
        "    outputs = jnp.fft.irfft(kernel * inputs, 2 * L, axis=-2)",
        new="L = u.shape[-2]\n"
        "    kernel = jnp.fft.rfft(K, L)[:, None]\n"
        "    if not past:\n"
        "        kernel = kernel.conj()\n"
        "    inputs = jnp.fft.rfft(u.astype(jnp.float32), L, axis=-2)\n"
        "    outputs = jnp.fft.irfft(kernel * inputs, L, axis=-2)",
        tests=(doctest("convolve_fft"), AUTHORS, net("logits-gated-ssm-fft")),
    ),
    Fault(
        name="conjugate missing",
        where="convolve_fft",
        old="kernel = kernel.conj()",
        new="kernel = kernel",
        tests=(
            "tests/test_convolution.py::test_jacobian_is_the_triangle",
            net("logits-gated-ssm-fft"),
        ),
    ),
    Fault(
        name="sign of the imaginary read-out",
        where="block_products",
        old="-read.imag",
        new="read.imag",
        tests=(
            doctest("block_products"),
            doctest("convolve_blocks"),
            net("logits-gated-ssm-blocks"),
        ),
    ),
    Fault(
        name="exponent between blocks",
        where="carry_states",
        old="return (fade * h + w_c, h)",
        new="return (fade * h + w_c, fade * h + w_c)",
        tests=(
            doctest("carry_states"),
            "tests/test_convolution.py::test_states_are_carried_from_block_to_block",
            net("logits-gated-ssm-blocks"),
        ),
    ),
    # Layers, encoder, heads
    Fault(
        name="backward kernel runs forward",
        where="GatedLayer.__init__",
        old="direction(config, past=False, rngs=rngs)",
        new="direction(config, past=True, rngs=rngs)",
        tests=(
            "tests/test_model.py::test_a_layer_reads_both_directions_and_each_ssm_its_own",
            GATED_LOGITS,
        ),
    ),
    Fault(
        name="residual dropped",
        where="GatedLayer.__call__",
        old="y = x + self.W_o(",
        new="y = self.W_o(",
        tests=(AUTHORS, GATED_LOGITS),
    ),
    Fault(
        name="normalization before the residual",
        where="StackLayer.__call__",
        old="return self.norm2(x + self.feed(x))",
        new="return x + self.norm2(self.feed(x))",
        tests=("tests/test_bert.py", BERT_LOGITS),
    ),
    Fault(
        name="exact GELU in the gated layer",
        where="gelu",
        old="approximate=True",
        new="approximate=False",
        tests=(AUTHORS, GATED_LOGITS),
    ),
    Fault(
        name="padding is heard backward",
        where="Direction.__call__",
        old="if self.config.mask_padding:",
        new="if self.config.mask_padding and self.past:",
        tests=("tests/test_model.py::test_padding_is_silent", GATED_LOGITS),
    ),
    Fault(
        name="mask on queries instead of keys",
        where="attend",
        old="mask[:, None, None, :]",
        new="mask[:, None, :, None]",
        tests=(doctest("attend"), "tests/test_bert.py", BERT_LOGITS),
    ),
    Fault(
        name="bfloat16 statistics",
        where="layer_norm",
        old="return nnx.LayerNorm(",
        new=ROUGH_NORM + "    return Rough(",
        tests=("tests/test_caught.py::test_statistics_are_taken_in_float32",),
    ),
    Fault(
        name="dropout outside of training",
        where="BiGS.logits",
        old="(None, None) if key is None else jax.random.split(key)",
        new="jax.random.split(jax.random.key(0) if key is None else key)",
        tests=(
            "tests/test_model.py::test_padding_is_silent",
            AUTHORS,
            GATED_LOGITS,
        ),
    ),
    Fault(
        name="mean over padding, too",
        where="pool",
        old="jnp.maximum(weight.sum(1), 1)",
        new="weight.shape[1]",
        tests=(
            doctest("pool"),
            AUTHORS,
            net("answers-for-texts,-non_padding_mean"),
        ),
    ),
    # The published format
    Fault(
        name="published names of the SSMs swapped",
        where="LAYER_NAMES",
        old="'forward': 'fs4', 'backward': 'bs4'",
        new="'forward': 'bs4', 'backward': 'fs4'",
        tests=(AUTHORS, GATED_LOGITS),
    ),
    Fault(
        name="square kernels transposed",
        where="take",
        old="array = np.asarray(tree.pop(name))",
        new="array = np.asarray(tree.pop(name))\n"
        "    array = array.T if array.shape[:1] * 2 == array.shape else array",
        tests=(
            AUTHORS,
            "tests/test_published.py::test_what_is_written_is_read_back",
            GATED_LOGITS,
        ),
    ),
    Fault(
        name="new positions in reverse",
        where="extend",
        old="np.tile(table, (-(-length // len(table)), 1))",
        new="np.tile(table[::-1], (-(-length // len(table)), 1))",
        tests=("tests/test_published.py::test_a_model_for_longer_texts",),
    ),
    # Text and masks
    Fault(
        name="tokenizer keeps capitals",
        where="wordpiece",
        old="normalizers.BertNormalizer()",
        new="normalizers.BertNormalizer(lowercase=False)",
        tests=(doctest("wordpiece"),),
    ),
    Fault(
        name="held-out texts are trained on",
        where="text_tokens",
        old="later.append(document.text)\n            else:\n"
        "                yield document.text",
        new="later.append(document.text)\n            yield document.text",
        tests=("tests/test_corpus.py::test_a_file",),
        file="workshop/corpora.py",
    ),
    Fault(
        name="sixteen of a hundred asked",
        where="masked_of",
        old="round(share * L)",
        new="round((share + 0.01) * L)",
        tests=(
            doctest("masked_of"),
            "tests/test_training.py::test_masking_statistics",
        ),
    ),
    Fault(
        name="no asked word is kept",
        where="mask_tokens",
        old="dice < 0.9",
        new="dice < 1.0",
        tests=("tests/test_training.py::test_masking_statistics", EXACT),
    ),
    Fault(
        name="special tokens drawn like others",
        where="mask_tokens",
        old="scores = random[:, 0] + np.isin(tokens, rows.special_ids)",
        new="scores = random[:, 0]",
        tests=(
            "tests/test_corpus.py::"
            "test_random_words_are_any_words_and_special_ones_are_never_asked",
            EXACT,
        ),
    ),
    Fault(
        name="one order for all epochs",
        where="epoch_order",
        old="(seed, 0, epoch)",
        new="(seed, 0, 0)",
        tests=(
            "tests/test_training.py::"
            "test_every_row_is_seen_once_an_epoch_and_orders_differ",
            EXACT,
        ),
    ),
    # The fast form
    Fault(
        name="exponent of the matrix between blocks",
        where="carry_by_matrix",
        old="gap = place[:, None] - place - 1",
        new="gap = place[:, None] - place",
        tests=(doctest("carry_by_matrix"), FAST_BLOCKS),
    ),
    Fault(
        name="the fast form reads the past twice",
        where="along",
        old="fast_convolve(u, ssm, side.past, side.config.convolution)",
        new="fast_convolve(u, ssm, True, side.config.convolution)",
        tests=(FAST_BLOCKS, FAST),
    ),
    Fault(
        name="the fast form convolves padding",
        where="along",
        old="if side.config.mask_padding:",
        new="if False:",
        tests=(FAST,),
    ),
    Fault(
        name="the fast form leaves out a layer",
        where="encode_at",
        old="for layer in earlier:",
        new="for layer in earlier[1:]:",
        tests=(FAST,),
    ),
    # Loss, optimizer, training
    Fault(
        name="labels moved by one place",
        where="masked_loss",
        old="jnp.asarray(labels)",
        new="jnp.roll(jnp.asarray(labels), 1, axis=1)",
        tests=(
            "tests/test_training.py::test_loss_ignores_what_is_not_asked",
            net("gradient-gated-ssm-float32"),
        ),
    ),
    Fault(
        name="loss averaged over all places",
        where="mean_loss",
        old="jnp.maximum(counted.sum(), 1)",
        new="counted.size",
        tests=(
            doctest("mean_loss"),
            "tests/test_training.py::test_loss_ignores_what_is_not_asked",
            net("gradient-gated-ssm-float32"),
        ),
    ),
    Fault(
        name="rate falls to zero",
        where="schedule",
        old="peak * recipe.end",
        new="0.0",
        tests=(
            doctest("schedule"),
            "tests/test_training.py::test_schedule_endpoints",
            EXACT,
        ),
    ),
    Fault(
        name="warm-up one step longer",
        where="schedule",
        old="round(recipe.warmup * recipe.steps))",
        new="round(recipe.warmup * recipe.steps) + 1)",
        tests=("tests/test_training.py::test_schedule_endpoints", EXACT),
    ),
    Fault(
        name="biases decay",
        where="is_decayed",
        old="('kernel', 'embedding')",
        new="('kernel', 'embedding', 'bias')",
        tests=(
            doctest("is_decayed"),
            "tests/test_training.py::test_groups_cover_all_parameters",
            TRAINING,
        ),
    ),
    Fault(
        name="backward SSMs in the wrong group",
        where="is_ssm",
        old="{'forward', 'backward'}",
        new="{'forward'}",
        tests=("tests/test_training.py::test_groups_cover_all_parameters", PARTS),
    ),
    Fault(
        name="beta_2 of 0.999",
        where="make_optimizer",
        old="b2=recipe.beta2",
        new="b2=0.999",
        tests=("tests/test_training.py::test_adamw_is_optax_adamw", TRAINING),
    ),
    Fault(
        name="epsilon of 1e-8",
        where="make_optimizer",
        old="eps=recipe.epsilon",
        new="eps=1e-08",
        tests=(
            "tests/test_caught.py::"
            "test_the_optimizer_adds_a_millionth_to_the_size_of_a_gradient",
        ),
    ),
    Fault(
        name="parts of a batch weigh the same",
        where="batch_gradient",
        old="(part.labels > 0).sum() / counted",
        new="1 / parts",
        tests=(PARTS,),
    ),
    Fault(
        name="dropout the same in every step",
        where="make_step",
        old="jax.random.fold_in(jax.random.key(recipe.seed), state.step)",
        new="jax.random.key(recipe.seed)",
        tests=(TRAINING,),
    ),
    Fault(
        name="resumed one batch early",
        where="training",
        old="batches(rows, recipe, int(state.step))",
        new="batches(rows, recipe, max(0, int(state.step) - 1))",
        tests=(
            "tests/test_training.py::test_resumed_run_is_bitwise_the_uninterrupted_one",
            "tests/test_net.py::test_a_resumed_run_is_the_uninterrupted_one",
        ),
    ),
    # Fine-tuning
    Fault(
        name="order of the labels of MNLI",
        where="GLUE",
        old="('entailment', 'neutral', 'contradiction')",
        new="('contradiction', 'neutral', 'entailment')",
        tests=("tests/test_caught.py::test_labels_are_numbered_as_on_the_hub",),
    ),
    Fault(
        name="Spearman for Pearson",
        where="task_scores",
        old="stats.pearsonr(a, b)[0]",
        new="stats.spearmanr(a, b)[0]",
        tests=("tests/test_glue.py::test_measures_are_those_of_the_libraries",),
    ),
]


class NotFound(ValueError):
    """A fault that does not fit today's program."""


def definition(tree, where):
    """The node that defines a function, a method, a class or a name of the module."""
    node = tree
    for part in where.split("."):
        named = [child for child in node.body if part in names(child)]
        if len(named) != 1:
            raise NotFound(f"{where}: {len(named)} definitions")
        node = named[0]
    return node


def names(node):
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def split_docstring(node):
    """A docstring, if there is one, as a list, and the other statements."""
    body = node.body
    has = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return (body[:1], body[1:]) if has else ([], body)


@functools.cache
def parsed(source):
    return ast.parse(source)


def seeded(source, fault):
    """The program with the fault in it; NotFound if it does not fit."""
    node = copy.deepcopy(definition(parsed(source), fault.where))
    docstring = []
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        node.decorator_list = []  # they stay in their lines, before the node's own
        docstring, node.body = split_docstring(node)
    text = ast.unparse(node)
    count = text.count(fault.old)
    if count != 1:
        raise NotFound(
            f"{fault.name}: {fault.old!r} occurs {count} times in {fault.where}; "
            "rewrite the fault for today's code"
        )
    changed = ast.parse(text.replace(fault.old, fault.new)).body[0]
    if docstring:
        changed.body = docstring + changed.body
    indent = " " * node.col_offset
    lines = source.splitlines(keepends=True)
    lines[node.lineno - 1 : node.end_lineno] = [
        textwrap.indent(ast.unparse(changed), indent) + "\n"
    ]
    return "".join(lines)


def copy_project(folder):
    """A copy of what the tests need, in a new folder."""
    ignore = shutil.ignore_patterns(
        ".*_cache", ".git", ".venv", "__pycache__", "node_modules", "runs"
    )
    return Path(shutil.copytree(ROOT, folder / "project", ignore=ignore))


def run_tests(project, tests):
    """pytest's status, or None if it took too long; the end of its output; seconds."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["--slow", "--doctest-modules", *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS if len(tests) < 20 else 5 * SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None, "", time.monotonic() - start
    return done.returncode, done.stdout[-2000:], time.monotonic() - start


VERDICTS = {0: "NOT CAUGHT", 1: "caught", None: "TOO SLOW"}


def try_fault(project, fault):
    """Seed one fault, run its tests, and say what they found."""
    source = (ROOT / fault.file).read_text()
    try:
        (project / fault.file).write_text(seeded(source, fault))
    except NotFound as error:
        return {"verdict": "REWRITE", "seconds": 0, "by": str(error)}
    status, output, seconds = run_tests(project, fault.tests)
    (project / fault.file).write_text(source)
    failed = [line for line in output.splitlines() if line.startswith("FAILED ")]
    by = failed[0].removeprefix("FAILED ").split(" - ")[0] if failed else ""
    verdict = VERDICTS.get(status, "BROKEN")
    return {"verdict": verdict, "seconds": round(seconds, 1), "by": by}


def chosen_faults(only):
    """The faults with these names, or all."""
    unknown = set(only) - {fault.name for fault in FAULTS}
    if unknown:
        sys.exit(f"no such fault: {', '.join(sorted(unknown))}; --list shows them")
    return [fault for fault in FAULTS if not only or fault.name in only]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", action="append", default=[])
    parser.add_argument("--list", action="store_true", help="show names and places")
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep the findings")
    options = parser.parse_args()
    faults = chosen_faults(options.only)
    if options.list:
        for fault in faults:
            print(f"{fault.name:40s} {fault.where}")
        return
    findings = {}
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(Path(folder))
        tests = sorted({test for fault in faults for test in fault.tests})
        status, output, _ = run_tests(project, tests)
        if status != 0:
            sys.exit(
                f"{output}\nwithout any fault the tests fail, lack or take too long"
            )
        for fault in faults:
            found = try_fault(project, fault)
            findings[fault.name] = found
            verdict, seconds = found["verdict"], found["seconds"]
            print(f"{verdict:10s} {seconds:5.0f} s  {fault.name}  {found['by']}")
            sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(findings, indent=1) + "\n")
    missed = [name for name, found in findings.items() if found["verdict"] != "caught"]
    print(f"{len(findings) - len(missed)} of {len(findings)} caught")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()

"""The document keeps its own rules, and each rule is seen to catch what breaks it."""

import importlib
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jupytext
import nbformat
import pages
import pytest
import reading

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "annotated_bigs.py"
NOTEBOOK = ROOT / "annotated_bigs.ipynb"
proofs = pages.page_module("proofs")

# What requirements.txt installs, as it is imported: prose may name any of it.
LIBRARIES = {
    "datasets",
    "flax",
    "jax",
    "jaxtyping",
    "jupytext",
    "matplotlib",
    "numpy",
    "optax",
    "orbax",
    "pytest",
    "scipy",
    "sklearn",
    "tokenizers",
    "tqdm",
    "transformers",
    "tyro",
}
# Words of other languages and of the authors' files that prose may set as code.
ALLOWED = frozenset({"python", "pip", "git", "make", "main", "--help", "--slow"})
ALLOWED |= {
    f"BiGS_{length}" for length in (128, 512, 1024, 4096)
}  # the authors' checkpoints
ALLOWED |= {"BiGS_128_MNLI", "BiGS_512_MNLI"}


@pytest.fixture(scope="module")
def document():
    return reading.read(SCRIPT.read_text(), ROOT)


@pytest.fixture(scope="module")
def bigs():
    return importlib.import_module("annotated_bigs")


@pytest.fixture(scope="module")
def notebook():
    if not NOTEBOOK.exists():
        pytest.skip("annotated_bigs.ipynb is not built yet: make notebook")
    return nbformat.read(NOTEBOOK, as_version=4)


# Rules that need the text alone. The tests below call each by name, on the document and
# on a small one that breaks it.
RULES = {
    check.__name__: check
    for check in (
        reading.check_rooms,
        reading.check_appendix_tags,
        reading.check_names,
        reading.check_rhythm,
        reading.check_doctests,
        reading.check_words,
        reading.check_markup,
        reading.check_links,
        reading.check_figures,
        reading.check_images,
        reading.check_line_length,
    )
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule, document):
    assert RULES[rule](document) == []


def test_claims_in_prose_are_true(document, bigs):
    assert reading.check_claims(document, vars(bigs)) == []


def test_numbers_in_prose_are_what_their_proofs_say(document, bigs):
    found = [
        f"{cell.where}: {complaint}"
        for cell in document.prose
        for complaint in proofs.wrong(cell.source, vars(bigs))
    ]
    assert found == []


def test_names_in_prose_exist(document, bigs):
    assert reading.check_spans(document, vars(bigs), LIBRARIES, ALLOWED) == []


def test_tests_named_in_prose_exist(document):
    named = [
        span.split("::")
        for cell in document.prose
        for span in reading.spans(cell.source)
        if "::test" in span
    ]
    missing = [
        (file, test)
        for file, test in named
        if f"\ndef {test}(" not in (ROOT / file).read_text()
    ]
    assert len(named) > 15
    assert not missing


def test_figures_carry_what_they_say(document, bigs):
    found = reading.figures(document)
    assert found
    for _, function, literal in found:
        drawn = getattr(bigs, function)
        said = {"name": drawn.name, "alt": drawn.alt, "caption": drawn.caption}
        assert said == {key: literal[key] for key in said}, function


# The notebook


def cells_of(notebook) -> list[tuple[str, str, tuple]]:
    """What the script says; the ids that the notebook has before its headings are not
    in it.
    """
    return [
        (
            cell.cell_type,
            re.sub('<a id="[^"]*"></a>\n\n', "", cell.source),
            tuple(cell.metadata.get("tags", ())),
        )
        for cell in notebook.cells
    ]


def test_notebook_holds_the_script(notebook):
    text = "\n".join(
        cell.source for cell in notebook.cells if cell.cell_type == "markdown"
    )
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(
        re.findall('<a id="([^"]*)"></a>', text)
    )
    assert cells_of(notebook) == cells_of(jupytext.read(SCRIPT, fmt="py:percent"))


def test_notebook_has_run(notebook, document):
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert [out for out in outputs if out.output_type == "error"] == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    images = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(images) >= len(reading.figures(document)) > 0
    for image in images:
        assert len(image.metadata.get("image/png", image.metadata).get("alt", "")) >= 30


def test_notebook_is_light(notebook):
    assert NOTEBOOK.stat().st_size < 3_000_000


# Importing


def run_python(
    code: str, folder: Path, **environment: str
) -> subprocess.CompletedProcess:
    environment = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def files_of_the_project() -> dict[Path, int]:
    """Every file with the time of its last change; what tools keep for themselves
    aside.
    """
    hidden = re.compile(r"(^|/)(\.|__pycache__|runs(/|$))")
    names = [path for path in ROOT.iterdir() if not hidden.search(path.name)]
    files = [
        file
        for path in names
        for file in ([path] if path.is_file() else path.rglob("*"))
    ]
    return {
        f: f.stat().st_mtime_ns
        for f in files
        if not hidden.search(str(f.relative_to(ROOT)))
    }


def test_importing_is_silent(tmp_path):
    # A second import, since a library's first one may prepare a cache of its own
    # (fonts).
    run_python("import annotated_bigs", tmp_path)
    before = files_of_the_project()
    # Reaching for a device would raise: there is no such platform.
    done = run_python("import annotated_bigs", tmp_path, JAX_PLATFORMS="nonexistent")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
    assert files_of_the_project() == before


def test_a_missing_platform_is_noticed(tmp_path):
    code = "import jax; jax.devices()"
    assert run_python(code, tmp_path, JAX_PLATFORMS="nonexistent").returncode != 0


@pytest.mark.timing
def test_importing_takes_little_more_than_its_libraries(tmp_path, timed):
    libraries = "import flax.nnx, jaxtyping, optax"

    def seconds(code: str) -> float:
        start = time.perf_counter()
        assert run_python(code, tmp_path, PYTHONDONTWRITEBYTECODE="").returncode == 0
        return time.perf_counter() - start

    def ratio() -> float:
        return seconds("import annotated_bigs") / seconds(libraries)

    seconds("import annotated_bigs")  # files come into memory, bytecode is written
    timed("the import by that of its libraries", ratio, most=1.5, rounds=5)


# Each rule can fail: a small document that keeps all rules, then one that breaks one of
# them.

GOOD = '''# %% [markdown]
# # The Annotated BiGS
#
# See [room 1](#1-room-of-math), the [notes](notes.md),
# a [paper](https://example.org/a_b?c=1)
# and $x^2$. It costs \\$5; `half(4) == 2`. Words in code, `just = 1`, are no prose.
#
# ![A straight line that climbs from left to right](figures/line.png)
#
# **Figure 1.** A line.

# %%
import math

COMMANDS = {}


def figure(**given):
    """Keep what draws a figure.

    >>> figure()(1)
    1
    """
    return lambda function: COMMANDS.setdefault("draw", function)


# %% [markdown]
# ## 0. Front
#
# > "It is simply a quotation."
#
# $$y = a$$

# %%
# (L, d), then the scale
SCALE = 2


def half(x: float) -> float:
    """Half of x.

    >>> half(4.0) * SCALE
    4.0
    """
    return x / SCALE


# %% [markdown]
# ## 1. Room of `math`
#
# Calls: `half(x)`, `half()`, `math.sqrt`, `half(...)`, `Model.rate`, `Model`,
# `len(x)`; fields and variables: `rate`, `x`, `model.rate`,
# `scipy.signal.cont2discrete`; others:
# `notes.md`, `figures/`, `--rate`, `annotated_bigs.py draw`, `a b`,
# `SCALE > 1 and half(2) < 2`, `draw`.


# %%
class Model:
    """A rate.

    >>> Model().rate
    2
    """

    rate: int = SCALE


@figure(
    name="line",
    alt="A straight line that climbs from left to right",
    caption="A line.",
)
def line(model):
    return math.sqrt(model.rate)


# %% [markdown]
# ## Appendix A. Tools

# %% tags=["appendix"]
TOOLS = None
'''
GOOD = GOOD.replace(
    "## 1.", "".join(f"## {n}. Room\n# " for n in range(1, 17)) + "## 17.", 1
)
GOOD = GOOD.replace("#1-room-of-math", "#17-room-of-math")


@pytest.fixture
def make(tmp_path):
    """Build a document from GOOD with one piece of its text replaced."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/line.png").touch()
    (tmp_path / "notes.md").touch()

    def build(old: str = "", new: str = "") -> reading.Document:
        assert old in GOOD, "the piece to break is not in the document"
        return reading.read(GOOD.replace(old, new, 1) if old else GOOD, tmp_path)

    return build


MINIATURE = RULES | {"check_doctests": partial(reading.check_doctests, least=3)}
CELL = "SCALE = 2\n"


@pytest.mark.parametrize("rule", MINIATURE)
def test_rule_lets_a_good_document_pass(rule, make):
    assert MINIATURE[rule](make()) == []


BREAKS = [
    ("check_rooms", "# # The Annotated BiGS", "# # The BiGS", "first heading"),
    ("check_rooms", "# ## 0. Front", "# # Front", "more than one"),
    ("check_rooms", "# ## 4. Room\n", "", "rooms are"),
    ("check_rooms", "# ## 4. Room\n", "# ## Room\n", "neither"),
    (
        "check_rooms",
        "# ## 4. Room\n# ## 5. Room",
        "# ## 5. Room\n# ## 4. Room",
        "rooms are",
    ),
    ("check_rooms", "Appendix A.", "Appendix B.", "rooms are"),
    ("check_appendix_tags", ' tags=["appendix"]', "", "tags are"),
    ("check_appendix_tags", "# %%\nclass", '# %% tags=["appendix"]\nclass', "tags are"),
    ("check_names", CELL, CELL + "Model\n", "Model comes from room 17"),
    (
        "check_names",
        "class Model:",
        "SCALE = 3\n\n\nclass Model:",
        "SCALE has a meaning",
    ),
    (
        "check_names",
        "return x / SCALE",
        "return x / Model.rate",
        "Model comes from room 17",
    ),
    (
        "check_names",
        "half(4.0) * SCALE",
        "half(4.0) * Model.rate",
        "doctest of half: Model",
    ),
    (
        "check_names",
        "return x / SCALE",
        "return x / SCALES",
        "SCALES is defined nowhere",
    ),
    (
        "check_names",
        "half(4.0) * SCALE",
        "half(4.0) * SCALES",
        "SCALES is defined nowhere",
    ),
    ("check_rhythm", CELL, CELL + "\n# %%\n", "code follows code"),
    (
        "check_line_length",
        CELL,
        CELL + "SCALE += 1" + " + 1" * 30 + "\n",
        "130 columns",
    ),
    ("check_doctests", "    >>> half(4.0) * SCALE\n", "", "half has no doctest"),
    ("check_doctests", "    >>> Model().rate\n    2\n", "", "only 2 doctest"),
    ("check_doctests", CELL, CELL + "\ndef f():\n    pass\n", "f has no doctest"),
    ("check_words", "$y = a$", "$y = a$ It Simply works.", "Simply"),
    ("check_words", 'caption="A line."', 'caption="This is just it."', "just"),
    ("check_markup", "$$y = a$$", "$$y = a", "unbalanced $$"),
    ("check_markup", "and $x^2$", "and $x^2", "unbalanced $ "),
    ("check_markup", "and $x^2$", "and $x^2 $", "space beside $"),
    ("check_markup", "and $x^2$", "as [@gu2022] says", "raw [@gu2022]"),
    ("check_markup", "and $x^2$", "`>>> half(2)`", "doctest in prose"),
    ("check_links", "#17-room-of-math", "#17-room", "nothing at '#17-room'"),
    ("check_links", "(notes.md)", "(note.md)", "nothing at 'note.md'"),
    (
        "check_links",
        "https://example.org",
        "https://example",
        "nothing at 'https://example/",
    ),
    ("check_links", "https://example.org", "htps://example.org", "nothing at 'htps:"),
    ("check_links", "](https:", "] (https:", "a space breaks"),
    (
        "check_figures",
        'alt="A straight line that climbs from left to right"',
        'alt="A"',
        "no alt",
    ),
    ("check_figures", 'caption="A line."', 'caption=""', "no caption"),
    ("check_figures", 'name="line"', 'name="lines"', "lines.png is not there"),
    ("check_figures", 'name="line"', 'name="lines"', "line.png is drawn by nothing"),
    (
        "check_figures",
        "TOOLS = None\n",
        '@figure(name="line")\ndef g(): 0\n',
        "two figures",
    ),
    (
        "check_images",
        "![A straight line that climbs from left to right]",
        "![A]",
        "no alt text",
    ),
    ("check_images", "**Figure 1.** A line.", "A line.", "no caption"),
    ("check_images", "$$y = a$$", '<img src="figures/line.png">', "<img>"),
]


@pytest.mark.parametrize(("rule", "old", "new", "complaint"), BREAKS)
def test_rule_catches(rule, old, new, complaint, make):
    complaints = MINIATURE[rule](make(old, new))
    assert any(complaint in line for line in complaints), complaints


def test_what_needs_no_doctest_exists(document):
    names = {node.name for _, node in reading.definitions(document)}
    assert names >= reading.TESTED_AT_LENGTH


def test_every_rule_is_seen_to_catch_something():
    assert {rule for rule, *_ in BREAKS} == set(RULES)


def namespace_of(document: reading.Document) -> dict:
    """Run the miniature's code, its figures aside."""
    names = {"__name__": "miniature"}
    exec("\n".join(cell.source.split("@figure")[0] for cell in document.code), names)
    return names


def test_claims_and_spans_let_a_good_document_pass(make):
    names = namespace_of(make())
    assert reading.check_claims(make(), names) == []
    assert reading.check_spans(make(), names, LIBRARIES) == []


@pytest.mark.parametrize(
    ("claim", "complaint"),
    [
        ("half(4) == 3", "is false"),
        ("half(5) == m", "raises"),
        ("1 < 2 and 3 < 2", "is false"),
    ],
)
def test_claims_catch(claim, complaint, make):
    document = make("half(4) == 2", claim)
    assert complaint in str(reading.check_claims(document, namespace_of(document)))


@pytest.mark.parametrize(
    "span",
    [
        "third",
        "thirds(x)",
        "math.sqroot",
        "Model.speed",
        "model.speed",
        "sqlite3.connect",
        "half(x, y)",
        "half(y=2)",
        "figures/circle.png",
        "--speed",
        "scipy.signal.nothing",
        "annotated_bigs.py paint",
        "python annotated_bigs.py paint --rate 3",
        "rates.x",
    ],
)
def test_spans_catch(span, make):
    document = make("`half(x)`", f"`{span}`")
    complaints = reading.check_spans(document, namespace_of(document), LIBRARIES)
    assert len(complaints) == 1
    assert f"`{span}`" in complaints[0]

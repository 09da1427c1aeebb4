"""The notebook and the page, built from a small document."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "page"

SCRIPT = r'''# %% [markdown]
# # The Title
#
# A formula, $h_k = \bar A h_{k-1}$, and the [tests](tests/test_page.py).
#
# $$y = x^2 \tag{7}$$
#
# ## 0. Front

# %%
import base64
import sys

from IPython.display import Image, Markdown, display

print("measured")
print("a bar of progress", file=sys.stderr)
DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
display(Image(DOT, metadata={"alt": "A dot", "caption": "**Figure 1.** A dot, $d$."}), Markdown("*A dot.*"))

# %% [markdown]
# ## Appendix A. Tools

# %% tags=["appendix"]
1 + 1
'''


def load(name: str):
    if not importlib.util.find_spec("pypandoc" if name == "build" else "ipykernel"):
        pytest.skip("requirements-dev.txt is not installed")
    spec = importlib.util.spec_from_file_location(f"page_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A script executed twice, into two notebooks."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "script.py").write_text(SCRIPT)
    for name in ("one.ipynb", "two.ipynb"):
        load("notebook").build(folder / "script.py", folder / name, timeout=60)
    return folder


def test_two_builds_are_the_same(built):
    assert (built / "one.ipynb").read_bytes() == (built / "two.ipynb").read_bytes()
    assert {path.suffix for path in built.iterdir()} == {".py", ".ipynb"}


def test_notebook_keeps_tags_alt_texts_and_what_was_printed(built):
    cells = nbformat.read(built / "one.ipynb", as_version=4).cells
    assert [cell.metadata for cell in cells] == [{}, {}, {}, {"tags": ["appendix"]}]
    printed, image, caption = cells[1].outputs
    assert caption.data["text/markdown"] == "*A dot.*"
    assert printed.text == "measured\n"
    assert image.metadata["image/png"]["alt"] == "A dot"


def test_a_failing_cell_leaves_the_old_notebook(built):
    (built / "script.py").write_text("# %%\n1 / 0\n")
    before = (built / "two.ipynb").read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        load("notebook").build(built / "script.py", built / "two.ipynb", timeout=60)
    assert (built / "two.ipynb").read_bytes() == before


def test_page_stands_alone(built):
    build = load("build")
    build.build(built / "one.ipynb", built / "index.html")
    page = (built / "index.html").read_text()
    assert build.FETCHED.findall(page) == [] and "<script" not in page
    assert page.count("<math ") == 3 and "<span>(7)</span>" in page
    assert re.search(r'<img [^>]*alt="A dot"', page) and page.count("<figcaption>") == 1
    # The table of contents leads to the rooms.
    assert 'href="#0-front"' in page and 'id="0-front"' in page
    assert page.count("<summary>Code</summary>") == 1
    assert "IPython.core" not in page and "<em>A dot.</em>" not in page
    assert "test_page.py" not in page  # a link that leads nowhere while there is no address


def test_page_refuses_a_formula_it_cannot_convert(built):
    notebook = nbformat.read(built / "one.ipynb", as_version=4)
    notebook.cells[0].source += "\n\n$\\nosuchcommand{x}$"
    nbformat.write(notebook, built / "bad.ipynb")
    with pytest.raises(SystemExit, match="nosuchcommand"):
        load("build").build(built / "bad.ipynb", built / "bad.html")
    assert not (built / "bad.html").exists()


@pytest.mark.parametrize("tag", ['<img src="a.png">', '<script src="https://a.b/c.js">'])
def test_what_would_be_fetched_is_noticed(tag):
    assert load("build").FETCHED.search(tag)
    assert not load("build").FETCHED.search('<img src="data:image/png;base64,x"> <a href="b">')


def test_text_alone_can_be_renewed(built):
    """Prose may change without running anything; code may not."""
    script, target = built / "prose.py", built / "prose.ipynb"
    target.write_bytes((built / "one.ipynb").read_bytes())
    script.write_text(SCRIPT.replace("# # The Title", "# # Another Title"))
    load("notebook").build(script, target, timeout=60, text=True)
    old, new = (nbformat.read(built / name, as_version=4) for name in ("one.ipynb", "prose.ipynb"))
    assert new.cells[0].source.startswith("# Another Title")
    assert [c.get("outputs") for c in new.cells] == [c.get("outputs") for c in old.cells]
    script.write_text(SCRIPT.replace("1 + 1", "1 + 2"))
    with pytest.raises(SystemExit, match="code has changed"):
        load("notebook").build(script, target, timeout=60, text=True)

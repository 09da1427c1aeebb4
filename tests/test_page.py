"""The notebook and the page, built from a small document; and the page that readers
get, seen by a browser.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import browser
import nbformat
import pages
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "page"
NOTEBOOK = ROOT / "annotated_bigs.ipynb"

SCRIPT = r"""# %% [markdown]
# # The Title
#
# A formula, $h_k = \bar A h_{k-1}$, and the [tests](tests/test_page.py).
#
# $$y = x^2 \tag{7}$$
#
# ## 0. Front
#
# `double(2)`, `double.__doc__` and [`double`](#0-front) and `doubled` and `pathlib`.

# %%
import base64
import sys

from IPython.display import Image, Markdown, display

print("measured")
print("a bar of progress", file=sys.stderr)
DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9"
    "awAAAABJRU5ErkJggg=="
)
words = {"alt": "A dot", "caption": "**Figure 1.** A dot, $d$."}
display(Image(DOT, metadata=words), Markdown("*A dot.*"))

# %% [markdown]
# ## Appendix A. Tools

# %% tags=["appendix"]
def double(x):
    "Twice as much."
    return 2 * x  # twice
"""


def do_without(what: str):
    """What a test needs is missing: here it is skipped, but CI, which has to see to it,
    fails.
    """
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.mark.parametrize(
    ("ci", "outcome"), [("true", pytest.fail), ("", pytest.skip)], ids=["ci", "here"]
)
def test_what_is_missing_is_an_error_only_in_ci(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome.Exception, match="npm is not installed"):
        do_without("npm is not installed")


def load(name: str):
    if not importlib.util.find_spec("pypandoc" if name == "build" else "ipykernel"):
        do_without("requirements-dev.txt is not installed")
    return pages.page_module(name)


@pytest.fixture(scope="module")
def build():
    """page/build.py, with all that it needs."""
    module = load("build")
    if not (shutil.which("node") and shutil.which("npm")):
        do_without("node and npm are not installed")
    try:
        module.install()
    except SystemExit as error:  # no network
        do_without(str(error))
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


def test_page_stands_alone(built, build):
    build.build(built / "one.ipynb", built / "index.html")
    page = (built / "index.html").read_text()
    assert build.FETCHED.findall(page) == []
    assert "<script" not in page
    assert page.count("<math ") == 3
    assert page.count('"katex-tag"') == 1
    assert "katex-error" not in page
    assert re.search(r'<img [^>]*alt="A dot"', page)
    assert page.count("<figcaption>") == 1
    # The table of contents leads to the rooms.
    assert 'href="#0-front"' in page
    assert 'id="0-front"' in page
    assert "IPython.core" not in page
    assert "<em>A dot.</em>" not in page
    assert (
        "test_page.py" not in page
    )  # a link that leads nowhere while there is no address


def test_names_lead_to_their_definitions(built, build):
    build.build(built / "one.ipynb", built / "index.html")
    page = (built / "index.html").read_text()
    assert page.count('id="def-double"') == 1
    for code in ("double(2)", "double.__doc__"):
        assert f'<a href="#def-double"><code>{code}</code></a>' in page
    assert page.count('href="#def-double"') == 3  # the third is its own address
    assert "<details><summary>Code: <code>double</code></summary>" in page
    assert '<span class="do">&quot;Twice as much.&quot;</span>' in page
    assert '<span class="co"># twice</span>' in page


def test_page_refuses_a_formula_it_cannot_set(built, build):
    notebook = nbformat.read(built / "one.ipynb", as_version=4)
    notebook.cells[0].source += "\n\n$\\nosuchcommand{x}$"
    nbformat.write(notebook, built / "bad.ipynb")
    with pytest.raises(SystemExit, match="nosuchcommand"):
        build.build(built / "bad.ipynb", built / "bad.html")
    assert not (built / "bad.html").exists()


def test_a_missing_tool_is_named(monkeypatch):
    module = load("build")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="install nodejs and npm"):
        module.install()


def test_only_fonts_that_are_used_are_in_the_page():
    css = "@font-face{font-family:KaTeX_A}@font-face{font-family:KaTeX_B}"
    css += ".k .a{font-family:KaTeX_A}.k .b{font:1em KaTeX_B}"
    faces = re.findall(r"@font-face\{[^}]*\}", css)
    is_used = load("build").is_used
    assert [is_used(face, css, {"k", "a"}) for face in faces] == [True, False]
    assert [is_used(face, css, {"k", "b"}) for face in faces] == [False, True]


@pytest.mark.parametrize(
    "tag",
    [
        '<img src="a.png">',
        '<script src="https://a.b/c.js">',
        "src: url(a.woff2)",
        '@import "a.css"',
    ],
)
def test_what_would_be_fetched_is_noticed(tag):
    assert load("build").FETCHED.search(tag)
    assert not load("build").FETCHED.search(
        '<img src="data:image/png;base64,x"> <a href="b">'
    )


def test_text_alone_can_be_renewed(built):
    """Prose may change without running anything; code may not."""
    script = built / "prose.py"
    target = built / "prose.ipynb"
    target.write_bytes((built / "one.ipynb").read_bytes())
    script.write_text(SCRIPT.replace("# # The Title", "# # Another Title"))
    load("notebook").build(script, target, timeout=60, text=True)
    old, new = (
        nbformat.read(built / name, as_version=4)
        for name in ("one.ipynb", "prose.ipynb")
    )
    assert new.cells[0].source.startswith("# Another Title")
    assert [c.get("outputs") for c in new.cells] == [
        c.get("outputs") for c in old.cells
    ]
    script.write_text(SCRIPT.replace("2 * x", "3 * x"))
    with pytest.raises(SystemExit, match="code has changed"):
        load("notebook").build(script, target, timeout=60, text=True)


# The page that readers get


class Tags(HTMLParser):
    """The ids of a page, where its links within the page lead to, and the text outside
    of <annotation> and code.
    """

    def __init__(self, page: str):
        super().__init__()
        self.ids = []
        self.targets = []
        self.text = []
        self.path = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.path.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a" and values["href"].startswith("#"):
            self.targets.append(values["href"][1:])

    def handle_endtag(self, tag):
        while self.path and self.path.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"annotation", "code", "pre", "style"} & set(self.path):
            self.text.append(data)


@pytest.fixture(scope="module")
def page(build, tmp_path_factory):
    """The document's own page."""
    file = tmp_path_factory.mktemp("site") / "index.html"
    build.build(NOTEBOOK, file)
    text = file.read_text()
    return SimpleNamespace(file=file, text=text, tags=Tags(text))


def test_page_is_light(page):
    assert page.file.stat().st_size < 3_000_000


def test_every_anchor_resolves(page):
    assert len(page.tags.ids) == len(set(page.tags.ids))
    assert set(page.tags.targets) <= set(page.tags.ids)
    assert len(page.tags.targets) > 100


def test_every_definition_has_an_anchor(page):
    code = [
        cell.source
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells
        if cell.cell_type == "code"
    ]
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = {
        node.name
        for source in code
        for node in ast.parse(source).body
        if isinstance(node, kinds)
    }
    assert {
        i.removeprefix("def-") for i in page.tags.ids if i.startswith("def-")
    } == names


def test_every_formula_is_set(page):
    text = "".join(page.tags.text)
    assert page.text.count('class="katex"') == page.text.count("<math ") > 100
    assert "katex-error" not in page.text
    assert 'class="math' not in page.text
    assert not re.search(r"\$|\\[a-z]+", text)


# What a browser says. Colours that mix are none of ours, so the nearest opaque
# background counts.
CONTRAST = """(() => {
  const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const clear = e => /, 0\\)$/.test(getComputedStyle(e).backgroundColor);
  const opaque = e => !e || !clear(e) ? e : opaque(e.parentElement);
  const texts = [...document.querySelectorAll("body *")].filter(
    e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  return [...new Set(texts.map(e => {
    const below = getComputedStyle(opaque(e)).backgroundColor;
    const both = [getComputedStyle(e).color, below];
    const [dark, bright] = both.map(light).sort((a, b) => a - b);
    return (bright + .05) / (dark + .05) < 4.5 ? [e.className, ...both].join(" ") : "";
  }))].filter(Boolean);
})()"""
TOUCHING = """[...document.querySelectorAll(".katex-tag")].filter(tag => {
  const bases = [...tag.parentElement.querySelectorAll(":scope > .katex-base")];
  const right = Math.max(...bases.map(b => b.getBoundingClientRect().right));
  return right + 8 > tag.getBoundingClientRect().left;
}).map(tag => tag.textContent)"""
AXE = """axe.run({resultTypes: ["violations"]}).then(
  found => found.violations.flatMap(
    v => v.nodes.map(n => v.id + ": " + n.html.slice(0, 120))))"""
WIDTHS = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@pytest.fixture(scope="module")
def screen(page):
    if not browser.executable():
        do_without("chromium is not installed")
    with browser.Browser() as opened:
        opened.open(page.file)
        opened.run(
            "document.querySelectorAll('details').forEach(box => box.open = true)"
        )
        yield opened


@pytest.mark.slow
def test_page_opens_without_a_network(screen):
    requests = [
        event["request"]["url"]
        for event in screen.reported("Network.requestWillBeSent")
    ]
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in requests) == 1
    said = (
        "Log.entryAdded",
        "Runtime.exceptionThrown",
        "Runtime.consoleAPICalled",
        "Network.loadingFailed",
    )
    assert screen.reported(*said) == []
    assert (
        screen.run('[...document.fonts].filter(font => font.status === "error").length')
        == 0
    )
    assert screen.run(
        "[...document.images].every(image => image.naturalWidth && image.alt)"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_page_fits_every_screen(screen, width, dark):
    screen.look(width, dark)
    assert screen.run('matchMedia("(prefers-color-scheme: dark)").matches') == dark
    content, window = screen.run(WIDTHS)
    assert content <= window == width
    assert screen.run(TOUCHING) == []
    assert screen.run(CONTRAST) == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1440, False)])
def test_page_passes_an_accessibility_checker(screen, width, dark):
    screen.look(width, dark)
    screen.run((FOLDER / "node_modules/axe-core/axe.min.js").read_text() + "; 0")
    assert screen.run(AXE) == []


# The same text in Jupyter, in Colab and on GitHub: the reader of GitHub's Markdown
# stands for all.


def walk(tree):
    """All elements of pandoc's tree, outermost first."""
    if isinstance(tree, dict) and "t" in tree:
        yield tree
    for part in (
        tree.values()
        if isinstance(tree, dict)
        else tree
        if isinstance(tree, list)
        else ()
    ):
        yield from walk(part)


def elsewhere(markdown: str) -> list[str]:
    """What would show as markup, or lead nowhere, where a notebook is read."""
    pandoc = load("build").pypandoc.get_pandoc_path()
    command = [pandoc, "--from=gfm+tex_math_dollars+gfm_auto_identifiers", "--to=json"]
    tree = json.loads(
        subprocess.run(
            command, input=markdown, capture_output=True, text=True, check=True
        ).stdout
    )
    found = list(walk(tree["blocks"]))
    ids = {element["c"][1][0] for element in found if element["t"] == "Header"}
    targets = [
        element["c"][2][0] for element in found if element["t"] in ("Link", "Image")
    ]
    words = " ".join(element["c"] for element in found if element["t"] == "Str")
    raw = re.findall(r"\$\$|\\tag|\\[a-z]{2,}|\[@\w+|\{#\w+|\$\S*\$", words)
    lost = [t for t in targets if t.startswith("#") and t[1:] not in ids]
    files = [
        t
        for t in targets
        if not re.match(r"#|https?://", t) and not (ROOT / t.partition("#")[0]).exists()
    ]
    return raw + lost + files


def test_notebook_reads_well_elsewhere():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert (
        elsewhere(
            "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        )
        == []
    )


@pytest.mark.parametrize(
    "text",
    [
        *(
            "as [@gu2022] says",
            "equation {#eq}",
            "$$\n\nx$$",
            "[a](#nowhere)",
            "[a](nofile.md)",
        ),
        *("$ x^2 $ \\tag{1}", "\\alpha"),
    ],
)
def test_what_would_show_elsewhere_is_noticed(text):
    assert elsewhere(f"# Here\n\n{text}")
    assert not elsewhere(
        "# Here\n\n[a](#here), $x^2$, [b](README.md), `$$`, `[@a`\n\n$$x \\tag{1}$$"
    )


PUBLISHED = """# %%
from pathlib import Path

for kind in ("figures", "data"):
    (Path("runs") / kind).mkdir(parents=True, exist_ok=True)
Path("runs/figures/dot.png").write_text("drawn")
Path("runs/data/found.json").write_text("{}")
print("made in", Path("runs").resolve())
"""


def test_a_build_publishes_what_its_run_made(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PUBLISHED)
    leftover = tmp_path / "runs" / "figures" / "old.png"
    leftover.parent.mkdir(parents=True)
    leftover.touch()

    load("notebook").build(script, tmp_path / "one.ipynb", timeout=60)

    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["dot.png"]
    assert (tmp_path / "figures" / "dot.png").read_text() == "drawn"
    assert (tmp_path / "data" / "found.json").read_text() == "{}"
    notebook = nbformat.read(tmp_path / "one.ipynb", as_version=4)
    assert notebook.cells[0].outputs[0].text == "made in runs\n"


def test_a_build_of_prose_alone_publishes_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PUBLISHED)
    load("notebook").build(script, tmp_path / "one.ipynb", timeout=60)
    own_run = tmp_path / "runs" / "figures" / "dot.png"
    own_run.write_text("drawn by a reader")

    script.write_text("# %% [markdown]\n# More prose.\n\n" + PUBLISHED)
    load("notebook").build(script, tmp_path / "one.ipynb", timeout=60, text=True)

    assert (tmp_path / "figures" / "dot.png").read_text() == "drawn"
    assert own_run.exists()

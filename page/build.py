"""Render annotated_bigs.ipynb as one self-contained page: `python page/build.py`.

pandoc writes the page, KaTeX sets its formulas, and what both need to look right is
written into it. Nothing is fetched when it is read, and it runs no script.
"""

import argparse
import base64
import html
import json
import pathlib
import re
import shutil
import subprocess

import pypandoc

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
MODULES = HERE / "node_modules"
# What may stand in a page that fetches nothing: links yes, resources only as data.
FETCHED = re.compile(
    r'<(?:img|script|link|iframe|source)\b[^>]*\b(?:src|href)="(?!data:)[^"]*"'
    r'|url\((?!"?data:)[^)]*\)|@import'
)
FORMULA = re.compile(
    r'([(“]*)<span class="math (inline|display)">(.*?)</span>([.,;:?)”’]*)', re.DOTALL
)
# pandoc makes each line of code a target and a link of its own, of which a page has no
# use.
LINE = re.compile(
    r'<span id="cb\d+-\d+"><a href="#cb[\d-]+" aria-hidden="true"'
    r' tabindex="-1"></a>(.*?)</span>$',
    re.M,
)
DEFINED = re.compile(r'^(<span class="kw">(?:def|class)</span> )(\w+)', re.M)


def repository(content: dict) -> str:
    """The public address that the document's REPOSITORY holds, "" while unset."""
    sources = "\n".join("".join(cell["source"]) for cell in content["cells"])
    found = re.search(r'^REPOSITORY = "(.*)"', sources, re.MULTILINE)
    return found[1] if found else ""


def without_captions(content: dict) -> dict:
    """A notebook shows a caption as text below its figure; the page has it in the
    figure already.
    """
    for cell in content["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [
                o for o in cell["outputs"] if "text/markdown" not in o.get("data", {})
            ]
    return content


def is_installed() -> bool:
    """Whether page/node_modules holds the versions that page/package.json asks for."""
    wanted = json.loads((HERE / "package.json").read_text())
    files = {
        MODULES / name / "package.json": v
        for part in wanted.values()
        if isinstance(part, dict)
        for name, v in part.items()
    }
    return all(
        file.exists() and json.loads(file.read_text())["version"] == v
        for file, v in files.items()
    )


def install() -> None:
    """Let npm fetch KaTeX and the fonts, once."""
    if not (shutil.which("node") and shutil.which("npm")):
        raise SystemExit(
            "the page needs node and npm to set its formulas: install nodejs and npm,"
            " then try again"
        )
    if is_installed():
        return
    options = (
        "--no-package-lock",
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        "--loglevel=error",
        # A registry may be slow, so each file is tried five times, a minute each time.
        "--fetch-retries=4",
        "--fetch-retry-mintimeout=2000",
        "--fetch-timeout=60000",
    )
    done = subprocess.run(
        ["npm", "install", *options, f"--prefix={HERE}"], capture_output=True, text=True
    )
    if done.returncode or not is_installed():
        raise SystemExit(
            "npm could not fetch what page/package.json names; is there a"
            f" network?\n{done.stderr}"
        )


def pandoc(notebook: pathlib.Path) -> str:
    """The page with formulas as TeX, without its styles."""
    content = without_captions(json.loads(notebook.read_text()))
    command = [
        pypandoc.get_pandoc_path(),
        *(
            "--from",
            "ipynb+tex_math_dollars+gfm_auto_identifiers+smart+markdown_in_html_blocks",
            "--to",
            "html5",
        ),
        *("--standalone", "--embed-resources", "--katex", "--fail-if-warnings"),
        *("--toc", "--toc-depth=2", "--wrap=none"),
        f"--template={HERE / 'template.html'}",
        f"--lua-filter={HERE / 'filter.lua'}",
        f"--metadata=repository:{repository(content)}",
        f"--resource-path={notebook.resolve().parent}",
    ]
    done = subprocess.run(
        command, input=json.dumps(content), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"pandoc could not render {notebook}:\n{done.stderr}")
    return done.stdout


def set_formulas(page: str) -> str:
    """Put KaTeX's output in the place of every formula; one that it refuses ends the
    build.
    """
    formulas = [
        (html.unescape(tex), kind == "display")
        for _, kind, tex, _ in FORMULA.findall(page)
    ]
    command = ["node", HERE / "formulas.cjs"]
    done = subprocess.run(
        command, input=json.dumps(formulas), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"KaTeX could not set:\n{done.stderr}")
    results = iter(json.loads(done.stdout))

    def put(found: re.Match) -> str:
        """A short formula stays on one line with the punctuation around it."""
        before, _, tex, after = found.groups()
        text = before + next(results) + after
        return (
            f'<span class="together">{text}</span>'
            if before + after and len(tex) < 40
            else text
        )

    return FORMULA.sub(put, page)


def mark_code(page: str) -> str:
    """Anchors for definitions, a tone of its own for docstrings, and no anchors for
    mere lines.
    """
    seen = set()

    def anchor(found: re.Match) -> str:
        keyword, name = found.groups()
        if name in seen:
            return found[0]
        seen.add(name)
        return f'{keyword}<a class="def" id="def-{name}" href="#def-{name}">{name}</a>'

    def mark(block: re.Match) -> str:
        code = DEFINED.sub(anchor, LINE.sub(r"\1", block[2]))
        return (
            block[1]
            + re.sub(r'<span class="co">(?!\s*#)', '<span class="do">', code)
            + "</code>"
        )

    # Nothing leads to these, and a contents stands here twice.
    page = re.sub(r' id="(?:toc-[^"]*|cb\d+)"', "", page)
    return re.sub(
        r'(<code class="sourceCode python">)(.*?)</code>', mark, page, flags=re.DOTALL
    )


def break_long_names(page: str) -> str:
    """Let long code within text go on in the next line, after a mark; what is copied
    stays the same.
    """

    def marked(found: re.Match) -> str:
        block, code = found.groups()
        return (
            found[0]
            if block
            else '<code class="long">'
            + re.sub("([/_.,]|::)", r"\1<wbr>", code)
            + "</code>"
        )

    return re.sub(r"(<pre[^>]*>)?<code>([^<]{16,})</code>", marked, page)


def is_used(face: str, css: str, classes: set[str]) -> bool:
    """Whether anything in the page asks for a font of KaTeX's."""
    family = re.search(r"font-family:\"?(\w+)", face)[1]
    if "font-weight:700" in face and not classes & {"mathbf", "textbf", "boldsymbol"}:
        return False
    if family == "KaTeX_Main" and "font-style:italic" in face:
        return bool(classes & {"mathit", "textit"})
    selectors = re.findall(
        rf"([^{{}}]+)\{{[^{{}}]*font(?:-family)?:[^{{}};]*{family}\b",
        css.replace(face, ""),
    )
    wanted = [
        set(re.findall(r"\.([\w-]+)", s))
        for group in selectors
        for s in group.split(",")
    ]
    return any(names and names <= classes for names in wanted)


def inlined(css: str, folder: pathlib.Path) -> str:
    """A style sheet whose fonts stand in itself."""

    def data(found: re.Match) -> str:
        content = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f"url(data:font/woff2;base64,{content})"

    return re.sub(r"url\(([^)]+\.woff2)\)", data, css)


def styles(page: str) -> str:
    """KaTeX's style sheet, with the fonts that the page uses, and ours."""
    folder = MODULES / "katex/dist"
    css = (folder / "katex.min.css").read_text()
    css = re.sub(r',url\([^)]*\.(?:woff|ttf)\) format\("\w+"\)', "", css)
    classes = {
        name
        for value in set(re.findall(r'class="([^"]+)"', page))
        for name in value.split()
    }
    css = re.sub(
        r"@font-face\{[^}]*\}",
        lambda face: face[0] if is_used(face[0], css, classes) else "",
        css,
    )
    return (
        inlined(css, folder) + "\n" + inlined((HERE / "style.css").read_text(), MODULES)
    )


def build(notebook: pathlib.Path, target: pathlib.Path) -> None:
    """Write the page, or raise if a formula cannot be set or anything stays outside."""
    install()
    page = break_long_names(mark_code(set_formulas(pandoc(notebook))))
    page = page.replace("</head>", f"<style>\n{styles(page)}</style>\n</head>", 1)
    outside = FETCHED.findall(page)
    if outside:
        raise SystemExit(f"the page would fetch {outside}")
    unfinished = target.with_name(target.name + ".unfinished")
    unfinished.write_text(page)
    unfinished.replace(target)
    print(
        f"{target.name}: {len(page.encode()) // 1024} KiB, {page.count('<math ')}"
        " formulas"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "notebook", type=pathlib.Path, nargs="?", default=ROOT / "annotated_bigs.ipynb"
    )
    parser.add_argument(
        "target", type=pathlib.Path, nargs="?", default=HERE / "index.html"
    )
    arguments = parser.parse_args()
    build(arguments.notebook, arguments.target)

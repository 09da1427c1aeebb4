"""Render annotated_bigs.ipynb as one self-contained page: `python page/build.py`.

pandoc does the work: formulas become MathML, code is coloured, figures are written into the
page. Nothing is fetched when it is read, and it runs no script.
"""

import argparse
import json
import pathlib
import re
import subprocess

import pypandoc

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
# What may stand in a page that fetches nothing: links yes, resources only as data.
FETCHED = re.compile(r'<(?:img|script|link|iframe|source)\b[^>]*\b(?:src|href)="(?!data:)[^"]*"')


def repository(content: dict) -> str:
    """The public address that the document's constant REPOSITORY holds, "" while unset."""
    sources = "\n".join("".join(cell["source"]) for cell in content["cells"])
    found = re.search(r'^REPOSITORY = "(.*)"', sources, re.MULTILINE)
    return found[1] if found else ""


def without_captions(content: dict) -> dict:
    """A notebook shows a caption as text below its figure; the page has it in the figure already."""
    for cell in content["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if "text/markdown" not in o.get("data", {})]
    return content


def build(notebook: pathlib.Path, target: pathlib.Path) -> None:
    """Write the page, or raise if a formula cannot be converted or anything stays outside."""
    content = without_captions(json.loads(notebook.read_text()))
    command = [
        pypandoc.get_pandoc_path(),
        *("--from", "ipynb+tex_math_dollars+gfm_auto_identifiers+smart", "--to", "html5"),
        *("--standalone", "--embed-resources", "--mathml", "--fail-if-warnings"),
        *("--toc", "--toc-depth=2", "--wrap=none"),
        f"--template={HERE / 'template.html'}",
        f"--css={HERE / 'style.css'}",
        f"--lua-filter={HERE / 'filter.lua'}",
        f"--metadata=repository:{repository(content)}",
        f"--resource-path={notebook.resolve().parent}",
    ]
    done = subprocess.run(command, input=json.dumps(content), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pandoc could not render {notebook}:\n{done.stderr}")
    if outside := FETCHED.findall(done.stdout):
        raise SystemExit(f"the page would fetch {outside}")
    target.write_text(done.stdout)
    print(f"{target.name}: {len(done.stdout) // 1024} KiB, {done.stdout.count('<math ')} formulas")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "notebook", type=pathlib.Path, nargs="?", default=ROOT / "annotated_bigs.ipynb"
    )
    parser.add_argument("target", type=pathlib.Path, nargs="?", default=HERE / "index.html")
    arguments = parser.parse_args()
    build(arguments.notebook, arguments.target)

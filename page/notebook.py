"""Execute annotated_bigs.py into annotated_bigs.ipynb: `python page/notebook.py`.

A run of the document leaves figures/ and data/ as they are and puts what it draws and
measures into runs/. This build publishes that, together with the notebook.

Two builds on one machine differ only in what the document measures: cells get their
names from their sources, progress bars (stderr) are left out, and so is what an editor
would add.
"""

import argparse
import ast
import hashlib
import os
import pathlib
import re
from collections import Counter

import jupytext
import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent


def name_cells(notebook) -> None:
    """Give each cell an id made of its source (and of how often the source came
    before).
    """
    seen = Counter()
    for cell in notebook.cells:
        text = f"{cell.cell_type}\n{cell.source}"
        cell.id = hashlib.sha256(f"{seen[text]}\n{text}".encode()).hexdigest()[:12]
        seen[text] += 1


def anchor_headings(notebook) -> None:
    """Put before every heading the id that GitHub gives it; Jupyter and Colab make up
    others, or none.
    """
    seen = Counter()

    def anchor(heading: re.Match) -> str:
        slug = re.sub(r"[^\w -]", "", heading[1].lower()).replace(" ", "-")
        seen[slug] += 1
        return f'<a id="{slug}{-seen[slug] + 1 or ""}"></a>\n\n{heading[0]}'

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^##+ (.+)$", anchor, cell.source, flags=re.MULTILINE)


def is_kept(output) -> bool:
    """Neither what went to stderr nor a widget, which dies with its kernel."""
    is_widget = any("jupyter.widget" in kind for kind in output.get("data", {}))
    return output.get("name") != "stderr" and not is_widget


def leave_out_paths(notebook, folder: pathlib.Path) -> None:
    """Name files as seen from the folder, wherever this machine has it."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = output.text.replace(f"{folder}/", "")


def strip(notebook) -> None:
    """Leave of the metadata only the cells' tags, and what images say of themselves
    (alt).
    """
    for cell in notebook.cells:
        cell.metadata = {
            key: value for key, value in cell.metadata.items() if key == "tags"
        }
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }


def without_words(source: str) -> str:
    """What a cell does: its code without comments and docstrings, whatever its form."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


def reuse(notebook, target: pathlib.Path) -> None:
    """Take the outputs of the last build; only prose and docstrings may have changed
    since.
    """
    old = [
        c for c in nbformat.read(target, as_version=4).cells if c.cell_type == "code"
    ]
    new = [c for c in notebook.cells if c.cell_type == "code"]
    if [without_words(c.source) for c in old] != [without_words(c.source) for c in new]:
        raise SystemExit(
            f"{target.name}: code has changed since the last build; build without"
            " --text"
        )
    for fresh, built in zip(new, old, strict=True):
        fresh.outputs, fresh.execution_count = built.outputs, built.execution_count


def execute(notebook, source: pathlib.Path, timeout: int) -> None:
    """Run every cell; one may take `timeout` seconds."""
    nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(source.resolve().parent)}},
    ).execute()


def made(source: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """(what the run made, where it is published) of each figure and file of numbers."""
    root = source.resolve().parent
    return [
        (file, root / kind / file.name)
        for kind in ("figures", "data")
        for file in sorted((root / "runs" / kind).glob("*"))
    ]


def publish(source: pathlib.Path) -> None:
    """Put what the run made in the place of what the last build published."""
    for file, place in made(source):
        place.parent.mkdir(exist_ok=True)
        os.replace(file, place)


def build(
    source: pathlib.Path, target: pathlib.Path, timeout: int, text: bool = False
) -> None:
    """Write `target` only once every cell of `source` has run, or, for `text`, has its
    old output.
    """
    notebook = jupytext.read(source, fmt="py:percent")
    name_cells(notebook)
    if text:
        reuse(notebook, target)
    else:
        for leftover, _ in made(source):
            leftover.unlink()
        execute(notebook, source, timeout)
    anchor_headings(notebook)
    strip(notebook)
    leave_out_paths(notebook, source.resolve().parent)
    nbformat.validate(notebook)
    unfinished = target.with_suffix(".unfinished")
    nbformat.write(notebook, unfinished)
    os.replace(unfinished, target)
    if not text:
        publish(source)
    print(
        f"{target.name}: {len(notebook.cells)} cells,"
        f" {target.stat().st_size // 1024} KiB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", type=pathlib.Path, nargs="?", default=ROOT / "annotated_bigs.py"
    )
    parser.add_argument(
        "target", type=pathlib.Path, nargs="?", help="default: beside source"
    )
    parser.add_argument(
        "--timeout", type=int, default=1800, help="seconds a cell may take"
    )
    parser.add_argument(
        "--text", action="store_true", help="only prose changed: keep the outputs"
    )
    arguments = parser.parse_args()
    target = arguments.target or arguments.source.with_suffix(".ipynb")
    build(arguments.source, target, arguments.timeout, arguments.text)

"""Execute annotated_bigs.py into annotated_bigs.ipynb: `python page/notebook.py`.

Two builds on one machine differ only in what the document measures: cells get their names
from their sources, progress bars (stderr) are left out, and so is what an editor would add.
"""

import argparse
import hashlib
import os
import pathlib
from collections import Counter

import jupytext
import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent


def name_cells(notebook) -> None:
    """Give each cell an id made of its source (and of how often the source came before)."""
    seen = Counter()
    for cell in notebook.cells:
        text = f"{cell.cell_type}\n{cell.source}"
        cell.id = hashlib.sha256(f"{seen[text]}\n{text}".encode()).hexdigest()[:12]
        seen[text] += 1


def is_kept(output) -> bool:
    """Neither what went to stderr nor a widget that lives only as long as its kernel."""
    is_widget = any("jupyter.widget" in kind for kind in output.get("data", {}))
    return output.get("name") != "stderr" and not is_widget


def strip(notebook) -> None:
    """Leave of the metadata only the cells' tags, and what images say of themselves (alt)."""
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def build(source: pathlib.Path, target: pathlib.Path, timeout: int) -> None:
    """Write `target` only once every cell of `source` has run; a cell may take `timeout` s."""
    notebook = jupytext.read(source, fmt="py:percent")
    name_cells(notebook)
    nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(source.resolve().parent)}},
    ).execute()
    strip(notebook)
    nbformat.validate(notebook)
    unfinished = target.with_suffix(".unfinished")
    nbformat.write(notebook, unfinished)
    os.replace(unfinished, target)
    print(f"{target.name}: {len(notebook.cells)} cells, {target.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", type=pathlib.Path, nargs="?", default=ROOT / "annotated_bigs.py"
    )
    parser.add_argument("target", type=pathlib.Path, nargs="?", help="default: beside source")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a cell may take")
    arguments = parser.parse_args()
    target = arguments.target or arguments.source.with_suffix(".ipynb")
    build(arguments.source, target, arguments.timeout)

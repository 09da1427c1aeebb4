"""The document where nothing else is: in an empty folder, in Colab, in a checkout that
cannot be written; and that reading it changes nothing.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "annotated_bigs.py"
# Nothing listens at this port: whoever asks the network is refused at once.
OFFLINE = {
    name: "http://127.0.0.1:9"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
}
# Reading in a minute or two what takes the document several: fewer steps of training,
# and fewer sentences to learn from.
SHORTER = {
    "steps=2000,": "steps=40,",
    "TO_LEARN = 1000": "TO_LEARN = 64",
    "evaluate_every=500,\n        save_every=1000": (
        "evaluate_every=20,\n        save_every=1000"
    ),
}


def shortened(source: str) -> str:
    for old, new in SHORTER.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def run(
    *command: str | Path, cwd: Path, **environment: str
) -> subprocess.CompletedProcess:
    known = {k: v for k, v in os.environ.items() if k.lower() != "no_proxy"}
    known |= OFFLINE | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=known | environment,
        capture_output=True,
        text=True,
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, what a run makes aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "runs"
    }


@pytest.fixture
def checkout(tmp_path):
    """The files of the project that the document may read, with a shorter run."""
    folder = tmp_path / "checkout"
    for name in ("data", "figures", "tests/golden"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / SCRIPT.name).write_text(shortened(SCRIPT.read_text()))
    return folder


def assert_all_was_said(output: str) -> None:
    """The examples ran, those at the end too."""
    assert "held-out loss:" in output
    assert "everything" in output.splitlines()[-1]


# Alone


@pytest.mark.slow
def test_the_script_alone_runs_to_its_end(tmp_path):
    (tmp_path / SCRIPT.name).write_text(shortened(SCRIPT.read_text()))
    done = run(sys.executable, SCRIPT.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_all_was_said(done.stdout)
    missing = {line for line in done.stdout.splitlines() if " is not here; " in line}
    assert any(line.startswith("data/bigs-boxed is not here") for line in missing)
    assert any(line.startswith("data/glue.json is not here") for line in missing)
    assert list(files(tmp_path)) == [SCRIPT.name]
    drawn = {path.stem for path in (tmp_path / "runs" / "figures").iterdir()}
    assert {"fades", "layers", "loss"} <= drawn
    # Lengths are measured on the trained model, which is not here.
    results = [path.name for path in (tmp_path / "runs" / "data").iterdir()]
    assert results == ["tiny.json"]


# Where the module is there, jax takes its part for output, too.
COLAB = """
import sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.modules["google.colab"].output = None
"""


@pytest.fixture
def colab(tmp_path):
    """A folder that makes every Python that finds it believe that it runs in Colab."""
    folder = tmp_path / "colab"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(COLAB)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_the_notebook_alone_in_colab_runs_to_its_end(tmp_path, colab):
    folder = tmp_path / "empty"
    folder.mkdir()
    book = jupytext.reads(shortened(SCRIPT.read_text()), fmt="py:percent")
    nbformat.write(book, folder / "book.ipynb")
    execute = "import nbformat, nbclient; book = nbformat.read('book.ipynb', 4); "
    execute += "nbclient.NotebookClient(book, timeout=1800, kernel_name='python3')"
    execute += ".execute(); nbformat.write(book, 'done.ipynb')"
    done = run(sys.executable, "-c", execute, cwd=folder, **colab)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(folder / "done.ipynb", 4).cells
    outputs = [out for cell in cells for out in cell.get("outputs", ())]
    assert [out for out in outputs if out.output_type == "error"] == []
    said = "".join(
        out.get("text", "") for out in outputs if out.get("name") == "stdout"
    )
    assert_all_was_said(said)
    assert "data/bigs-boxed is not here" in said


# In Colab, the first cell


def first_cell(repository: str) -> str:
    """The document's first code cell, with a public address."""
    cells = jupytext.read(SCRIPT, fmt="py:percent").cells
    source = next(cell.source for cell in cells if cell.cell_type == "code")
    assert source.count('REPOSITORY = ""') == 1
    return source.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")


@pytest.fixture
def repository(tmp_path):
    """A repository at an address; it asks for a newer jaxtyping than any, and for what
    is installed here.
    """
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "data").mkdir()
    (folder / "data" / "found.json").write_text("{}")
    wanted = (ROOT / "requirements.txt").read_text() + "jaxtyping>=999\n"
    (folder / "requirements.txt").write_text(wanted)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "All"]):
        done = run("git", *identity, *command, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder.as_uri()


@pytest.fixture
def index(tmp_path):
    """Settings that make pip say what it would install, from one local wheel."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    about = "jaxtyping-999.dist-info"
    with zipfile.ZipFile(folder / "jaxtyping-999-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", "Name: jaxtyping\nVersion: 999\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_DRY_RUN": "1",
        "PIP_REPORT": str(tmp_path / "report.json"),
    }


def test_colab_fetches_the_repository_and_upgrades_what_is_too_old(
    tmp_path, colab, repository, index
):
    (tmp_path / "content").mkdir()
    code = first_cell(repository) + "\nprint(sorted(os.listdir()))"
    for _ in range(2):  # a kernel that starts anew finds the clone
        done = run(
            sys.executable, "-c", code, cwd=tmp_path / "content", **colab, **index
        )
        assert done.returncode == 0, done.stderr
        assert "'data'" in done.stdout
        assert "'requirements.txt'" in done.stdout
        report = json.loads((tmp_path / "report.json").read_text())
        installed = [item["metadata"]["name"] for item in report["install"]]
        assert installed == ["jaxtyping"]


def test_colab_without_an_address_installs_nothing_that_is_there(tmp_path, colab):
    done = run(sys.executable, "-c", first_cell(""), cwd=tmp_path, **colab)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.glob("*")) == [tmp_path / "colab"]


def test_elsewhere_the_first_cell_does_nothing(tmp_path, repository):
    (tmp_path / "content").mkdir()
    code = first_cell(repository)
    done = run(sys.executable, "-c", code, cwd=tmp_path / "content")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "content").iterdir()) == []


# Reading changes nothing


@pytest.mark.slow
def test_reading_changes_nothing_from_any_working_directory(checkout, tmp_path):
    before = files(checkout)
    (tmp_path / "elsewhere").mkdir()
    script = checkout / SCRIPT.name
    done = run(sys.executable, script, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_all_was_said(done.stdout)
    assert " is not here" not in done.stdout
    assert files(checkout) == before
    assert list((tmp_path / "elsewhere").iterdir()) == []
    made = {path.name for path in (checkout / "runs" / "figures").iterdir()}
    assert made == {path.name for path in (checkout / "figures").iterdir()}
    told = [line for line in done.stdout.splitlines() if "what this run makes" in line]
    assert told == [f"what this run makes goes to {checkout / 'runs'}"]


def read_only(folder: Path) -> list[str]:
    """A command before which a folder cannot be written, not even by root."""
    if os.geteuid() != 0:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        return []
    mount = f'mount --bind "{folder}" "{folder}" && mount -o remount,ro,bind "{folder}"'
    command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if run(*command, "true", cwd=folder).returncode:
        pytest.skip("nothing can be mounted here, and root writes everywhere else")
    return command


def test_results_go_where_they_can(checkout, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    code = "import annotated_bigs as bigs; "
    code += (
        "bigs.keep_results(bigs.RESULTS, history=[]); bigs.show(bigs.fades_figure); "
    )
    code += "print(bigs.measured('tiny')['history'], bigs.RUNS)"
    command = [*read_only(checkout), sys.executable, "-c", code]
    path = {"PYTHONPATH": str(checkout)}
    done = run(*command, cwd=tmp_path / "elsewhere", **path)
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "elsewhere" / "runs"
    assert done.stdout.splitlines()[-1] == f"[] {runs}"
    assert (runs / "figures" / "fades.png").stat().st_size > 10_000
    assert not (checkout / "runs").exists()

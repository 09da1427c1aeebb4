"""What the README promises, the Makefile, the hooks and the workflow run are the same
commands.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def output(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked(*patterns: str) -> list[Path]:
    """The project's files, those of git and those about to be."""
    listing = output(
        *("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"),
        *("--", *patterns),
    )
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file()]


def marked(name: str, readme: str | Path = "README.md") -> str:
    """README's command below `<!-- ci: NAME -->`, as .ci/run takes it out."""
    found = output("awk", "-v", f"name={name}", "-f", ".ci/readme-commands", readme)
    return found.removesuffix("\n")


@pytest.mark.parametrize("name", ["run", "test"])
def test_readmes_commands_do_their_own_setting_up(name):
    command = marked(name)
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert "-r requirements.txt" in command


def test_readmes_commands_run_the_document_and_its_tests():
    assert marked("run").endswith("&& .venv/bin/python annotated_bigs.py")
    assert marked("test").endswith("&& .venv/bin/python -m pytest --doctest-modules")
    assert "-r requirements-dev.txt" in marked("test")


MARKED = """\
```sh
first
```

<!-- ci: one -->
```sh
one
more
```

<!-- ci: two -->

```sh
two
```

<!-- ci: three -->
Text stands between, so this block is none of the marker's.

```sh
three
```
"""


@pytest.mark.parametrize(
    ("name", "command"), [("one", "one"), ("two", "two"), ("three", ""), ("four", "")]
)
def test_a_command_is_the_one_below_its_marker(tmp_path, name, command):
    (tmp_path / "README.md").write_text(MARKED)
    assert marked(name, tmp_path / "README.md") == command


def test_make_runs_what_the_readme_runs():
    if not shutil.which("make"):
        pytest.skip("make is not installed")

    def recipe(target: str) -> str:
        return output("make", "--dry-run", target, "PYTHON=.venv/bin/python").strip()

    assert marked("run").endswith(f"&& {recipe('run')}")
    assert marked("test").endswith(f"&& {recipe('test')}")
    assert recipe("test-all") == f"{recipe('test')} --slow"
    assert " && ".join(recipe("install").splitlines()) in marked("test")
    assert f"{recipe('lint')}\n" in (ROOT / ".ci/run").read_text()


def test_make_describes_every_target():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    targets = re.search(
        r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )[1]
    described = re.findall(r"^(\S+) +\S.*$", output("make"), re.MULTILINE)
    assert described == targets.split()


@pytest.fixture(scope="module")
def workflow() -> dict:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def steps(workflow: dict, job: str) -> list[str]:
    return [step["run"] for step in workflow["jobs"][job]["steps"] if "run" in step]


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci/run").read_text()
    assert "tests=$(awk -v name=test -f .ci/readme-commands README.md)" in script
    assert 'bash -c "$tests --slow"' in script


def test_hooks_run_what_ci_runs():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    hooks = yaml.safe_load(text)["repos"][0]["hooks"]
    *lints, document = (hook["entry"] for hook in hooks)
    for lint in lints:
        assert f".venv/bin/{lint}\n" in (ROOT / ".ci/run").read_text()
    assert [word for word in document.split() if (ROOT / word).is_file()]


def test_workflow_tests_the_oldest_and_the_newest(workflow):
    assert steps(workflow, "test") == ["bash .ci/run"]
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert matrix == {"python": ["3.11", "3.13"]}
    assert steps(workflow, "lowest") == ["bash .ci/lowest"]
    assert "--resolution lowest-direct" in (ROOT / ".ci/lowest").read_text()


def test_workflow_publishes_what_was_tested(workflow):
    assert "make page" in steps(workflow, "page")
    assert set(workflow["jobs"]["publish"]["needs"]) == {"test", "lowest", "page"}


def test_workflow_asks_the_hub_once_a_week(workflow):
    events = workflow[True]  # YAML reads the key `on` as a truth value
    minute, hour, day, month, weekday = events["schedule"][0]["cron"].split()
    assert (day, month) == ("*", "*")
    assert weekday.isdigit()
    assert "schedule" in workflow["jobs"]["hub"]["if"]
    assert "make test-hub" in steps(workflow, "hub")


def stub(folder: Path, name: str, script: str) -> None:
    """A command of this name, which notes down how it was called."""
    bash = shutil.which("bash")
    text = f'#!{bash}\necho "{name} $*" >> "{folder}/calls"\n{script}\n'
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def fetched_tools(folder: Path, apt: str) -> tuple[int, list[str]]:
    """Exit status of .ci/page-tools where nothing is installed, and what it called."""
    stub(folder, "id", "echo 0")
    stub(folder, "sleep", "")
    stub(folder, "timeout", 'shift; "$@"')
    stub(folder, "apt-get", apt)
    command = [shutil.which("bash"), ROOT / ".ci/page-tools"]
    done = subprocess.run(command, env={"PATH": str(folder)}, capture_output=True)
    calls = (folder / "calls").read_text().splitlines()
    return done.returncode, [call for call in calls if call.startswith("apt-get")]


def test_the_pages_tools_are_fetched(tmp_path):
    status, calls = fetched_tools(tmp_path, "")
    assert status == 0
    assert [call.split()[4] for call in calls[:2]] == ["update", "install"]
    assert "--download-only npm chromium" in calls[1]
    assert calls[2] == "apt-get -q install -y npm chromium"


def test_a_failing_mirror_is_asked_three_times(tmp_path):
    status, calls = fetched_tools(tmp_path, "exit 100")
    assert status != 0
    assert len(calls) == 3


def test_a_mirror_may_fail_twice(tmp_path):
    count = 'echo >> "${0%/*}/tries"; mapfile -t tries < "${0%/*}/tries"'
    status, calls = fetched_tools(tmp_path, f"{count}; [[ ${{#tries[@]}} -ge 3 ]]")
    assert status == 0
    assert len(calls) == 5


def test_pytest_collects_the_document_and_its_tests_only():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert settings["pytest"]["ini_options"]["testpaths"] == [
        "annotated_bigs.py",
        "tests",
    ]


LOWER_BOUND = re.compile(r"[A-Za-z0-9_-]+>=\d+(\.\d+)*")


def too_narrow(requirements: str) -> list[str]:
    """Lines that say anything but the least version that will do."""
    lines = [re.sub(r"\s*#.*", "", line) for line in requirements.splitlines()]
    return [line for line in lines if line and not LOWER_BOUND.fullmatch(line)]


def test_requirements_are_lower_bounds():
    assert too_narrow((ROOT / "requirements.txt").read_text()) == []
    dev = (ROOT / "requirements-dev.txt").read_text()
    assert too_narrow(dev) == ["-r requirements.txt"]


@pytest.mark.parametrize(
    "line", ["jax==0.7.2", "jax", "jax>=0.7,<0.8", "jax~=0.7", "jax[k]>=1"]
)
def test_narrow_requirements_are_noticed(line):
    assert too_narrow(f"# ours\nnumpy>=2.0  # enough\n{line}\n") == [line]


def normal(name: str) -> str:
    """A distribution's name as an index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: str) -> set[str]:
    return {normal(name) for name in re.findall(r"^[\w-]+(?=>=)", requirements, re.M)}


def imported(source: str) -> set[str]:
    """Top-level names of the packages that a source imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


DISTRIBUTIONS = packages_distributions()
# Makes tests/golden/bert by hand, once; the tests themselves do without.
BY_HAND = {"make_bert.py": {"torch"}}


def undeclared(files: Iterable[Path], requirements: set[str]) -> set[str]:
    """What is imported and neither declared, nor of Python, nor of this project."""
    files = list(files)
    ours = {path.stem for path in tracked("*.py")} | set(sys.stdlib_module_names)
    wanted = set()
    for file in files:
        wanted |= imported(file.read_text()) - BY_HAND.get(file.name, set())
    return {
        name
        for name in wanted - ours
        if not requirements & {normal(d) for d in DISTRIBUTIONS.get(name, [name])}
    }


RUNTIME = declared((ROOT / "requirements.txt").read_text())
DEVELOPMENT = declared((ROOT / "requirements-dev.txt").read_text())
TOOLS = "tests/", "page/", "conftest.py"


def is_tool(path: Path) -> bool:
    return str(path.relative_to(ROOT)).startswith(TOOLS)


def test_what_readers_import_is_declared():
    files = [path for path in tracked("*.py") if not is_tool(path)]
    assert ROOT / "annotated_bigs.py" in files
    assert undeclared(files, RUNTIME) == set()


def test_what_tests_and_page_import_is_declared():
    files = [path for path in tracked("*.py") if is_tool(path)]
    assert undeclared(files, RUNTIME | DEVELOPMENT) == set()


@pytest.mark.parametrize(
    "line",
    [
        "import frobnicate",
        "from frobnicate.deep import x",
        "def f():\n    import os, frobnicate as g",
    ],
)
def test_an_undeclared_import_is_noticed(tmp_path, line):
    file = tmp_path / "source.py"
    file.write_text(f"import jax.numpy\nimport sklearn.metrics\n{line}\n")
    assert undeclared([file], RUNTIME) == {"frobnicate"}
    assert undeclared([file], RUNTIME - {"scikit-learn"}) == {"frobnicate", "sklearn"}


MACHINE = re.compile(
    r"(?<![\w.])/(?:work|root|home|Users)/|(?<![\w.])/tmp/[a-z]"
    r"|pypi\.org|files\.pythonhosted|registry\.npmjs|deb\.debian"
)


def test_no_file_names_a_machine_or_an_index():
    texts = {path: path.read_bytes() for path in tracked()}
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path, text in texts.items()
        if b"\0" not in text
        and (match := MACHINE.search(text.decode(errors="replace")))
    }
    assert found == {}


@pytest.mark.parametrize("name", ["|root|x", "|tmp|x", "https:||pypi[.]org"])
def test_machines_and_indices_are_noticed(name):
    # Written otherwise, since this file is searched as well.
    assert MACHINE.search("see " + name.replace("|", "/").replace("[.]", "."))
    assert not MACHINE.search("https://example.org/homework/ and figures/home/")

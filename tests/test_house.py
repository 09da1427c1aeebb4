"""What the README promises, the Makefile, the hooks and the workflow run are the same
commands.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def output(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
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


def test_no_file_of_tests_imports_another():
    """What several share lies in modules whose names do not begin with test_."""
    for path in (ROOT / "tests").glob("*.py"):
        for line in path.read_text().splitlines():
            assert not re.match(r"\s*(from|import) test_", line), path.name


@pytest.mark.slow
def test_pytest_collects_the_document_and_its_tests_only():
    command = [sys.executable, "-m", "pytest", "--doctest-modules"]
    settings = os.environ | {"PYTEST_ADDOPTS": ""}  # with two -q no test is named
    collected = output(*command, "--collect-only", "-q", env=settings)
    files = {line.partition("::")[0] for line in collected.splitlines() if "::" in line}
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
    workshop = {
        f"workshop/{path.name}"
        for path in (ROOT / "workshop").glob("*.py")
        if ">>>" in path.read_text()
    }
    on_request = {"tests/test_hub.py"}  # with -m hub
    assert files == {"annotated_bigs.py"} | workshop | tests - on_request


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
    modules = [path.relative_to(ROOT) for path in tracked("*.py")]
    ours = {path.stem for path in modules} | {path.parts[0] for path in modules}
    ours |= set(sys.stdlib_module_names)
    wanted = set()
    for file in files:
        wanted |= imported(file.read_text()) - BY_HAND.get(file.name, set())
    return {
        name
        for name in wanted - ours - sys.stdlib_module_names
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
    listing = output(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"
    )
    paths = [ROOT / name for name in listing.split("\0") if name]
    for path in filter(Path.is_file, paths):
        text = path.read_bytes()
        if b"\0" not in text:
            match = MACHINE.search(text.decode(errors="replace"))
            assert match is None, path


@pytest.mark.parametrize("name", ["|root|x", "|tmp|x", "https:||pypi[.]org"])
def test_machines_and_indices_are_noticed(name):
    # Written otherwise, since this file is searched as well.
    assert MACHINE.search("see " + name.replace("|", "/").replace("[.]", "."))
    assert not MACHINE.search("https://example.org/homework/ and figures/home/")


# Whose it is, and what changed


def section(text: str, title: str) -> str:
    """What stands below a heading of the second level."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def citation() -> dict:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


@pytest.fixture(scope="module")
def card() -> str:
    """The card of the trained model."""
    return (ROOT / "data/bigs-boxed/README.md").read_text()


def test_citation_is_of_this_program(citation, readme):
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "authors"} <= set(citation)
    assert readme.startswith(f"# {citation['title']}\n")


def test_readme_and_citation_name_the_same_paper(citation, readme):
    paper = citation["references"][0]
    entry = dict(re.findall(r"(\w+) = \{(.*?)\}", readme))
    names = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert entry["author"] == " and ".join(names)
    assert entry["title"] == paper["title"]
    assert entry["booktitle"] == paper["collection-title"]
    assert entry["year"] == str(paper["year"])
    assert entry["note"] == paper["identifiers"][0]["value"]
    assert entry["note"].removeprefix("arXiv:") in paper["url"]


def test_one_licence_of_the_code(citation, card, readme):
    name, version = (ROOT / "LICENSE").read_text().split("\n")[1:3]
    assert (name.strip(), version.split(",")[0].strip()) == (
        "Apache License",
        "Version 2.0",
    )
    assert citation["license"] == "Apache-2.0"
    assert "Apache-2.0" in section(readme, "Licence")
    assert "Apache-2.0" in section(card, "Licence and sources")


def test_one_licence_of_the_weights(card, readme):
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "cc-by-sa-4.0"
    assert "CC BY-SA 4.0" in section(readme, "Licence")
    assert "CC BY-SA 4.0" in section(text, "Licence and sources")
    assert "README.md#licence-and-sources" in section(readme, "Licence")


def test_every_file_with_weights_has_its_licence(card):
    folder = ROOT / "data/bigs-boxed"
    named = set(re.findall(r"`([\w.]+\.\w+)`", section(card, "Licence and sources")))
    assert named <= {path.name for path in folder.iterdir()}
    assert {path.name for path in folder.iterdir() if path.suffix != ".json"} <= {
        *named,
        "README.md",
    }
    assert "tokenizer.json" in named


def test_every_text_that_was_read_has_its_source(card):
    log = json.loads((ROOT / "data/bigs-boxed/training.json").read_text())["boxed"]
    kinds = {Path(file).name.partition("-")[0] for file in log["text"].split(", ")}
    rows = re.findall(r"^\| `(\w+)-\*` \|", section(card, "Licence and sources"), re.M)
    assert set(rows) == kinds


KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def untidy(changelog: str) -> list[str]:
    """What Keep a Changelog would not have: unknown kinds, versions out of order."""
    heads = re.findall(r"^## (.*)$", changelog, re.M)
    found = [] if heads[0] == "[Unreleased]" else [heads[0]]
    version = re.compile(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d{2}-\d{2})")
    found += [head for head in heads[1:] if not version.fullmatch(head)]
    known = [version.fullmatch(head) for head in heads[1:] if version.fullmatch(head)]
    numbers = [tuple(map(int, match.groups()[:3])) for match in known]
    dates = [match[4] for match in known]
    for order in (numbers, dates):
        found += [] if order == sorted(order, reverse=True) else [str(order)]
    return found + list(set(re.findall(r"^### (.*)$", changelog, re.M)) - KINDS)


def test_changelog_is_in_order():
    assert untidy((ROOT / "CHANGELOG.md").read_text()) == []


OLDER = (
    "## [Unreleased]\n\n## [1.0.1] - 2026-12-01\n### Fixed\n## [1.0.0] - 2026-11-30\n"
)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("[Unreleased]", "[1.1.0] - 2027-01-01"),
        ("[1.0.1]", "[0.9.9]"),
        ("2026-12-01", "2026-11-01"),
        ("### Fixed", "### News"),
        ("[1.0.0] - 2026-11-30", "[1.0.0]"),
    ],
)
def test_an_untidy_changelog_is_noticed(right, wrong):
    assert untidy(OLDER) == []
    assert untidy(OLDER.replace(right, wrong))


def lost(text: str, folder: Path) -> list[str]:
    """Files that a text links to, and targets of make that it names, but nobody has."""
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    files = [link for link in links if not (folder / link).exists()]
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    makes = re.findall(r"`make ([\w-]+)", text)
    scripts = re.findall(r"`bash ([\w./-]+)`", text)
    return [
        *files,
        *(target for target in makes if target not in targets.split()),
        *(script for script in scripts if not (ROOT / script).exists()),
    ]


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/bigs-boxed/README.md"],
)
def test_what_texts_point_to_exists(name):
    file = ROOT / name
    assert lost(file.read_text(), file.parent) == []


@pytest.mark.parametrize("text", ["[a](none.md)", "`make haste`", "`bash .ci/none`"])
def test_a_lost_file_is_noticed(text):
    assert lost(f"[b](README.md#licence) `make test` {text}", ROOT)

"""What the README promises, the Makefile, the hooks and the workflow run are the same
commands.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def commands() -> list[str]:
    """README's commands as .ci/run takes them out."""
    return output("awk", "-f", ".ci/readme-commands", "README.md").splitlines()


def test_readme_holds_two_commands_that_do_their_own_setting_up(commands):
    run, test = commands[:2]
    for command in (run, test):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
        assert "-r requirements.txt" in command
    assert run.endswith("&& .venv/bin/python annotated_bigs.py")
    assert test.endswith("&& .venv/bin/python -m pytest --doctest-modules")
    assert "-r requirements-dev.txt" in test


def test_commands_are_taken_from_sh_blocks_only(tmp_path):
    text = "```\nno\n```\n\n```sh\none\nmore\n```\n\n```python\nno\n```\n\n"
    text += "```sh\ntwo\n```\n"
    (tmp_path / "README.md").write_text(text)
    found = output("awk", "-f", ".ci/readme-commands", str(tmp_path / "README.md"))
    assert found.split() == ["one", "two"]


def test_make_runs_what_the_readme_runs(commands):
    if not shutil.which("make"):
        pytest.skip("make is not installed")

    def recipe(target: str) -> str:
        return output("make", "--dry-run", target, "PYTHON=.venv/bin/python").strip()

    assert commands[0].endswith(f"&& {recipe('run')}")
    assert commands[1].endswith(f"&& {recipe('test')}")
    assert recipe("test-all") == f"{recipe('test')} --slow"
    assert " && ".join(recipe("install").splitlines()) in commands[1]
    assert recipe("lint") in (ROOT / ".ci/run").read_text().splitlines()


def test_make_describes_every_target():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    targets = re.search(
        r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )[1]
    described = re.findall(r"^(\S+) +\S.*$", output("make"), re.MULTILINE)
    assert described == targets.split()


@pytest.fixture(scope="module")
def jobs() -> dict:
    """What the workflow of .github does."""
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def test_workflow_runs_scripts_and_targets_that_exist(jobs):
    steps = [step for job in jobs.values() for step in job["steps"]]
    commands = [step["run"].split() for step in steps if "run" in step]
    scripts = {words[1] for words in commands if words[0] == "bash"}
    targets = {words[1] for words in commands if words[0] == "make"}
    makefile = (ROOT / "Makefile").read_text()
    assert scripts == {".ci/run"}
    assert targets
    for target in targets:
        assert f"\n{target}:" in makefile


def test_workflow_publishes_after_everything_else(jobs):
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}


def test_workflow_tests_the_oldest_python_that_is_promised(jobs):
    oldest = jobs["test"]["strategy"]["matrix"]["python"][0]
    assert f"needs Python {oldest} or newer" in (ROOT / "README.md").read_text()
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == "py" + oldest.replace(".", "")


def test_workflow_runs_slow_and_timed_tests():
    """.ci/run runs README's second command, with the options that conftest.py adds."""
    script = (ROOT / ".ci/run").read_text()
    assert ".ci/readme-commands README.md" in script
    options = re.findall(r'"(--[a-z]+)"', (ROOT / "conftest.py").read_text())
    for option in options:
        assert f'bash -c "$tests {option}"' in script


def test_hooks_run_what_the_workflow_runs():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    lint, document = yaml.safe_load(hooks)["repos"][0]["hooks"]
    assert f".venv/bin/{lint['entry']}" in (ROOT / ".ci/run").read_text()
    files = [word for word in document["entry"].split() if word.endswith(".py")]
    assert files
    for file in files:
        assert (ROOT / file).is_file()


def test_no_file_of_tests_imports_another():
    """What several share lies in modules whose names do not begin with test_."""
    for path in (ROOT / "tests").glob("*.py"):
        for line in path.read_text().splitlines():
            assert not re.match(r"\s*(from|import) test_", line), path.name


@pytest.mark.slow
def test_pytest_collects_the_document_and_its_tests_only():
    collected = output(
        sys.executable, "-m", "pytest", "--doctest-modules", "--collect-only", "-q"
    )
    files = {line.partition("::")[0] for line in collected.splitlines() if "::" in line}
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
    assert files == {"annotated_bigs.py"} | tests


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

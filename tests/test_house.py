"""What the README promises, the Makefile, the hooks and the workflow run are the same
commands.
"""

import re
import shutil
import subprocess
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


def test_hooks_and_workflow_run_the_same_commands():
    script = (ROOT / ".ci/run").read_text()
    assert 'bash -c "$tests --slow"' in script
    assert ".ci/readme-commands README.md" in script
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0][
        "hooks"
    ]
    lint, document = (hook["entry"] for hook in hooks)
    assert f".venv/bin/{lint}" in script
    assert [word for word in document.split() if (ROOT / word).is_file()]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {"run": "bash .ci/run"} in jobs["test"]["steps"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert {"run": "make page"} in jobs["page"]["steps"]
    assert set(jobs["publish"]["needs"]) == {"test", "page"}


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


MACHINE = re.compile(
    r"(?<![\w.])/(?:work|root|home|Users)/|(?<![\w.])/tmp/[a-z]"
    r"|pypi\.org|files\.pythonhosted|registry\.npmjs|deb\.debian"
)


def test_no_file_names_a_machine_or_an_index():
    listing = output(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"
    )
    paths = [ROOT / name for name in listing.split("\0") if name]
    texts = {path: path.read_bytes() for path in paths if path.is_file()}
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

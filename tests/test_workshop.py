"""The workshop and the story are one module, however the program is started."""

import ast
import importlib
import json
import subprocess
import sys

import shell
import small

import annotated_bigs as bigs

STORY = small.ROOT / "annotated_bigs.py"


def python(folder, *arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_command_gets_the_classes_of_the_running_script(project):
    """The script runs as __main__, and the workshop imports it by name."""
    spy = project / "workshop" / "commands.py"
    before = spy.read_text()
    spy.write_text(
        "import sys\n"
        "import annotated_bigs as bigs\n"
        "def main():\n"
        "    print(bigs is sys.modules['__main__'], bigs.BiGS.__module__)\n"
    )
    try:
        status, out, err = python(project, "annotated_bigs.py", "inspect")
    finally:
        spy.write_text(before)
    assert (status, out) == (0, "True __main__\n"), err


def test_a_notebook_is_the_module_that_the_workshop_imports(project):
    """Its cells run in __main__, which has no file."""
    code = (
        "import sys\n"
        "source = open('annotated_bigs.py').read()\n"
        "sys.argv = ['kernel', 'some', 'arguments']\n"
        "namespace = sys.modules['__main__'].__dict__\n"
        "head = source.split('# ## 3. ')[0].rsplit('# %%', 1)[0]\n"
        "exec(head, namespace)\n"
        "import annotated_bigs\n"
        "print(annotated_bigs is sys.modules['__main__'])\n"
    )
    status, out, err = python(project, "-c", code)
    assert (status, out) == (0, "True\n"), err


def test_the_workshop_runs_by_its_own_name_and_tells_no_story(project):
    status, out, err = python(project, "-m", "workshop", "--help")
    assert status == 0, err
    assert out.startswith("usage: annotated_bigs.py")
    assert "fill-mask" in out


def test_without_the_workshop_a_command_is_one_line(tmp_path):
    (tmp_path / STORY.name).write_text(STORY.read_text())
    status, out, err = python(tmp_path, STORY.name, "figures")
    assert (status, out) == (2, "")
    assert err == (
        "error: workshop/ is not here; commands come with the repository of this"
        " document\n"
    )


def test_the_story_imports_the_workshop_only_to_hand_over():
    lines = [line.strip() for line in STORY.read_text().splitlines()]
    found = [
        line for line in lines if line.startswith(("from workshop", "import workshop"))
    ]
    assert found == ["from workshop.commands import main"]


def test_names_of_other_modules_exist():
    """ruff cannot see that a name has left its module."""
    modules = {"bigs": bigs, "small": small, "shell": shell}
    folders = [small.ROOT / "workshop", small.ROOT / "tests"]
    for file in (small.ROOT / "workshop").glob("[a-z]*.py"):
        modules[file.stem] = importlib.import_module(f"workshop.{file.stem}")
    missing = []
    for file in sorted(path for folder in folders for path in folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = modules.get(node.value.id)
                if module and not hasattr(module, node.attr):
                    missing.append(f"{file.name}, line {node.lineno}: {node.attr}")
    assert missing == []


def test_importing_the_workshop_runs_nothing(project):
    code = "import json, sys, workshop.commands; print(json.dumps(sorted(sys.modules)))"
    status, out, err = python(project, "-c", code)
    assert status == 0, err
    assert err == ""
    assert len(out.splitlines()) == 1
    assert "annotated_bigs" in json.loads(out)

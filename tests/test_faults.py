"""Every fault of faults.py fits the program; whether it is caught, faults.py tells."""

import ast
import re
from collections import Counter

import faults
import pytest


def docstrings(source):
    nodes = ast.walk(ast.parse(source))
    kinds = ast.FunctionDef | ast.ClassDef | ast.Module
    return [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_program(fault):
    assert fault.old != fault.new
    source = (faults.ROOT / fault.file).read_text()
    assert fault.new in faults.seeded(source, fault)
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        name = name.partition("[")[0].rpartition(".")[2]
        text = (faults.ROOT / file).read_text()
        assert not name or re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE)


def test_faults_differ():
    assert len(faults.FAULTS) == 44
    for key in (lambda f: f.name, lambda f: (f.where, f.old, f.new)):
        assert max(Counter(map(key, faults.FAULTS)).values()) == 1


PROGRAM = '''
@decorated
def one(x):
    """Docstring with x + 1.

    >>> one(1)
    2
    """
    return (x   # a comment
            + 1)


class Two:
    def three(self):
        return [1, 2]


FOUR = dict(a=1,
            b=2)
'''


@pytest.mark.parametrize(
    ("where", "old", "new", "expected"),
    [
        ("one", "x + 1", "x - 1", "    return x - 1\n"),
        ("Two.three", "[1, 2]", "[2, 1]", "        return [2, 1]\n"),
        ("Two", "return [1, 2]", "return None", "        return None\n"),
        ("FOUR", "a=1, b=2", "a=2, b=1", "FOUR = dict(a=2, b=1)\n"),
    ],
)
def test_a_snippet_is_found_however_it_is_written(where, old, new, expected):
    changed = faults.seeded(PROGRAM, faults.Fault("f", where, old, new, ()))
    assert expected in changed
    assert "@decorated\ndef one(x):" in changed
    assert docstrings(changed) == docstrings(PROGRAM)


@pytest.mark.parametrize(
    ("where", "old", "message"),
    [
        ("one", "x + 2", "occurs 0 times in one; rewrite"),
        ("FOUR", "=", "occurs 3 times in FOUR; rewrite"),
        ("five", "x", "five: 0 definitions"),
        ("Two.six", "x", "Two.six: 0 definitions"),
    ],
)
def test_a_fault_that_does_not_fit_is_named(where, old, message):
    with pytest.raises(faults.NotFound, match=message):
        faults.seeded(PROGRAM, faults.Fault("f", where, old, "y", ()))

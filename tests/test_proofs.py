"""Hidden proofs: what they catch, and that a number is renewed in the form it has."""

import doctest

import pages
import pytest

proofs = pages.page_module("proofs")

NAMES = {"a": 2.04, "b": 1300, "c": -0.5, "six": 6}
GOOD = (
    "From 2.0<!-- = a\n--> to 1,300<!-- =\n b --> by -0.5<!-- = c -->,"
    " six<!-- = six --> of them; it rises.<!-- if a < b -->"
)


def test_its_examples():
    assert doctest.testmod(proofs).failed == 0


def test_what_is_right_passes():
    assert proofs.wrong(GOOD, NAMES) == []
    assert len(proofs.PROOF.findall(GOOD)) == 4
    assert proofs.renewed(GOOD, NAMES)[1] == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("2.0<", "2.1<", "a is 2.0, not 2.1"),
        ("2.0<", "2.04<", None),
        ("1,300", "1,301", "b is 1,300, not 1,301"),
        ("1,300", "1300", "b is 1,300, not 1300"),
        ("by -0.5", "by 0.5", "c is -0.5, not 0.5"),
        ("six<", "seven<", "six is six, not seven"),
        ("if a < b", "if a > b", "a > b is false"),
        ("if a < b", "if d", "d raises NameError"),
        ("= c", "= d", "d raises NameError"),
        ("it rises.", "it rises." + proofs.AGAIN, "read again"),
    ],
)
def test_what_is_wrong_is_named(old, new, complaint):
    assert old in GOOD
    found = proofs.wrong(GOOD.replace(old, new), NAMES)
    assert complaint in found[0] if complaint else found == []


def test_renewing_keeps_the_form_and_marks_what_has_turned():
    text, changes = proofs.renewed(GOOD, NAMES | {"a": 3.14159, "b": 1250})
    assert "3.1<!-- = a\n-->" in text
    assert "1,250<!-- =\n b -->" in text
    assert len(changes) == 2
    assert proofs.AGAIN not in text
    turned, _ = proofs.renewed(GOOD, NAMES | {"c": 0.5})
    assert turned.count(proofs.AGAIN) == 1
    assert proofs.renewed(turned, NAMES | {"c": 0.4})[0].count(proofs.AGAIN) == 1

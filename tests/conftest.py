"""Fixtures shared by several files of tests."""

import shutil
import statistics

import pytest
import small

import annotated_bigs as bigs

# Programs that tests start; to import them, as doctests do, would be to run them.
collect_ignore = ["process.py", "devices.py"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what the commands need; nothing is written into the repository."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(small.ROOT / "annotated_bigs.py", folder)
    shutil.copytree(small.ROOT / "data", folder / "data")
    shutil.copytree(small.ROOT / "workshop", folder / "workshop")
    paragraphs = (
        f"The sum of {number} and {number + 1} is an odd number. It is not even."
        for number in range(900)
    )
    (folder / "corpus.txt").write_text("\n\n".join(paragraphs))
    return folder


@pytest.fixture
def one_step(monkeypatch):
    """Runs of one recipe share their compiled step."""
    monkeypatch.setattr(bigs, "make_step", small.make_step)


@pytest.fixture
def timed(record_property):
    """timed(what, measure, most, rounds) fails if the median of what measure returns
    is more than a fifth beyond `most`, and so is that of another try. Measures compare
    where they can: two times taken one after the other, so that a busy machine slows
    both. What was found is reported in any case.
    """

    def check(what, measure, most, rounds=3):
        def median():
            return statistics.median(measure() for _ in range(rounds))

        found = [median()]
        if found[0] > 1.2 * most:
            found.append(median())
        told = ", then ".join(f"{value:.3g}" for value in found)
        record_property("timing", f"{what}: {told} (at most {most:.3g})")
        assert found[-1] <= 1.2 * most

    return check

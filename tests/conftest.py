"""Fixtures shared by several files of tests."""

import shutil

import pytest
import small


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what the commands need; nothing is written into the repository."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(small.ROOT / "annotated_bigs.py", folder)
    shutil.copytree(small.ROOT / "data", folder / "data")
    paragraphs = (
        f"The sum of {number} and {number + 1} is an odd number. It is not even."
        for number in range(900)
    )
    (folder / "corpus.txt").write_text("\n\n".join(paragraphs))
    return folder

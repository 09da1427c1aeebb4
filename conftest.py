"""Settings shared by all tests and doctests."""

import importlib.util
import os

os.environ.setdefault("MPLBACKEND", "Agg")
# Tests compile hundreds of small programs and run each once: compile fast rather than
# well.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

# Must stand before the document's first import: from then on every array annotation of
# the document, such as Float[Array, "L d"], is checked at each call.
if importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    install_import_hook("annotated_bigs", "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="run the tests marked slow, too"
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))
    if "hub" not in config.getoption("markexpr"):
        asking = [item for item in items if "hub" in item.keywords]
        items[:] = [item for item in items if "hub" not in item.keywords]
        config.hook.pytest_deselected(items=asking)


@pytest.fixture(autouse=True)
def highest_precision():
    """On a TPU float32 products multiply in bfloat16 unless told otherwise."""
    with jax.default_matmul_precision("highest"):
        yield

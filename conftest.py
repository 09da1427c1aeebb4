"""Settings shared by all tests and doctests."""

import atexit
import functools
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Tests compile hundreds of small programs and run each a few times: compile fast rather
# than well.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def are_known(*flags: str) -> bool:
    """Whether this release of XLA has these flags; any other would end the process."""
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    return done.returncode == 0


def set_up() -> None:
    """For this process and for all that it starts: workers, commands, runs. What one of
    them has compiled or gathered, the others read.
    """
    if "TESTS_SHARE" not in os.environ:
        folder = tempfile.mkdtemp(prefix="tests-share-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TESTS_SHARE"] = folder
    if "XLA_FLAGS" not in os.environ:
        known = FAST_COMPILATION if are_known(*FAST_COMPILATION) else ()
        os.environ["XLA_FLAGS"] = " ".join(known)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["TESTS_SHARE"]
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


os.environ.setdefault("MPLBACKEND", "Agg")
set_up()

import jax  # noqa: E402, not before these settings

# Must stand before the document's first import: from then on every array annotation of
# the document, such as Float[Array, "L d"], is checked at each call.
if importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    install_import_hook(["annotated_bigs", "workshop"], "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="run the tests marked slow, too"
    )
    parser.addoption(
        "--timing",
        action="store_true",
        help="run the tests marked timing instead of the others, one after another",
    )


def pytest_configure(config):
    """Only the tests that are marked so ask the hub; no other waits for an answer."""
    if "hub" not in config.option.markexpr:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A run of everything is shared among workers, if pytest-xdist is installed and
    nothing else was asked for. A worker takes whole files, whose tests share what was
    compiled. An accelerator belongs to one process.
    """
    is_worker = hasattr(config, "workerinput")
    is_everything = config.args_source is config.ArgsSource.TESTPATHS
    if (
        config.pluginmanager.hasplugin("xdist")
        and not is_worker
        and config.option.numprocesses is None
        and is_everything
        and not config.option.timing
        and jax.default_backend() == "cpu"
    ):
        config.option.numprocesses = min(os.cpu_count(), 4)
        config.option.dist = "loadfile"


def pytest_collection_modifyitems(config, items):
    if "hub" not in config.option.markexpr:
        asking = [item for item in items if "hub" in item.keywords]
        items[:] = [item for item in items if "hub" not in item.keywords]
        config.hook.pytest_deselected(items=asking)
    if config.option.timing:
        others = [item for item in items if "timing" not in item.keywords]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "timing" in item.keywords]
        return
    for item in items:
        if "timing" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="timing: runs with --timing"))
        if "slow" in item.keywords and not config.option.slow:
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


def pytest_terminal_summary(terminalreporter):
    """What was measured, whether it was within its bound or not."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, text in getattr(report, "user_properties", ()):
                if name == "timing" and report.when == "call":
                    terminalreporter.write_line(f"{report.nodeid}: {text}")


@pytest.fixture(scope="session", autouse=True)
def gathered_once():
    """The English of the installed packages takes a quarter of a minute to gather: one
    process does, and the others read what it found.
    """
    from filelock import FileLock

    import annotated_bigs

    gather = annotated_bigs.embedded_english

    @functools.cache
    @functools.wraps(gather)
    def english():
        found = Path(os.environ["TESTS_SHARE"]) / "english.pickle"
        with FileLock(f"{found}.lock"):
            if not found.exists():
                found.write_bytes(pickle.dumps(gather()))
        return pickle.loads(found.read_bytes())

    annotated_bigs.embedded_english = english


@pytest.fixture(autouse=True)
def highest_precision():
    """On a TPU float32 products multiply in bfloat16 unless told otherwise."""
    with jax.default_matmul_precision("highest"):
        yield

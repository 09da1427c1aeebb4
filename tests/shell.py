"""The command line, as the tests start it in a folder of its own."""

import os
import subprocess
import sys

# A run of pretraining that takes seconds.
TINY = ("--size", "tiny", "--recipe", "demonstration", "--batch", "2")


def start(project, *arguments) -> subprocess.Popen:
    """Start a command as a reader does: without a network, and with the reader's
    compiler rather than that of conftest.py.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        [sys.executable, "annotated_bigs.py", *map(str, arguments)],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(project, *arguments, timeout=900) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    process = start(project, *arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)

"""One process of a run, for test_recovery.py, as the plan on its command line wants it.

It may hold at a step until a file "go" appears, fill the disk before a step, pause
before every step, or leave after one.
"""

import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import small

import annotated_bigs as bigs
from workshop import commands, running

plan = json.loads(sys.argv[1])
output = Path(plan["output"])
make = bigs.make_step
number = 0


def hold():
    """Say that the step is reached, and wait for leave to take it."""
    (output / "held").touch()
    while not (output / "go").exists():
        time.sleep(0.05)


def fill_the_disk():
    """From the checkpoint of step 10 on, no file may be larger than 4096 bytes."""
    while not (output / "checkpoints" / "10").exists():
        time.sleep(0.05)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def make_step(recipe, loss):
    step = make(recipe, loss)

    def once(state, batch):
        global number
        number = int(state.step) + 1
        if number == plan.get("hold"):
            hold()
        if number == plan.get("full"):
            fill_the_disk()
        time.sleep(plan.get("pause", 0))
        return step(state, batch)

    return once


def product_rate(dtype):
    """Nothing is measured: speed is not what these runs are about."""
    return 1e9


def main():
    recipe = replace(small.RECIPE, **plan["recipe"])
    commands.join_processes(plan.get("distributed", ""))
    bigs.make_step = make_step
    running.product_rate = product_rate
    with commands.leaving_on_request() as asked:

        def stop():
            return asked() or number == plan.get("leave")

        data = small.dataset()
        return running.pretrain(small.CONFIG, recipe, data, output, True, stop=stop)


try:
    run = main()
except bigs.UserError as error:
    sys.exit(f"error: {error}")
print("stopped at", run.history[-1]["step"])

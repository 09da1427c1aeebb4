"""Four steps on as many devices as there are, for test_training.py: what they lead to
is written into the file that is named.
"""

import sys
from dataclasses import replace

import jax
import numpy as np
import small

import annotated_bigs as bigs

recipe = replace(small.RECIPE, batch=8)
state = bigs.fresh_state(replace(small.CONFIG, hidden_dropout_prob=0.0), recipe)
step = bigs.make_step(recipe, bigs.fast_loss)
rows = small.random_rows()
for number in range(4):
    batch = bigs.on_devices(bigs.batch_at(rows, 8, 0, number), 8)
    state, loss = step(state, batch)
found = small.leaves(state.model)
np.savez(sys.argv[1], *found, loss=loss, devices=len(jax.devices()))

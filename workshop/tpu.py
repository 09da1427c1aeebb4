"""A TPU without a TPU: what its own compiler says of a layer and of the whole step.

The compiler is in the package libtpu, and `jax.experimental.topologies` describes a
chip that is not there. Trust its memory and its program; its times only where no loop
and no custom call is in the program.
"""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import annotated_bigs as bigs
from workshop import benchmark

# Topology, chips of a host, and memory of a device in GB: one core of a v3, one chip of
# the others.
TPU_CHIPS = {
    "v3": ("v3:2x2x1", (2, 2, 1), 16.0),
    "v4": ("v4:2x2x1", (2, 2, 1), 32.0),
    "v5e": ("v5e:1x1", (1, 1, 1), 16.0),
    "v6e": ("v6e:1x1", (1, 1, 1), 32.0),
}


def tpu_placer(chip: str) -> Callable[[Any], Any]:
    """Something that turns arrays into descriptions of arrays that lie on one TPU
    device.

    >>> tpu_placer("v99")
    Traceback (most recent call last):
    annotated_bigs.UserError: tpu: 'v99' does not exist; choose one of v3, v4, v5e, v6e
    """
    topology, bounds, _ = bigs.choose(TPU_CHIPS, "tpu", chip)
    if importlib.util.find_spec("libtpu") is None:
        raise bigs.UserError(
            "tpu: this needs the TPU compiler; install it with: pip install libtpu"
        )
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_LOG_DIR": "disabled",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=bounds
    )
    where = jax.sharding.SingleDeviceSharding(described.devices[0])
    return lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
    )


def layer_on_tpu(chip: str, route: str, L: int, tokens: int = 16384) -> dict[str, Any]:
    """The compiler's operations, bytes and, where meaningful, seconds of training one
    large layer on a TPU.
    """
    place = tpu_placer(chip)
    config = benchmark.variant(replace(bigs.large, dtype="bfloat16"), route, L)
    x = place(
        jax.ShapeDtypeStruct((L, max(1, tokens // L), config.hidden_size), jnp.bfloat16)
    )
    layer = place(jax.eval_shape(lambda: bigs.one_layer(config, nnx.Rngs(0))))
    compiled = (
        jax.jit(benchmark.layer_program("layer, training")).lower(layer, x).compile()
    )
    cost = compiled.cost_analysis()
    text = compiled.as_text()
    opaque = re.findall(r" (while|custom-call|conditional)\(", text)
    seconds = cost.get("optimal_seconds", -1)
    return {
        "what": "layer, training",
        "length": L,
        "batch": x.shape[1],
        "route": route,
        "seconds": seconds if seconds > 0 and not opaque else None,
        "operations": cost["flops"],
        "bytes": cost["bytes accessed"],
        "opaque": sorted(set(opaque)),
        "gigabytes": benchmark.planned_gigabytes(compiled),
    }


def layers_on_tpu(
    chip: str, lengths: Iterable[int], routes: Iterable[str] = bigs.ROUTES
) -> list[dict[str, Any]]:
    """`layer_on_tpu` for each length and route, with the ratio of seconds to the layer
    without routing.
    """
    from tqdm.auto import tqdm

    found = []
    for L, route in tqdm(
        [(L, route) for L in lengths for route in routes], unit="program"
    ):
        row = layer_on_tpu(chip, route, L)
        bare = next(
            (r["seconds"] for r in found if (r["length"], r["route"]) == (L, "none")),
            row["seconds"],
        )
        found.append(
            row | {"ratio": row["seconds"] / bare if row["seconds"] and bare else None}
        )
    return found


def steps_on_tpu(chip: str) -> list[dict[str, Any]]:
    """Memory of whole training steps on one TPU device, in GB; None where the compiler
    refuses.
    """
    place = tpu_placer(chip)
    documented = replace(bigs.RECIPES["documented"], batch=131, remat=True)
    full = replace(bigs.large, dtype="bfloat16")
    plans = {
        "documented, large": (full, documented),
        "documented, large, 4096 tokens": (
            replace(full, max_position_embeddings=4096),
            replace(documented, batch=4, length=4096),
        ),
        "quarter-hour, base": (
            replace(bigs.base, dtype="bfloat16"),
            bigs.RECIPES["quarter-hour"],
        ),
    }
    found = []
    for what, (config, recipe) in plans.items():
        state = place(
            jax.eval_shape(
                lambda config=config, recipe=recipe: bigs.fresh_state(config, recipe)
            )
        )
        places = bigs.masked_of(recipe.length, recipe.masked)
        batch = place(
            bigs.Batch(
                *(
                    jax.ShapeDtypeStruct((recipe.batch, width), jnp.int32)
                    for width in (recipe.length, places, places)
                )
            )
        )
        start = time.perf_counter()
        try:
            step = bigs.make_step(recipe, bigs.fast_loss_of(recipe))
            compiled = step.lower(state, batch).compile()
            gigabytes = benchmark.planned_gigabytes(compiled)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            gigabytes = None
        found.append(
            {
                "what": what,
                "batch": recipe.batch,
                "length": recipe.length,
                "gigabytes": gigabytes,
                "available": TPU_CHIPS[chip][2],
                "compile_seconds": time.perf_counter() - start,
            }
        )
    return found

"""What a comparison needs beside the architectures of the story: layers with one thing
taken away, and architectures of equal size.

Importing this module adds the blocks `sum`, `single`, `no-product` and `stack-gelu` and
the routings `free` and `channels` to `LAYERS`.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import annotated_bigs as bigs
from annotated_bigs import along, dense, gelu, gelu_exact, mix_channels, mix_tokens


def before(layer: bigs.GatedLayer, x):
    """What the branches of a layer read: its input, normed if that comes first."""
    return layer.norm(x) if layer.config.pre_norm else x


def after(layer: bigs.GatedLayer, y):
    """What a layer puts out: normed if that comes last."""
    return y if layer.config.pre_norm else layer.norm(y)


class SumLayer(bigs.GatedLayer):
    """A gated layer that adds U1 and U2 of (9) in place of multiplying them."""

    def __call__(self, x, mask):
        h = before(self, x)
        V = gelu(self.W_v(h))
        U1 = self.W_u1(self.forward(gelu(self.W_f(h)), mask))
        U2 = self.W_u2(self.backward(gelu(self.W_b(h)), mask))
        U = gelu(self.W_u(U1 + U2))
        return after(self, x + self.W_o(U * V))


class SingleLayer(bigs.GatedLayer):
    """A gated layer without the gate V."""

    join = staticmethod(jnp.multiply)  # of U1 and U2

    def __init__(self, config, rngs):
        super().__init__(config, rngs)
        del self.W_v

    def __call__(self, x, mask):
        h = before(self, x)
        U1 = self.W_u1(self.forward(gelu(self.W_f(h)), mask))
        U2 = self.W_u2(self.backward(gelu(self.W_b(h)), mask))
        U = gelu(self.W_u(self.join(U1, U2)))
        return after(self, x + self.W_o(U))


class NoProductLayer(SingleLayer):
    """A gated layer without the gate V that adds U1 and U2: nothing is multiplied."""

    join = staticmethod(jnp.add)


class StackGeluLayer(bigs.StackLayer):
    """A stacked layer with a GELU after each of its SSMs."""

    def route(self, h, mask):
        past = self.W_k(gelu_exact(self.forward(self.W_q(h), mask)))
        return self.W_o(gelu_exact(self.backward(self.W_v(past), mask)))


class FreeDirection(nnx.Module):
    """One direction of a layer whose kernel is no SSM's: a number for each lag."""

    def __init__(self, config: bigs.Config, past: bool):
        self.config = config
        self.past = past
        self.lags = nnx.Param(jnp.zeros(config.max_position_embeddings))
        self.D = nnx.Param(jnp.ones(1))

    def __call__(self, u, mask):
        if self.config.mask_padding:
            u = jnp.where(mask[..., None], u, 0)
        K = self.lags[: u.shape[-2]].at[0].add(self.D[0])
        return bigs.convolve_toeplitz(u, K, self.past)


class FreeLayer(bigs.GatedLayer):
    """A gated layer with free kernels, of at most as many lags as the longest text."""

    def __init__(self, config, rngs):
        super().__init__(config, rngs)
        self.forward = FreeDirection(config, past=True)
        self.backward = FreeDirection(config, past=False)


class ChannelsDirection(nnx.Module):
    """One direction of a layer in which every channel has an SSM of its own."""

    def __init__(self, config: bigs.Config, past: bool, rngs: nnx.Rngs):
        self.config = config
        self.past = past

        def one_ssm(key):
            return bigs.SSM(config.num_ssm, config.scaling, nnx.Rngs(key))

        keys = jax.random.split(rngs.params(), config.hidden_size)
        self.ssms = jax.vmap(one_ssm)(keys)

    def __call__(self, u, mask):
        if self.config.mask_padding:
            u = jnp.where(mask[..., None], u, 0)

        def one_channel(ssm, column):
            K = bigs.ssm_kernel(ssm.diagonal(), u.shape[-2]).at[0].add(ssm.D[0])
            return bigs.convolve_fft(column[..., None], K, self.past)[..., 0]

        return jax.vmap(one_channel, (0, -1), -1)(self.ssms, u)


class ChannelsLayer(bigs.GatedLayer):
    """A gated layer with an SSM for each channel, as in S4D."""

    def __init__(self, config, rngs):
        super().__init__(config, rngs)
        self.forward = ChannelsDirection(config, True, rngs)
        self.backward = ChannelsDirection(config, False, rngs)


@along.register(FreeDirection)
@along.register(ChannelsDirection)
def _(side, u, mask):
    return jnp.swapaxes(side(jnp.swapaxes(u, 0, 1), mask.T), 0, 1)


@mix_channels.register
def _(layer: SumLayer, x, h, past, future):
    V = gelu(dense(layer.W_v, h))
    U1 = dense(layer.W_u1, past)
    U2 = dense(layer.W_u2, future)
    U = gelu(dense(layer.W_u, U1 + U2))
    return after(layer, x + dense(layer.W_o, U * V))


@mix_channels.register
def _(layer: SingleLayer, x, h, past, future):
    U1 = dense(layer.W_u1, past)
    U2 = dense(layer.W_u2, future)
    U = gelu(dense(layer.W_u, layer.join(U1, U2)))
    return after(layer, x + dense(layer.W_o, U))


@mix_tokens.register
def _(layer: StackGeluLayer, x, mask):
    h = layer.norm1(x) if layer.config.pre_norm else x
    past = gelu_exact(along(layer.forward, dense(layer.W_q, h), mask))
    past = dense(layer.W_k, past)
    future = gelu_exact(along(layer.backward, dense(layer.W_v, past), mask))
    return x, future


bigs.LAYERS["sum", "ssm"] = SumLayer
bigs.LAYERS["single", "ssm"] = SingleLayer
bigs.LAYERS["no-product", "ssm"] = NoProductLayer
bigs.LAYERS["stack-gelu", "ssm"] = StackGeluLayer
bigs.LAYERS["gated", "free"] = FreeLayer
bigs.LAYERS["gated", "channels"] = ChannelsLayer


class Arm(NamedTuple):
    """An architecture of a comparison, and what changes in the recipe for it."""

    config: bigs.Config
    recipe: dict[str, Any] = {}


def of_one_size(config: bigs.Config) -> dict[str, Arm]:
    """Architectures with the parameters of a gated config, within 2 %.

    >>> arms = of_one_size(bigs.tiny).values()
    >>> sizes = {bigs.parameters(arm.config) for arm in arms}
    >>> max(sizes) / min(sizes) < 1.02
    True
    """
    wider = config.intermediate_size * 3 // 2
    stack = replace(config, block="stack", intermediate_size=wider)
    single = replace(config, block="single", intermediate_size=wider)
    return {
        "gated SSM": Arm(config),
        "sum for product": Arm(replace(config, block="sum")),
        "without V": Arm(single),
        "no product": Arm(replace(single, block="no-product")),
        "stacked SSM, GELU": Arm(replace(stack, block="stack-gelu")),
        "stacked attention": Arm(replace(stack, routing="attention")),
        "stacked SSM": Arm(stack),
        "gated attention": Arm(replace(config, routing="attention")),
        "no routing": Arm(replace(config, routing="none")),
    }


def static_routings(config: bigs.Config) -> dict[str, Arm]:
    """Ways to have static kernels in a gated config. An SSM for each channel takes more
    parameters, the others differ by less than 1 %.

    >>> counts = {
    ...     name: bigs.parameters(arm.config)
    ...     for name, arm in static_routings(bigs.tiny).items()
    ... }
    >>> round(counts.pop("an SSM a channel") / bigs.parameters(bigs.tiny), 2)
    1.13
    >>> max(counts.values()) / min(counts.values()) < 1.01
    True
    """
    return {
        "frozen SSM": Arm(config, {"ssm_rate": 0.0}),
        "free kernels": Arm(replace(config, routing="free")),
        "an SSM a channel": Arm(replace(config, routing="channels")),
        "lin": Arm(replace(config, scaling="lin")),
        "inv": Arm(replace(config, scaling="inv")),
    }


def all_arms(config: bigs.Config) -> dict[str, Arm]:
    """Every architecture that can be compared.

    >>> list(all_arms(bigs.tiny))[0]
    'gated SSM'
    """
    return of_one_size(config) | static_routings(config)

"""What a comparison needs beside the architectures of the story: layers with one thing
taken away, and architectures of equal size.

Importing this module adds the blocks `sum`, `single` and `stack-gelu` and the routing
`free` to `LAYERS`.
"""

from dataclasses import replace

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

    def __init__(self, config, rngs):
        super().__init__(config, rngs)
        del self.W_v

    def __call__(self, x, mask):
        h = before(self, x)
        U1 = self.W_u1(self.forward(gelu(self.W_f(h)), mask))
        U2 = self.W_u2(self.backward(gelu(self.W_b(h)), mask))
        U = gelu(self.W_u(U1 * U2))
        return after(self, x + self.W_o(U))


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
        self.kernel = nnx.Param(jnp.zeros(config.max_position_embeddings))
        self.D = nnx.Param(jnp.ones(1))

    def __call__(self, u, mask):
        if self.config.mask_padding:
            u = jnp.where(mask[..., None], u, 0)
        K = self.kernel[: u.shape[-2]].at[0].add(self.D[0])
        return bigs.convolve_toeplitz(u, K, self.past)


class FreeLayer(bigs.GatedLayer):
    """A gated layer with free kernels, of at most as many lags as the longest text."""

    def __init__(self, config, rngs):
        super().__init__(config, rngs)
        self.forward = FreeDirection(config, past=True)
        self.backward = FreeDirection(config, past=False)


@along.register
def _(side: FreeDirection, u, mask):
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
    U = gelu(dense(layer.W_u, U1 * U2))
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
bigs.LAYERS["stack-gelu", "ssm"] = StackGeluLayer
bigs.LAYERS["gated", "free"] = FreeLayer


def of_one_size(config: bigs.Config) -> dict[str, bigs.Config]:
    """Architectures with the parameters of a gated config, within 2 %.

    >>> sizes = {bigs.parameters(arm) for arm in of_one_size(bigs.tiny).values()}
    >>> max(sizes) / min(sizes) < 1.02
    True
    """
    wider = config.intermediate_size * 3 // 2
    stack = replace(config, block="stack", intermediate_size=wider)
    return {
        "gated SSM": config,
        "sum for product": replace(config, block="sum"),
        "without V": replace(config, block="single", intermediate_size=wider),
        "stacked SSM, GELU": replace(stack, block="stack-gelu"),
        "stacked attention": replace(stack, routing="attention"),
        "stacked SSM": stack,
        "gated attention": replace(config, routing="attention"),
        "no routing": replace(config, routing="none"),
    }

"""The one place where an activation meets a weight.

Dims: B batch, T tokens, I inputs, O outputs, R adapter rank.

Optional behaviour arrives as variable collections, so model files know none of it and an absent
collection costs nothing: `lora` adds a low-rank product, `taps` hands out the input, `sinks`
catch gradient statistics. A sink is an identity on the output whose backward rule returns, as the
cotangent of a dummy argument, what its rule makes of the input and the output's cotangent: for
y = xW, dL/dW = x^T g, so any statistic of per-example gradients is a function of x and g.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

TAPS, SPLICE, SPLICED = "taps", "splice", "spliced"


class Rule(Protocol):
    """What a sink keeps from the forward pass and emits in the backward pass; hashable."""

    def save(self, x_BTI: jax.Array, aux: Any) -> Any:
        """The residual kept until the backward pass."""
        ...

    def emit(self, saved: Any, aux: Any, g_BTO: jax.Array) -> Any:
        """The statistic: same structure, shapes and dtypes as `Sink.out`."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass, meta_fields=["rule"], data_fields=["aux", "out"]
)
@dataclasses.dataclass(frozen=True)
class Sink:
    """One site's entry in the `sinks` collection; the gradient with respect to `out` is the catch.

    aux: arrays the rule needs (projections, normalisers). out: zeros of the statistic's shape.
    """

    rule: Rule
    aux: Any
    out: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sink(rule: Rule, y_BTO: jax.Array, x_BTI: jax.Array, aux: Any, out: Any) -> jax.Array:
    del rule, x_BTI, aux, out
    return y_BTO


def _sink_forward(rule: Rule, y_BTO: jax.Array, x_BTI: jax.Array, aux: Any, out: Any):
    return y_BTO, (rule.save(x_BTI, aux), aux)


def _sink_backward(rule: Rule, residual: Any, g_BTO: jax.Array):
    saved, aux = residual
    return g_BTO, None, None, rule.emit(saved, aux, g_BTO)


_sink.defvjp(_sink_forward, _sink_backward)


def catch(sink: Sink | None, y: jax.Array, x: jax.Array) -> jax.Array:
    """y, whose cotangent the sink will see together with x: a map's output and its input.

    Of a lookup y = W[x], x are the row numbers.
    """
    return y if sink is None else _sink(sink.rule, y, x, sink.aux, sink.out)


def tap(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """x, handed out when the collection `taps` is asked for, and replaced where there is another.

    `splice` says whether in this layer, `spliced` by what (see `core.taps`). Neither costs anything
    when absent.
    """
    if module.has_variable(SPLICE, name):
        other = module.get_variable(SPLICED, name).astype(x.dtype)
        x = jnp.where(module.get_variable(SPLICE, name), other, x)
    module.sow(TAPS, name, x, reduce_fn=lambda _, new: new, init_fn=lambda: x)
    return x


class Linear(nn.Module):
    """y = x W (+ b), W stored [in, out]; computed in the dtype of `x`."""

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        w_IO = self.param("w", nn.initializers.zeros, (x_BTI.shape[-1], self.features))
        y_BTO = x_BTI @ w_IO.astype(x_BTI.dtype)
        if self.bias:
            b_O = self.param("b", nn.initializers.zeros, (self.features,))
            y_BTO = y_BTO + b_O.astype(x_BTI.dtype)[None, None]
        tap(self, "in", x_BTI)
        y_BTO = self._catch("weight", y_BTO, x_BTI)
        if self.has_variable("lora", "a"):
            a_IR, b_RO = (self.get_variable("lora", n).astype(x_BTI.dtype) for n in "ab")
            scale = self.get_variable("lora", "scale").astype(x_BTI.dtype)
            x_BTI = self._dropout(x_BTI)
            h_BTR = self._catch("lora_a", x_BTI @ a_IR, x_BTI)
            y_BTO = y_BTO + scale * self._catch("lora_b", h_BTR @ b_RO, h_BTR)
        return y_BTO

    def _dropout(self, x_BTI: jax.Array) -> jax.Array:
        """The adapter's input with some of it zeroed; only with a key, so never but in training."""
        if not self.has_rng("dropout") or not self.has_variable("lora", "dropout"):
            return x_BTI
        keep = 1 - self.get_variable("lora", "dropout")  # in bfloat16, a draw has 128 values only
        kept_BTI = jax.random.bernoulli(self.make_rng("dropout"), keep, x_BTI.shape)
        return jnp.where(kept_BTI, x_BTI / keep.astype(x_BTI.dtype), 0)

    def _catch(self, name: str, y_BTO: jax.Array, x_BTI: jax.Array) -> jax.Array:
        return catch(self.get_variable("sinks", name), y_BTO, x_BTI)

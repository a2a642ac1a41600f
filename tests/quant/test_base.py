"""What every format refuses, and that it says how to mend it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.quant.formats import check, dequantize, int8, nf4, quantize

W = jnp.ones((2, 128, 3))


@pytest.mark.parametrize(
    ("weight", "fmt", "message"),
    [
        (jnp.ones(64), nf4(), "no input and output axis.*Leave it dense"),
        (jnp.ones((3, 128)), nf4(), r"blocks of 64 do not tile.*\(3, 128\).*transpose"),
        (jnp.ones((96, 4)), nf4(), "Use block=32"),
        (jnp.ones((0, 4)), nf4(), "Leave this weight dense"),
        (jnp.ones((64, 4), jnp.int32), nf4(), "dtype int32 is no float"),
        (jnp.full((64, 4), jnp.nan), nf4(), "256 of 256 entries that are not finite"),
        (jnp.ones((64, 4)).at[3, 1].set(jnp.inf), int8(), "1 of 256 entries"),
    ],
)
def test_weights_that_are_refused(weight, fmt, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, fmt)


def test_options_that_are_refused():
    with pytest.raises(ValueError, match=r"nf4\(block=48\): use one of 32, 64"):
        nf4(48)
    with pytest.raises(ValueError, match="no stochastic rounding. Leave out key"):
        quantize(W, nf4(), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": jnp.zeros((2, 63, 3), jnp.uint8)}, r"'codes'.*\(2, 63, 3\).*needs uint8\(2, 64"),
        ({"absmax": jnp.zeros((2, 2, 3), jnp.float32)}, "'absmax'.*float32.*needs uint8"),
        ({"offset": jnp.zeros((2, 1, 3), jnp.float32)}, "'offset'"),
        ({"offset": None}, r"lacks \['offset'\]"),
    ],
)
def test_packed_arrays_that_do_not_fit(change, message):
    packed = quantize(W, nf4()) | change
    packed = {name: array for name, array in packed.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        dequantize(packed, nf4(), W.shape)


def test_scales_that_are_not_finite():
    packed = quantize(W, nf4())
    check(packed, nf4(), W.shape)
    packed["nested_absmax"] = packed["nested_absmax"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="'nested_absmax' has 3 of 6 .*download"):
        check(packed, nf4(), W.shape)


def test_values_are_not_checked_while_tracing():
    packed = jax.jit(lambda w: quantize(w, nf4()))(W * np.nan)
    assert packed["codes"].shape == (2, 64, 3)

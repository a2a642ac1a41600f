"""Views of labelled weights against the same operations on the dense array, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxpeft as jp
from jaxpeft.core.einsum import Einsum
from jaxpeft.core.labels import Cut, Drop, Layout, Split, View

SHAPES = [(6, 4), (2, 3, 4), (4, 6, 1), (12, 2)]


def low_rank(shape, seed=0):
    """`W[i..., o...] = sum_r A[first axis, r] B[r, other axes]`, with float64 factors."""
    rng = np.random.default_rng(seed)
    layout, (rank,) = Layout.of(shape).fresh(2)
    a, b = rng.standard_normal((shape[0], 2)), rng.standard_normal((2, *shape[1:]))
    labels = tuple(range(1, len(shape)))
    factors = jnp.asarray(a), jnp.asarray(b)
    return Einsum(factors, ((0, rank), (rank, *labels)), layout, jnp.dtype("float64")), (
        np.tensordot(a, b, 1)
    )


@st.composite
def operations(draw, shape):
    """One operation that `View` knows: its kind and arguments, and what it does to an array."""
    kind = draw(st.sampled_from(["transpose", "reshape", "squeeze", "slice", "broadcast"]))
    if kind == "transpose":
        order = tuple(draw(st.permutations(range(len(shape)))))
        return View(kind, (order,)), lambda w: w.transpose(order)
    if kind == "reshape":
        new = draw(st.sampled_from(list(reshapes(shape))))
        return View(kind, (new,)), lambda w: w.reshape(new)
    if kind == "squeeze":
        ones = tuple(i for i, n in enumerate(shape) if n == 1)
        return View(kind, (ones,)), lambda w: w.squeeze(ones)
    if kind == "slice":
        return draw(slices(shape))
    return draw(broadcasts(shape))


def reshapes(shape):
    """Merge two neighbours, split an axis in two, put in an axis of one."""
    for i in range(len(shape) + 1):
        yield (*shape[:i], 1, *shape[i:])
    for i in range(len(shape) - 1):
        yield (*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :])
    for i, size in enumerate(shape):
        yield from ((*shape[:i], n, size // n, *shape[i + 1 :]) for n in (2, 3) if size % n == 0)


@st.composite
def slices(draw, shape):
    axis = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[axis] - 1))
    stop = draw(st.integers(start + 1, shape[axis]))
    stride = draw(st.integers(1, 2))
    starts = tuple(start if i == axis else 0 for i in range(len(shape)))
    count = -(-(stop - start) // stride)
    sizes = tuple(count if i == axis else n for i, n in enumerate(shape))
    strides = tuple(stride if i == axis else 1 for i in range(len(shape)))
    index = tuple(
        slice(start, stop, stride) if i == axis else slice(None) for i in range(len(shape))
    )
    return View("slice", (starts, sizes, strides)), lambda w: w[index]


@st.composite
def broadcasts(draw, shape):
    """A new axis somewhere, and axes of one grown."""
    at = draw(st.integers(0, len(shape)))
    dimensions = tuple(i + (i >= at) for i in range(len(shape)))
    grown = tuple(3 if n == 1 and draw(st.booleans()) else n for n in shape)
    new = (*grown[:at], 2, *grown[at:])
    expanded = (*shape[:at], 1, *shape[at:])
    return View("broadcast", (new, dimensions)), lambda w: np.broadcast_to(w.reshape(expanded), new)


@given(data=st.data(), shape=st.sampled_from(SHAPES))
def test_chains_of_views_equal_the_same_operations_on_the_dense_array(data, shape):
    with jax.enable_x64(True):
        weight, dense = low_rank(shape)
        for _ in range(data.draw(st.integers(1, 5))):
            view, act = data.draw(operations(weight.shape))
            seen = weight.view(view)
            if seen is None:  # Not sayable in labels: the engine makes the array then.
                continue
            weight, dense = seen, act(dense)
            assert weight.shape == dense.shape
        np.testing.assert_allclose(weight.materialize(), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((6, 4), View("transpose", ((1, 0),))),
        ((6, 4), View("reshape", ((2, 3, 4),))),
        ((6, 4), View("reshape", ((24,),))),
        ((6, 4), View("reshape", ((3, 8),))),
        ((6, 1), View("squeeze", ((1,),))),
        ((6, 4), View("slice", ((2, 0), (3, 4), (1, 1)))),
        ((6, 4), View("slice", ((1, 0), (2, 4), (3, 1)))),
        ((6, 1), View("broadcast", ((5, 6, 3), (1, 2)))),
    ],
)
def test_these_views_can_be_said_in_labels(shape, view):
    """The property test above lets a view refuse; these must not."""
    assert low_rank(shape)[0].view(view) is not None


def test_a_cut_across_merged_axes_cannot_be_said_in_labels():
    with jax.enable_x64(True):
        weight, dense = low_rank((6, 4))
        merged = weight.view(View("reshape", ((24,),)))
        whole = merged.view(View("slice", ((4,), (8,), (1,))))
        np.testing.assert_allclose(whole.materialize(), dense.reshape(24)[4:12])
    assert merged.view(View("slice", ((3,), (8,), (1,)))) is None
    assert merged.view(View("slice", ((0,), (12,), (2,)))) is None


def test_edits_name_what_happens_to_each_label():
    layout = Layout.of((6, 1, 4))
    assert layout.apply(View("transpose", ((2, 0, 1),)))[1] == ()
    assert layout.apply(View("squeeze", ((1,),)))[1] == (Drop(1),)
    assert layout.apply(View("slice", ((2, 0, 0), (3, 1, 4), (1, 1, 1))))[1] == (Cut(0, 2, 3),)
    assert layout.apply(View("reshape", ((2, 3, 4),)))[1] == (Split(0, ((3, 2), (4, 3))),)


def test_an_unknown_view_is_refused():
    assert Layout.of((2, 3)).apply(View("sort", ())) is None


@given(shape=st.sampled_from(SHAPES), side=st.integers(0, 1), data=st.data())
def test_products_of_views_equal_products_of_the_dense_array(shape, side, data):
    """`dot_general` with the weight on either side, over any of its axes."""
    with jax.enable_x64(True):
        weight, dense = low_rank(shape)
        lifted = _lifted_product(side, data.draw(st.integers(0, len(shape) - 1)))
        x = np.random.default_rng(1).standard_normal((5, *shape[::-1]))
        np.testing.assert_allclose(lifted(weight, x), lifted(dense, x), rtol=1e-11, atol=1e-11)


def _lifted_product(side, axis):
    def product(params, x):
        w = params["w"]
        other = x.ndim - 1 - axis
        pair = ((axis,), (other,)) if side == 0 else ((other,), (axis,))
        operands = (w, x) if side == 0 else (x, w)
        return lax.dot_general(*operands, (pair, ((), ())))

    lifted = jp.lift(product, strict=True)
    return lambda w, x: lifted({"w": w if isinstance(w, Einsum) else jnp.asarray(w)}, x)

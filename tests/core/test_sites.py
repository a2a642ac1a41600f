"""Discovery: what each axis of each parameter is used for, in every form of product."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxpeft as jp
from jaxpeft.core.site import Site
from jaxpeft.core.sites import discover
from tests.cases import CASES


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def site_of(f, w, *inputs, **kwargs):
    (site,) = discover(
        lambda params, *xs, **kw: f(params["w"], *xs, **kw), {"w": w}, inputs, kwargs
    )
    return site


def layer(x, w):
    return x @ w, None


def conv(w, x, **options):
    return lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), **options
    )


X, SQUARE = array(2, 5), array(4, 5, 5)


@pytest.mark.parametrize(
    ("f", "shape", "inputs", "roles"),
    [
        (lambda w, x: x @ w, (5, 7), [X], "in out"),
        (lambda w, x: x @ w.T, (7, 5), [X], "out in"),
        (lambda w, x: w @ x.T, (7, 5), [X], "out in"),
        (lambda w, x: x @ w[1], (3, 5, 7), [X], "stack in out"),
        (lambda w, x, i: x @ w[:, i], (5, 3, 7), [X, array(dtype="int32")], "in stack out"),
        (lambda w, x: x @ w.reshape(5, 12), (5, 3, 4), [X], "in out out"),
        (lambda w, x: x @ w.reshape(3, 5, 7)[0], (15, 7), [X], "stack out"),
        (lambda w, x: x @ (w * 2).astype("bfloat16"), (5, 7), [X], "in out"),
        (lambda w, x: jnp.einsum("BD,NDH->BNH", x, w), (3, 5, 7), [X], "out in out"),
        (lambda w, x: jnp.einsum("BD,SNDH->SBNH", x, w), (2, 3, 5, 7), [X], "out out in out"),
        (lambda w, x: jnp.einsum("BNH,NHD->BD", x, w), (3, 5, 7), [array(2, 3, 5)], "in in out"),
        (lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (3, 5, 7), [array(3, 2, 5)],
         "batch in out"),
        (lambda w, x, n: lax.ragged_dot(x, w, n), (3, 5, 7), [X, array(3, dtype="int32")],
         "batch in out"),
        (lambda w, x: conv(w, x), (3, 5, 7), [array(2, 8, 5)], "in in out"),
        (lambda w, i: w[i], (11, 7), [array(3, dtype="int32")], "in out"),
        (lambda w, i: w[i] @ w.T, (11, 7), [array(3, dtype="int32")], "in out"),
        (lambda w, x: lax.scan(layer, x, w)[0], (4, 5, 5), [X], "stack in out"),
        (lambda w, x: lax.scan(layer, x, jnp.moveaxis(w, 1, 0))[0], (5, 4, 5), [X], "in stack out"),
        (lambda w, x: lax.scan(lambda x, i: layer(x, w[i]), x, jnp.arange(4))[0], (4, 5, 5), [X],
         "stack in out"),
        (lambda w, x: lax.scan(jax.checkpoint(layer), x, w)[0], (4, 5, 5), [X], "stack in out"),
        (lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w, x), (5, 5), [X], "in out"),
        (lambda w, x: lax.while_loop(lambda x: (x @ w).sum() < 9, lambda x: 2 * x, x), (5, 7), [X],
         "in out"),
        (lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w + 1), (5, 7), [X],
         "in out"),
        (lambda w, x: jax.jit(lambda w, x: x @ w)(w, x), (5, 7), [X], "in out"),
        (lambda w, x: x @ lax.optimization_barrier(lax.stop_gradient(w)), (5, 7), [X], "in out"),
        (lambda w, x: sum(x @ part for part in jnp.split(w, 2)), (10, 7), [X], "in out"),
        (lambda w, x: x @ jnp.broadcast_to(w[None], (3, 5, 7)), (5, 7), [array(3, 2, 5)], "in out"),
        (lambda w, x: x @ jax.nn.relu(w), (5, 7), [X], "in out"),
        (lambda w, x: x @ (w * jnp.ones((5, 7))), (5, 7), [X], "in out"),
        (lambda w, x: x + w, (5,), [X], ""),
        (lambda w, x: x, (5, 7), [X], ""),
    ],
)  # fmt: skip
def test_roles(f, shape, inputs, roles):
    assert " ".join(site_of(f, array(*shape), *inputs).roles) == roles


def test_the_groups_of_a_convolution():
    site = site_of(lambda w, x: conv(w, x, feature_group_count=2), array(3, 5, 8), array(2, 8, 10))
    assert site.groups == 2 and site.roles == ("in", "in", "out")


def test_uses_are_listed_once_in_order():
    site = site_of(lambda w, i: w[i] @ w.T @ w, array(11, 7), array(3, dtype="int32"))
    assert site.uses == ("gather", "dot_general") and site.table and site.linear


def test_a_bias_is_no_linear_map():
    site = site_of(lambda w, x: x + w, array(5), X)
    assert not site.linear and not site.table and site.dense == ("add",)


@pytest.mark.parametrize(
    ("f", "primitive"),
    [
        (lambda w, x: x @ jnp.sort(w), "sort"),
        (lambda w, x: x @ w + w.sum(), "reduce_sum"),
        (lambda w, x: x @ (w * (x.T @ x)), "mul"),
    ],
)
def test_what_makes_a_weight_dense_is_listed(f, primitive):
    assert site_of(f, array(5, 5), X).dense == (primitive,)


def test_integer_leaves_and_inputs_are_no_sites():
    params = {"count": array(3, dtype="int32"), "w": array(5, 7)}
    sites = discover(lambda params, x: x @ params["w"], params, (X,), {})
    assert [site.path for site in sites] == ["w"]


def test_keyword_arguments_and_numbers_reach_the_model():
    site = site_of(lambda w, x, *, flip: x @ w.T if flip else x @ w, array(5, 5), X, flip=True)
    assert site.roles == ("out", "in")


def test_positions_that_a_batch_takes_are_activations():
    params = {"where": array(5, 7), "w": array(7, 3)}
    add = lambda params, x: (x + params["where"]) @ params["w"]  # noqa: E731
    sites = jp.transform(add, jp.lora(2)).sites(params, array(2, 5, 7))
    assert {site.path: site.linear for site in sites} == {"where": False, "w": True}


def test_sites_go_through_json():
    site = Site("a/w", (3, 5), "float32", ("stack", "in"), ("gather",), 2, ("sort",))
    assert Site.from_json(site.to_json()) == site


def test_axes_sizes_and_the_listing():
    site = Site("a/w", (3, 5, 7), "bfloat16", ("stack", "in", "out"), ("dot_general",))
    assert site.axes("in", "out") == (1, 2) and site.sizes("stack", "out") == (3, 7)
    assert site.size == 105
    tuned = jp.transform(lambda params, x: x @ params["w"], jp.lora(2))
    assert (
        str(tuned.sites({"w": array(5, 7)}, X)).split()
        == "w 5x7 float32 in,out dot_general".split()
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.fast], ids=lambda case: case.id)
def test_fast_cases_list_nothing_that_becomes_dense(case):
    """`sites` and the engine must agree on what is dense: strict laws run on the same cases."""
    built = case.build()
    sites = jp.transform(built.model, jp.lora(2)).sites(built.params, *built.inputs, **built.kwargs)
    assert not any(site.dense for site in sites if site.linear)

"""partition and combine are inverses; masks and labels pick what their patterns say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxpeft as jp
from jaxpeft.core.tree import HOLE, Hole, leaves_with_paths, path_of
from tests.cases.hlo import made as made_by

leaves = st.integers(0, 9) | st.none()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)
wheres = st.sampled_from(["**", "a", "a/**", "**/b", "**/0", "*", "{b,c}/**"]) | st.sampled_from(
    [lambda path, leaf: leaf % 2 == 0, lambda path, leaf: False]
)


@given(trees, wheres)
def test_combine_undoes_partition(tree, where):
    matched, rest = jp.partition(tree, where)
    assert jp.combine(matched, rest) == tree
    assert jp.combine(rest, matched) == tree


@given(trees, wheres)
def test_partition_undoes_combine(tree, where):
    parts = jp.partition(tree, where)
    again = jp.partition(jp.combine(*parts), where)
    assert again == parts


@given(trees, wheres)
def test_the_parts_hold_the_leaves_that_the_mask_says(tree, where):
    matched, rest = jp.partition(tree, where)
    flags = jax.tree.leaves(jp.mask(tree, where))
    values = jax.tree.leaves(tree)
    assert jax.tree.leaves(matched) == [v for v, f in zip(values, flags, strict=True) if f]
    assert jax.tree.leaves(rest) == [v for v, f in zip(values, flags, strict=True) if not f]


def test_none_is_data_and_a_hole_is_not_a_leaf():
    tree = {"a": None, "b": 1}
    matched, rest = jp.partition(tree, "a")
    assert matched == {"a": None, "b": HOLE} and rest == tree
    assert jax.tree.leaves(HOLE) == [] and repr(HOLE) == "HOLE" and Hole() == HOLE


def test_gradients_and_optimizers_see_the_kept_part_only():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    kept, frozen = jp.partition(params, "a")
    grads = jax.grad(lambda kept: sum(map(jnp.sum, jp.combine(kept, frozen).values())))(kept)
    assert jax.tree.structure(grads) == jax.tree.structure(kept)
    assert len(jax.tree.leaves(optax.adam(1.0).init(kept)[0].mu)) == 1


def test_combine_names_the_place_that_does_not_fit():
    with pytest.raises(ValueError, match="no part has a leaf at 'a/0'"):
        jp.combine({"a": [HOLE]}, {"a": [HOLE]})
    with pytest.raises(ValueError, match="2 parts have a leaf at 'a/0'"):
        jp.combine({"a": [1]}, {"a": [1]})
    with pytest.raises(ValueError, match="at least one part"):
        jp.combine()


def test_paths_are_keys_joined_by_slashes():
    tree = {"a": [0, {"b": (1,)}], "c.d": 2}
    assert [path for path, _ in leaves_with_paths(tree)[0]] == ["a/0", "a/1/b/0", "c.d"]
    assert path_of(()) == ""


def test_the_wrapper_of_an_nnx_variable_adds_no_key():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert sorted(path for path, _ in leaves_with_paths(state)[0]) == ["bias", "kernel"]


def test_labels_are_those_of_the_first_rule():
    adapter = {"q": {"a": 0.0, "b": 0.0}, "out": {"a": 0.0, "b": 0.0}}
    got = jp.labels(adapter, [("out/*", "head"), ("**/b", "fast")], default="slow")
    assert got == {"q": {"a": "slow", "b": "fast"}, "out": {"a": "head", "b": "head"}}
    with pytest.raises(ValueError, match="matched none of the 4 leaves"):
        jp.labels(adapter, [("**/c", "x")])


def test_a_mask_keeps_the_optimizer_and_the_step_off_frozen_leaves():
    """Single-tree style: one tree of adapter and weights, our mask, `optax.masked`."""
    params = {"w": jnp.ones((11, 13)), "lora": {"a": jnp.ones((11, 2)), "b": jnp.ones((2, 13))}}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 11)), jnp.float32)
    optimizer = optax.masked(optax.adam(0.1), jp.mask(params, "lora/**"))
    state = optimizer.init(params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert shapes == {(), (11, 2), (2, 13)}

    def step(params, state, x, freeze):
        def loss(params):
            tree = {**params, "w": freeze(params["w"])}
            y = x @ tree["w"] + x @ tree["lora"]["a"] @ tree["lora"]["b"]
            return jnp.sum(jnp.sin(y))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def products(freeze):
        """Matrix products of the weight's size in the compiled step."""
        compiled = jax.jit(step, static_argnums=3).lower(params, state, x, freeze).compile()
        return {made for made in made_by(compiled.as_text(), [11 * 13]) if made.startswith("dot")}

    assert products(jax.lax.stop_gradient) == set()
    assert products(lambda w: w) == {"dot f32[11,13]"}
    after, _ = step(params, state, x, jax.lax.stop_gradient)
    np.testing.assert_array_equal(after["w"], params["w"])
    assert not np.allclose(after["lora"]["b"], params["lora"]["b"])

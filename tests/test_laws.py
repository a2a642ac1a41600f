"""Laws that hold for every method on every model: one table, methods x laws x cases."""

import dataclasses
import functools
import math
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.core.tree import path_of
from jaxpeft.quant.formats.host import Plain
from tests.cases import CASES
from tests.cases.hlo import made
from tests.cases.measure import (
    build,
    compiled_base,
    compiled_step,
    difference,
    loss,
    quiet,
    setting,
    step,
    values,
)


def lora():
    return jp.rules(("**", jp.lora(2, alpha=3)))


def rslora():
    return jp.rules(("**", jp.rslora(2, alpha=3)))


def full_beside_lora():
    return jp.rules(("**", jp.lora(2, alpha=3)), ("**", jp.full()))


def some_layers():
    return jp.layers(lora(), [-1])


def lora_twice():
    return jp.chain(lora(), jp.rules(("**", jp.lora(3))))


def qalora():
    return jp.qalora(1, alpha=3, group=5)


@dataclasses.dataclass(frozen=True)
class Method:
    """A tuning, the cases that it runs on, and what its form promises."""

    tuning: object
    cases: tuple = CASES


SOME = tuple(
    case
    for case in CASES
    if case.id
    in {
        "Flax linen layers: nn.Dense",
        "Flax linen layers: nn.Conv, 2-D, strided",
        "Flax linen layers: nn.Embed with a tied attend",
        "Flax linen loops and remat: nn.scan of nn.remat",
        "Flax nnx layers: nnx.MultiHeadAttention",
        "Flax nnx loops, remat and jit: nnx.scan of nnx.remat",
        "Experts: ebd,edf->ebf, one A and B an expert",
        "Right, but dense: w * mask, a mask of the weight's shape",
    }
)
SCANNED = tuple(
    case for case in SOME if case.id == "Flax linen loops and remat: nn.scan of nn.remat"
)
METHODS = {
    "lora": Method(lora),
    "rslora": Method(rslora, SOME[:1]),
    "full beside lora": Method(full_beside_lora, SOME),
    "lora + lora": Method(lora_twice, SOME),
    "lora in some layers": Method(some_layers, SCANNED),
    "qalora": Method(qalora, tuple(case for case in SOME if "Experts" in case.id)),
}
PAIRS = [(method, case) for method in METHODS.values() for case in method.cases]
IDS = [f"{name}: {case.id}" for name, method in METHODS.items() for case in method.cases]


def law(keep=lambda method, case: True):
    """Runs a law over the pairs that `keep` allows, one test a pair."""
    kept = [(pair, name) for pair, name in zip(PAIRS, IDS, strict=True) if keep(*pair)]
    return pytest.mark.parametrize(
        ("method", "case"), [pair for pair, _ in kept], ids=[name for _, name in kept]
    )


def reverse(method, case):
    return case.reverse


def fast(method, case):
    return case.fast and case.reverse


def some(method, case):
    return case in SOME and case.reverse


def lora_only(method, case):
    return method.tuning is lora


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree) if _plain(leaf)]


def _plain(leaf):
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def kinds(tree):
    """What a compiled function depends on: the tree, and each leaf's shape, dtype and weakness."""
    types = map(jax.typeof, jax.tree.leaves(tree))
    return jax.tree.structure(tree), [(t.shape, t.dtype, t.weak_type) for t in types]


def test_the_small_table_has_its_cases():
    assert len(SOME) == 8
    assert len({case.id for case in CASES}) == len(CASES)


@law()
def test_a_fresh_adapter_changes_nothing(method, case):
    """Compiled: XLA may choose other kernels for a loop with factors in it, so not to the bit."""
    out = values(case, method.tuning)
    assert difference(out["unchanged"], out["base"]) < 1e-6


@law(lambda method, case: case in SOME and "nnx.scan" not in case.name)
def test_a_fresh_adapter_changes_no_bit_of_any_operation(method, case):
    """Operation by operation. (`nnx.scan` returns its weights, which stack to arrays then.)"""
    here = setting(case, method.tuning)
    params, inputs = here.built.params, here.built.inputs
    fresh = values(case, method.tuning)["fresh"]
    with jax.disable_jit(), quiet(case):
        assert bits(here.apply(fresh, params, inputs)) == bits(here.base(params, inputs))


@law()
def test_apply_equals_the_merged_model(method, case):
    out = values(case, method.tuning)
    assert difference(out["applied"], out["merged"]) < case.tolerance
    assert difference(out["applied"], out["base"]) > 1e-3


@law()
def test_gradients_equal_those_through_the_merged_model(method, case):
    out = values(case, method.tuning)
    assert difference(out["gradient"], out["merged gradient"]) < case.tolerance


@law(lambda method, case: case in SOME)
def test_gradients_are_the_same_under_remat(method, case):
    """Remat of the whole call; the cases have it around their layers as well."""
    here, out = setting(case, method.tuning), values(case, method.tuning)
    remat = functools.partial(here.derivative, jax.checkpoint(here.apply))
    with quiet(case):
        args = out["adapter"], here.built.params, here.built.inputs
        got = jax.jit(remat)(*args)
    assert difference(got, out["gradient"]) < case.tolerance


@law(lambda method, case: case.mapped)
def test_vmap_over_adapters_is_a_loop_over_adapters(method, case):
    out = values(case, method.tuning)
    for i, name in enumerate(("unchanged", "applied")):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], out["mapped"])
        assert difference(one, out[name]) < case.tolerance


@law()
def test_merge_changes_tuned_leaves_only_and_keeps_the_tree(method, case):
    out, params = values(case, method.tuning), setting(case, method.tuning).built.params
    merged = out["merged params"]
    assert kinds(merged) == kinds(params)
    sites = {site.path for site in out["adapter"].sites}
    same = jp.mask(params, lambda path, leaf: path not in sites)
    for kept, old, new in zip(*map(jax.tree.leaves, (same, params, merged)), strict=True):
        assert (bits([old]) == bits([new])) == kept


@law(lora_only)
def test_merge_is_the_formula_in_float64(method, case):
    out = values(case, method.tuning)
    old, new = (by_path(tree) for tree in (setting(case, lora).built.params, out["merged params"]))
    for site in out["adapter"].sites:
        want = old[site.path] + 1.5 * lora_update(site, out["adapter"][site.path])
        assert difference(new[site.path], want) < 1e-6


def lora_update(site, leaves):
    """`A B` by the convention of the leaves' axes: stack and experts, rank, then in or out."""
    letters = string.ascii_lowercase[: len(site.shape)]
    both, inner, outer = (
        "".join(letters[axis] for axis in site.axes(*roles))
        for roles in (("stack", "batch"), ("in",), ("out", ""))
    )
    a, b = (np.asarray(leaves[name], np.float64) for name in "ab")
    return np.einsum(f"{both}Z{inner},{both}Z{outer}->{letters}", a, b)


def by_path(tree):
    return {
        path_of(keys): np.asarray(leaf, np.float64)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


@law(lora_only)
def test_the_number_of_parameters_is_the_formula(method, case):
    shapes = setting(case, method.tuning).shapes
    for site in shapes.sites:
        layers, inner, outer = map(
            math.prod, (site.sizes("stack", "batch"), site.sizes("in"), site.sizes("out", ""))
        )
        count = sum(leaf.size for leaf in shapes[site.path].values())
        assert count == layers * 2 * (inner + outer)


@law(reverse)
def test_three_steps_keep_the_adapter_s_tree_and_the_inputs(method, case):
    here, descend = setting(case, method.tuning), compiled_step(case, method.tuning)
    params, inputs = here.built.params, here.built.inputs
    adapter, before = values(case, method.tuning)["adapter"], bits((params, inputs))
    losses, like = [], kinds(adapter)
    for _ in range(3):
        adapter, value = descend(adapter, params, inputs)
        losses.append(float(value))
        assert kinds(adapter) == like
    assert len(set(losses)) == 3
    assert bits((params, inputs)) == before


@law(fast)
def test_the_compiled_step_makes_no_array_of_a_weight_s_size(method, case):
    sizes = weight_sizes(setting(case, method.tuning).shapes.sites)
    found = made(compiled_step(case, method.tuning).as_text(), sizes)
    if found:
        found -= made(compiled_base(case).as_text(), sizes)
    assert not found


def weight_sizes(sites):
    """Elements of each weight that products use, and of one layer or expert of it."""
    linear = [site for site in sites if site.linear]
    return {size for site in linear for size in (site.size, math.prod(site.sizes("in", "out")))}


@law(lora_only)
def test_a_packed_base_gives_what_its_weights_give(method, case):
    """Packed without loss, so that the values are those of the other laws; nothing dense either."""
    here, out = setting(case, lora), values(case, lora)
    packed, adapter = packed_base(case, Plain()), out["adapter"]
    f = here.apply

    @jax.jit
    def program(*args):
        return f(*args), here.derivative(f, *args)

    with quiet(case):
        applied, gradient = program(adapter, packed, here.built.inputs)
        merged = here.tuned.merge(adapter, packed)
    assert difference(applied, out["applied"]) < case.tolerance
    assert difference(gradient, out["gradient"]) < case.tolerance
    assert difference(merged, out["merged params"]) < case.tolerance


@law(lambda method, case: lora_only(method, case) and case.fast and case.reverse)
def test_the_backward_pass_over_a_packed_base_keeps_packed_weights_alone(method, case):
    here = setting(case, lora)
    packed = jax.eval_shape(lambda: packed_base(case, jp.quant.fp8()))
    found = [w for w in jax.tree.leaves(packed, is_leaf=is_packed) if is_packed(w)]
    sizes = {
        size
        for site in here.shapes.sites
        for size in (site.size, math.prod(site.sizes("in", "out")))
    }

    def kept(adapter, params, inputs):
        return jax.vjp(lambda adapter: loss(here.apply(adapter, params, inputs)), adapter)[1]

    program = jax.make_jaxpr(kept)(here.shapes, packed, here.built.inputs).jaxpr
    made_there = [v.aval for v in program.outvars if v not in program.invars]
    assert not found or not sizes & {a.size for a in made_there if a.dtype == jnp.float32}


def packed_base(case, fmt):
    """The params with every weight of a product packed, but tables that tokens look up."""
    built, tuned = build(case), setting(case, lora).tuned
    sites = tuned.sites(built.params, *built.inputs, **built.kwargs)
    if all(site.table or not site.linear for site in sites):
        return built.params
    return jp.quantize(built.params, fmt, sites=sites)


def is_packed(leaf):
    return isinstance(leaf, jp.quant.QuantizedWeight)


@law(lambda method, case: lora_only(method, case) and some(method, case))
def test_the_check_of_the_step_sees_the_arrays_that_merging_makes(method, case):
    """The law above can fail: the same step through `merge` makes updates of full size."""
    sizes = weight_sizes(setting(case, method.tuning).shapes.sites)
    assert made(compiled_step(case, method.tuning, "merged").as_text(), sizes)


@law(some)
def test_steps_inside_a_scan_are_the_steps_of_a_loop(method, case):
    here, one = setting(case, method.tuning), compiled_step(case, method.tuning)
    start, args = values(case, method.tuning)["adapter"], (here.built.params, here.built.inputs)

    @jax.jit
    def many(adapter, *args):
        return jax.lax.scan(lambda adapter, _: step(here.apply)(adapter, *args), adapter, length=3)

    with quiet(case):
        scanned, losses = many(start, *args)
    looped = start
    for i in range(3):
        looped, value = one(looped, *args)
        assert abs(value - losses[i]) < 1e-4 * (1 + abs(value))
    assert difference(scanned, looped) < 1e-4


@law(lambda method, case: method.tuning is not full_beside_lora)
def test_init_needs_shapes_only(method, case):
    """All but `full`, which starts at the weights' values."""
    here = setting(case, method.tuning)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), here.built.params)
    abstract = jax.eval_shape(lambda: here.init(shapes, here.built.inputs))
    assert kinds(abstract) == kinds(values(case, method.tuning)["fresh"])


@law(lora_only)
def test_a_bfloat16_base_stays_bfloat16(method, case):
    here = setting(case, method.tuning)
    # Flax keeps running statistics in float32.
    wide = jp.mask(here.built.params, "**/{mean,var}")
    small = jax.tree.map(lambda x, w: x if w else as_bfloat16(x), here.built.params, wide)
    inputs = jax.tree.map(as_bfloat16, here.built.inputs)
    with quiet(case):
        got, want, adapter, merged = jax.eval_shape(
            lambda params, inputs: (
                here.apply(here.init(params, inputs), params, inputs),
                here.base(params, inputs),
                here.init(params, inputs),
                here.tuned.merge(here.init(params, inputs), params),
            ),
            small,
            inputs,
        )
    assert kinds(got) == kinds(want) and kinds(merged) == kinds(small)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}


def as_bfloat16(leaf):
    return leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@pytest.mark.parametrize("case", [c for c in CASES if not c.fast], ids=lambda case: case.id)
def test_strict_refuses_the_cases_that_are_dense(case):
    built = setting(case, lora).built
    tuned = jp.transform(built.model, lora(), strict=True)
    with pytest.raises(jp.MaterializeError, match="is materialized at"):
        jax.eval_shape(tuned.apply, setting(case, lora).shapes, built.params, *built.inputs)

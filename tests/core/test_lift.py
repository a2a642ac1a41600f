"""`lift`: unknown things make the weight dense, are reported, and are never wrong."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core as jex
from jax.interpreters import mlir

import jaxpeft as jp
from jaxpeft.core import control
from jaxpeft.core.einsum import Einsum
from jaxpeft.core.labels import Layout
from jaxpeft.core.structured import Structured, Sum

# An operation that no engine can know: doubles its operand.
twice_p = jex.Primitive("twice")
twice_p.def_impl(lambda x: x * 2)
twice_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(twice_p, mlir.lower_fun(lambda x: x * 2, multiple_results=False))


def twice(x):
    return twice_p.bind(x)


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tuned_weight(*shape):
    """`W + A B` for a weight of two or more axes, the first `len(shape) - 2` of them stacked."""
    *stack, _, _ = range(len(shape))
    layout, (rank,) = Layout.of(shape).fresh(2)
    a, b = numbers(1, *shape[:-1], 2), numbers(2, *shape[:-2], 2, shape[-1])
    rows, columns = len(shape) - 2, len(shape) - 1
    owned = (*stack, rows, rank), (*stack, rank, columns)
    update = Einsum((a, b), owned, layout, jnp.dtype("float32"))
    return Sum((numbers(3, *shape), update), "w")


def same(f, weight, *inputs, strict=True):
    """`lift(f)` on the structured weight against `f` on the dense one."""
    got = jp.lift(f, strict=strict)({"w": weight}, *inputs)
    want = f({"w": weight.materialize()}, *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)


X = numbers(4, 3, 5)


def test_an_unknown_operation_gets_the_dense_weight_with_a_warning():
    def f(params, x):
        return x @ twice(params["w"])

    with pytest.warns(jp.MaterializeWarning, match=r"'w' is materialized at `twice` \(.*test_lift"):
        same(f, tuned_weight(5, 7), X, strict=False)


def test_strict_refuses_it_and_says_where():
    lifted = jp.lift(lambda params, x: x @ twice(params["w"]), strict=True)
    with pytest.raises(jp.MaterializeError, match=r"'w' is materialized at `twice` .*strict=True"):
        lifted({"w": tuned_weight(5, 7)}, X)


def test_an_unknown_operation_on_activations_runs_as_it_is():
    same(lambda params, x: twice(twice(x) @ params["w"]), tuned_weight(5, 7), X)


LOOPS = {
    "scan": lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0],
    "while": lambda p, x: lax.while_loop(lambda x: (x < 9).all(), lambda x: 10 + x @ p["w"][0], x),
    "remat": lambda p, x: jax.checkpoint(lambda w, x: x @ w[0])(p["w"], x),
    "cond": lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p["w"][0], lambda: x @ p["w"][1]),
    "jit": lambda p, x: jax.jit(lambda w, x: x @ w[0])(p["w"], x),
}
READERS = {"scan": "read_scan", "while": "read_while", "jit": "read_call"}


@pytest.mark.parametrize("name", LOOPS)
def test_programs_inside_are_entered(name):
    same(LOOPS[name], tuned_weight(2, 5, 5), X)


@pytest.mark.parametrize("name", READERS)
def test_an_encoding_that_is_not_known_gets_the_dense_weight(name, monkeypatch):
    """As in a JAX version whose parameters are called something else."""
    monkeypatch.setattr(control, READERS[name], lambda params: None)
    with pytest.warns(jp.MaterializeWarning, match=f"materialized at `{name}`"):
        same(LOOPS[name], tuned_weight(2, 5, 5), X, strict=False)


@pytest.mark.parametrize(
    ("read", "params"),
    [
        (control.read_scan, {"jaxpr": 0, "num_consts": 0, "num_carry": 1, "length": 2}),
        (
            control.read_scan,
            dict(jaxpr=0, num_consts=0, num_carry=1, length=2, reverse=0, unroll=1, new=3),
        ),
        (control.read_while, {"cond_jaxpr": 0, "body_jaxpr": 0}),
        (control.read_call, {"fun": 0}),
    ],
)
def test_unknown_parameters_are_not_guessed_at(read, params):
    assert read(params) is None


class Flat:
    """As JAX 0.11 describes a scan's inputs: a tree whose parts have lengths."""

    def __init__(self, *lengths):
        self.lengths = lengths

    def unpack(self):
        return [range(length) for length in self.lengths]


def test_a_scan_is_read_from_the_newer_encoding_too(monkeypatch):
    read = control.read_scan

    def encoded_newly(params):
        old = dict(params)
        counts = old.pop("num_consts"), old.pop("num_carry")
        rest = len(old["jaxpr"].jaxpr.invars) - sum(counts)
        return read(old | {"ft_in": Flat(*counts, rest), "ft_out": Flat(1, 0)})

    monkeypatch.setattr(control, "read_scan", encoded_newly)
    same(LOOPS["scan"], tuned_weight(2, 5, 5), X)


class Doubled(Structured):
    """The least that a weight must define."""

    name = "w"

    def __init__(self, half):
        self.half, self.shape, self.dtype = half, half.shape, half.dtype

    def materialize(self, dtype=None):
        return (2 * self.half).astype(dtype or self.dtype)


jax.tree_util.register_pytree_node(
    Doubled, lambda w: ((w.half,), None), lambda _, halves: Doubled(*halves)
)


@pytest.mark.parametrize("name", LOOPS)
def test_a_weight_that_only_materializes_is_right_everywhere(name):
    with pytest.warns(jp.MaterializeWarning):
        same(LOOPS[name], Doubled(numbers(5, 2, 5, 5)), X, strict=False)


def test_a_structured_weight_without_materialize_says_so():
    class Nothing(Structured):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must define materialize"):
        Nothing().materialize()


def test_weights_that_the_model_returns_are_dense():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jp.MaterializeWarning)
        same(lambda p, x: (p["w"], [p["w"].T], x), tuned_weight(5, 7), X, strict=False)


def test_arguments_that_are_no_arrays_pass_through():
    def f(params, x, *, mode, scale):
        return (x @ params["w"] if mode == "product" else x) * scale

    weight = tuned_weight(5, 7)
    got = jp.lift(f, strict=True)({"w": weight}, X, mode="product", scale=2)
    np.testing.assert_allclose(got, 2 * (X @ weight.materialize()), rtol=1e-5, atol=1e-5)


def test_effects_in_untouched_equations_stay(capfd):
    def f(params, x):
        jax.debug.print("sum is {}", x.sum())
        return x @ params["w"]

    jax.block_until_ready(jp.lift(f, strict=True)({"w": tuned_weight(5, 7)}, jnp.ones((3, 5))))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("sum is 15.0") == 1


@pytest.mark.parametrize("transform", [jax.jit, lambda f: jax.jit(jax.checkpoint(f))])
def test_lift_composes_with_transforms(transform):
    def f(params, x):
        return jnp.sin(x @ params["w"])

    weight = tuned_weight(5, 7)
    lifted = jp.lift(f, strict=True)
    got = transform(jax.grad(lambda x: lifted({"w": weight}, x).sum()))(X)
    want = jax.grad(lambda x: f({"w": weight.materialize()}, x).sum())(X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_two_weights_in_one_product():
    """`w.T @ w`: one of them is made dense, and that is reported."""
    with pytest.warns(jp.MaterializeWarning, match="materialized at `dot_general`"):
        same(lambda p, x: x @ (p["w"].T @ p["w"]), tuned_weight(5, 5), X, strict=False)


def test_a_product_inside_jax_s_own_helpers_is_reported_at_the_line_that_called_them():
    with pytest.warns(jp.MaterializeWarning, match=r"test_lift\.py:\d+"):
        same(
            lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)),
            tuned_weight(5, 5),
            X,
            strict=False,
        )

"""The doors for linen, nnx and functions: same call, same outputs, and nothing written."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import DenyList

import jaxpeft as jp

X = jnp.sin(jnp.arange(15.0)).reshape(3, 5)
ALL = jp.rules(("**", jp.lora(2)))


class Net(nn.Module):
    def setup(self):
        self.hidden, self.out = nn.Dense(7), nn.Dense(4)
        self.norm = nn.BatchNorm(use_running_average=False, momentum=0.5)
        self.noise = nn.Dropout(0.5)

    def __call__(self, x, train=False):
        return self.out(self.noise(self.norm(self.encode(x)), deterministic=not train))

    def encode(self, x):
        return jnp.tanh(self.hidden(x))


class Live(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(7, momentum=0.5, rngs=rngs)
        self.noise = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, *, scale=1.0):
        return scale * self.out(self.noise(self.norm(self.encode(x))))

    def encode(self, x):
        return jnp.tanh(self.hidden(x))


@pytest.fixture(scope="module")
def linen():
    return Net(), Net().init(jax.random.key(0), X)


def nudged(adapter):
    return jax.tree.map(lambda leaf: leaf + 0.2, adapter)


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_linen_takes_every_argument_of_module_apply(linen):
    model, variables = linen
    tuned = jp.transform(model, ALL, strict=True)
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(3)}}
    adapter = nudged(tuned.init(jax.random.key(1), variables, X, **options))
    assert sorted(adapter) == ["params/hidden/kernel", "params/out/kernel"]
    got = tuned.apply(adapter, variables, X, **options)
    want = model.apply(tuned.merge(adapter, variables), X, **options)
    close(got, want)
    plain = model.apply(variables, X, **options)
    assert not np.allclose(got[1]["batch_stats"]["norm"]["mean"],
                           plain[1]["batch_stats"]["norm"]["mean"])  # fmt: skip


def test_linen_runs_another_method(linen):
    model, variables = linen
    tuned = jp.transform(model, ALL, strict=True)
    adapter = nudged(tuned.init(jax.random.key(1), variables, X, method="encode"))
    assert list(adapter) == ["params/hidden/kernel"]
    want = model.apply(tuned.merge(adapter, variables), X, method="encode")
    close(tuned.apply(adapter, variables, X, method="encode"), want)


@pytest.mark.parametrize(
    "mutable", [True, "batch_stats", ["batch_stats"], DenyList("params")], ids=str
)
def test_linen_jits_its_calls_and_boundaries_are_found_in_them(mutable, linen):
    """Though `nn.jit` has traced the same call without any marks before."""
    (model, variables), jitted = linen, nn.jit(Net)()
    rule = jp.rules(("{hidden,norm}:out", jp.bottleneck(2)))
    run = {"mutable": mutable}
    close(jitted.apply(variables, X, **run), model.apply(variables, X, **run))
    tuned, plain = (jp.transform(m, rule) for m in (jitted, model))
    adapter = nudged(tuned.init(jax.random.key(1), variables, X, **run))
    assert list(adapter) == ["hidden:out", "norm:out"]
    got, want = (t.apply(adapter, variables, X, **run) for t in (tuned, plain))
    close(got, want)
    assert not np.allclose(got[0], jitted.apply(variables, X, **run)[0])


class Scaled(Net):
    def __call__(self, x, train=False):
        return 2 * super().__call__(x, train)


def test_linen_calls_within_a_call_at_the_same_path_are_part_of_it(linen):
    """A boundary that a subclass shares with its base is met once."""
    variables, rule = linen[1], jp.rules((":out", jp.bottleneck(2)))
    tuned = jp.transform(Scaled(), rule)
    adapter = nudged(tuned.init(jax.random.key(1), variables, X, mutable=["batch_stats"]))
    base, _ = Scaled().apply(variables, X, mutable=["batch_stats"])
    got, _ = tuned.apply(adapter, variables, X, mutable=["batch_stats"])
    last = jp.transform(lambda params, x: jp.tap(x, ":out"), rule)
    close(got, last.apply(adapter, {}, base))


def live():
    model = Live(nnx.Rngs(0))
    return model, nnx.state(model)


def test_nnx_takes_the_call_s_arguments_and_gives_its_outputs():
    model, state = live()
    tuned = jp.transform(model, ALL, strict=True)
    adapter = nudged(tuned.init(jax.random.key(1), state, X, scale=2.0))
    merged = nnx.merge(nnx.graphdef(model), tuned.merge(adapter, state), copy=True)
    close(tuned.apply(adapter, state, X, scale=2.0), merged(X, scale=2.0))


@pytest.mark.parametrize("method", ["encode", Live.encode])
def test_nnx_runs_another_method(method):
    model, state = live()
    tuned = jp.transform(model, ALL, strict=True)
    adapter = nudged(tuned.init(jax.random.key(1), state, X, method=method))
    assert list(adapter) == ["hidden/kernel"]
    merged = nnx.merge(nnx.graphdef(model), tuned.merge(adapter, state), copy=True)
    close(tuned.apply(adapter, state, X, method=method), merged.encode(X))


@pytest.mark.parametrize("kinds", [nnx.BatchStat, (nnx.BatchStat, nnx.RngCount)])
def test_nnx_gives_the_state_that_is_asked_for(kinds):
    model, state = live()
    tuned = jp.transform(model, ALL, strict=True)
    adapter = nudged(tuned.init(jax.random.key(1), state, X))
    out, after = tuned.apply(adapter, state, X, mutable=kinds)
    merged = nnx.merge(nnx.graphdef(model), tuned.merge(adapter, state), copy=True)
    close(out, merged(X))
    close(after, nnx.state(merged, kinds))


def test_nnx_gives_the_whole_state_for_true():
    model, state = live()
    tuned = jp.transform(model, ALL)
    adapter = tuned.init(jax.random.key(1), state, X)
    _, after = tuned.apply(adapter, state, X, mutable=True)
    model(X)
    assert jax.tree.structure(after) == jax.tree.structure(nnx.state(model))
    close(after["norm"], nnx.state(model)["norm"])


def test_nnx_calls_write_into_no_argument():
    """Dropout counts its keys and batch norm its statistics: in a copy of the state."""
    model, state = live()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    tuned = jp.transform(model, ALL)
    first = tuned.fn(state, X)
    np.testing.assert_array_equal(tuned.fn(state, X), first)
    adapter = tuned.init(jax.random.key(1), state, X)
    tuned.apply(adapter, state, X)
    for now in (
        nnx.filter_state(state, nnx.Not(nnx.RngKey)),
        nnx.state(model, nnx.Not(nnx.RngKey)),
    ):
        jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(now), before)


def test_nnx_models_may_be_abstract():
    abstract = nnx.eval_shape(lambda: Live(nnx.Rngs(0)))
    tuned = jp.transform(abstract, ALL)
    adapter = tuned.init(jax.random.key(1), nnx.state(abstract), X)
    assert sorted(adapter) == ["hidden/kernel", "out/kernel"]
    state = live()[1]
    close(tuned.apply(adapter, state, X), tuned.fn(state, X))


@dataclasses.dataclass
class Config:
    """Compared by its values, and so without a hash: what most published models are made from."""

    scale: float
    table: np.ndarray | None = None


class Configured(nnx.Module):
    def __init__(self, config: Config):
        self.config = config
        self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.config.scale * self.linear(x)


@pytest.mark.parametrize("table", [None, np.arange(3)])
def test_nnx_modules_may_hold_values_without_a_hash(table):
    x = jnp.ones((2, 4))
    for scale in (1.0, 2.0):
        model = Configured(Config(scale, table))
        tuned = jp.transform(model, jp.lora(2))
        adapter = tuned.init(jax.random.key(0), nnx.state(model), x)
        got = tuned.apply(adapter, nnx.state(model), x)
        np.testing.assert_allclose(got, scale * model.linear(x), rtol=1e-6)


def test_a_function_is_a_model():
    tuned = jp.transform(lambda w, x: x @ w, ALL)
    adapter = tuned.init(jax.random.key(1), jnp.ones((5, 7)), X)
    assert list(adapter) == [""]


@pytest.mark.parametrize("model", [3, None, {"w": 1}])
def test_anything_else_is_refused(model):
    with pytest.raises(TypeError, match="a linen module, an nnx module or a function"):
        jp.transform(model, ALL)


def test_the_head_that_a_model_names_is_left_alone_by_bare_methods():
    class Headed(Live):
        output_head = "out/kernel"

    model = Headed(nnx.Rngs(0))
    adapter = jp.transform(model, jp.lora(2)).init(jax.random.key(0), nnx.state(model), X)
    assert list(adapter) == ["hidden/kernel"]

"""Bottleneck adapters against the formulas of AdapterHub's documentation, in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

import jaxpeft as jp
from jaxpeft.methods import adapters
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.phm import phm

D, M, ROWS, TIME = 8, 4, 2, 5
RNG = np.random.default_rng(0)
PARAMS = {
    "w": RNG.normal(size=(D, D)),
    "scale": 1 + 0.3 * RNG.normal(size=D),
    "bias": 0.3 * RNG.normal(size=D),
}
X = RNG.normal(size=(ROWS, TIME, D))
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "gelu_exact": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "identity": lambda x: x,
}


def norm(x, scale, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return scale * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) + bias


def sublayer(post):
    """A sublayer of an own model: its norm behind the sum (`post`) or none."""

    def model(params, x):
        h = x @ params["w"]

        def norm_of(u):
            u = u - u.mean(-1, keepdims=True)
            u = u / jnp.sqrt((u**2).mean(-1, keepdims=True) + 1e-5)
            return params["scale"] * u + params["bias"]

        sources = {"stream": x, "sum": x + h}
        if post:
            h = jp.tap(h, "layer/mlp:delta", **sources, norm=norm_of(x + h))
            return norm_of(x + h)
        return x + jp.tap(h, "layer/mlp:delta", **sources)

    return model


def adapterhub(leaves, flags, post):
    """The layer's output by AdapterHub's names of options, in float64."""
    h = X @ PARAMS["w"]

    def layer_norm(x):
        return norm(x, PARAMS["scale"], PARAMS["bias"], 1e-5) if post else x

    def own_norm(name, x):
        return norm(x, leaves[f"{name}_scale"], leaves[f"{name}_bias"], 1e-5)

    parallel = flags.get("is_parallel", False)
    z, r = h, h
    if parallel:
        z = r = X
    elif flags["original_ln_before"]:
        z = layer_norm(h + X)
        before = flags.get("residual_before_ln", True)
        r = {True: h, False: z, "post_add": h + X}[before]
    elif not flags.get("residual_before_ln", True):
        r = z
    inner = own_norm("norm_in", z) if flags.get("ln_before") else z
    inner = ACTIVATIONS[flags["non_linearity"]](inner @ leaves["down"].T + leaves["down_bias"])
    o = (inner @ leaves["up"] + leaves["up_bias"]) * leaves.get("scale", flags.get("scaling", 1.0))
    if flags.get("use_gating"):
        gate = 1 / (1 + np.exp(-(z @ leaves["gate"] + leaves["gate_bias"])))
        o = o * gate.mean(axis=1)[:, None, None]
    first = flags.get("adapter_residual_before_ln") and not parallel
    o = o + r if first else o
    o = own_norm("norm_out", o) if flags.get("ln_after") else o
    o = o + h if parallel else o if first else o + r
    after = flags.get("original_ln_after", True)
    return layer_norm(o + X) if after else o


SEQ = {"original_ln_before": True, "non_linearity": "relu"}
DOUBLE = {"original_ln_before": False, "non_linearity": "swish"}
PARALLEL = {"is_parallel": True, "non_linearity": "relu"}
PLUS = SEQ | {"original_ln_after": False, "residual_before_ln": False}
FORMS = {
    "seq_bn": (adapters.pfeiffer(width=M), SEQ, (True, False)),
    "double_seq_bn": (adapters.houlsby(width=M), DOUBLE, (True, False)),
    "par_bn": (
        adapters.parallel_adapter(width=M),
        PARALLEL | {"scaling": 4.0},
        (True, False),
    ),
    "scaled_par_bn": (adapters.parallel_adapter(width=M, scale="learned"), PARALLEL, (True,)),
    "adapter_plus, norms in front": (
        adapters.adapter_plus(width=M),
        PLUS | {"non_linearity": "gelu_exact"},
        (False,),
    ),
    "gated": (adapters.pfeiffer(width=M, gate="sequence"), SEQ | {"use_gating": True}, (True,)),
    "residual behind the norm": (
        adapters.pfeiffer(width=M, residual="read"),
        SEQ | {"residual_before_ln": False},
        (True, False),
    ),
    "residual post_add": (
        adapters.pfeiffer(width=M, residual="sum"),
        SEQ | {"residual_before_ln": "post_add"},
        (True,),
    ),
    "the stream is lost": (
        adapters.houlsby(width=M, residual={"x": 1, "stream": -1}),
        DOUBLE | {"original_ln_after": False},
        (False,),
    ),
    "ln_before and ln_after": (
        adapters.houlsby(width=M, norm_in=True, norm_out="update"),
        DOUBLE | {"ln_before": True, "ln_after": True},
        (True,),
    ),
    "ln_after the residual": (
        adapters.pfeiffer(width=M, norm_out="result"),
        SEQ | {"ln_after": True, "adapter_residual_before_ln": True},
        (True, False),
    ),
    "parallel with ln_after": (
        adapters.parallel_adapter(width=M, norm_out="update"),
        PARALLEL | {"scaling": 4.0, "ln_after": True},
        (False,),
    ),
}
CASES = [(name, post) for name, (_, _, posts) in FORMS.items() for post in posts]


def randomized(adapter, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), adapter)


def shapes(tuned, params, x):
    return jax.eval_shape(lambda: tuned.init(jax.random.key(0), params, x))


def made(method, post=True, params=PARAMS):
    tuned = jp.transform(sublayer(post), method)
    return tuned, shapes(tuned, params, X)


@pytest.mark.parametrize(("name", "post"), CASES)
def test_every_form_is_adapterhub_s(name, post):
    method, flags, _ = FORMS[name]
    with jax.enable_x64(True):
        tuned, adapter = made(method, post)
        adapter = randomized(adapter)
        leaves = {n: np.asarray(leaf) for n, leaf in adapter["layer/mlp:delta"].items()}
        expected = adapterhub(leaves, flags, post)
        # Norms are made in float32.
        np.testing.assert_allclose(tuned.apply(adapter, PARAMS, X), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "method",
    [
        bottleneck(M),
        adapters.houlsby(width=M, bias=False, gate="token", scale="learned"),
        adapters.pfeiffer(reduction=2, norm_in=True, norm_out="update", scale="channel"),
        adapters.parallel_adapter(),
        adapters.adapter_plus(width=M),
        adapters.compacter(width=M, phm=phm(2)),
        adapters.compacter_plus(width=M, phm=phm(2, shared=None)),
    ],
)
def test_fresh_adapters_change_no_bit(method):
    tuned = jp.transform(sublayer(False), jp.rules(("**/*:delta", method)))
    adapter = tuned.init(jax.random.key(0), PARAMS, X)
    np.testing.assert_array_equal(
        jax.jit(tuned.apply)(adapter, PARAMS, X), jax.jit(tuned.fn)(PARAMS, X)
    )


def test_published_starts():
    """Spread of the fresh maps: AdapterHub's "bert", "houlsby" and "mam_adapter"."""
    site = jp.Site("a:out", (4, 400), "float32", ("stack", "in"), ("call",))
    for init, down, up in (
        ("bert", 0.02, 0.02),
        ("houlsby", 0.01 * 0.8796, 0.01 * 0.8796),  # of a normal cut at two deviations
        ("mam", (1 / 400 / 3) ** 0.5, 0.0),
        ("zero", 0.02, 0.0),
    ):
        method = bottleneck(50, init=init)
        leaves = jax.jit(method.init, static_argnums=(1, 2))(
            jax.random.key(0, impl="unsafe_rbg"), site, None
        )
        leaves = jax.tree.map(np.asarray, leaves)
        assert leaves["down"].shape == leaves["up"].shape == (4, 50, 400)
        np.testing.assert_allclose(leaves["down"].std(), down, rtol=0.02)
        np.testing.assert_allclose(leaves["up"].std(), up, rtol=0.02)
        assert not leaves["down_bias"].any() and not leaves["up_bias"].any()
        if init != "zero":
            assert np.abs(leaves["down"]).max() <= {"bert": 1, "houlsby": 0.02, "mam": 0.05}[init]


def test_the_count_of_parameters():
    site = jp.Site("a:out", (3, 6), "float32", ("stack", "in"), ("call",))

    def count(method):
        leaves = jax.eval_shape(lambda key: method.init(key, site, None), jax.random.key(0))
        return sum(leaf.size for leaf in leaves.values())

    assert count(bottleneck(2)) == 3 * (2 * (2 * 6 + 1) + 6)
    assert count(bottleneck(reduction=4)) == 3 * (1 * (2 * 6 + 1) + 6)
    assert count(bottleneck(reduction=0.5)) == 3 * (12 * (2 * 6 + 1) + 6)
    assert count(bottleneck(2, bias=False, gate="token", scale="channel")) == 3 * (24 + 7 + 6)
    assert count(bottleneck(2, norm_in=True, norm_out="result", scale="learned")) == 3 * (32 + 25)


def test_lora_is_a_bottleneck_that_reads_the_input():
    """At a projection's output, `y + B A x`, as UniPELT has it with a gate."""
    lora = bottleneck(2, activation="identity", reads="input", bias=False, scale=0.5)
    wide = RNG.normal(size=(D, 3))

    def model(params, x):
        return jp.tap(x @ params, "q:out", input=x)

    tuned = jp.transform(model, jp.rules(("q:out", lora)))
    adapter = randomized(shapes(tuned, wide, X))
    a, b = (np.asarray(adapter["q:out"][name], np.float64) for name in ("down", "up"))
    assert (a.shape, b.shape) == ((2, D), (2, 3))
    expected = X @ wide + 0.5 * (X @ a.T) @ b
    np.testing.assert_allclose(tuned.apply(adapter, wide, X), expected, rtol=1e-5, atol=1e-5)


def test_a_gate_for_each_position_is_causal():
    tuned = jp.transform(sublayer(False), adapters.houlsby(width=M, gate="token"))
    adapter = randomized(shapes(tuned, PARAMS, X))
    later = X.copy()
    later[:, 3:] += 1
    one, other = (np.asarray(tuned.apply(adapter, PARAMS, x)) for x in (X, later))
    np.testing.assert_array_equal(one[:, :3], other[:, :3])


@pytest.mark.parametrize("option", ["dropout", "stochastic_depth"])
def test_dropout_is_of_entries_and_depth_of_rows(option):
    """With the same row 4000 times, what is kept is the update divided by the share kept."""
    params, x = (jnp.asarray(a, jnp.float32) for a in (PARAMS["w"], X[:1, :1].repeat(4000, 0)))

    def model(params, x):
        return jp.tap(x @ params, "w:out")

    method = bottleneck(M, residual={}, **{option: 0.25})
    tuned = jp.transform(model, jp.rules(("w:out", method)))
    adapter = randomized(shapes(tuned, params, x))
    base = np.asarray(tuned.apply(adapter, params, x))
    update = np.asarray(tuned.apply(adapter, params, x, dropout_key=jax.random.key(3)))
    kept = update != 0
    np.testing.assert_allclose(kept.mean(), 0.75, atol=0.02)
    np.testing.assert_allclose(update, kept * base / 0.75, rtol=1e-5)
    assert (kept == kept[..., :1]).all() == (option == "stochastic_depth")


def test_bfloat16_stays_and_is_near():
    tuned, adapter = made(adapters.pfeiffer(width=M, gate="sequence", norm_in=True), False)
    adapter = randomized(adapter)
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (PARAMS, X))
    y = tuned.apply(adapter, params, x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(tuned.apply(adapter, PARAMS, X))
    np.testing.assert_allclose(np.asarray(y, np.float32), wide, rtol=0.1, atol=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a width or a reduction"),
        ({"width": 2, "reduction": 2}, "a width or a reduction"),
        ({"width": 0}, "Use a positive int"),
        ({"reduction": -1}, "must be positive"),
        ({"width": 2, "dropout": 1.0}, "dropout=1.0 is not a share"),
        ({"width": 2, "scale": "channels"}, "none of 'learned', 'channel'"),
        ({"width": 2, "gate": "row"}, "none of None, 'token', 'sequence'"),
        ({"width": 2, "norm_out": "sum"}, "norm_out='sum'"),
        ({"width": 2, "init": "xavier"}, "init='xavier' is none of 'zero', 'bert'"),
        ({"width": 2, "activation": "rely"}, "not in jax.nn"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bottleneck(**options)


def test_what_a_place_lacks_is_said():
    tuned = jp.transform(sublayer(False), bottleneck(M, reads="norm"))
    with pytest.raises(ValueError, match="reads 'norm', but what can be read there is 'x', 'str"):
        tuned.init(jax.random.key(0), PARAMS, X)
    tuned = jp.transform(sublayer(False), bottleneck(M, residual="norm"))
    adapter = shapes(tuned, PARAMS, X)
    with pytest.raises(ValueError, match="reads 'norm'"):
        tuned.apply(adapter, PARAMS, X)


@pytest.mark.parametrize(
    "method",
    [
        adapters.parallel_adapter(scale="learned", init="zero"),
        adapters.houlsby(width=3, residual={"x": 1, "stream": -1}, norm_out="update"),
        adapters.compacter(phm=phm(2, sizes=(8, 4), learn_rule=False)),
    ],
)
def test_the_options_make_the_method_again(method):
    options = json.loads(json.dumps(method.options))
    again = bottleneck(**options)
    assert json.loads(json.dumps(again.options)) == options
    assert (again.name, again.fixed, again.call) == (method.name, method.fixed, method.call)

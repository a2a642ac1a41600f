"""Mix-and-match and UniPELT as plain chains, against AdapterHub's library, and their gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.hf.adapterhub import load_adapterhub
from tests.hf.adapterhub.conftest import FIXTURES, base, inputs, stored

LORA = dict(activation="identity", reads="input", bias=False)
RECIPES = {
    "mam": jp.chain(jp.prefix_tuning(3, hidden=4), jp.parallel_adapter(reduction=4)),
    "unipelt": jp.chain(
        jp.prefix_tuning(3, hidden=4, gate=True),
        jp.pfeiffer(reduction=4, gate="sequence"),
        jp.rules(("**/{query,value}:out", jp.bottleneck(2, gate="sequence", **LORA))),
    ),
}


def chained(adapter, shapes):
    """The library's leaves where the chain has them; its prefix has one network for all layers."""
    common = {}
    for path, leaves in adapter.items():
        if path.startswith("shared:"):
            common |= {name: jnp.broadcast_to(v, (2, *v.shape)) for name, v in leaves.items()}
    filled = {}
    for path, stages in shapes.items():
        ((number, names),) = stages.items()
        own = common | adapter[path]
        filled[path] = {number: {name: own[name] for name in names}}
    return jp.Adapter(filled, shapes.sites)


def made(name):
    model, params = base("bert")
    tuned = jp.transform(model, RECIPES[name])
    (ids,), named = inputs("bert")
    shapes = jax.eval_shape(tuned.init, jax.random.key(0), params, ids, **named)
    adapter = chained(load_adapterhub(FIXTURES / "bert" / name, model)[1], shapes)
    assert jax.tree.map(jnp.shape, dict(adapter)) == jax.tree.map(jnp.shape, dict(shapes))
    return model, params, tuned, adapter


@pytest.mark.parametrize("name", RECIPES)
def test_a_plain_chain_computes_what_the_library_does(name):
    _, params, tuned, adapter = made(name)
    (ids,), named = inputs("bert")
    found = jax.jit(lambda: tuned.apply(adapter, params, ids, **named))()
    np.testing.assert_allclose(found, stored("bert")[f"{name}/logits"], rtol=1e-5, atol=1e-5)


def gated(adapter, sites, value):
    """Gates open at 40, closed at -40."""

    def set_(keys, leaf):
        path, *_, name = (key.key for key in keys)
        here = any(site in path for site in sites)
        return jnp.full_like(leaf, value) if here and name == "gate_bias" else (
            0 * leaf if here and name == "gate" else leaf)  # fmt: skip

    return jax.tree_util.tree_map_with_path(set_, adapter)


def test_gates_leave_out_what_they_close_and_open_to_the_plain_forms():
    model, params, tuned, adapter = made("unipelt")
    (ids,), named = inputs("bert")
    both = (":delta", ":out")

    def without_gates(leaves):
        keep = {k: v for k, v in leaves.items() if not k.startswith("gate")}
        return {k: without_gates(v) if isinstance(v, dict) else v for k, v in keep.items()}

    plain = jp.chain(
        jp.prefix_tuning(3, hidden=4),
        jp.pfeiffer(reduction=4),
        jp.rules(("**/{query,value}:out", jp.bottleneck(2, **LORA))),
    )
    sites = [s for s in adapter.sites if s.side in ("key", "value")]
    # What is given to the attention is read for the gate alone.
    bare = [jp.Site(**(s.__dict__ | {"reads": ()})) for s in adapter.sites]
    keys = {s.path: adapter[s.path] for s in sites}
    alone = jp.transform(model, jp.chain(jp.prefix_tuning(3, hidden=4, gate=True)))

    @jax.jit
    def program():
        def run(tuned, adapter):
            return tuned.apply(adapter, params, ids, **named)

        opened = gated(adapter, (":",), 40.0)
        open_ = run(tuned, opened)
        closed = run(tuned, gated(adapter, both, -40.0))
        plainly = run(jp.transform(model, plain), jp.Adapter(without_gates(dict(opened)), bare))
        prefix = run(alone, jp.Adapter(keys, sites))
        shut = run(alone, gated(jp.Adapter(keys, sites), (":",), -40.0))
        zero = jp.Adapter(jax.tree.map(jnp.zeros_like, keys), sites)
        return (open_, plainly), (closed, prefix), (shut, run(alone, zero))

    for one, other in program():
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    # A closed prefix still takes its share of the softmax, with keys of zero.
    shut = program()[2][0]
    assert np.abs(shut - model.apply(params, ids, **named)).max() > 1e-3

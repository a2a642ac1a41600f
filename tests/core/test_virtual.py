"""Prompts and prefixes on models that nobody prepared: names, masks, scans, caches, composition."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft.core.virtual import lengthened_mask

V, D, N, T = 11, 8, 3, 4
TOKENS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
KEEP = jnp.array([[True, True, True, False], [True, True, True, True]])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, visible):
        y = nn.MultiHeadDotProductAttention(2, name="attention")(x, x, mask=visible)
        return x + y, None


class Linen(nn.Module):
    """Names of its own for its inputs, learned positions, scanned or looped, with remat."""

    scanned: bool
    size: int = V

    @nn.compact
    def __call__(self, words, keep=None, places=None):
        places = jnp.arange(words.shape[1])[None] if places is None else places
        x = nn.Embed(self.size, D, name="table")(words) + nn.Embed(20, D, name="where")(places)
        visible = nn.make_causal_mask(words)
        if keep is not None:
            visible = nn.combine_masks(visible, keep[:, None, None, :])
        if not self.scanned:
            for i in range(2):
                x, _ = Block(name=f"layers_{i}")(x, visible)
            return x
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2,
            in_axes=nn.broadcast,
        )  # fmt: skip
        return layers(name="layers")(x, visible)[0]


NAMES = {"tokens": "words", "mask": "keep", "positions": "places"}


def attention(p, x, visible, prefix_key, prefix_value):
    """What flax computes, with a prefix, written out."""
    q, k, v = (
        jnp.einsum("btd,dnh->btnh", x, p[name]["kernel"]) + p[name]["bias"]
        for name in ("query", "key", "value")
    )
    rows = lambda r: jnp.broadcast_to(r, (x.shape[0], *r.shape))  # noqa: E731
    k = jnp.concatenate([rows(prefix_key), k], 1)
    v = jnp.concatenate([rows(prefix_value), v], 1)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    visible = jnp.pad(visible, [(0, 0)] * 3 + [(k.shape[1] - visible.shape[-1], 0)],
                      constant_values=True)  # fmt: skip
    shares = jax.nn.softmax(jnp.where(visible, scores, -1e9))
    y = jnp.einsum("bnts,bsnh->btnh", shares, v)
    return jnp.einsum("btnh,nhd->btd", y, p["out"]["kernel"]) + p["out"]["bias"]


def oracle(params, prefixes):
    """The looped model by hand: tokens at positions N..., prefixes in every attention."""
    x = params["table"]["embedding"][TOKENS]
    x = x + params["where"]["embedding"][N + jnp.arange(T)][None]
    visible = jnp.tril(jnp.ones((T, T), bool))[None, None] & KEEP[:, None, None, :]
    for i, (key, value) in enumerate(prefixes):
        p = params[f"layers_{i}"]["attention"]
        x = x + attention(p, x, visible, key, value)
    return x


@pytest.fixture(scope="module", params=["looped", "scanned and remat'd"])
def model(request):
    looped = Linen(False).init(jax.random.key(0), TOKENS)
    if request.param == "looped":
        return Linen(False), looped, looped["params"]
    layers = [looped["params"][f"layers_{i}"] for i in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    rest = {name: looped["params"][name] for name in ("table", "where")}
    return Linen(True), {"params": rest | {"layers": stacked}}, looped["params"]


def test_a_prefix_equals_longer_keys_and_values(model):
    module, variables, plain = model
    tuned = jp.transform(module, jp.prefix_tuning(N, names=NAMES))
    adapter = tuned.init(jax.random.key(1), variables, TOKENS, KEEP)
    assert tuned.virtual_tokens == N
    leaves = [
        [np.asarray(adapter[path]["prefix"]) for path in sorted(adapter) if path.endswith(side)]
        for side in (":key", ":value")
    ]
    if module.scanned:
        leaves = [list(side[0]) for side in leaves]
    expected = oracle(plain, list(zip(*leaves, strict=True)))
    actual = tuned.apply(adapter, variables, TOKENS, keep=KEEP)
    np.testing.assert_allclose(actual[KEEP], expected[KEEP], atol=1e-5)
    grads = jax.grad(lambda a: tuned.apply(a, variables, TOKENS, keep=KEEP).sum())(adapter)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(grads))


def test_a_prompt_equals_a_longer_table(model):
    module, variables, _ = model
    tuned = jp.transform(module, jp.prompt_tuning(N, names=NAMES))
    adapter = tuned.init(jax.random.key(1), variables, TOKENS, KEEP)
    assert list(adapter) == ["params/table/embedding"]
    table = variables["params"]["table"]["embedding"]
    rows = adapter["params/table/embedding"]["prompt"]
    longer = jnp.concatenate([table, rows])
    ids = jnp.concatenate([jnp.broadcast_to(V + jnp.arange(N), (2, N)), TOKENS], 1)
    params = variables["params"] | {"table": {"embedding": longer}}
    keep = jnp.concatenate([jnp.ones((2, N), bool), KEEP], 1)
    # Positions that the caller gives move on with the tokens.
    places = jnp.broadcast_to(jnp.arange(T), (2, T))
    expected = Linen(module.scanned, V + N).apply({"params": params}, ids, keep)[:, N:]
    actual = tuned.apply(adapter, variables, TOKENS, KEEP, places)
    np.testing.assert_allclose(actual[KEEP], expected[KEEP], atol=1e-5)
    kept = tuned.apply(adapter, variables, TOKENS, KEEP, virtual="keep")
    assert kept.shape == (2, N + T, D)


def test_prompt_and_prefix_together_train_under_jit(model):
    module, variables, _ = model
    tuning = jp.chain(jp.prompt_tuning(2, names=NAMES), jp.prefix_tuning(N, hidden=4, names=NAMES))
    tuned = jp.transform(module, tuning)
    adapter = tuned.init(jax.random.key(1), variables, TOKENS)
    assert tuned.virtual_tokens == N + 2

    @jax.jit
    def loss(adapter):
        return (tuned.apply(adapter, variables, TOKENS) ** 2).mean()

    step = jax.tree.map(lambda a, g: a - 0.05 * g, adapter, jax.grad(loss)(adapter))
    assert loss(step) < loss(adapter)


class Cached(nnx.Module):
    """Decodes one token at a time with flax's own cache."""

    def __init__(self):
        self.table = nnx.Embed(V, D, rngs=nnx.Rngs(0))
        self.attention = nnx.MultiHeadAttention(2, D, decode=True, rngs=nnx.Rngs(1))

    def __call__(self, tokens):
        x = self.table(tokens)
        mask = None if self.attention.decode else nnx.make_causal_mask(tokens)
        return x + self.attention(x, mask=mask)


@pytest.mark.parametrize("tuning", [jp.prompt_tuning(N), jp.prefix_tuning(N)])
def test_a_model_that_decodes_one_token_at_a_time(tuning):
    model = Cached()
    model.attention.init_cache((2, N + T, D))
    whole = Cached()
    whole.attention.set_attributes(decode=False)
    tuned = jp.transform(whole, tuning)
    params = nnx.state(whole, nnx.Param)
    adapter = tuned.init(jax.random.key(0), nnx.state(whole), TOKENS)
    expected = tuned.apply(adapter, nnx.state(whole), TOKENS)

    stepwise = jp.transform(model, tuning)
    nnx.update(model, params)
    state = nnx.state(model)
    ids = jnp.concatenate([stepwise.virtual_ids(adapter, 2), TOKENS], 1)
    step = jax.jit(lambda s, t: stepwise.decode(adapter, s, t, mutable=True))
    outs = []
    for i in range(N + T):
        out, state = step(state, ids[:, i : i + 1])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs[N:], 1), expected, atol=1e-5)


class Steps(nn.Module):
    """Linen layers under scan and remat, with names of their own, and linen's own cache."""

    decode: bool

    @nn.compact
    def __call__(self, words, places):
        class Layer(nn.Module):
            decode: bool

            @nn.compact
            def __call__(self, x, visible):
                attention = nn.MultiHeadDotProductAttention(2, decode=self.decode, name="attention")
                return x + attention(x, x, mask=visible), None

        x = nn.Embed(V, D, name="table")(words) + nn.Embed(20, D, name="where")(places)
        visible = None if self.decode else nn.make_causal_mask(words)
        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0, "cache": 0}, split_rngs={"params": True},
            length=2, in_axes=nn.broadcast,
        )  # fmt: skip
        return layers(self.decode, name="layers")(x, visible)[0]


@pytest.mark.parametrize("method", [jp.prompt_tuning, jp.prefix_tuning])
def test_a_scanned_and_remat_linen_model_decodes_with_its_cache(method):
    tuning, places = method(N, names=NAMES), jnp.broadcast_to(jnp.arange(T), (2, T))
    whole, steps = Steps(False), Steps(True)
    start = steps.init(jax.random.key(0), jnp.zeros((2, N + T), int), jnp.zeros((2, N + T), int))
    params, cache = {"params": start["params"]}, start["cache"]
    tuned, stepwise = jp.transform(whole, tuning), jp.transform(steps, tuning)
    adapter = tuned.init(jax.random.key(1), params, TOKENS, places)
    adapter = jax.tree.map(lambda leaf: 20 * leaf, adapter)
    expected = tuned.apply(adapter, params, TOKENS, places=places)
    ids = jnp.concatenate([stepwise.virtual_ids(adapter, 2), TOKENS], 1)

    @jax.jit
    def step(cache, i):
        words = jax.lax.dynamic_slice_in_dim(ids, i, 1, 1)
        state = params | {"cache": cache}
        where = jnp.full((2, 1), i)
        y, new = stepwise.decode(adapter, state, words, places=where, mutable=["cache"])
        return y, new["cache"]

    outs = []
    for i in range(N + T):
        y, cache = step(cache, i)
        outs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outs[N:], 1), expected, atol=1e-5)
    assert np.abs(expected - whole.apply(params, TOKENS, places)).max() > 1e-2


class MaskOfIds(Linen):
    def __call__(self, words):
        return super().__call__(words, words != 0)


def test_a_prefix_is_seen_by_models_that_take_the_mask_from_the_ids():
    model, prefix = Linen(False), jp.prefix_tuning(N, names=NAMES)
    variables = model.init(jax.random.key(0), TOKENS)
    tuned, itself = (jp.transform(m, prefix) for m in (model, MaskOfIds(False)))
    adapter = tuned.init(jax.random.key(1), variables, TOKENS, TOKENS != 0)
    want = tuned.apply(adapter, variables, TOKENS, TOKENS != 0)
    np.testing.assert_allclose(itself.apply(adapter, variables, TOKENS), want, atol=1e-6)


def test_a_prefix_knows_the_arguments_and_all_attentions_of_a_function():
    model, prefix = Linen(False), jp.prefix_tuning(N, names={"tokens": "words"})
    variables = model.init(jax.random.key(0), TOKENS)

    def function(variables, words):
        return model.apply(variables, words)

    tuned, alike = jp.transform(function, prefix), jp.transform(model, prefix)
    adapter, other = (t.init(jax.random.key(1), variables, TOKENS) for t in (tuned, alike))
    sides = [":key", ":value", ":key_1", ":value_1"]
    assert sorted(adapter) == sorted(sides)
    pairs = zip(other, sides, strict=True)
    same = jp.Adapter({path: adapter[side] for path, side in pairs}, other.sites)
    got, want = tuned.apply(adapter, variables, TOKENS), alike.apply(same, variables, TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_prefix_in_some_attentions_alone_is_refused():
    module = Linen(False)
    variables = module.init(jax.random.key(0), TOKENS)
    tuning = jp.rules(("layers_0/**:{key,value}", jp.prefix_tuning(N, names=NAMES)))
    with pytest.raises(ValueError, match="'layers_1/attention:key' has no method"):
        jp.transform(module, tuning).init(jax.random.key(1), variables, TOKENS)


def test_a_placeholder_that_an_encoder_would_pool_is_told():
    """In front it takes the first token's place; behind, what is pooled is the first token."""

    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, words):
            x = nn.Embed(V, D, name="table")(words)
            return nn.MultiHeadDotProductAttention(2, name="attention")(x, x)[:, 0]

    module = Pooled()
    variables = module.init(jax.random.key(0), TOKENS)
    names = {"tokens": "words"}
    front = jp.transform(module, jp.prefix_tuning(N, names=names))
    with pytest.warns(UserWarning, match=r"first position .*test_virtual.py.*place=\"back\""):
        front.init(jax.random.key(1), variables, TOKENS)
    back = jp.transform(module, jp.prefix_tuning(N, place="back", names=names))
    adapter = back.init(jax.random.key(1), variables, TOKENS)
    p = variables["params"]
    x = p["table"]["embedding"][TOKENS]
    prefixes = (adapter[f"attention:{side}"]["prefix"] for side in ("key", "value"))
    expected = attention(p["attention"], x, jnp.ones((1, 1, T, T), bool), *prefixes)
    np.testing.assert_allclose(back.apply(adapter, variables, TOKENS), expected[:, 0], atol=1e-5)


def test_inputs_of_unknown_names_are_asked_for():
    module = Linen(False)
    variables = module.init(jax.random.key(0), TOKENS)
    tuned = jp.transform(module, jp.prefix_tuning(N))
    adapter = tuned.init(jax.random.key(1), variables, TOKENS)
    with pytest.raises(ValueError, match="'words'.* is known to hold the tokens"):
        tuned.apply(adapter, variables, TOKENS)


@pytest.mark.parametrize("method", [jp.prefix_tuning, jp.prompt_tuning])
def test_merging_says_why_it_cannot_be(method):
    module = Linen(False)
    variables = module.init(jax.random.key(0), TOKENS)
    tuned = jp.transform(module, method(N, names=NAMES))
    adapter = tuned.init(jax.random.key(1), variables, TOKENS)
    with pytest.raises(ValueError, match="cannot be merged"):
        tuned.merge(adapter, variables)


def test_masks_over_queries_and_keys_grow_on_both_axes():
    bools = jnp.tril(jnp.ones((1, 1, T, T), bool))
    longer = lengthened_mask(bools, T, N)
    assert longer.shape == (1, 1, N + T, N + T)
    assert bool(longer[..., N:, :N].all()) and not bool(longer[..., :N, N:].any())
    np.testing.assert_array_equal(longer[..., N:, N:], bools)
    added = jnp.where(bools, 0.0, -1e9)
    np.testing.assert_array_equal(lengthened_mask(added, T, N)[..., N:, :] == 0, longer[..., N:, :])

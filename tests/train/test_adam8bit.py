"""8-bit Adam against bitsandbytes and float64, in the step, on meshes and through checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft import train
from jaxpeft.quant.formats.dynamic import dynamic_table
from jaxpeft.train import chunks
from jaxpeft.train.adam8bit import Moment

RATE, DECAY, STEPS = 1e-2, 0.1, 6
SHAPES = {"whole": (18, 512), "odd": (5, 999), "small": (3, 7)}


def gradients(shape, seed):
    random = np.random.default_rng(seed)
    spread = 10.0 ** random.uniform(-4, 0, shape)  # several decades within a block
    return [(random.standard_normal(shape) * spread).astype(np.float32) for _ in range(STEPS)]


def codes_of(moment):
    """One code a number, from words of four."""
    return np.asarray(moment.codes).view(np.uint8)


def start(shape, seed):
    return np.random.default_rng(100 + seed).standard_normal(shape).astype(np.float32)


def ours(optimizer, params, grads):
    """The params after each step, and the last state."""

    @jax.jit
    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state, path = optimizer.init(params), []
    for g in grads:
        params, state = step(params, state, g)
        path.append(params)
    return path, state


@pytest.fixture(scope="module")
def run():
    params = {name: jnp.asarray(start(shape, i)) for i, (name, shape) in enumerate(SHAPES.items())}
    grads = [gradients(shape, i) for i, shape in enumerate(SHAPES.values())]
    steps = [dict(zip(SHAPES, each, strict=True)) for each in zip(*grads, strict=True)]
    return *ours(train.adam8bit(RATE, weight_decay=DECAY), params, steps), steps


@pytest.fixture
def exact_bitsandbytes(monkeypatch):
    """Its CPU optimizer with its reference quantizer, not the one that rounds to a grid first.

    In one point ours is another: a second moment above 0 is not rounded to 0.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.backends.cpu import ops

    kernel = torch.ops.bitsandbytes.quantize_blockwise.default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)

    def quantize(x, code, absmax, out, block):
        codes, largest = kernel.redispatch(keys, x, code, block)
        out.copy_(torch.where((x > 0) & (code[0] == 0), codes.clamp(min=1), codes))
        absmax.copy_(largest)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", quantize)
    return torch


@pytest.mark.parametrize("name", SHAPES)
def test_steps_and_codes_equal_those_of_bitsandbytes(name, run, exact_bitsandbytes):
    torch, (path, state, steps) = exact_bitsandbytes, run
    import bitsandbytes as bnb

    weight = torch.nn.Parameter(torch.from_numpy(start(SHAPES[name], list(SHAPES).index(name))))
    optimizer = bnb.optim.AdamW8bit([weight], lr=RATE, weight_decay=DECAY)
    for g, params in zip(steps, path, strict=True):
        weight.grad = torch.from_numpy(g[name])
        optimizer.step()
        # A last bit of a moment may choose the other code, and so move one value of many.
        off = np.abs(np.asarray(params[name]) - weight.detach().numpy())
        assert np.mean(off > 1e-6) < 2e-3 and off.max() < RATE
    theirs, (found, *_) = optimizer.state[weight], state
    for moment, key in ((found.mu[name], "1"), (found.nu[name], "2")):
        if name == "small":
            np.testing.assert_allclose(moment, theirs["state" + key], rtol=1e-5, atol=1e-9)
            continue
        np.testing.assert_allclose(moment.absmax.ravel(), theirs["absmax" + key], rtol=1e-6)
        found_codes = codes_of(moment).ravel()[: weight.numel()].astype(int)
        apart = np.abs(found_codes - theirs["state" + key].numpy().ravel())
        assert apart.max() <= 1 and np.mean(apart > 0) < 2e-3


def test_a_step_equals_the_definition_in_float64(run):
    """Each moment is off by at most half a step of the table; the direction has none of that."""
    path, state, steps = run
    m = v = np.zeros(SHAPES["whole"])
    signed, unsigned = (dynamic_table(s).astype(np.float64) for s in (True, False))
    x = start(SHAPES["whole"], 0).astype(np.float64)
    for t, g in enumerate(steps, 1):
        g = g["whole"].astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        x = x - RATE * (u + DECAY * x)
        off = np.abs(np.asarray(path[t - 1]["whole"]) - x)
        assert np.mean(off > 1e-6) < 2e-3 * t and off.max() < t * RATE
        m, v = nearest(m, signed), nearest(v, unsigned)
    for moment, exact, table in ((state[0].mu, m, signed), (state[0].nu, v, unsigned)):
        absmax = np.repeat(np.asarray(moment["whole"].absmax), 256, axis=1)
        values = table[codes_of(moment["whole"])] * absmax
        close = np.isclose(values, exact, rtol=1e-5, atol=1e-12)
        assert np.mean(close) > 0.995


def test_steps_stay_near_those_of_float32_where_gradients_in_a_block_differ_by_a_thousand():
    """Rounding small second moments to 0, as bitsandbytes does, is off by 1.2 times the way."""
    random = np.random.default_rng(0)
    size = 10.0 ** random.uniform(-3, 0, (16, 1024))
    grads = [(size * random.normal(0.3, 1, size.shape)).astype(np.float32) for _ in range(50)]
    first = {"w": jnp.zeros(size.shape)}
    (*_, found), _ = ours(train.adam8bit(1e-3), first, [{"w": g} for g in grads])
    (*_, expected), _ = ours(optax.adam(1e-3), first, [{"w": g} for g in grads])
    off = jnp.linalg.norm(found["w"] - expected["w"]) / jnp.linalg.norm(expected["w"])
    assert off < 0.15


def nearest(x, table):
    largest = np.abs(x).reshape(-1, 256).max(1, keepdims=True)
    scaled = x.reshape(-1, 256) / largest
    code = np.clip(np.searchsorted(table, scaled), 1, 255)
    code -= scaled - table[code - 1] <= table[code] - scaled
    code = np.where((table[0] == 0) & (scaled > 0), np.maximum(code, 1), code)
    return (table[code] * largest).reshape(x.shape)


def test_state_is_two_bytes_a_parameter():
    params = {"w": jnp.zeros((64, 1024)), "b": jnp.zeros(100)}
    state = train.adam8bit(1e-3).init(params)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    n = 64 * 1024
    assert size == 2 * n + 2 * 4 * n // 256 + 2 * 4 * 100 + 4  # codes, absmax, small leaf, count
    assert (size - 804) / n == 2.03125
    full = sum(x.nbytes for x in jax.tree.leaves(optax.adamw(1e-3).init(params)))
    assert full / size > 3.9


def test_an_update_unpacks_a_chunk_at_a_time(monkeypatch):
    """All moments in float32 at once would be twice the leaf; the direction is as large as it."""
    monkeypatch.setattr(chunks, "SIZE", 2**14)
    params = {"w": jnp.zeros((1024, 4096))}
    optimizer = train.adam8bit(1e-3)

    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.lower(params, optimizer.init(params)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * params["w"].nbytes


def test_leaves_that_are_masked_or_in_other_groups_hold_no_state():
    params = {"a": jnp.ones((16, 256)), "b": jnp.ones((16, 256)), "fixed": jnp.ones((16, 256))}
    grads = jax.tree.map(jnp.ones_like, params)
    slow, fast = train.adam8bit(1e-3), train.adam8bit(16e-3)
    labels = {"a": "slow", "b": "fast", "fixed": "none"}
    plus = optax.partition({"slow": slow, "fast": fast, "none": optax.set_to_zero()}, labels)
    updates, _ = plus.update(grads, plus.init(params), params)
    np.testing.assert_allclose(updates["b"], 16 * updates["a"], rtol=1e-6)
    masked = optax.masked(slow, {"a": True, "b": True, "fixed": False})
    codes = [x for x in jax.tree.leaves(masked.init(params)) if x.dtype == jnp.uint32]
    assert len(codes) == 4


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_state_lies_like_its_leaf_and_gives_the_same_steps(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    specs = {"whole": P("data", "model"), "odd": P("data", None), "cut": P(None, ("data", "model"))}
    values = {"whole": (4, 2048), "odd": (64, 200), "cut": (8, 1024)}  # a block over two devices
    values = {n: np.random.default_rng(0).standard_normal(s, np.float32) for n, s in values.items()}
    placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in values.items()}
    optimizer = train.adam8bit(RATE)
    expected, _ = ours(optimizer, values, [values] * 2)
    with jax.set_mesh(mesh):
        fresh, *_ = optimizer.init(placed)
        path, (state, *_) = ours(optimizer, placed, [placed] * 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), path, expected)
    for name, moment in [*fresh.mu.items(), *state.mu.items(), *state.nu.items()]:
        assert isinstance(moment, Moment)
        assert moment.codes.sharding.is_equivalent_to(placed[name].sharding, 2), name
    for part in (fresh, state):
        assert part.mu["whole"].absmax.sharding.spec == P("data", "model")


def test_resume_is_bitwise(tmp_path):
    def loss(adapter, params, batch, key):
        return jnp.sum((batch @ adapter["w"]) ** 2), jnp.float32(batch.shape[0])

    optimizer = train.optimizer(1e-2, name="adamw8bit", weight_decay=0.1)
    batches = np.random.default_rng(0).standard_normal((4, 3, 16), np.float32)
    adapter = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((16, 512), np.float32))}
    state = train.init_state(adapter, optimizer, jax.random.key(0))
    fresh = train.init_state(adapter, optimizer, jax.random.key(0))
    step = train.make_step(loss, optimizer)
    for i, batch in enumerate(batches):
        if i == 2:
            train.save(tmp_path, i, state)
        state, _ = step(state, {}, batch)
    again = train.restore(tmp_path, fresh)
    for batch in batches[2:]:
        again, _ = step(again, {}, batch)
    dtypes = [x.dtype for x in jax.tree.leaves(state.opt_state)]
    assert dtypes.count(jnp.uint32) == 2
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert jnp.array_equal(a, b)


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match="b2=1.0 is no decay"):
        train.adam8bit(1e-3, b2=1.0)
    with pytest.raises(ValueError, match="min_size=-1"):
        train.scale_by_adam8bit(min_size=-1)


def test_options_may_be_injected():
    params = {"w": jnp.asarray(start((8, 512), 0))}
    steps = [{"w": g} for g in gradients((8, 512), 0)[:2]]
    plain, _ = ours(train.adam8bit(RATE, weight_decay=DECAY), params, steps)
    make = optax.inject_hyperparams(train.adam8bit, static_args="min_size")
    injected, state = ours(make(RATE, weight_decay=DECAY), params, steps)
    assert state.hyperparams["b2"] == np.float32(0.999)
    for a, b in zip(injected, plain, strict=True):
        np.testing.assert_allclose(a["w"] - params["w"], b["w"] - params["w"], rtol=1e-3, atol=1e-6)

"""LoRA on an nnx module of your own: own einsum modules, raw parameters, a tied head, a scan.

A small causal transformer reads the start of a count such as 3 5 7 9 and learns to go on, in steps
of 1 to 4, modulo 23. It is then frozen, and an adapter teaches it to count down: LoRA on the
projections, full training of the norms' scales. The optax step is written out by hand. Without
the adapter the model still counts up, as its weights have not changed.

    python examples/own_module_nnx.py            # 35 s of CPU time
    python examples/own_module_nnx.py --small    # fewer steps, as in the tests: mostly compiling

Expect 100.0% of the next numbers right counting up and 0.1% counting down before, 100.0% counting
down after, with an adapter of 10,912 parameters on a base of 34,048.

Variation: leave out the rule for the norms; 10,752 parameters then reach 100.0% as well.
"""

import sys
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxpeft as jp

modulus = 23  # the numbers are 0 ... 22
length = 12  # numbers in a count
width = 32  # of the residual stream
heads = 2  # of the attention
layers = 2  # stacked on axis 0 of every weight, and run by a scan
batch_size = 64  # counts in a step
base_steps = 1000  # of training the base model, all weights
tune_steps = 400  # of training the adapter, base weights frozen
learning_rate = 3e-3  # of Adam, for both
tuning = jp.rules(  # the first rule that fits a parameter wins
    ("layers/{qkv,out,gate_up,down}/**", jp.lora(8, alpha=16)),
    ("**/*norm", jp.full()),  # these leaves themselves
)
if "--small" in sys.argv[1:]:
    base_steps, tune_steps, batch_size = 60, 60, 32


class Einsum(nnx.Module):
    """A kernel and the product it takes part in; no class of Flax's own."""

    def __init__(self, subscripts, shape, rngs):
        self.subscripts = subscripts
        self.w = nnx.Param(0.1 * jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.subscripts, x, self.w[...])


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.Param(jnp.ones(width))
        self.qkv = Einsum("btd,sdnh->sbtnh", (3, width, heads, width // heads), rngs)
        self.out = Einsum("btnh,nhd->btd", (heads, width // heads, width), rngs)
        self.mlp_norm = nnx.Param(jnp.ones(width))
        self.gate_up = nnx.Param(0.1 * jax.random.normal(rngs.params(), (2, width, 4 * width)))
        self.down = nnx.Param(0.1 * jax.random.normal(rngs.params(), (4 * width, width)))

    def __call__(self, x):  # (B, T, D)
        q, k, v = self.qkv(rms_norm(x, self.norm[...]))  # each (B, T, H, D / H)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        h, gate_up = rms_norm(x, self.mlp_norm[...]), self.gate_up[...]
        return x + (jax.nn.silu(h @ gate_up[0]) * (h @ gate_up[1])) @ self.down[...]


class Counter(nnx.Module):
    """Numbers (B, T) to logits (B, T, modulus) of the next number."""

    def __init__(self, rngs):
        make = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.layers = make(rngs.split(layers))
        self.table = nnx.Param(0.3 * jax.random.normal(rngs.params(), (modulus, width)))
        self.places = nnx.Param(0.3 * jax.random.normal(rngs.params(), (length, width)))
        self.final_norm = nnx.Param(jnp.ones(width))

    def __call__(self, tokens):
        x = self.table[...][tokens] + self.places[...][: tokens.shape[1]]
        x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )
        return rms_norm(x, self.final_norm[...]) @ self.table[...].T  # the head is tied


def counts(key, direction, count=batch_size):
    """Counts (B, T) from a random start, in steps of 1 to 4 up (direction 1) or down (-1)."""
    keys = jax.random.split(key)
    start = jax.random.randint(keys[0], (count, 1), 0, modulus)
    stride = jax.random.randint(keys[1], (count, 1), 1, 5)
    return (start + direction * stride * jnp.arange(length)) % modulus


def loss(logits, tokens):
    """Cross-entropy of each number but the first two, which cannot be known."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, 1:-1], tokens[:, 2:])
    return losses.mean()


def accuracy(apply, direction):
    """Share of right next numbers in 1024 fresh counts."""
    tokens = counts(jax.random.key(99), direction, 1024)
    return float((jax.jit(apply)(tokens).argmax(-1)[:, 1:-1] == tokens[:, 2:]).mean())


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


optimizer = optax.adam(learning_rate)


def training_step(apply):
    """A jitted step `(trained, state, params, tokens) -> (trained, state)` by hand."""

    @jax.jit
    def step(trained, state, params, tokens):
        grads = jax.grad(lambda t: loss(apply(t, params, tokens), tokens))(trained)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trained, updates), state

    return step


began = time.perf_counter()
model = nnx.eval_shape(lambda: Counter(nnx.Rngs(0)))  # shapes only; the arrays are in `params`
graphdef = nnx.graphdef(model)
params = jax.jit(lambda: nnx.state(Counter(nnx.Rngs(0))))()

run = lambda params, tokens: nnx.merge(graphdef, params, copy=True)(tokens)  # noqa: E731
step, state = training_step(lambda params, _, tokens: run(params, tokens)), optimizer.init(params)
up = jax.jit(lambda i: counts(jax.random.fold_in(jax.random.key(1), i), 1))
for i in range(base_steps):
    params, state = step(params, state, None, up(i))
base = lambda tokens: run(params, tokens)  # noqa: E731
before = accuracy(base, -1)
print(f"base:    up {accuracy(base, 1):.1%}, down {before:.1%}, {count(params):,} parameters")

tuned = jp.transform(model, tuning, strict=True)  # strict: an error where LoRA had no fast path
print(tuned.sites(params, up(0)))
adapter = jax.jit(tuned.init)(jax.random.key(2), params, up(0))
step, state = training_step(tuned.apply), optimizer.init(adapter)
down = jax.jit(lambda i: counts(jax.random.fold_in(jax.random.key(3), i), -1))
for i in range(tune_steps):
    adapter, state = step(adapter, state, params, down(i))
after = accuracy(lambda tokens: tuned.apply(adapter, params, tokens), -1)
print(f"adapter: down {after:.1%}, {count(adapter):,} parameters in {len(adapter)} sites")

merged = tuned.merge(adapter, params)  # an nnx.State for the plain module
tokens = down(0)
error = jnp.abs(jax.jit(run)(merged, tokens) - tuned.apply(adapter, params, tokens)).max()
print(f"merged:  differs from the adapter by at most {error:.1e} in a logit")
print(f"base:    still up {accuracy(base, 1):.1%}; took {time.perf_counter() - began:.0f} s")
assert after > before + 0.05 and error < 1e-3

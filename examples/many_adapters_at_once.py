"""Many adapters on one frozen model: made, trained and used all at once, by `jax.vmap`.

A small network, a plain function of its params, learns y = sin(x). Then each of N users brings a
handful of points of a sine wave of their own, with another amplitude and phase, and gets a LoRA
adapter. All adapters train in one program. After that a batch in which each row belongs to another
user is answered in one call. Training the adapters one by one gives the same results.

    python examples/many_adapters_at_once.py            # 12 s of CPU time
    python examples/many_adapters_at_once.py --small    # fewer users, as in the tests

Expect a mean squared error of 0.317 without the adapters and 0.003 with; those trained one by one
answer the same to 1e-6. Training all 64 took 0.28 s at once and 0.52 s one by one, on two CPU cores
that were busy with other things.

Variation: `users = 1000` took 9.2 s at once and 12.1 s one by one, error 0.002, there too.
"""

import sys
import time

import jax
import jax.numpy as jnp
import optax

import jaxpeft as jp

users = 64  # each with an adapter and data of their own
points = 16  # known points of each user's wave
width = 64  # of the network's two hidden layers
base_steps = 2000  # of training the base model
tune_steps = 500  # of training each adapter, base weights frozen
rank = 4  # of each LoRA update
learning_rate = 1e-2  # of Adam, for both
if "--small" in sys.argv[1:]:
    users, base_steps, tune_steps = 8, 500, 100


def model(params, x):  # (B,) -> (B,)
    h = jnp.tanh(x[:, None] @ params["first"] + params["first_bias"])
    h = jnp.tanh(h @ params["second"] + params["second_bias"])
    return (h @ params["last"])[:, 0]


def init_params(key):
    keys = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(keys[0], (1, width)),
        "first_bias": jnp.zeros(width),
        "second": jax.random.normal(keys[1], (width, width)) / width**0.5,
        "second_bias": jnp.zeros(width),
        "last": jax.random.normal(keys[2], (width, 1)) / width**0.5,
    }


def fit(loss, start, steps):
    """`steps` steps of Adam on `loss(trained)`, from `start` on."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(carry, _):
        trained, state = carry
        updates, state = optimizer.update(jax.grad(loss)(trained), state)
        return (optax.apply_updates(trained, updates), state), None

    (trained, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return trained


def timed(f, *args):
    """`f(*args)` and its seconds, after a first call that compiles."""
    jax.block_until_ready(f(*args))
    began = time.perf_counter()
    return jax.block_until_ready(f(*args)), time.perf_counter() - began


x = jnp.linspace(-3.0, 3.0, 64)
base_loss = lambda params: jnp.mean((model(params, x) - jnp.sin(x)) ** 2)  # noqa: E731
params = jax.jit(lambda key: fit(base_loss, init_params(key), base_steps))(jax.random.key(0))
print(f"base: mean squared error {base_loss(params):.1e} on sin(x)")

# Each user's data: N waves, and `points` of each.
keys = jax.random.split(jax.random.key(1), 3)
amplitude = jax.random.uniform(keys[0], (users, 1), minval=0.5, maxval=2.0)
phase = jax.random.uniform(keys[1], (users, 1), minval=-1.0, maxval=1.0)
xs = jax.random.uniform(keys[2], (users, points), minval=-3.0, maxval=3.0)
ys = amplitude * jnp.sin(xs + phase)

# `init`, `apply` and the training are pure functions of one adapter; vmap makes them work on N.
# `last` is a vector in all but name (64, 1): its rank can only be 1.
tuning = jp.rules(("second", jp.lora(rank)), ("{first,last}", jp.lora(1)), ("*_bias", jp.full()))
tuned = jp.transform(model, tuning, strict=True)


def train(key, x, y):
    """One user's adapter from their points."""
    start = tuned.init(key, params, x)
    loss = lambda adapter: jnp.mean((tuned.apply(adapter, params, x) - y) ** 2)  # noqa: E731
    return fit(loss, start, tune_steps)


user_keys = jax.random.split(jax.random.key(2), users)
adapters, at_once = timed(jax.jit(jax.vmap(train)), user_keys, xs, ys)
a = adapters["second"]["a"]
print(f"adapters: {users}, stacked in one tree, such as second/a {a.shape}")

alone = jax.jit(train)
jax.block_until_ready(alone(user_keys[0], xs[0], ys[0]))
began = time.perf_counter()
singles = [alone(user_keys[i], xs[i], ys[i]) for i in range(users)]
jax.block_until_ready(singles)
one_by_one = time.perf_counter() - began
print(f"training: {at_once:.2f} s at once, {one_by_one:.2f} s one by one")


# A batch of 512 questions, each from some user: every row takes its user's adapter.
@jax.jit
def answer(adapters, user, x):
    mine = jax.tree.map(lambda leaf: leaf[user], adapters)
    return jax.vmap(lambda adapter, x: tuned.apply(adapter, params, x[None])[0])(mine, x)


user = jax.random.randint(jax.random.key(3), (512,), 0, users)
questions = jax.random.uniform(jax.random.key(4), (512,), minval=-2.5, maxval=2.5)
truth = amplitude[user, 0] * jnp.sin(questions + phase[user, 0])
answers = answer(adapters, user, questions)
before, after = (jnp.mean((y - truth) ** 2) for y in (model(params, questions), answers))
print(f"answers: mean squared error {before:.3f} without adapters, {after:.3f} with")

stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
difference = jnp.abs(answer(stacked, user, questions) - answers).max()
print(f"equal: adapters trained one by one answer the same to {difference:.1e}")
assert after < 0.5 * before and difference < 1e-2

"""Multitask prompt tuning against PEFT's module, and the ways to start a target task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import MultitaskPromptTuningConfig
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from safetensors.torch import save_file

import jaxpeft as jp
from jaxpeft.methods.multitask_prompt import (
    average_source_tasks,
    exact_source_task,
    multitask_prompt_tuning,
    only_source_shared,
)

N, D, TASKS, RANKS, VOCABULARY = 3, 4, 5, 2, 7
TABLE = np.random.default_rng(0).standard_normal((VOCABULARY, D)).astype(np.float32)
PARAMS = {"table": TABLE}
IDS, CHOSEN = jnp.array([[1, 2, 6], [0, 4, 3]]), jnp.array([4, 1])


def model(params, tokens):
    x = jnp.take(params["table"], tokens, axis=0)
    return jnp.tanh(jnp.cumsum(x, axis=1)) @ params["table"].T


def expected(prompts, ids):
    """The model in float64 with prompts `(B, n, d)` in front."""
    wide = np.asarray(TABLE, np.float64)
    x = np.concatenate([prompts, wide[ids]], axis=1)
    return (np.tanh(np.cumsum(x, 1)) @ wide.T)[:, prompts.shape[1] :]


def module(**options):
    config = MultitaskPromptTuningConfig(
        num_tasks=options.pop("tasks", TASKS), num_ranks=RANKS, num_virtual_tokens=N, token_dim=D,
        num_transformer_submodules=1, task_type="CAUSAL_LM", **options,
    )  # fmt: skip
    return MultitaskPromptEmbedding(config, torch.nn.Embedding(VOCABULARY, D))


def leaves_of(theirs):
    values = theirs.embedding.weight, theirs.prefix_task_cols, theirs.prefix_task_rows
    names = "prompt", "columns", "rows"
    return {n: jnp.asarray(v.detach().numpy()) for n, v in zip(names, values, strict=True)}


def prompts_of(theirs, task_ids):
    indices = torch.arange(N)[None].expand(len(task_ids), -1)
    return theirs(indices, torch.tensor(np.asarray(task_ids))).detach().numpy()


@pytest.fixture(scope="module")
def tuned():
    return jp.transform(model, multitask_prompt_tuning(N, TASKS, ranks=RANKS))


@pytest.fixture(scope="module")
def sources(tuned):
    """PEFT's module over source tasks, with larger factors, and the adapter of its weights."""
    theirs = module()
    for factor in (theirs.prefix_task_cols, theirs.prefix_task_rows):
        factor.data.mul_(50)
    fresh = jax.eval_shape(tuned.init, jax.random.key(0), PARAMS, IDS)
    leaves = leaves_of(theirs)
    assert jax.tree.map(jnp.shape, leaves) == jax.tree.map(jnp.shape, dict(fresh["table"]))
    return theirs, jp.Adapter({"table": leaves}, fresh.sites)


def test_each_sequence_has_the_prompt_of_its_task(tuned, sources):
    theirs, adapter = sources
    apply = jax.jit(tuned.apply)
    want = expected(prompts_of(theirs, CHOSEN), IDS)
    np.testing.assert_allclose(apply(adapter, PARAMS, IDS, task_ids=CHOSEN), want, 1e-4, 1e-5)
    with pytest.raises(ValueError, match=r"call apply\(..., task_ids=ids\)"):
        tuned.apply(adapter, PARAMS, IDS)


def test_gradients_are_those_of_the_formula_and_none_for_tasks_that_are_absent(tuned, sources):
    _, adapter = sources

    def formula(adapter):
        leaves = adapter["table"]
        prompts = leaves["prompt"] * (leaves["columns"] @ leaves["rows"])[CHOSEN]
        x = jnp.concatenate([prompts, TABLE[IDS]], axis=1)
        return jnp.sin(jnp.tanh(jnp.cumsum(x, axis=1)) @ TABLE.T)[:, N:].sum()

    def ours(adapter):
        return jnp.sin(tuned.apply(adapter, PARAMS, IDS, task_ids=CHOSEN)).sum()

    got, want = jax.jit(lambda a: (jax.grad(ours)(a), jax.grad(formula)(a)))(adapter)
    for name, leaf in want["table"].items():
        np.testing.assert_allclose(got["table"][name], leaf, rtol=1e-4, atol=1e-5)
    assert not got["table"]["rows"][jnp.array([0, 2, 3])].any()


@pytest.mark.parametrize("how", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK"])
def test_a_target_task_starts_as_in_peft(how, sources, tmp_path):
    theirs, adapter = sources
    state = {
        "prompt_embeddings": theirs.embedding.weight.data,
        "prefix_task_cols": theirs.prefix_task_cols.data,
        "prefix_task_rows": theirs.prefix_task_rows.data,
    }
    save_file(state, tmp_path / "source.safetensors")
    target = module(
        tasks=1, prompt_tuning_init=how, prompt_tuning_init_task=3,
        prompt_tuning_init_state_dict_path=str(tmp_path / "source.safetensors"),
    )  # fmt: skip
    exact = how == "EXACT_SOURCE_TASK"
    start = exact_source_task(adapter, 3) if exact else average_source_tasks(adapter)
    for name, leaf in leaves_of(target).items():
        np.testing.assert_allclose(start["table"][name], leaf, rtol=1e-6, atol=1e-7)
    single = jp.transform(model, multitask_prompt_tuning(N, 1, ranks=RANKS))
    got = jax.jit(single.apply)(start, PARAMS, IDS)
    want = expected(prompts_of(target, [0, 0]), IDS)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_shared_prompt_alone_starts_other_tasks(sources):
    _, adapter = sources
    target = jp.transform(model, multitask_prompt_tuning(N, 2, ranks=RANKS))
    fresh = target.init(jax.random.key(0), PARAMS, IDS)
    start = only_source_shared(adapter, fresh)
    np.testing.assert_array_equal(start["table"]["prompt"], adapter["table"]["prompt"])
    for name in ("columns", "rows"):
        np.testing.assert_array_equal(start["table"][name], fresh["table"][name])
    plain = jp.transform(model, jp.prompt_tuning(N)).init(jax.random.key(0), PARAMS, IDS)
    with pytest.raises(ValueError, match="no multitask prompt"):
        average_source_tasks(plain)


def test_factors_start_small_and_the_number_of_parameters_is_the_formula():
    tokens, tasks, ranks = 30, 20, 2
    tuned = jp.transform(model, multitask_prompt_tuning(tokens, tasks, ranks=ranks, init=[1, 2]))
    leaves = tuned.init(jax.random.key(0), PARAMS, IDS)["table"]
    np.testing.assert_array_equal(leaves["prompt"], TABLE[[1, 2] * 15])
    assert float(leaves["columns"].std()) == pytest.approx(0.02, rel=0.1)
    count = sum(leaf.size for leaf in leaves.values())
    assert count == tokens * D + tasks * ranks * (tokens + D)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((0, 2), "tokens=0"), ((2, 0), "tasks=0"), ((2, 2.0), "tasks=2.0")],
)
def test_numbers_are_checked(arguments, says):
    with pytest.raises(ValueError, match=says):
        multitask_prompt_tuning(*arguments)
    with pytest.raises(ValueError, match="ranks=0"):
        multitask_prompt_tuning(2, 2, ranks=0)

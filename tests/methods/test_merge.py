"""What cannot be merged says why and what to do instead: every public method on activations."""

import inspect
import re

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from tests.methods.decoding import IDS, decoder, filled

MODEL, PARAMS = decoder()


def at(where, method):
    return jp.rules((where, method))


MLP = "layers/mlp:delta"
BOTTLENECKS = (
    "adapter_plus", "compacter", "compacter_plus", "houlsby", "layers", "parallel_adapter",
    "pfeiffer",
)  # fmt: skip
CALLS = {
    "adapter_plus": jp.adapter_plus(width=2),
    "average": at(MLP, jp.average(jp.bottleneck(2), jp.bottleneck(2))),
    "batch_split": at(MLP, jp.batch_split(jp.bottleneck(2), None, sizes=(1, 1))),
    "bottleneck": jp.bottleneck(2),
    "cartridge": jp.cartridge(2),
    "compacter": jp.compacter(width=2, phm=jp.phm(2)),
    "compacter_plus": jp.compacter_plus(width=2, phm=jp.phm(2)),
    "cpt": jp.cpt([5, 1], [1, 2]),
    "deep_prompt": at("layers:in", jp.deep_prompt(1, inside="norm")),
    "direft": at("layers:out", jp.direft(2)),
    "fuse": at(MLP, jp.fuse(jp.bottleneck(2), jp.bottleneck(2))),
    "houlsby": jp.houlsby(width=2),
    "ia3 on activations": at("**/k_proj:out", jp.ia3("activations")),
    "invertible": at("embed_tokens:out", jp.invertible(8)),
    "ladder": at("norm:in", jp.ladder(2, 2)),
    "layers": jp.layers(jp.houlsby(width=2), [1]),
    "llama_adapter": jp.llama_adapter(2),
    "loreft": at("layers:out", jp.loreft(2)),
    "multitask_prompt_tuning": jp.multitask_prompt_tuning(2, 3),
    "noreft": at("layers:out", jp.noreft(2)),
    "p_tuning": jp.p_tuning(2, hidden=3),
    "parallel_adapter": jp.parallel_adapter(width=2),
    "pfeiffer": jp.pfeiffer(width=2),
    "prefix_tuning": jp.prefix_tuning(2),
    "prompt_tuning": jp.prompt_tuning(2),
    "shadow": jp.shadow(2),
    "split": at(MLP, jp.split(jp.bottleneck(2), None, at=1)),
}


def test_the_table_has_every_public_method_that_is_no_change_of_weights():
    made = {
        name for name, f in vars(jp).items()
        if inspect.isfunction(f) and inspect.signature(f).return_annotation == "Method"
    }  # fmt: skip
    weights = {"lora", "rslora", "qalora", "ia3", "full", "bitfit", "norm_tuning"}
    assert made <= weights | {name.split(" ")[0] for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_merging_says_why_it_cannot_be_and_what_to_do(name):
    tuned = jp.transform(MODEL, jp.chain(jp.rules(("**/q_proj/kernel", jp.lora(2))), CALLS[name]))
    adapter = jax.eval_shape(tuned.init, jax.random.key(0), PARAMS, IDS)
    with pytest.raises(ValueError, match="cannot be merged") as error:
        tuned.merge(adapter, PARAMS)
    own = name.split(" ")[0]
    named = jp.houlsby().name if own in BOTTLENECKS else own
    reason = "depends on them|virtual tokens beside those|hands a state"
    assert re.match(rf"`{named}` at '[^']+' .*({reason}).* no weight holds", str(error.value))
    for what in ("tuned.apply(adapter", "jaxpeft.serve.generate", "jaxpeft.save"):
        assert what in str(error.value)


def test_what_is_beside_it_merges_alone():
    rest = jp.transform(MODEL, jp.rules(("**/q_proj/kernel", jp.lora(2))))
    both = jp.transform(MODEL, jp.chain(rest.tuning, jp.houlsby(width=2)))
    adapter = jax.eval_shape(both.init, jax.random.key(0), PARAMS, IDS)
    path = "layers/self_attn/q_proj/kernel"
    leaves = filled(adapter[path]["0"])
    part = jp.Adapter({path: leaves}, [s for s in adapter.sites if s.path == path])
    merged = rest.merge(part, PARAMS)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), merged, PARAMS)
    assert sum(jax.tree.leaves(changed)) == 1

"""Module names, against peft's own matching."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from jaxpeft.hf.config import Options
from jaxpeft.hf.match import ends, in_layers, shortest

MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 11)
    for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm", "experts.1.q_proj")
] + ["model.embed_tokens", "lm_head", "model.norm", "q_proj", "xq_proj"]

names = st.sampled_from(
    ["q_proj", "self_attn.q_proj", "1.self_attn.q_proj", "proj", "norm", "lm_head", "mlp", "layers"]
)
patterns = st.sampled_from(
    [".*", r".*q_proj", "q_proj", r"model\.layers\.1\..*", r".*\.(1|11)\..*_proj", "lm_head|.*norm"]
)
chosen = st.one_of(patterns, st.lists(names, max_size=3))


@given(
    target=chosen,
    exclude=st.one_of(st.none(), chosen),
    whole=st.one_of(st.none(), st.lists(names, max_size=2)),
    layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 12), max_size=2)),
    within=st.one_of(st.none(), st.sampled_from(["layers", ["layers", "experts"], "h", "", []])),
)
@settings(max_examples=200, deadline=None)
def test_targets_are_those_of_peft(target, exclude, whole, layers, within):
    values = dict(
        target_modules=target,
        exclude_modules=exclude,
        modules_to_save=whole,
        layers_to_transform=layers,
        layers_pattern=within,
    )
    theirs = SimpleNamespace(**values, target_parameters=None)
    ours = Options(**values)
    for module in MODULES:
        expected = check_target_module_exists(theirs, module)
        excluded = type(expected).__name__ == "_ExcludedModule"
        assert ours.targets(module, True, "lm_head") == (bool(expected) and not excluded), module


@given(keys=st.lists(st.one_of(names, patterns), max_size=3, unique=True))
@settings(deadline=None)
def test_rank_patterns_are_those_of_peft(keys):
    pattern = {key: i + 1 for i, key in enumerate(keys)}
    for module in MODULES:
        expected = pattern.get(get_pattern_key(pattern.keys(), module), 99)
        assert Options(r=99, rank_pattern=pattern).rank(module) == expected
        assert Options(lora_alpha=99, alpha_pattern=pattern).alpha(module) == expected


# A module whose whole name is the end of another's cannot be chosen alone.
DISTINCT = [module for module in MODULES if module != "q_proj"]


@given(wanted=st.sets(st.sampled_from(DISTINCT), min_size=1))
@settings(deadline=None)
def test_the_shortest_names_choose_exactly_what_is_wanted(wanted):
    found = shortest(wanted, DISTINCT, lambda name, module: ends(module, [name]))
    assert {module for module in DISTINCT if ends(module, found)} == wanted
    for name in found:
        rest = [other for other in found if other != name]
        assert {module for module in DISTINCT if ends(module, rest)} != wanted


def test_a_bad_pattern_is_named():
    with pytest.raises(ValueError, match=r"target_modules='\(' is no regular expression"):
        Options(target_modules="(").targets("q_proj", True, "lm_head")
    with pytest.raises(ValueError, match="layers_pattern"):
        in_layers("model.layers.1.q_proj", [1], ["("])

"""Globs, order, and what an unmatched rule says."""

import fnmatch

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxpeft as jp
from jaxpeft.core.rules import compile_pattern, first_match, nearest

PATHS = ("q_proj/kernel", "layers/0/attn/q_proj/kernel", "layers/1/attn/v_proj/bias", "norm/scale")


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("**", "a", True),
        ("**", "a/b/c", True),
        ("*", "a", True),
        ("*", "a/b", False),
        ("a/*", "a/b", True),
        ("a/*", "a", False),
        ("a/*", "a/b/c", False),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("**/kernel", "a/my_kernel", False),
        ("a/**", "a", True),
        ("a/**", "a/b/c", True),
        ("a/**", "ab", False),
        ("a/**/z", "a/z", True),
        ("a/**/z", "a/b/c/z", True),
        ("a/**/z", "a/b/c", False),
        ("**/{q,v}_proj/**", "layers/0/q_proj/kernel", True),
        ("**/{q,v}_proj/**", "layers/0/k_proj/kernel", False),
        ("**/{q,v}_proj/**", "v_proj", True),
        ("**/{*_proj,fc?}/kernel", "mlp/fc1/kernel", True),
        ("**/{*_proj,fc?}/kernel", "mlp/fc12/kernel", False),
        ("**/norm*/**", "layers/norm_1/scale", True),
        ("**/norm*/**", "layers/my_norm/scale", False),
        ("a.b/[0]", "a.b/[0]", True),
        ("a.b/[0]", "axb/0", False),
    ],
)
def test_globs(glob, path, matches):
    assert compile_pattern(glob)(path, None) is matches


names = st.text("abq_", min_size=1, max_size=4)


@given(st.lists(names, min_size=1, max_size=4), st.text("abq_*?", min_size=1, max_size=4))
def test_within_a_level_globs_are_those_of_fnmatch(levels, pattern):
    path = "/".join(levels)
    if "**" in pattern:
        return
    want = len(levels) == 1 and fnmatch.fnmatchcase(path, pattern)
    assert compile_pattern(pattern)(path, None) is want


@given(st.lists(names, min_size=1, max_size=4), st.lists(names, max_size=3))
def test_two_stars_stand_for_any_number_of_levels(tail, head):
    path = "/".join([*head, *tail])
    assert compile_pattern("**/" + "/".join(tail))(path, None)
    assert compile_pattern("/".join([*head, "**"]) if head else "**")(path, None)


def test_predicates_see_the_path_and_the_leaf():
    seen = compile_pattern(lambda path, leaf: path == "a" and leaf == 3)
    assert seen("a", 3) and not seen("a", 4) and not seen("b", 3)


def test_the_first_rule_that_matches_wins():
    found = first_match([("**/q_proj/**", 1), ("layers/**", 2)], [(path, None) for path in PATHS])
    assert found == {PATHS[0]: 1, PATHS[1]: 1, PATHS[2]: 2}


def test_a_rule_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(ValueError, match=r"where='\*\*/query/kernel' matched none of the 4 leaves"):
        first_match([("**/query/kernel", 1)], [(path, None) for path in PATHS])
    with pytest.raises(ValueError, match=r"Nearest: .*'q_proj/kernel'.*Use `tuned.sites"):
        first_match([("**/qproj/kernel", 1)], [(path, None) for path in PATHS])
    with pytest.raises(ValueError, match="the predicate .* matched none of the 4 leaves"):
        first_match([(lambda path, leaf: False, 1)], [(path, None) for path in PATHS])


def test_nearest_reads_a_pattern_without_wildcards():
    assert nearest("**/norm*/scale", PATHS, 1) == ["norm/scale"]
    assert nearest("**/v_proj", PATHS, 1) == ["layers/1/attn/v_proj/bias"]


@pytest.mark.parametrize("pattern", ["", "/a"])
def test_patterns_that_can_match_nothing_are_refused_at_once(pattern):
    with pytest.raises(ValueError, match="paths have no leading '/'"):
        jp.rules((pattern, jp.lora(2)))


def test_rules_take_pairs_of_a_pattern_and_a_method():
    with pytest.raises(TypeError, match=r"takes \(pattern, method\) pairs, got 'a'"):
        jp.rules("a", jp.lora(2))
    with pytest.raises(TypeError, match="a glob or a predicate"):
        jp.rules((3, jp.lora(2)))


PARAMS = {"q": {"w": jnp.ones((5, 7)), "b": jnp.ones(7)}, "out": {"w": jnp.ones((7, 3))}}
X = jnp.ones((2, 5))


def model(params, x):
    return (x @ params["q"]["w"] + params["q"]["b"]) @ params["out"]["w"]


def placed(tuning):
    adapter = jax.eval_shape(jp.transform(model, tuning).init, jax.random.key(0), PARAMS, X)
    return {path: tuple(leaves) for path, leaves in adapter.items()}


LORA, FULL = ("a", "b"), ("value",)


@pytest.mark.parametrize(
    ("tuning", "want"),
    [
        (jp.lora(2), {"out/w": LORA, "q/w": LORA}),
        (jp.full(), {"out/w": FULL, "q/b": FULL, "q/w": FULL}),
        (jp.rules(("q/**", jp.lora(2))), {"q/w": LORA}),
        (
            jp.rules(("q/*", jp.lora(2)), ("**", jp.full())),
            {"out/w": FULL, "q/b": FULL, "q/w": LORA},
        ),
        (jp.rules((lambda path, site: site.shape == (7, 3), jp.full())), {"out/w": FULL}),
        (
            jp.chain(jp.rules(("q/w", jp.lora(2))), jp.rules(("out/w", jp.full()))),
            {"out/w": ("1",), "q/w": ("0",)},
        ),
        (jp.chain(jp.lora(2), jp.rules(("q/w", jp.lora(1)))), {"out/w": ("0",), "q/w": ("0", "1")}),
    ],
)
def test_where_methods_go(tuning, want):
    assert placed(tuning) == want


def test_a_rule_whose_method_cannot_work_where_it_matched_says_so():
    with pytest.raises(ValueError, match=r"matched 'q/b', but `lora` cannot work there.*full\(\)"):
        placed(jp.rules(("q/b", jp.lora(2))))


def test_a_rule_that_fits_no_parameter_names_the_nearest():
    with pytest.raises(ValueError, match="matched none of the 3 parameters. Nearest: 'q/w'"):
        placed(jp.rules(("**/q/weight", jp.lora(2))))


@pytest.mark.parametrize("tuning", [3, "lora", {"**": jp.lora(2)}, jp.lora])
def test_a_tuning_of_another_type_is_refused(tuning):
    with pytest.raises(TypeError, match=r"a tuning is a method, rules\(...\) or chain\(...\), got"):
        placed(tuning)


def test_a_rule_of_something_that_is_no_method_is_refused():
    with pytest.raises(TypeError, match="'q/w' is paired with 3, which is no method"):
        placed(jp.rules(("q/w", 3)))


def test_a_bare_method_that_fits_nothing_is_an_error():
    tuned = jp.transform(lambda params, x: x + params, jp.lora(2))
    with pytest.raises(ValueError, match="fits none of the 1 parameters"):
        tuned.init(jax.random.key(0), jnp.ones(3), jnp.ones(3))

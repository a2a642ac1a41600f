"""Adapters that were read from AdapterHub's files survive in the library's own."""

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.hf.adapterhub import load_adapterhub
from jaxpeft.hf.native import describe
from tests.hf.adapterhub.conftest import FIXTURES, base

CASES = (
    "prefix_tuning", "prompt_tuning", "ia3_gated", "mam", "fusion_dynamic", "leave_out",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_enough(name, tmp_path):
    model, _ = base("bert")
    tuned, adapter = load_adapterhub(FIXTURES / "bert" / name, model)
    jp.save(tmp_path / "native", adapter, tuned)
    again, back = jp.load(tmp_path / "native", model)
    jax.tree.map(np.testing.assert_array_equal, dict(back), dict(adapter))
    one, other = (
        [(where, describe(method)) for where, method in each.tuning.pairs]
        for each in (tuned, again)
    )
    assert sorted(one, key=str) == sorted(other, key=str)
    assert again.trainable(back) == tuned.trainable(adapter)


def test_a_fusion_of_what_no_file_can_name_is_refused(tmp_path):
    model, params = base("bert")
    inner = jp.bottleneck(2, activation=lambda x: x * x)
    tuned = jp.transform(model, jp.rules(("**/output:delta", jp.fuse(inner, inner))))
    adapter = tuned.init(jax.random.key(0), params, *model.example())
    jp.save(tmp_path / "native", adapter, tuned)
    with pytest.raises(ValueError, match="tuning="):
        jp.load(tmp_path / "native", model)

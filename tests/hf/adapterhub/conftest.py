"""The models and the files in tests/fixtures/adapterhub, which AdapterHub's library wrote."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

import jaxpeft as jp

FIXTURES = Path(__file__).parents[2] / "fixtures/adapterhub"
KINDS = ("bert", "bert_bare", "roberta", "distilbert", "t5", "t5_gated", "vit")

# One of each kind is enough for every run; the others differ from these in one option.
QUICK = {
    "bert/adapter_plus", "bert/compacter_shared", "bert/fusion_static", "bert/ia3_gated",
    "bert/leave_out", "bert/loreft", "bert/par_bn_ln", "bert/prompt_tuning", "bert/reduction_map",
    "bert/residual_post_add", "distilbert/seq_bn_inv", "roberta/lora", "t5/double_seq_bn",
    "t5/prefix_tuning_encoder", "vit/prefix_tuning",
}  # fmt: skip


def cases(*kinds):
    """The directories of adapters, as "model/adapter"."""
    paths = sorted(path for kind in kinds or KINDS for path in (FIXTURES / kind).iterdir())
    return [f"{path.parent.name}/{path.name}" for path in paths if path.is_dir()]


@functools.cache
def base(kind):
    """`(model, params)`."""
    return jp.models.load(FIXTURES / kind, dtype="float32")


@functools.cache
def bare(kind, architecture):
    """The model without its head."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(FIXTURES / kind / "model.safetensors", folder)
        config = json.loads((FIXTURES / kind / "config.json").read_text())
        changed = config | {"architectures": [architecture]}
        Path(folder, "config.json").write_text(json.dumps(changed))
        return jp.models.load(folder, dtype="float32")


@functools.cache
def inputs(kind):
    """`(positional, named)` arguments of the model's call."""
    feed = load_file(FIXTURES / kind / "inputs.safetensors")
    if kind == "vit":
        return (feed["pixel_values"].transpose(0, 2, 3, 1),), {}
    mask = feed["attention_mask"].astype(bool)
    names = ["input_ids", "decoder_input_ids"][: 1 + kind.startswith("t5")]
    return tuple(feed[name].astype("int32") for name in names), {"mask": mask}


@functools.cache
def stored(kind):
    return load_file(FIXTURES / kind / "expected.safetensors")


def outputs(kind, tuned, adapter, params, **more):
    positional, named = inputs(kind)
    call = jax.jit(lambda a, p: tuned.apply(a, p, *positional, **named, **more))
    return np.asarray(call(adapter, params))

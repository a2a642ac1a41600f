"""Write tests/fixtures/adapterhub with the library `adapters`, or check files against it.

Runs in an environment of its own, because `adapters` needs transformers 4:

    pip install torch==2.13.0 adapters==1.3.0
    python scripts/adapterhub_fixtures.py                        # write the fixtures
    python scripts/adapterhub_fixtures.py --check FOLDER         # do these load, and equal?

`FOLDER` holds `<model>/<adapter>/` and `<model>/fusion_<name>/` directories, of the same names as
the fixtures, that another library wrote.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapterhub_cases import BASES
from adapters import Fuse
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()

FOLDER = Path(__file__).parents[1] / "tests" / "fixtures" / "adapterhub"
CONFIG = "adapter_config.json"
SAFE_FUSION = "model_adapter_fusion.safetensors"
Tensors = dict[str, Tensor]


def noise(shape: torch.Size, name: str, scale: float) -> Tensor:
    seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return scale * torch.randn(shape, generator=seed)


def reflectors(shape: torch.Size, name: str) -> Tensor:
    """A random Householder form: its diagonal holds signs."""
    x = noise(shape, name, 0.3).fill_diagonal_(-1.0)
    x[0, 0] = 1.0
    return x


def randomize(model: nn.Module, known: Collection[str] = ()) -> None:
    """Move every parameter that is not `known` away from its initial value."""
    for name, value in model.named_parameters():
        if name in known:
            continue
        if name.endswith("parametrizations.weight.original"):
            value.data = reflectors(value.shape, name)
        else:
            value.data = value.data + noise(value.shape, name, 0.3)


def inputs(kind: str) -> Tensors:
    seed = torch.Generator().manual_seed(0)
    if kind == "vit":
        return {"pixel_values": torch.randn((2, 3, 8, 8), generator=seed)}
    ids = torch.randint(2, 31, (3, 7), generator=seed)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    if kind == "roberta":  # its positions are counted from the ids that are not padding
        ids = torch.where(mask == 1, ids, 1)
    feed = {"input_ids": ids, "attention_mask": mask}
    if kind.startswith("t5"):
        feed["decoder_input_ids"] = torch.randint(2, 31, (3, 5), generator=seed)
    return feed


@torch.no_grad()
def outputs(model: Any, feed: Tensors) -> Tensors:
    """The last hidden state (of T5: the decoder's) and the logits, if the model has any."""
    out = getattr(model, "transformer", model)(**feed, output_hidden_states=True)
    state = (out.get("decoder_hidden_states") or out.hidden_states)[-1]
    if hasattr(model, "vit"):  # whose list holds states in front of norms and interventions
        state = model.vit(**feed).last_hidden_state
    found = {"last_hidden_state": state}
    if "logits" in out:
        found["logits"] = out.logits
    return {k: v.clone().contiguous() for k, v in found.items()}


def write_base(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = BASES[kind].build()
    randomize(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file(inputs(kind), folder / "inputs.safetensors")


def flexible(folder: Path, cls: Any) -> Any:
    """A model of one of the library's own classes, with the weights of the base model."""
    model = cls(transformers.AutoConfig.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    missing, _ = model.base_model.load_state_dict(weights, strict=False)
    if set(missing) - {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}:
        raise ValueError(f"{folder}: no weights for {missing}")
    return model


def fresh(folder: Path, kind: str) -> Any:
    """The base model, ready for adapters. Attention is `eager`: there, all masks are right."""
    if BASES[kind].flexible:
        model = flexible(folder, BASES[kind].flexible)
    else:
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        cls = getattr(transformers, name)
        model = cls.from_pretrained(folder, attn_implementation="eager")
        adapters.init(model)
    model.config._name_or_path = f"tiny-{kind}"
    return model.eval()


def add(model: Any, name: str, config: Any) -> None:
    torch.manual_seed(0)
    known = dict(model.named_parameters())
    model.add_adapter(name, config=config)
    randomize(model, known)


def save(write: Callable[..., None], folder: Path, stem: str, binary: str) -> None:
    """Save in safetensors, also where the library itself can write shared tensors in .bin only."""
    try:
        write(str(folder), use_safetensors=True)
    except RuntimeError:
        write(str(folder))
        tensors = torch.load(folder / binary, weights_only=True)
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / stem)
        (folder / binary).unlink()


def save_adapter(model: Any, folder: Path, name: str) -> None:
    headed = {"with_head": False} if hasattr(model, "save_head") else {}
    write = partial(model.save_adapter, adapter_name=name, **headed)
    save(write, folder, "adapter.safetensors", "pytorch_adapter.bin")


def save_fusion(model: Any, folder: Path, names: list[str]) -> None:
    write = partial(model.save_adapter_fusion, adapter_names=names)
    save(write, folder, SAFE_FUSION, "pytorch_model_adapter_fusion.bin")


def age(folder: Path) -> None:
    """Turn an adapter into what the library's first version wrote."""
    path = folder / CONFIG
    config = json.loads(path.read_text())
    del config["version"]
    config["config"]["non_linearity"] = "gelu"
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    tensors = load_file(folder / "adapter.safetensors")
    old = {
        k.replace(
            "attention.output.adapters", "attention.output.attention_text_task_adapters"
        ).replace(".output.adapters", ".output.layer_text_task_adapters"): v
        for k, v in tensors.items()
    }
    save_file(old, folder / "adapter.safetensors")


def reload(folder: Path, kind: str, adapter: Path) -> Any:
    """The base model with an adapter from its directory."""
    model = fresh(folder, kind)
    info: dict[str, Any] = {}
    load = dict(use_safetensors=True, loading_info=info, set_active=True)
    headed = {"with_head": False} if hasattr(model, "save_head") else {}
    model.load_adapter(str(adapter), **load, **headed)
    if info["unexpected_keys"] or info["missing_keys"]:
        raise ValueError(f"{adapter}: {info}")
    return model.eval()


def write_adapter(folder: Path, kind: str, name: str, config: Any) -> dict[str, Tensors]:
    feed = inputs(kind)
    model = fresh(folder, kind)
    add(model, name, config)
    model.set_active_adapters(name)
    save_adapter(model, folder / name, name)
    if name == "legacy":
        age(folder / name)
    expected = {name: outputs(model, feed)}
    again = outputs(reload(folder, kind, folder / name), feed)
    if name == "direft":
        expected["direft_reloaded"] = again
    elif difference(again, expected[name]) > 1e-5:
        raise ValueError(f"{kind}/{name} differs when it is loaded again")
    return expected


def write_fusion(folder: Path, kind: str, name: str) -> dict[str, Tensors]:
    children, config = BASES[kind].fusions[name]
    model = reload(folder, kind, folder / children[0])
    for child in children[1:]:
        model.load_adapter(str(folder / child), use_safetensors=True, with_head=False)
    known = dict(model.named_parameters())
    model.add_adapter_fusion(children, config=config)
    randomize(model, known)
    model.set_active_adapters(Fuse(*children))
    save_fusion(model, folder / f"fusion_{name}", children)
    return {f"fusion_{name}": outputs(model.eval(), inputs(kind))}


def difference(found: Tensors, expected: Tensors) -> float:
    return max(float((found[k] - expected[k]).abs().max()) for k in expected)


def write_binary(folder: Path, base: Path, name: str) -> None:
    """One adapter in the pickled form that the library writes unless told otherwise."""
    shutil.rmtree(folder, ignore_errors=True)
    reload(base, "bert", base / name).save_adapter(str(folder), name, with_head=False)


def write(root: Path) -> None:
    for kind, base in BASES.items():
        folder = root / kind
        shutil.rmtree(folder, ignore_errors=True)
        write_base(folder, kind)
        expected = {"base": outputs(fresh(folder, kind), inputs(kind))}
        for name, config in base.adapters.items():
            expected |= write_adapter(folder, kind, name, config)
        for name in base.fusions:
            expected |= write_fusion(folder, kind, name)
        flat = {f"{name}/{k}": v for name, out in expected.items() for k, v in out.items()}
        save_file(flat, folder / "expected.safetensors")
        print(f"{kind}: {len(expected)} cases")
    write_binary(root / "binary", root / "bert", "prefix_tuning")


def load_fusion(folder: Path, kind: str, fusion: Path) -> Any:
    children = BASES[kind].fusions[fusion.name.removeprefix("fusion_")][0]
    model = reload(folder, kind, folder / children[0])
    for child in children[1:]:
        model.load_adapter(str(folder / child), use_safetensors=True, with_head=False)
    model.load_adapter_fusion(str(fusion), use_safetensors=True)
    model.set_active_adapters(Fuse(*children))
    return model.eval()


def check(root: Path, others: Path) -> None:
    """Load each directory of `others` here, and compare the outputs with the expected ones."""
    worst = 0.0
    for path in sorted(p for p in others.glob("*/*") if p.is_dir()):
        kind, name = path.parent.name, path.name
        if name == "direft" and others == root:  # see README.md
            continue
        fusion = name.startswith("fusion_")
        model = (load_fusion if fusion else reload)(root / kind, kind, path)
        expected = load_file(root / kind / "expected.safetensors")
        part = {k.partition("/")[2]: v for k, v in expected.items() if k.startswith(f"{name}/")}
        found = difference(outputs(model, inputs(kind)), part)
        worst = max(worst, found)
        print(f"{kind}/{name}: {found:.1e}")
    if worst > 1e-5:
        raise SystemExit(f"the largest difference is {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the fixtures are")
    parser.add_argument("--check", type=Path, help="a folder of files to load and compare")
    options = parser.parse_args()
    if options.check:
        check(options.out, options.check)
    else:
        write(options.out)


if __name__ == "__main__":
    main()

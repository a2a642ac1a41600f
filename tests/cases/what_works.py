"""Writes `docs/what_works.md` from the table of cases: `python -m tests.cases.what_works`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.cases import CASES, Case

PAGE = Path(__file__).parents[2] / "docs" / "what_works.md"
PEERS = {"qwix": "qwix 0.1.8", "quax": "quax 0.4.6", "gemma": "gemma 3.3.0"}

HEAD = """\
# What works

Models are written in many ways. This page lists the ways that we know of, found in public JAX code,
and what LoRA does on each: `jaxpeft`, and beside it other JAX libraries where they were measured.

| | |
|---|---|
| fast | the update runs as `(x A) B`; `A B` is never formed |
| dense | right, but `W + A B` is formed, as costly as training the weight itself |
| fails | an error |
| silent | no adapter is made there and nothing says so |
| – | not measured |

Every row is a small model in `tests/cases`. For each of them `tests/test_laws.py` checks the
outputs and the gradients against the merged model. Where our column says "fast", it also runs under
`strict=True`, and the compiled training step is searched for arrays of the weight's size (a
`while_loop` has no such step). Where it says "dense", you get a warning that names the weight, the
operation and the line, or an error under `strict=True`. All of it holds over quantized weights as
well: outputs, gradients and merged weights are those over the dense ones, and where our column says
"fast", the backward pass keeps no dense weight.

The other columns were measured with jax 0.10.2 and flax 0.12.8 on a CPU: `apply_lora_to_model` of
qwix 0.1.8, the `LoraArray` example of quax 0.4.6, and `gm.nn.LoRA` of gemma 3.3.0. They are results
on the operation that a row names, inside a module where the library needs one (qwix and gemma do
not take functions). lorax 0.3.1 cannot be imported with that jax. The columns are meant as a map of
what is hard, not as a ranking: newer versions may do better.
"""

PUBLISHED = """\
# Published models

Small random ones, with jax 0.10.2 and flax 0.12.8 on a CPU. "LoRA" is `jp.lora` on every linear map
under `strict=True`, with outputs and gradients equal to those of the merged model. "nf4, int8" is
the same over `jp.quantize`d weights, equal to LoRA over the weights that they stand for, and no
dense weight is kept for the backward pass. Those marked with a star are `tests/third_party`, which
`scripts/third_party.sh` runs; the others, and what "also" says of methods, were run once by hand.

| | models | LoRA | nf4, int8 | also |
|---|---|---|---|---|
| transformers 4.57.6, Flax * | Bert, Albert, BigBird, GPT-2, GPT-J, Llama | yes | yes | |
| transformers 4.57.6, Flax * | Bart, Whisper, ViT, Dinov2, CLIP, ResNet | yes | yes | |
| transformers 4.57.6, Flax * | Wav2Vec2 | yes | – | a normalized weight is dense, and told |
| Tunix 0.1.7 * | Llama 3, Qwen 3, its experts, Gemma 3 | yes | yes | |
| mamba2-jax 1.1.2 * | Mamba 2 | yes | yes | |
| torchax 0.0.13 * | transformers' torch Llama, GPT-2, ViT | yes | yes | |
| equimo 1.1.0 * | ViT, an equinox module | yes | yes | |
| penzai 0.2.5 * | Llama, its layers in a scan, Gemma | yes | yes | prefixes |
| gemma 3.3.0 | Gemma 3 | yes | yes | bottlenecks, LoReFT, prompts, prefixes |
| jax-image-models 0.4.0 | ViT, with remat, CLIP | yes | yes | bottlenecks at layers of a scan |
| flaxmodels 0.1.3 | ResNet-18 | yes | yes | its GPT-2 does not run with this jax |

What has no whole blocks of nf4, such as a first convolution of 7 x 7 x 3 inputs, stays dense.
Prompt tuning does not reach penzai's models, which look up ids in the transpose of their tables.
jimmy-vision 0.0.7 cannot be imported with that flax.
"""


def page() -> str:
    """The whole page as Markdown."""
    groups = itertools.groupby(CASES, key=lambda case: case.group)
    lines = [line for name, cases in groups for line in section(name, cases)]
    return "\n".join([HEAD, *lines, PUBLISHED])


def section(name: str, cases: Iterable[Case]) -> Iterator[str]:
    yield f"## {name}\n"
    yield "| | jaxpeft | " + " | ".join(PEERS.values()) + " |"
    yield "|---" * (2 + len(PEERS)) + "|"
    yield from map(row, cases)
    yield ""


def row(case: Case) -> str:
    ours = "fast" if case.fast else "dense"
    cells = [case.name, ours, *(case.peers.get(peer, "–") for peer in PEERS)]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())

"""P-tuning: a prompt that a small network computes.

x' = [p_1; ...; p_n; x],   P = MLP(E)   or   P = MLP(BiLSTM(E)),   E: (n, d)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.methods.cpt import moved_context
from jaxpeft.methods.p_tuning_network import bidirectional_lstm, computed, perceptron
from jaxpeft.methods.prompt import check_count, prompt_method

Array = jax.Array


def p_tuning(
    tokens: int,
    *,
    encoder: str = "mlp",
    hidden: int | None = None,
    layers: int = 2,
    both: bool = False,
    names: Mapping[str, str] | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """P-tuning: prompt tuning where a network computes the prompt of `tokens` rows.

    With "mlp", `P = relu(relu(E K_0 + b_0) K_1 + b_1) K_2 + b_2`, widths d, h, h, d. With "lstm", a
    bidirectional LSTM of h units a direction runs over the rows of `E` first, and its two outputs
    go through `relu(. K_0 + b_0) K_1 + b_1`, widths 2h, 2h, d. Sequences are lengthened as in
    `prompt_tuning`; `flat_prompt` gives the plain prompt, which is all that a trained one needs.

    Leaves: `embedding` (n, d) normal, the linear layers' `kernel_i` and `bias_i`, and for an LSTM
    `input_i` (2, width, 4h), `state_i` (2, h, 4h) and `gates_i` (2, 4h) a layer, directions first,
    gates in torch's order, uniform within one over the root of their inputs (of `h` in an LSTM).
    Parameters with "mlp": `n d + h (2 d + h + 2) + d`; with "lstm": `n d + 8 h (d + h + 1)` for its
    first layer, `8 h (3 h + 1)` for each other one, and `2 h (2 h + 1) + d (2 h + 1)`.

    Args:
        tokens: length of the prompt, `n`.
        encoder: "mlp" or "lstm".
        hidden: width of the network, `h`; the embeddings' width when absent.
        layers: of the LSTM. The MLP has three.
        both: prompt the tokens of a decoder behind an encoder too, with the same embeddings.
        names: the model's arguments where they have unusual names: keys "tokens", "mask" and
            "positions".
        dtype: of the leaves.

    Returns:
        A method for the table that the tokens index. As a bare tuning it goes there by itself.

    Raises:
        ValueError: if a number is out of range, or `encoder` is unknown.

    Example:
        >>> import jaxpeft as jp
        >>> method = p_tuning(20, hidden=128)

    Reference:
        Liu et al. 2021, arXiv:2103.10385; the networks are those of PEFT.
    """
    check_count(tokens)
    if encoder not in ("mlp", "lstm"):
        raise ValueError(f'encoder={encoder!r} is neither "mlp" nor "lstm".')
    for name, value in (("hidden", hidden), ("layers", layers)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} is out of range. Use a positive int.")

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        del weight
        width = site.shape[1]
        inner = hidden or width
        first, second, third = jax.random.split(key, 3)
        leaves = {"embedding": jax.random.normal(first, (tokens, width), dtype)}
        if encoder == "mlp":
            return leaves | perceptron(second, (width, inner, inner, width), dtype)
        leaves |= bidirectional_lstm(third, width, inner, layers, dtype)
        return leaves | perceptron(second, (2 * inner, 2 * inner, width), dtype)

    options = {
        "tokens": tokens, "encoder": encoder, "hidden": hidden, "layers": layers, "both": both,
        "names": dict(names or {}),
    }  # fmt: skip
    return prompt_method("p_tuning", start, computed, tokens, options, both=both, names=names)


def flat_prompt(leaves: Leaves) -> Leaves:
    """The leaves of `prompt_tuning`, equal to a prompt that others stand for.

    Args:
        leaves: of `p_tuning` or `cpt` at its site; those of `prompt_tuning` stay as they are.

    Returns:
        `{"prompt": ...}` (n, d), what PEFT writes to files.

    Example:
        >>> flat_prompt({"prompt": jnp.ones((2, 3))})["prompt"].shape
        (2, 3)
    """
    if "prompt" in leaves:
        return leaves
    return {"prompt": moved_context(leaves) if "context" in leaves else computed(leaves)}

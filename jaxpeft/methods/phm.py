r"""Parameterized hypercomplex (PHM) products, the maps of Compacter.

y = x H + b,   H = sum_i kron(C_i, W_i),   W_i = l_i r_i

C: (n, n, n), the rule;  W: (n, in/n, out/n)
"""

from __future__ import annotations

from typing import NamedTuple


class Phm(NamedTuple):
    """Options of PHM products; see `phm`."""

    n: int = 4
    rank: int | None = 1
    rule_rank: int | None = None
    shared: str | None = "compacter"
    sizes: tuple[int, int] | None = None
    learn_rule: bool = True
    spread: float = 1e-4


def phm(
    n: int = 4,
    *,
    rank: int | None = 1,
    rule_rank: int | None = None,
    shared: str | None = "compacter",
    sizes: tuple[int, int] | None = None,
    learn_rule: bool = True,
    spread: float = 1e-4,
) -> Phm:
    """PHM products for the maps of `bottleneck(..., phm=phm(4))`.

    `y = x H + b`, `H = sum_i kron(C_i, W_i)` with `n` rules `C_i` (n, n) and weights `W_i`
    (in / n, out / n). Leaves for each map ("down", "up"): `down_left` (stack..., n, in/n, rank) and
    `down_right` (stack..., n, rank, out/n), or `down` (stack..., n, in/n, out/n); the rule is
    `rule` (n, n, n), or `rule_left` (n, n, rank) and `rule_right`. A map has
    `rank * (in + out)` parameters and its bias, the rule `n^3` for all of them together.

    Args:
        n: of rules; it divides the width of the model and of the bottleneck.
        rank: of each `W_i`; None for whole ones.
        rule_rank: of each rule, 1 for AdapterHub's factorized rule; None for whole ones.
        shared: the name under which all layers and both maps have one rule in common, at
            "shared:compacter" in the adapter; None for a rule each. Adapters that are trained apart
            and then composed need names of their own.
        sizes: `(d, m)`: share the weights between all layers too, which then have these sizes.
        learn_rule: False leaves the rules as they start.
        spread: standard deviation of the rules' start, 1e-4 in the authors' code.

    Returns:
        The options as a value.

    Raises:
        ValueError: if `n` is no positive int, or `sizes` is given without `shared`.

    Example:
        >>> import jaxpeft as jp
        >>> method = jp.bottleneck(reduction=32, activation="gelu", phm=phm(4))

    Reference:
        Karimi Mahabadi et al. 2021, arXiv:2106.04647; Zhang et al. 2021, arXiv:2102.08597.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n!r} is not a number of rules. Use a positive int, such as 4.")
    if sizes is not None and shared is None:
        raise ValueError("sizes= shares the weights, so shared= must name them.")
    sizes = None if sizes is None else (sizes[0], sizes[1])
    return Phm(n, rank, rule_rank, shared, sizes, learn_rule, spread)

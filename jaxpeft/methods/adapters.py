r"""Published bottleneck adapters, as options of `bottleneck` and the places where they go.

They are placed at the ":delta" of the sublayers of the models of this library. A model of others
has no such place; rules then say where: `rules(("**/mlp:out", houlsby()))`.
"""

from __future__ import annotations

from typing import Any

from jaxpeft.core.method import Method
from jaxpeft.core.rules import compile_pattern
from jaxpeft.core.site import Site
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.phm import Phm

# Where the feed-forward sublayers and the cross attentions of the own models are.
_FEED_FORWARD = tuple(
    map(
        compile_pattern,
        (
            "**/{mlp,output,ffn}:delta",
            "**/encoder/block/layer/1:delta",
            "**/decoder/block/layer/2:delta",
        ),
    )
)
_CROSS = compile_pattern("**/decoder/block/layer/1:delta")


def houlsby(**options: Any) -> Method:
    """Houlsby's adapters, AdapterHub's "double_seq_bn": `x' = x + up(swish(down(x)))`.

    As a bare tuning behind every attention (not cross attention) and every feed-forward sublayer,
    before the residual is added. In a model of others name both: "**/{attention,mlp}:out".

    Args:
        **options: of `bottleneck`; by default `reduction=16, activation="swish"`.

    Returns:
        A method.

    Example:
        >>> method = houlsby(reduction=8)

    Reference:
        Houlsby et al. 2019, arXiv:1902.00751.
    """
    return _recipe(options, 16, activation="swish")._replace(bare=_is_sublayer)


def pfeiffer(**options: Any) -> Method:
    """Pfeiffer's adapters, AdapterHub's "seq_bn": `x' = x + up(relu(down(z)))`, z = LN(stream + x).

    As a bare tuning at every feed-forward sublayer; `z` is `sum`, stream + x, where the model has
    its norms in front of sublayers. At the output of a whole block, as in a pre-norm model of
    others ("**/block:out"), `z` is `x`, which is that sum.

    Args:
        **options: of `bottleneck`; by default `reduction=16, reads=("norm", "sum", "x")`.

    Returns:
        A method.

    Example:
        >>> method = pfeiffer(reduction=8)

    Reference:
        Pfeiffer et al. 2020, arXiv:2005.00052.
    """
    return _recipe(options, 16, reads=("norm", "sum", "x"))._replace(bare=_is_feed_forward)


def parallel_adapter(**options: Any) -> Method:
    """Parallel adapters, AdapterHub's "par_bn": `x' = x + s * up(relu(down(z)))`.

    As a bare tuning beside every feed-forward sublayer, `z` being the stream that it is added to.
    At a module's output in a model of others ("**/mlp:out") `z` is the module's input, as in the
    paper. With `scale="learned"` it is AdapterHub's "scaled_par_bn".

    Args:
        **options: of `bottleneck`; by default
            `reduction=2, reads=("stream", "input"), scale=4.0, init="mam"`.

    Returns:
        A method.

    Example:
        >>> import jaxpeft as jp
        >>> mix_and_match = jp.chain(jp.prefix_tuning(30, hidden=512), parallel_adapter())

    Reference:
        He et al. 2021, arXiv:2110.04366.
    """
    defaults = {"reads": ("stream", "input"), "scale": 4.0, "init": "mam"}
    return _recipe(options, 2, **defaults)._replace(bare=_is_feed_forward)


def adapter_plus(**options: Any) -> Method:
    """Adapter+: `x' = x + s * up(gelu(down(z)))`, s a scale a channel, behind the whole sublayer.

    As a bare tuning at every feed-forward sublayer of models with their norms in front, with
    `z = stream + x`. Behind the norm of post-norm models, "**/output/LayerNorm:out", and behind a
    block of a model of others, "**/block:out", `z` is `x`.

    Args:
        **options: of `bottleneck`; by default `reduction=96, activation="gelu_exact",
            scale="channel", stochastic_depth=0.1, reads=("sum", "x")`. The paper starts with
            `init="houlsby"`.

    Returns:
        A method.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("**/block:out", adapter_plus(reduction=48)))

    Reference:
        Steitz and Roth 2024, arXiv:2406.06820.
    """
    defaults = {"activation": "gelu_exact", "scale": "channel", "stochastic_depth": 0.1}
    method = _recipe(options, 96, reads=("sum", "x"), **defaults)
    return method._replace(bare=lambda site: _is_feed_forward(site) and "norm" not in _there(site))


def compacter(**options: Any) -> Method:
    """Compacter: `houlsby` with PHM products for the two maps; see `phm`.

    Args:
        **options: of `bottleneck`; by default
            `reduction=32, activation="gelu_exact", phm=phm(4)`.

    Returns:
        A method, which as a bare tuning goes where `houlsby` goes.

    Example:
        >>> method = compacter(phm=Phm(n=4, spread=0.1))

    Reference:
        Karimi Mahabadi et al. 2021, arXiv:2106.04647.
    """
    return houlsby(**_compacter(options))


def compacter_plus(**options: Any) -> Method:
    """Compacter++: `pfeiffer` with PHM products for the two maps, at feed-forward sublayers only.

    Args:
        **options: as of `compacter`.

    Returns:
        A method, which as a bare tuning goes where `pfeiffer` goes.

    Example:
        >>> method = compacter_plus(reduction=16)

    Reference:
        Karimi Mahabadi et al. 2021, arXiv:2106.04647.
    """
    return pfeiffer(**_compacter(options))


def _compacter(options: dict[str, Any]) -> dict[str, Any]:
    size = {} if "width" in options else {"reduction": 32}
    return {"activation": "gelu_exact", "phm": Phm(), **size, **options}


def _recipe(options: dict[str, Any], reduction: float, **defaults: Any) -> Method:
    size = {} if "width" in options else {"reduction": reduction}
    return bottleneck(**(size | defaults | options))


def _is_feed_forward(site: Site) -> bool:
    return site.side == "delta" and any(matches(site.path, site) for matches in _FEED_FORWARD)


def _is_sublayer(site: Site) -> bool:
    return site.side == "delta" and not _CROSS(site.path, site)


def _there(site: Site) -> dict[str, int]:
    return dict(site.sources)

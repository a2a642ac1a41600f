"""What a command tunes: LoRA by its own options, or any method by its name."""

from typing import Any, Literal

Remat = Literal["projections", "layers", "none"]
LORA_RATE = 5e-4


def tuning(method: str, targets: str | None, model: Any) -> Any:
    """The tuning that a specification asks for; see `jaxpeft.train.read_spec`.

    Args:
        method: such as "prefix:tokens=20".
        targets: a glob over parameters or modules; None for wherever the method goes by itself.
        model: the model, which may say which parameter is its output head.

    Returns:
        What `jaxpeft.transform` takes.

    Raises:
        ValueError: the method or an option of it is unknown.
    """
    import jaxpeft as jp
    from jaxpeft import train

    spec = train.read_spec(method)
    if targets is None or not spec.methods:
        return spec.tuning(output=getattr(model, "output_head", None))
    return jp.rules(*((targets, part) for part in spec.methods))


def peak_rate(rate: float | None, method: str | None) -> float:
    """The learning rate: as given, else the method's usual one."""
    if rate is not None or method is None:
        return LORA_RATE if rate is None else rate
    from jaxpeft import train

    return train.read_spec(method).rate


def policy(remat: Remat) -> Any:
    """What the backward pass finds kept of a layer, as `jax.checkpoint` takes it."""
    import jax

    from jaxpeft.models.decoder import KEEP_PROJECTIONS

    nothing = jax.checkpoint_policies.nothing_saveable
    return {"projections": KEEP_PROJECTIONS, "layers": nothing, "none": None}[remat]

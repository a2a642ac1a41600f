"""What a command tunes: LoRA by its own options, or any method by its name."""

from typing import Any, Literal

Remat = Literal["projections", "layers", "none"]
Rule = Literal["adamw", "adamw8bit", "lion", "sgd"]
Narrow = Literal["float32", "bfloat16"]
Offload = Literal["weights", "optimizer", "all"]
LORA_RATE = 5e-4
RANK = 8


def specification(method: str | None, **lora: float | None) -> str:
    """The method as a text for `tuning`: LoRA by the options that are its own, or any by its name.

    Args:
        method: such as "prefix:tokens=20"; None for LoRA.
        **lora: `rank`, `alpha` and `dropout`; None where not given.

    Returns:
        A specification; see `jaxpeft.train.read_spec`.

    Raises:
        ValueError: the method is unknown, or both are given.

    Example:
        >>> specification(None, rank=4, alpha=None, dropout=None)
        'lora:rank=4,alpha=8,dropout=0.0,lr=0.0005'
    """
    from jaxpeft import train

    given = {name: value for name, value in lora.items() if value is not None}
    if method is None:
        rank = given.get("rank", RANK)
        values = {"rank": rank, "alpha": 2 * rank, "dropout": 0.0} | given | {"lr": LORA_RATE}
        return "lora:" + ",".join(f"{name}={value}" for name, value in values.items())
    train.read_spec(method)
    if given:
        raise ValueError(_both(method, given))
    return method


def _both(method: str, given: dict[str, float]) -> str:
    """What to write where options of LoRA stand beside another method."""
    from jaxpeft import train

    text, left = method, []
    for name, value in given.items():
        longer = f"{text}{',' if ':' in text.rpartition('+')[2] else ':'}{name}={value}"
        try:
            train.read_spec(longer)
            text = longer
        except ValueError:
            left.append(name)
    typed = ", ".join(f"--{name} {value}" for name, value in given.items())
    without = f" {method} has no {' or '.join(left)}." if left else ""
    return (
        f"{typed}: of the LoRA that is tuned without --method, but --method {method} is given."
        f"{without} Write --method {text} instead."
    )


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


def peak_rate(rate: float | None, method: str) -> float:
    """The learning rate: as given, else the method's usual one."""
    from jaxpeft import train

    return train.read_spec(method).rate if rate is None else rate


def in_dtype(tuned: Any, adapter: Any, dtype: str) -> Any:
    """The adapter, its trained leaves in a dtype."""
    import jax

    cast = lambda x, trained: x.astype(dtype) if trained else x  # noqa: E731
    return jax.tree.map(cast, adapter, tuned.trainable(adapter))


def is_offloaded(what: str, offload: str | None) -> bool:
    """Whether "weights" or the "optimizer" wait in host memory.

    >>> is_offloaded("weights", "all"), is_offloaded("weights", "optimizer")
    (True, False)
    """
    return offload in (what, "all")


def policy(remat: Remat) -> Any:
    """What the backward pass finds kept of a layer, as `jax.checkpoint` takes it."""
    import jax

    from jaxpeft.models.decoder import KEEP_PROJECTIONS

    nothing = jax.checkpoint_policies.nothing_saveable
    return {"projections": KEEP_PROJECTIONS, "layers": nothing, "none": None}[remat]

"""What every model here can do."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from jaxpeft.core.lift import lift
from jaxpeft.core.structured import Structured
from jaxpeft.models.names import Name


@dataclasses.dataclass(frozen=True)
class _Call:
    """A model's call; two of the same model are equal, so that their program is compiled once."""

    graphdef: Any

    def __call__(self, params: nnx.State, *inputs: Any, **kw: Any) -> Any:
        return nnx.merge(self.graphdef, params)(*inputs, **kw)


class Model(nnx.Module):
    """A Flax model whose weights have names in Hugging Face's files.

    Attributes:
        config: a frozen dataclass that describes the model in full; `config.model_type` is a key
            of `jaxpeft.models.families.FAMILIES`.
        keys_take_prefix: whether the attentions take keys and values that prefix tuning made
            longer, so that the sequence stays as it is. Not for causal models, whose prefix takes
            positions and slots of the cache.
    """

    config: Any
    keys_take_prefix: ClassVar[bool] = False

    @property
    def task(self) -> str | None:
        """What a call is for, such as "causal-lm"; None for a bare model."""
        return getattr(self.config, "task", "causal-lm")

    def names(self) -> tuple[Name, ...]:
        """One row for each weight, in the order of the files."""
        raise NotImplementedError

    def example(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract inputs of a small call that uses every weight."""
        raise NotImplementedError

    def apply(self, params: nnx.State, *inputs: Any, **kw: Any) -> Any:
        """Call the model with these weights; a pure function of them, ready for `jit` and `grad`.

        Args:
            params: the weights, as `load` or `nnx.split` gives them, dense or quantized.
            *inputs: as for the call itself.
            **kw: as for the call itself.

        Returns:
            What the call returns.
        """
        call = _Call(nnx.graphdef(self))
        leaves = jax.tree.leaves(params, is_leaf=_is_structured)
        packed = any(map(_is_structured, leaves))
        return (lift(call) if packed else call)(params, *inputs, **kw)


def _is_structured(leaf: Any) -> bool:
    return isinstance(leaf, Structured)

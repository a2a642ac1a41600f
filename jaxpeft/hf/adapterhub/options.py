"""The options of each method in the files of AdapterHub's library `adapters`.

The fields are named as in `adapter_config.json` and have the library's defaults.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """Bottleneck adapters, Compacter and invertible adapters."""

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: float | dict[str, float]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: tuple[int, ...] = ()
    dropout: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool = True
    shared_W_phm: bool = False
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    phm_c_init: str = "normal"
    phm_init_range: float = 0.0001
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = "glorot-uniform"
    phm_rank: int = 1
    phm_bias: bool = True
    stochastic_depth: float = 0.0

    def factor(self, layer: int) -> float:
        """The reduction factor of a layer."""
        if not isinstance(self.reduction_factor, dict):
            return self.reduction_factor
        found = self.reduction_factor.get(str(layer)) or self.reduction_factor.get("default")
        if found is None:
            raise ValueError(
                f"reduction_factor={self.reduction_factor} has none for layer {layer}. Give it "
                'one, or a "default".'
            )
        return found


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Prefix tuning."""

    architecture: str = "prefix_tuning"
    encoder_prefix: bool = True
    cross_prefix: bool = True
    leave_out: tuple[int, ...] = ()
    flat: bool = False
    prefix_length: int = 30
    bottleneck_size: int = 512
    non_linearity: str = "tanh"
    dropout: float = 0.0
    use_gating: bool = False
    shared_gating: bool = True
    init_weights_seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Prompt tuning."""

    architecture: str = "prompt_tuning"
    prompt_length: int = 10
    prompt_init: str = "random_uniform"
    prompt_init_text: str | None = None
    combine: str = "prefix"
    init_weights_seed: int | None = None


@dataclasses.dataclass(frozen=True)
class LowRank:
    """LoRA, (IA)^3, DoRA and VeRA."""

    architecture: str = "lora"
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: tuple[int, ...] = ()
    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    attn_matrices: tuple[str, ...] = ("q", "v")
    composition_mode: str = "add"
    init_weights: str = "lora"
    init_weights_seed: int | None = None
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Reft:
    """LoReFT, NoReFT and DiReFT.

    The last has `subtract_projection` False, which the library neither writes nor reads, so that a
    DiReFT comes back from a file as a NoReFT.
    """

    layers: str | tuple[int, ...]
    prefix_positions: int
    suffix_positions: int
    r: int
    orthogonality: bool
    tied_weights: bool = False
    dropout: float = 0.05
    non_linearity: str | None = None
    dtype: str | None = None
    architecture: str = "reft"
    output_reft: bool = True
    init_weights_seed: int | None = None
    subtract_projection: bool = True


@dataclasses.dataclass(frozen=True)
class Fusion:
    """AdapterFusion, in a file of its own."""

    key: bool = True
    query: bool = True
    value: bool = True
    query_before_ln: bool = False
    regularization: bool = True
    residual_before: bool = False
    temperature: bool = False
    value_before_softmax: bool = True
    value_initialized: bool = True
    dropout_prob: float | None = None


Part = Bottleneck | Prefix | Prompt | LowRank | Reft | Fusion

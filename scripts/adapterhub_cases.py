"""The tiny models, adapters and fusions that scripts/adapterhub_fixtures.py writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import adapters
import transformers
from adapters import (
    AdapterPlusConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DiReftConfig,
    DoubleSeqBnConfig,
    DoubleSeqBnInvConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
)

_TEXT = dict(vocab_size=31, max_position_embeddings=24)
_BERT = dict(
    _TEXT, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
_T5 = dict(
    vocab_size=31, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
)
_PREFIX = PrefixTuningConfig(prefix_length=3, bottleneck_size=4)
_FLAT = PrefixTuningConfig(prefix_length=3, flat=True)
_ALL_LORA = dict(attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True)


class Base(NamedTuple):
    """One tiny model, the adapters and the fusions that are made for it."""

    build: Callable[[], Any]
    adapters: dict[str, Any]
    fusions: dict[str, tuple[list[str], Any]] = {}
    flexible: Any = None  # the library's own class, where its files differ from those of `build`


_BERT_ADAPTERS = {
    "seq_bn": SeqBnConfig(reduction_factor=4),
    "seq_bn_2": SeqBnConfig(reduction_factor=8),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
    "double_seq_bn_2": DoubleSeqBnConfig(reduction_factor=8, non_linearity="tanh"),
    "par_bn": ParBnConfig(),
    "par_bn_attention": ParBnConfig(mh_adapter=True, reduction_factor=4),
    "scaled_par_bn": ParBnConfig(scaling="learned"),
    "seq_bn_inv": SeqBnInvConfig(reduction_factor=4),
    "double_seq_bn_inv": DoubleSeqBnInvConfig(reduction_factor=4),
    "compacter": CompacterConfig(reduction_factor=4),
    "compacter_plus": CompacterPlusPlusConfig(reduction_factor=4),
    "compacter_shared": CompacterPlusPlusConfig(
        reduction_factor=4, shared_W_phm=True, factorized_phm_rule=True, phm_dim=2, phm_rank=2
    ),
    "compacter_unshared": CompacterPlusPlusConfig(
        reduction_factor=4, shared_phm_rule=False, factorized_phm_W=False, phm_bias=False
    ),
    "adapter_plus": AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
    "prefix_tuning": _PREFIX,
    "prefix_tuning_flat": _FLAT,
    "prefix_tuning_gated": _FLAT.replace(use_gating=True, shared_gating=False),
    "prefix_tuning_leave_out": _FLAT.replace(leave_out=[0]),
    "prompt_tuning": PromptTuningConfig(prompt_length=3),
    "prompt_tuning_after_bos": PromptTuningConfig(prompt_length=3, combine="prefix_after_bos"),
    "lora": LoRAConfig(r=2, alpha=6),
    "lora_all": LoRAConfig(r=2, alpha=4, **_ALL_LORA),
    "lora_gated": LoRAConfig(r=2, use_gating=True),
    "ia3": IA3Config(),
    "ia3_gated": IA3Config(use_gating=True),
    "loreft": LoReftConfig(r=2),
    "loreft_tied": LoReftConfig(r=3, tied_weights=True, suffix_positions=2, layers=[1]),
    "noreft": NoReftConfig(r=2, suffix_positions=1, non_linearity="relu"),
    "direft": DiReftConfig(r=2, prefix_positions=2, suffix_positions=2),
    "mam": MAMConfig(_PREFIX, ParBnConfig(reduction_factor=4)),
    "unipelt": UniPELTConfig(_PREFIX, SeqBnConfig(reduction_factor=4), LoRAConfig(r=2, alpha=2)),
    "ln_before": SeqBnConfig(reduction_factor=4, ln_before=True),
    "ln_after": SeqBnConfig(reduction_factor=4, ln_after=True),
    "ln_after_residual": DoubleSeqBnConfig(
        reduction_factor=4, ln_after=True, adapter_residual_before_ln=True
    ),
    "par_bn_ln": ParBnConfig(reduction_factor=4, ln_before=True, ln_after=True),
    "gated": SeqBnConfig(reduction_factor=4, use_gating=True),
    "par_bn_gated": ParBnConfig(reduction_factor=4, use_gating=True),
    "reduction_map": DoubleSeqBnConfig(reduction_factor={"1": 2, "default": 8}),
    "leave_out": DoubleSeqBnConfig(reduction_factor=4, leave_out=[0]),
    "up_projection": SeqBnConfig(reduction_factor=0.5, non_linearity="leakyrelu"),
    "residual_post_add": SeqBnConfig(reduction_factor=4, residual_before_ln="post_add"),
    "legacy": DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu_new"),
    "residual_after_ln": SeqBnConfig(reduction_factor=4, residual_before_ln=False, scaling=0.5),
}

BASES = {
    "bert": Base(
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT)),
        _BERT_ADAPTERS,
        {
            "dynamic": (["seq_bn", "seq_bn_2"], "dynamic"),
            "static": (
                ["double_seq_bn", "double_seq_bn_2"],
                {
                    **adapters.StaticAdapterFusionConfig().to_dict(),
                    "query_before_ln": True,
                },
            ),
        },
    ),
    "bert_bare": Base(
        lambda: transformers.BertModel(transformers.BertConfig(**_BERT)),
        {"double_seq_bn": DoubleSeqBnConfig(reduction_factor=4), "prefix_tuning": _PREFIX},
    ),
    "roberta": Base(
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**_BERT, pad_token_id=1)
        ),
        {
            "seq_bn": SeqBnConfig(reduction_factor=4),
            "prefix_tuning_flat": _FLAT,
            "prompt_tuning": PromptTuningConfig(prompt_length=3),
            "lora": LoRAConfig(r=2, alpha=6),
            "loreft": LoReftConfig(r=2),
        },
    ),
    "distilbert": Base(
        lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(**_TEXT, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        ),
        {
            "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
            "seq_bn_inv": SeqBnInvConfig(reduction_factor=4),
            "par_bn": ParBnConfig(),
            "compacter": CompacterConfig(reduction_factor=4),
            "prefix_tuning": _PREFIX,
            "lora": LoRAConfig(r=2, alpha=6, **_ALL_LORA),
            "ia3": IA3Config(),
            "noreft": NoReftConfig(r=2, suffix_positions=1),
        },
    ),
    "t5": Base(
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5)),
        {
            "seq_bn": SeqBnConfig(reduction_factor=4),
            "double_seq_bn": DoubleSeqBnConfig(
                reduction_factor=4, cross_adapter=True, leave_out=[1]
            ),
            "par_bn": ParBnConfig(),
            "seq_bn_inv": SeqBnInvConfig(reduction_factor=4),
            "prefix_tuning": _PREFIX,
            "prefix_tuning_gated": _FLAT.replace(use_gating=True, shared_gating=False),
            "prefix_tuning_encoder": _FLAT.replace(cross_prefix=False),
            "lora": LoRAConfig(r=2, alpha=6, **_ALL_LORA),
            "ia3": IA3Config(),
        },
    ),
    "t5_gated": Base(
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        {
            "compacter": CompacterConfig(reduction_factor=4, cross_adapter=True),
            "lora": LoRAConfig(r=2, alpha=6, **_ALL_LORA),
            "ia3": IA3Config(),
        },
        flexible=adapters.T5AdapterModel,
    ),
    "vit": Base(
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=8,
                patch_size=4,
            )
        ),
        {
            "seq_bn": SeqBnConfig(reduction_factor=4),
            "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
            "par_bn": ParBnConfig(),
            "adapter_plus": AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
            "prefix_tuning": _PREFIX,
            "prompt_tuning": PromptTuningConfig(prompt_length=3),
            "lora": LoRAConfig(r=2, alpha=6, **_ALL_LORA),
            "loreft": LoReftConfig(r=2),
        },
    ),
}

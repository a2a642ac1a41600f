"""Tiny random transformers models, saved as Hugging Face directories: the oracle for ours."""

import pytest
import torch
import transformers

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
# Options of each model under test; every one is compared with transformers.
MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-wide-heads": ("llama", dict(head_dim=12)),
    "llama-linear": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    ),
    "llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "mistral": ("mistral", dict(sliding_window=5)),
    "mistral-full": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2-sliding": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=0),
    ),
}


def make_model(name):
    """A random transformers model in float32, its biases and norms not at their neutral start."""
    model_type, options = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **SIZES | options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """`oracle(name)` gives the transformers model and the directory where it is saved."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            model = make_model(name)
            model.save_pretrained(directory)
            made[name] = (model, directory)
        return made[name]

    return get


@pytest.fixture
def tokens():
    """Two rows of twelve random tokens, none of them special."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 64, (2, 12), generator=generator).numpy()

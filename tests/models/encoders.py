"""Tiny random encoders of transformers, with heads: the oracle for ours."""

import numpy as np
import torch
import transformers

TYPES = ("bert", "roberta", "xlm-roberta", "distilbert")
# The task, the class of transformers for it, and options of its configuration.
HEADS = {
    None: (transformers.AutoModel, {}),
    "sequence-classification": (
        transformers.AutoModelForSequenceClassification,
        dict(id2label={0: "bad", 1: "so so", 2: "good"}),
    ),
    "regression": (
        transformers.AutoModelForSequenceClassification,
        dict(num_labels=1, problem_type="regression"),
    ),
    "token-classification": (
        transformers.AutoModelForTokenClassification,
        dict(id2label={0: "O", 1: "B", 2: "I", 3: "E"}),
    ),
    "question-answering": (transformers.AutoModelForQuestionAnswering, {}),
}
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=40,
    initializer_range=0.2,
)
LENGTHS = (9, 5)


def make_encoder(model_type, task=None, **options):
    """A random transformers model in float32, its biases and norms not at their neutral start."""
    width = "hidden_dim" if model_type == "distilbert" else "intermediate_size"
    # Files have names in "dim" and so on for DistilBERT, and epsilons differ between the others.
    epsilon = {} if model_type == "distilbert" else dict(layer_norm_eps=1e-5)
    auto, head = HEADS[task]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, **SIZES, **{width: 48}, **epsilon, **head, **options
    )
    model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model.eval()


def padded(model_type, side="right"):
    """Tokens `[2, 9]` of two texts, and the mask that leaves out the shorter one's padding."""
    tokens = np.random.default_rng(1).integers(4, 64, (2, LENGTHS[0]))
    mask = np.arange(LENGTHS[0]) < np.array(LENGTHS)[:, None]
    mask = mask if side == "right" else mask[:, ::-1]
    padding = 1 if "roberta" in model_type else 0
    return np.where(mask, tokens, padding), mask


def reference(torch_model, tokens, mask=None, **inputs):
    """Hidden states or logits of the transformers model, start and end of an answer stacked."""
    inputs = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(np.asarray(mask).astype(int))
    with torch.no_grad():
        out = torch_model(input_ids=torch.tensor(np.asarray(tokens)), **inputs)
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def check(actual, expected, rtol=1e-5):
    """Equal to `rtol` of the largest value."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float32) / scale, expected / scale, atol=rtol)

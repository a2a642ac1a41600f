"""GGUF files against transformers' own reading of the same file."""

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jaxpeft.models import load, load_tokenizer, save
from jaxpeft.models.config import RopeScaling, from_hf
from jaxpeft.models.gguf import unpermute
from jaxpeft.models.names import names
from jaxpeft.models.rope import inverse_frequencies, llama3_divisors
from tests.models.tiny import LLAMA3

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def vocabulary():
    letters = list(bytes_to_unicode().values())
    return WORDS + letters + [merge.replace(" ", "") for merge in MERGES]


def permute(values, heads):
    """What llama.cpp's converter does to the rows of queries and keys."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def write_gguf(path, model, *, arch="llama", quantize=False, divisors=None, pre="smollm"):
    """Write a transformers model as llama.cpp's converter does.

    `quantize` may be a function from the name of a matrix and its values to its blocks and their
    kind.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, pre)
    add_tensors(writer, model, arch, quantize)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, pre):
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(WORDS) + [1] * (len(tokens) - len(WORDS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def add_tensors(writer, model, arch, quantize):
    config = model.config
    table = names(from_hf(config.to_dict()))
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    for name in table:
        for layer in range(config.num_hidden_layers if name.stacked else 1):
            values = state[name.tensor.format(layer=layer)]
            if arch == "llama" and "q_proj" in name.path:
                values = permute(values, config.num_attention_heads)
            if arch == "llama" and "k_proj" in name.path:
                values = permute(values, config.num_key_value_heads)
            packed, kind = values, None
            if quantize and values.ndim == 2:
                pack = quantize if callable(quantize) else by_q8_0
                packed, kind = pack(name.gguf.format(layer=layer), values)
            writer.add_tensor(name.gguf.format(layer=layer), packed, raw_dtype=kind)


def by_q8_0(name, values):
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quantize(values, kind), kind


def tiny(model_type="llama", **options):
    sizes = dict(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **sizes | options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def check(path, expected, tokens):
    model, params = load(path)
    scale = np.abs(expected).max()
    logits = model.apply(params, tokens)
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-4)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gguf")
    write_gguf(directory / "tiny.gguf", tiny(tie_word_embeddings=True))
    return directory / "tiny.gguf"


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers_reading_of_the_file(tmp_path, tokens, tied, quantize):
    write_gguf(tmp_path / "m.gguf", tiny(tie_word_embeddings=tied), quantize=quantize)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    check(tmp_path, logits_of(torch_model, tokens), tokens)


def test_qwen2_has_biases_and_no_permutation(tmp_path, tokens):
    model = tiny("qwen2")
    write_gguf(tmp_path / "m.gguf", model, arch="qwen2", pre="qwen2")
    check(tmp_path / "m.gguf", logits_of(model, tokens), tokens)


def test_llama3_divisors_give_back_the_scaling(tmp_path, tokens):
    constants = LLAMA3 | dict(original_max_position_embeddings=8192)
    model = tiny(rope_parameters=constants, max_position_embeddings=16384)
    config = from_hf(model.config.to_dict())
    plain = from_hf(model.config.to_dict() | dict(rope_parameters=None))
    divisors = llama3_divisors(inverse_frequencies(plain), config.rope_scaling)
    oracle = model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(inverse_frequencies(plain) / divisors, oracle, rtol=1e-6)
    write_gguf(tmp_path / "m.gguf", model, divisors=divisors)
    assert load(tmp_path)[0].config.rope_scaling == RopeScaling("llama3", 8.0)
    check(tmp_path, logits_of(model, tokens), tokens)


def test_other_divisors_are_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny(), divisors=np.linspace(1, 5, 8))
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        load(tmp_path)


def test_unpermute_is_the_inverse_of_llama_cpp():
    rows = np.arange(24.0).reshape(24, 1)
    np.testing.assert_array_equal(unpermute(permute(rows, 3), 3), rows)


def test_saved_as_hugging_face_directory(file, tmp_path, tokens):
    model, params = load(file)
    save(tmp_path / "hf", model, params, tokenizer_from=file)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    check(file, logits_of(again, tokens), tokens)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "hello\n\n  12 w"
    assert tokenizer(text).input_ids == load_tokenizer(file)(text).input_ids
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_tokenizer_equals_transformers_but_for_single_digits(file):
    ours = load_tokenizer(file)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("hello world", " he'll\n\n go  ", "<|im_start|>hello<|im_end|>\n", "äöü 漢"):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    messages = [{"role": "user", "content": "hello"}]
    chat = ours.apply_chat_template(messages, tokenize=False)
    assert chat == theirs.apply_chat_template(messages, tokenize=False)
    # SmolLM's own tokenizer.json starts with Digits(individual_digits=True): "12" stays two tokens.
    tokens = vocabulary()
    assert [tokens[i] for i in ours("a 12").input_ids] == ["a", "Ġ", "1", "2"]


def test_tokenizer_and_model_need_no_torch(file):
    code = f"""
import sys

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] == "torch"
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
from jaxpeft.models import load, load_tokenizer
tokens = load_tokenizer({str(file)!r})("hello 12", return_tensors="np").input_ids
model, params = load({str(file)!r})
print(model.apply(params, tokens).shape, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == f"(1, 4, {len(vocabulary())}) False", done.stderr


def test_damaged_and_ambiguous_files(file, tmp_path):
    (tmp_path / "a.gguf").write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged or no GGUF"):
        load(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds 2 GGUF files: a.gguf, b.gguf"):
        load(tmp_path)
    with pytest.raises(ValueError, match="damaged or no GGUF"):
        load(tmp_path / "b.gguf")
    (tmp_path / "c.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no .gguf file"):
        load(tmp_path / "c.bin")


def test_unknown_architecture_and_tokenizer(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tokenizer_model("rwkv")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="general.architecture='mamba'.*llama, qwen2"):
        load(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.ggml.model='rwkv'"):
        load_tokenizer(tmp_path)


def test_unknown_pre_tokenizer(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny(), pre="klingon")
    with pytest.raises(ValueError, match="tokenizer.ggml.pre='klingon'"):
        load_tokenizer(tmp_path)

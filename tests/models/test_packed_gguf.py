"""GGUF blocks that stay packed, against the gguf package and transformers."""

import warnings

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxpeft as jp
from jaxpeft.models import load, load_tokenizer, save
from jaxpeft.quant.formats.ggml import FIELDS
from tests.models.packed import formats_in, made_dense, same
from tests.models.test_gguf import by_q8_0, logits_of, tiny, write_gguf
from tests.models.test_packed_load import PROJECTIONS

KINDS = ("q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k")


def by_kinds(name, values):
    """Blocks of another kind for each projection; random ones of the kinds that gguf only reads."""
    projections = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down")
    kinds = {"attn_output": "q4_k", **dict(zip(projections, KINDS[3:] + KINDS[:3], strict=True))}
    found = [kind for part, kind in kinds.items() if part in name]
    return blocks(found[0], name, values) if found else by_q8_0(name, values)


def blocks(kind, name, values):
    number = gguf.GGMLQuantizationType[kind.upper()]
    if not kind.endswith("k"):
        return gguf.quantize(values, number), number
    random, size = np.random.default_rng(sum(name.encode())), gguf.GGML_QUANT_SIZES[number][1]
    raw = random.integers(0, 256, (values.shape[0], values.shape[1] // 256, size), np.uint8)
    start = 0
    for field in FIELDS[kind]:
        end = start + field.length * field.dtype.itemsize
        if field.dtype == np.float16:
            scale = random.uniform(1e-4, 2e-4, (*raw.shape[:2], field.length))
            raw[..., start:end] = scale.astype(np.float16).view(np.uint8)
        start = end
    return raw.reshape(values.shape[0], -1), number


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    wide = dict(hidden_size=256, intermediate_size=512, tie_word_embeddings=True)
    write_gguf(path, tiny(**wide), quantize=by_kinds)
    return path


def test_every_kind_is_kept_as_gguf_reads_it(file):
    model, kept = load(file, quantize="keep")
    found = formats_in(kept)
    assert found.pop("embed_tokens/embedding") == jp.quant.gguf("q8_0")
    assert found.keys() == PROJECTIONS
    assert sorted(fmt.kind for fmt in found.values()) == sorted([*KINDS, "q4_k"])
    _, plain = load(file)  # dequantized by the gguf package
    assert same(made_dense(kept), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    tokens = np.random.default_rng(0).integers(3, 60, (2, 6))
    expected, actual = logits_of(oracle, tokens), jp.lift(model.apply)(kept, tokens)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-4)


def test_layers_of_several_kinds_stay_packed_and_are_written_back(tmp_path):
    """As in Q4_K_M files, where some layers have finer blocks than others."""

    def by_layers(name, values):
        first = name.startswith("blk.0.")
        kinds = {
            "attn_v": ("q4_k", "q6_k"),
            "ffn_down": ("q8_0", "q5_k"),
            "ffn_up": ("q4_0", "q4_1"),
        }
        kind = next((kinds[part][not first] for part in kinds if part in name), "q8_0")
        return blocks(kind, name, values)

    write_gguf(
        tmp_path / "m.gguf", tiny(hidden_size=256, intermediate_size=512), quantize=by_layers
    )
    model, kept = load(tmp_path, quantize="keep")
    mixed = {path: fmt.kinds for path, fmt in formats_in(kept).items() if fmt.name == "gguf_mixed"}
    assert mixed == {
        "layers/self_attn/v_proj/kernel": ("q4_k", "q6_k"),
        "layers/mlp/down_proj/kernel": ("q5_k", "q8_0"),
        "layers/mlp/up_proj/kernel": ("q4_0", "q4_1"),
    }
    _, plain = load(tmp_path)  # dequantized by the gguf package
    assert same(made_dense(kept), plain)
    tokens = np.random.default_rng(0).integers(3, 60, (2, 6))
    ours, theirs = jp.lift(model.apply, strict=True)(kept, tokens), model.apply(plain, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(np.abs(theirs).max()))
    save(tmp_path / "again.gguf", model, kept, tokenizer_from=tmp_path / "m.gguf")
    first, second = (gguf.GGUFReader(tmp_path / name) for name in ("m.gguf", "again.gguf"))
    written = {tensor.name: tensor for tensor in second.tensors}
    for tensor in first.tensors:
        assert written[tensor.name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(written[tensor.name].data, tensor.data)
    with pytest.raises(ValueError, match=r"go into a \.gguf file alone"):
        save(tmp_path / "directory", model, kept)


def test_a_stack_with_a_dense_layer_becomes_dense_unless_a_format_is_named(tmp_path):
    def by_layers(name, values):
        if name.startswith("blk.1.ffn_down"):
            return values, gguf.GGMLQuantizationType.F32
        return blocks("q8_0", name, values)

    write_gguf(tmp_path / "m.gguf", tiny(), quantize=by_layers)
    with pytest.warns(UserWarning, match=r"mlp/down_proj.*q8_0.*: 1, dense: 1.*loaded dense"):
        _, kept = load(tmp_path, quantize="keep")
    down = "layers/mlp/down_proj/kernel"
    assert formats_in(kept).keys() == PROJECTIONS - {down} | {
        "embed_tokens/embedding", "lm_head/kernel"
    }  # fmt: skip
    _, plain = load(tmp_path)
    assert same(kept["layers"]["mlp"]["down_proj"], plain["layers"]["mlp"]["down_proj"])
    rules = jp.rules((down, jp.quant.gguf("q8_0")), ("**", "keep"))
    _, named = load(tmp_path, quantize=rules)
    assert formats_in(named) == formats_in(kept) | {down: jp.quant.gguf("q8_0")}


def test_a_file_is_written_back_as_it_was(file, tmp_path):
    model, kept = load(file, quantize="keep")
    save(tmp_path / "again.gguf", model, kept, tokenizer_from=file)
    first, second = gguf.GGUFReader(file), gguf.GGUFReader(tmp_path / "again.gguf")
    written = {tensor.name: tensor for tensor in second.tensors}
    assert written.keys() == {tensor.name for tensor in first.tensors}
    for tensor in first.tensors:
        again = written[tensor.name]
        assert again.tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(again.data, tensor.data)
    for key, field in first.fields.items():
        assert second.fields[key].contents() == field.contents()
    text = "hello world 12"
    ours, theirs = load_tokenizer(tmp_path / "again.gguf"), load_tokenizer(file)
    assert ours(text).input_ids == theirs(text).input_ids


def test_dense_weights_are_written_in_their_dtype(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny())
    model, params = load(tmp_path, dtype=jnp.bfloat16)
    save(tmp_path / "b.gguf", model, params, tokenizer_from=tmp_path / "m.gguf")
    assert same(load(tmp_path / "b.gguf", dtype=jnp.bfloat16)[1], params)


def about(path):
    """What a file says of its blocks, as the gguf package names it."""
    found = gguf.GGUFReader(path).fields
    version = found.get("general.quantization_version")
    kind = gguf.LlamaFileType(found["general.file_type"].contents()).name
    return kind, version and version.contents()


def test_a_file_says_what_its_blocks_are(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny(), quantize=by_q8_0)
    version = gguf.GGML_QUANT_VERSION
    source = tmp_path / "m.gguf"
    for kind, expected in (
        ("q4_0", ("MOSTLY_Q4_0", version)),
        (None, ("ALL_F32", None)),
        ("q8_0", ("MOSTLY_Q8_0", version)),
    ):
        wanted = jp.rules(("layers/**/kernel", jp.quant.gguf(kind))) if kind else None
        model, params = load(tmp_path / "m.gguf", quantize=wanted)
        path = tmp_path / f"{kind}.gguf"
        save(path, model, params, tokenizer_from=source)
        assert about(path) == expected
        source = path  # the next one comes from a file that says something else
    opened = gguf.GGUFReader(path, "r+")
    opened.fields["general.file_type"].parts[-1][0] = gguf.LlamaFileType.MOSTLY_Q5_K_S
    opened.data.flush()
    model, kept = load(path, quantize="keep")
    save(tmp_path / "same.gguf", model, kept, tokenizer_from=path)
    assert about(tmp_path / "same.gguf") == ("MOSTLY_Q5_K_S", version)


def test_what_a_gguf_file_needs(file, tmp_path):
    model, kept = load(file, quantize="keep")
    for source in (None, tmp_path):
        with pytest.raises(ValueError, match="needs the metadata and the tokenizer of another"):
            save(tmp_path / "x.gguf", model, kept, tokenizer_from=source)
    with pytest.raises(ValueError, match="GGUF blocks go into a .gguf file"):
        save(tmp_path / "x", model, kept)
    _, packed = load(file, quantize=jp.rules(("**/up_proj/kernel", jp.quant.nf4())))
    with pytest.raises(ValueError, match="is packed in NF4.*jp.quant.gguf"):
        save(tmp_path / "x.gguf", model, packed, tokenizer_from=file)
    write_gguf(tmp_path / "other.gguf", tiny())
    with pytest.raises(ValueError, match="is of another model"):
        save(tmp_path / "x.gguf", model, kept, tokenizer_from=tmp_path / "other.gguf")
    assert not list(tmp_path.glob("x*"))


def test_scales_that_are_no_numbers_are_named(tmp_path):
    def damaged(name, values):
        data, kind = by_q8_0(name, values)
        if name == "blk.1.attn_k.weight":
            data[0, :2] = 255
        return data, kind

    write_gguf(tmp_path / "m.gguf", tiny(), quantize=damaged)
    for how in ("keep", None):
        where = "layers.1.self_attn.k_proj.weight' in .*m.gguf.*finite"
        with pytest.raises(ValueError, match=where):
            load(tmp_path, quantize=how)

"""Specifications of methods: how they are read, and what they train in an encoder."""

import jax
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft import train
from jaxpeft.models.bert import Bert
from jaxpeft.models.bert_config import BertConfig
from jaxpeft.train.specs import KNOWN

D, F, L, V, P = 16, 24, 3, 40, 20  # width, inner width, layers, words, positions
HEAD = 2 * D + 2
CONFIG = BertConfig(
    "bert", V, D, F, L, 2, max_position_embeddings=P, task="token-classification", labels=("a", "b")
)
BIASES = L * (4 * D + F + D + 2 * D) + D  # of maps and of norms, of all layers and the embeddings
SCALES = (2 * L + 1) * D
KERNELS = L * (4 * D * D + 2 * D * F)
TABLES = (V + P + 2) * D
MAPS = L * (4 * 2 * D + 2 * (D + F))  # inputs and outputs of all maps
COUNTS = {
    "probe": 0,
    "bitfit": BIASES,
    "norms": 2 * SCALES,
    "ia3": L * (5 * D + F),
    "lora:rank=2": 2 * MAPS,
    "rslora:rank=3": 3 * MAPS,
    "houlsby:reduction=4": 2 * L * (4 * (2 * D + 1) + D),
    "pfeiffer:width=5": L * (5 * (2 * D + 1) + D),
    "parallel:reduction=2": L * (8 * (2 * D + 1) + D),
    "prompt:tokens=7": 7 * D,
    "prefix:tokens=4": 2 * L * 4 * D,
    "full": BIASES + SCALES + KERNELS + TABLES,
    "lora:rank=2+bitfit": 2 * MAPS + BIASES,
    "prefix:tokens=4+parallel:reduction=2": 2 * L * 4 * D + L * (8 * (2 * D + 1) + D),
}
OTHERS = ("compacter:reduction=4", "p_tuning:tokens=3", "loreft:rank=2")


@pytest.fixture(scope="module")
def encoder():
    return nnx.eval_shape(lambda: Bert(CONFIG, rngs=nnx.Rngs(0)))


def trained(encoder, text):
    """Number of parameters that a specification trains beside the head."""
    tuning = train.read_spec(text).tuning(("classifier/*",), encoder.output_head)
    tuned = jp.transform(encoder, tuning)
    init = lambda params: tuned.init(jax.random.key(0), params, *encoder.example())  # noqa: E731
    adapter = jax.eval_shape(init, nnx.state(encoder))
    assert {"classifier/kernel", "classifier/bias"} <= set(adapter)
    return sum(leaf.size for leaf in jax.tree.leaves(adapter)) - HEAD


@pytest.mark.parametrize("text", COUNTS)
def test_a_method_trains_its_parameters_and_the_head(encoder, text):
    assert trained(encoder, text) == COUNTS[text]


@pytest.mark.parametrize("text", OTHERS)
def test_the_others_fit_too(encoder, text):
    assert trained(encoder, text) > 0


def test_every_name_is_tried_here():
    tried = {text.partition(":")[0] for text in (*COUNTS, *OTHERS)}
    assert KNOWN.keys() | {"probe"} == tried & (KNOWN.keys() | {"probe"})


def test_without_a_head_the_output_stays(encoder):
    tuning = train.read_spec("lora:rank=2").tuning((), "classifier/kernel")
    tuned = jp.transform(encoder, tuning)
    adapter = tuned.init(jax.random.key(0), nnx.state(encoder), *encoder.example())
    assert "classifier/kernel" not in adapter and len(adapter) == 6
    with pytest.raises(ValueError, match="'probe' trains the head alone"):
        train.read_spec("probe").tuning()


def test_options_and_learning_rates():
    spec = train.read_spec("lora:rank=4,alpha=8,dropout=0.1,lr=1e-4")
    (method,) = spec.methods
    assert (spec.rate, method.options["alpha"], method.options["dropout"]) == (1e-4, 8, 0.1)
    (method,) = train.read_spec("pfeiffer:width=4,bias=false,activation=gelu,gate=none").methods
    assert (method.options["bias"], method.options["activation"]) == (False, "gelu")
    assert method.options["gate"] is None
    assert train.read_spec("prefix+lora:lr=2e+1").rate == 20
    assert train.read_spec("prefix+lora").rate == KNOWN["prefix"].rate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lroa", "'lroa', which is none of: lora, rslora"),
        ("", "'' names ''"),
        ("lora:8", "'8' is no option. Write"),
        ("lora:rank=0", "rank=0 is not a rank"),
        ("lora:ranks=8", "lora has no option 'ranks'. It has lr, rank, alpha"),
        ("lora:lr=fast", "lr=fast is no learning rate"),
        ("lora:lr=-1", "lr=-1 is no learning rate"),
        ("probe:rank=2", "probe has no option but lr"),
        ("houlsby:width=4,reduction=2", "a bottleneck has a width or a reduction"),
    ],
)
def test_a_specification_that_is_wrong(text, message):
    with pytest.raises(ValueError) as caught:
        train.read_spec(text)
    assert message in str(caught.value)


def test_each_method_once():
    with pytest.raises(ValueError, match="each once"):
        train.read_specs(["lora", "lora"])
    with pytest.raises(ValueError, match="one or more"):
        train.read_specs([])

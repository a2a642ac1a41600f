"""Tasks that methods can be compared on: labels or numbers of texts, and language modelling."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.train.loss import LossFn, causal_lm_loss, cross_entropy
from jaxpeft.train.rows import WEIGHT
from jaxpeft.train.step import evaluate, make_evaluation

Apply = Callable[..., jax.Array]
Score = Callable[[Any, Any], dict[str, float]]

POOLINGS = ("mean", "first")


class Task(NamedTuple):
    """What a model is tuned for, and how well it does it.

    Attributes:
      model: what `transform` takes.
      params: its frozen weights.
      train: position -> batch, with `len` batches in an epoch, such as `Rows` or `Batches`.
      loss: from `tuned.apply` to a loss function for `make_step`.
      score: from `tuned.apply` to `(adapter, params) -> {name: number}` on held-out data.
      quality: the name of the number to compare by.
      higher: whether more of it is better.
      baseline: `{name: number}` of a guess that looks at no input.
      head: globs of the parameters of a new head, which every method trains fully.
      example: abstract inputs of a call, where the model has no `example()`.
    """

    model: Any
    params: Any
    train: Any
    loss: Callable[[Apply], LossFn]
    score: Callable[[Apply], Score]
    quality: str
    higher: bool = True
    baseline: Mapping[str, float] = {}
    head: tuple[str, ...] = ()
    example: tuple[Any, ...] = ()


def tokenize(texts: Sequence[str], tokenizer: Any, max_length: int) -> dict[str, np.ndarray]:
    """Token ids of texts, padded to one length: that of the longest, `max_length` at most.

    Args:
      texts: at least one.
      tokenizer: a Hugging Face tokenizer.
      max_length: tokens; what is longer is cut from the end.

    Returns:
      `tokens` (texts, length) int32, and `mask`, False at padding.
    """
    given = tokenizer(list(texts), truncation=True, max_length=max_length)
    rows = [np.asarray(ids, np.int32) for ids in given["input_ids"]]
    mask = np.arange(max(map(len, rows))) < np.array([len(ids) for ids in rows])[:, None]
    tokens = np.full(mask.shape, tokenizer.pad_token_id or 0, np.int32)
    tokens[mask] = np.concatenate(rows)
    return {"tokens": tokens, "mask": mask}


def pool(logits: jax.Array, mask: jax.Array, pooling: str = "mean") -> jax.Array:
    """One answer a text from one a token: `mean_t(x_t W + b) = mean_t(x_t) W + b`.

    A linear head on pooled features is so that of a token classifier, pooled afterwards. Virtual
    tokens of prompts are cut before, so they do not count.

    Args:
      logits: (texts, tokens, classes).
      mask: (texts, tokens), False at padding.
      pooling: "mean", or "first" for the first token's.

    Returns:
      (texts, classes).

    Example:
      >>> pool(jnp.array([[[1.0], [3.0], [8.0]]]), jnp.array([[True, True, False]])).tolist()
      [[2.0]]
    """
    if pooling == "first":
        return logits[:, 0]
    weights = mask.astype(logits.dtype)[..., None]
    return (logits * weights).sum(1) / weights.sum(1)


def classification(
    model: Any, params: Any, train: Any, test: Iterable[Any], *, pooling: str = "mean"
) -> Task:
    """Which class a text belongs to: a new linear head on the mean of an encoder's last states.

    Args:
      model: from `jp.models.load(directory, task="token-classification", labels=[...])`, whose head
        is pooled; see `pool`.
      params: its weights.
      train: `Rows` of `tokens`, `mask` and `labels` (integers).
      test: batches of the same.
      pooling: "mean" or "first".

    Returns:
      A `Task` whose scores are `accuracy` and `loss` (nats a text).
    """

    def logits(apply: Apply, adapter: Any, params: Any, batch: Any, key: Any) -> jax.Array:
        answers = apply(adapter, params, batch["tokens"], mask=batch["mask"], dropout_key=key)
        return pool(answers, batch["mask"], pooling)

    def loss(apply: Apply) -> LossFn:
        def loss_fn(adapter: Any, params: Any, batch: Any, key: Any) -> Any:
            found = logits(apply, adapter, params, batch, key)
            return cross_entropy(found, batch["labels"], batch[WEIGHT] > 0)

        return loss_fn

    def score(apply: Apply) -> Score:
        predict = jax.jit(lambda a, p, batch: logits(apply, a, p, batch, None))

        def scored(adapter: Any, params: Any) -> dict[str, float]:
            found, labels = _gather(predict, adapter, params, test, "labels")
            losses = -np.asarray(jax.nn.log_softmax(found))[np.arange(len(labels)), labels]
            accuracy = float(np.mean(found.argmax(-1) == labels))
            return {"accuracy": accuracy, "loss": float(losses.mean())}

        return scored

    labels = np.concatenate([batch["labels"][batch[WEIGHT] > 0] for batch in test])
    commonest = np.bincount(train.arrays["labels"]).argmax()
    baseline = {"accuracy": float(np.mean(labels == commonest))}
    return Task(
        model, params, train, loss, score, "accuracy", baseline=baseline, head=("classifier/*",)
    )


def regression(
    model: Any, params: Any, train: Any, test: Iterable[Any], *, pooling: str = "mean"
) -> Task:
    """A number for each text, by least squares, with the head of `classification`.

    Numbers are learned in units of their standard deviation from their mean in `train`.

    Args:
      model: from `jp.models.load(directory, task="token-classification", labels=1)`.
      params: its weights.
      train: `Rows` of `tokens`, `mask` and `labels` (floats).
      test: batches of the same.
      pooling: "mean" or "first".

    Returns:
      A `Task` whose scores are `pearson`, `spearman` (correlations) and `rmse`, in the labels'
      unit.
    """
    known = train.arrays["labels"]
    center, spread = float(np.mean(known)), float(np.std(known)) or 1.0

    def numbers(apply: Apply, adapter: Any, params: Any, batch: Any, key: Any) -> jax.Array:
        answers = apply(adapter, params, batch["tokens"], mask=batch["mask"], dropout_key=key)
        return pool(answers, batch["mask"], pooling)[:, 0]

    def loss(apply: Apply) -> LossFn:
        def loss_fn(adapter: Any, params: Any, batch: Any, key: Any) -> Any:
            wanted = (batch["labels"] - center) / spread
            errors = (numbers(apply, adapter, params, batch, key) - wanted) ** 2
            return jnp.sum(batch[WEIGHT] * errors), jnp.sum(batch[WEIGHT])

        return loss_fn

    def score(apply: Apply) -> Score:
        predict = jax.jit(lambda a, p, batch: numbers(apply, a, p, batch, None))

        def scored(adapter: Any, params: Any) -> dict[str, float]:
            found, labels = _gather(predict, adapter, params, test, "labels")
            return agreement(found * spread + center, labels)

        return scored

    labels = np.concatenate([batch["labels"][batch[WEIGHT] > 0] for batch in test])
    baseline = {
        "pearson": 0.0,
        "spearman": 0.0,
        "rmse": agreement(labels * 0 + center, labels)["rmse"],
    }
    return Task(
        model, params, train, loss, score, "pearson", baseline=baseline, head=("classifier/*",)
    )


def agreement(found: Any, wanted: Any) -> dict[str, float]:
    """How well numbers agree: Pearson's and Spearman's correlation, and the root mean square error.

    Args:
      found: (n,).
      wanted: (n,).

    Returns:
      `pearson`, `spearman` (0 where one side is constant) and `rmse`.

    Example:
      >>> agreement([1.0, 2.0, 9.0], [1.0, 2.0, 3.0])["spearman"]
      1.0
    """
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return {
        "pearson": _correlation(found, wanted),
        "spearman": _correlation(_ranks(found), _ranks(wanted)),
        "rmse": float(np.sqrt(np.mean((found - wanted) ** 2))),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / norm) if norm > 0 else 0.0


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def language_modelling(model: Any, params: Any, train: Any, test: Iterable[Any]) -> Task:
    """The next token of a causal language model.

    Args:
      model: a decoder of `jp.models.load`.
      params: its weights.
      train: `Batches`.
      test: `Batch`es; see `Batches`.

    Returns:
      A `Task` whose score is `loss`, in nats a target token. There is no new head, and the baseline
      is the model without an adapter.
    """
    plain = make_evaluation(
        causal_lm_loss(lambda adapter, p, *a, dropout_key, **kw: model.apply(p, *a, **kw))
    )

    def score(apply: Apply) -> Score:
        evaluation = make_evaluation(causal_lm_loss(apply))
        return lambda adapter, params: {"loss": evaluate(evaluation, adapter, params, test)}

    baseline = {"loss": evaluate(plain, {}, params, test)}
    return Task(model, params, train, causal_lm_loss, score, "loss", False, baseline)


def _gather(
    predict: Callable[..., Any], adapter: Any, params: Any, batches: Iterable[Any], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Answers and what was wanted, of the real rows of all batches."""
    pairs = [(predict(adapter, params, batch), batch) for batch in batches]
    kept = [(np.asarray(found)[b[WEIGHT] > 0], b[name][b[WEIGHT] > 0]) for found, b in pairs]
    found, wanted = zip(*kept, strict=True)
    return np.concatenate(found), np.concatenate(wanted)

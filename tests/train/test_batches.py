import numpy as np
import pytest

from jaxpeft.train import Batches, Example, bucket_lengths

LENGTHS = np.random.default_rng(0).integers(1, 100, 53)
EXAMPLES = [Example(np.full(n, i + 1), np.ones(n, bool)) for i, n in enumerate(LENGTHS)]


def seen(batch):
    return sorted(batch.tokens[batch.targets.any(1), 0].tolist())


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("batch_size", [1, 4, 60])
def test_every_example_comes_once_an_epoch(batch_size, seed):
    batches = Batches(EXAMPLES, batch_size, seed=seed)
    for epoch in range(2):
        positions = range(epoch * len(batches), (epoch + 1) * len(batches))
        tokens = sorted(t for p in positions for t in seen(batches(p)))
        assert tokens == list(range(1, 54))
        assert {batches(p).tokens.shape[0] for p in positions} == {batch_size}


def test_rows_are_the_examples_padded_on_the_right():
    for batch in Batches(EXAMPLES, 4):
        for tokens, mask, targets in zip(*batch, strict=True):
            example = EXAMPLES[tokens[0] - 1]
            n = len(example.tokens)
            assert mask.tolist() == [True] * n + [False] * (len(tokens) - n)
            np.testing.assert_array_equal(tokens[:n], example.tokens)
            assert not tokens[n:].any() and not targets[n:].any()
            assert targets[:n].all() or not targets.any()


def test_a_position_gives_the_same_batch_in_any_order():
    forward, backward = Batches(EXAMPLES, 4, seed=7), Batches(EXAMPLES, 4, seed=7)
    last = [backward(p) for p in reversed(range(30))][::-1]
    for p in range(30):
        np.testing.assert_array_equal(forward(p).tokens, last[p].tokens)


def test_epochs_and_seeds_differ():
    a, b = Batches(EXAMPLES, 4, seed=0), Batches(EXAMPLES, 4, seed=1)
    n = len(a)
    first, second, other = (
        [seen(f(p)) for p in range(s, s + n)] for f, s in ((a, 0), (a, n), (b, 0))
    )
    assert first != second and first != other
    assert sorted(first) != sorted(second)  # other company, not only another order


def test_no_seed_keeps_the_order():
    tokens = [t for batch in Batches(EXAMPLES, 4, seed=None) for t in seen(batch)]
    assert tokens == list(range(1, 54))


def test_few_lengths_and_little_padding():
    batches = Batches(EXAMPLES, 4)
    widths = [batches(p).tokens.shape[1] for p in range(len(batches))]
    assert set(widths) <= set(bucket_lengths(max(LENGTHS)))
    sizes = [batch.mask.mean() for batch in batches]
    unsorted = [batch.mask.mean() for batch in Batches(EXAMPLES, 4, seed=None)]
    assert np.mean(sizes) > np.mean(unsorted)


@pytest.mark.parametrize("longest", [1, 16, 17, 500, 4096])
def test_buckets_hold_the_longest(longest):
    lengths = bucket_lengths(longest)
    assert longest <= lengths[-1] < longest + 16
    assert len(lengths) <= 4 and list(lengths) == sorted(set(lengths))


def test_fingerprint_tells_data_apart():
    untaught = EXAMPLES[-1]._replace(targets=~EXAMPLES[-1].targets)
    others = [
        Batches(EXAMPLES, 4),
        Batches(EXAMPLES, 5),
        Batches(EXAMPLES, 4, seed=1),
        Batches(EXAMPLES[::-1], 4),
        Batches([*EXAMPLES[:-1], untaught], 4),
    ]
    prints = [batches.fingerprint() for batches in others]
    assert len(set(prints)) == 5
    assert prints[0] == Batches(list(EXAMPLES), 4).fingerprint()


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="0 examples"):
        Batches([], 4)
    with pytest.raises(ValueError, match=f"has {max(LENGTHS)} tokens but lengths=\\(8,\\)"):
        Batches(EXAMPLES, 4, lengths=(8,))

import sys

import numpy as np
import pytest
from matplotlib.image import imread

from jaxpeft import train


def image(tmp_path, rows):
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    for row in rows:
        train.append_metrics(path, row)
    train.plot_loss(path, tmp_path / "loss.png")
    return imread(tmp_path / "loss.png")[..., :3]


def coloured(pixels):
    """Number of pixels that are not grey."""
    return int((np.ptp(pixels, axis=-1) > 0.2).sum())


def test_both_curves_are_drawn(tmp_path):
    losses = [{"step": i, "loss": 2.0 / i} for i in range(1, 20)]
    evaluations = [{"step": i, "eval_loss": 2.5 / i} for i in (5, 10)]
    train_only, both = image(tmp_path, losses), image(tmp_path, losses + evaluations)
    assert train_only.shape == both.shape == (480, 840, 3)
    assert 0 < coloured(train_only) < coloured(both)


def test_a_missing_loss_is_passed_over(tmp_path):
    assert coloured(image(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": np.nan}]))


def test_pyplot_is_left_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    image(tmp_path, [{"step": 1, "loss": 1.0}])
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        train.plot_loss(tmp_path / "none.jsonl", tmp_path / "loss.png")
    with pytest.raises(ValueError, match="holds no loss yet"):
        image(tmp_path, [{"step": 1, "seconds": 1.0}])

"""Eight virtual CPU devices, no network, and the same random numbers in every run."""

import os
import random
import sys

# These are read when jax and transformers are first imported, so they are set before that. What the
# user has set stays: JAX_PLATFORMS=cuda runs the same tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# No deadline: the first example of each property compiles. No database: runs do not depend on it.
hypothesis.settings.register_profile(
    "jaxpeft", deadline=None, derandomize=True, database=None, max_examples=25
)
hypothesis.settings.load_profile("jaxpeft")


@pytest.fixture(autouse=True)
def _same_random_numbers():
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)

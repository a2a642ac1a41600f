"""Eight virtual CPU devices, no network, and the same random numbers in every run."""

import os
import random
import sys

# These are read when jax and transformers are first imported, so they are set before that. What the
# user has set stays: JAX_PLATFORMS=cuda runs the same tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiling is what the tests spend their time on: the last two leave out LLVM's work alone, and the
# arrays that a program makes are decided before it.
_FLAGS = {"--xla_force_host_platform_device_count": 8}
if os.environ["JAX_PLATFORMS"] == "cpu":
    _FLAGS["--xla_backend_optimization_level"] = 0
    _FLAGS["--xla_llvm_disable_expensive_passes"] = "true"
_GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_GIVEN, *(f"{name}={value}" for name, value in _FLAGS.items() if name not in _GIVEN)]
).strip()

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

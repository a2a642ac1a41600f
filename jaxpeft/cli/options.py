"""Options from a YAML file, as if they had been typed before those on the command line."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any


def with_file(args: list[str]) -> list[str]:
    return args

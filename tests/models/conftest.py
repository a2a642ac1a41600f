"""Fixtures for the tests of models."""

from tests.models.tiny import oracle as oracle
from tests.models.tiny import tokens as tokens

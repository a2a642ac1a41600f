"""Fixtures for the tests of generation."""

from tests.models.tiny import oracle as oracle
from tests.models.tiny import tokens as tokens

"""Flax models that load Hugging Face weights."""

from jaxpeft.models.config import DecoderConfig as DecoderConfig
from jaxpeft.models.decoder import Decoder as Decoder
from jaxpeft.models.load import load as load

"""Flax models that load Hugging Face weights."""

from jaxpeft.models.config import DecoderConfig as DecoderConfig
from jaxpeft.models.decoder import Decoder as Decoder
from jaxpeft.models.load import load as load
from jaxpeft.models.names import names as names
from jaxpeft.models.save import save as save
from jaxpeft.models.tokenizer import load_tokenizer as load_tokenizer

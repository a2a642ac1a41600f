"""Flax models that load Hugging Face weights."""

from jaxpeft.models.config import DecoderConfig as DecoderConfig
from jaxpeft.models.decoder import Decoder as Decoder
from jaxpeft.models.families import FAMILIES as FAMILIES
from jaxpeft.models.families import Family as Family
from jaxpeft.models.load import load as load
from jaxpeft.models.mirror import mirror as mirror
from jaxpeft.models.model import Model as Model
from jaxpeft.models.names import Name as Name
from jaxpeft.models.names import names as names
from jaxpeft.models.save import save as save
from jaxpeft.models.tokenizer import load_tokenizer as load_tokenizer

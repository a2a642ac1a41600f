"""Adapter files: Hugging Face PEFT's LoRA format both ways, and a native one for any adapter."""

from jaxpeft.hf.collect import PeftFormatError as PeftFormatError
from jaxpeft.hf.native import load as load
from jaxpeft.hf.native import save as save
from jaxpeft.hf.read import load_adapter as load_adapter
from jaxpeft.hf.write import save_adapter as save_adapter

"""Adapter files: those of Hugging Face PEFT and of AdapterHub both ways, and a native one."""

from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError as AdapterHubFormatError
from jaxpeft.hf.adapterhub.read import load_adapterhub as load_adapterhub
from jaxpeft.hf.adapterhub.write import save_adapterhub as save_adapterhub
from jaxpeft.hf.collect import PeftFormatError as PeftFormatError
from jaxpeft.hf.difference import difference as difference
from jaxpeft.hf.native import load as load
from jaxpeft.hf.native import save as save
from jaxpeft.hf.read import load_adapter as load_adapter
from jaxpeft.hf.write import save_adapter as save_adapter

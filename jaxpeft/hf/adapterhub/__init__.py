"""The files of AdapterHub's library `adapters`, both ways."""

from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError as AdapterHubFormatError
from jaxpeft.hf.adapterhub.read import load_adapterhub as load_adapterhub
from jaxpeft.hf.adapterhub.write import save_adapterhub as save_adapterhub

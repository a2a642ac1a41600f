"""Adapters on disk, in whichever format they are."""

from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
NATIVE = "adapter.safetensors"


def save_adapter(directory: Path, tuned: Any, adapter: Any, model: Any, base: str) -> Path:
    """Writes an adapter in Hugging Face PEFT's format or, if that cannot say it, in our own.

    Args:
        directory: where to.
        tuned: the tuned model.
        adapter: its adapter.
        model: the model that it is for.
        base: the model's name, for the file.

    Returns:
        The file that holds the tensors.
    """
    import jaxpeft as jp
    from jaxpeft.hf import PeftFormatError

    try:
        jp.hf.save_adapter(directory, tuned, adapter, model=model, base_model_name=base)
    except PeftFormatError:
        jp.save(directory / NATIVE, adapter, tuned)
        # An earlier adapter of PEFT's would be read in place of this one.
        (directory / CONFIG).unlink(missing_ok=True)
        return directory / NATIVE
    return directory / "adapter_model.safetensors"


def load_adapter(path: Path, model: Any, params: Any) -> tuple[Any, Any]:
    """Reads an adapter of PEFT, of AdapterHub, or of ours.

    Args:
        path: a directory, or a file of ours.
        model: the model that it is for.
        params: the model's weights.

    Returns:
        `(tuned, adapter)`.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is damaged, or for another model.
    """
    import jaxpeft as jp

    if path.is_file() or not (path / CONFIG).is_file() and (path / NATIVE).is_file():
        return jp.load(path if path.is_file() else path / NATIVE, model)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"{path} holds no adapter: neither {CONFIG} nor {NATIVE}. Give the --output of "
            "`jaxpeft finetune`, or an adapter's directory of PEFT or AdapterHub."
        )
    from jaxpeft.hf.files import read_json

    if "peft_type" in read_json(path / CONFIG):
        return jp.hf.load_adapter(path, model, params=params)
    return jp.hf.load_adapterhub(path, model)

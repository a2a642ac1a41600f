r"""bitsandbytes' 4-bit tensors, as its files hold them, to and from packed arrays, bit for bit.

A file holds a weight (out, in) as one run of bytes, row after row, the first of two codes in the
high half. That is our layout transposed, with the halves of each byte swapped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.quant.formats.base import Packed, Quantized, Shape, check
from jaxpeft.quant.formats.codebook import FP4, NF4, Codebook, phases, reach, reached
from jaxpeft.quant.formats.dynamic import BLOCK, dynamic_table

Arrays = dict[str, np.ndarray]
_STATE = "quant_state.bitsandbytes__"
_KINDS = {"nf4": NF4, "fp4": FP4}


def from_bitsandbytes(arrays: Mapping[str, Any]) -> Quantized:
    """A 4-bit weight from the tensors of a file.

    Args:
        arrays: `"weight"` and what the file has under its name: `"absmax"`, `"quant_map"`,
            `"quant_state.bitsandbytes__nf4"` (or `fp4`) and, doubly quantized, `"nested_absmax"`
            and `"nested_quant_map"`.

    Returns:
        `Quantized(packed, format, shape)` of the kernel (in, out), numpy arrays.

    Raises:
        ValueError: an array is missing, truncated, not finite, of other values than the format's
            table; or blocks of the file cross the rows of its weight.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxpeft.quant.formats import nf4, quantize
        >>> packed = quantize(jnp.ones((64, 3)), nf4())
        >>> from_bitsandbytes(to_bitsandbytes(Quantized(packed, nf4(), (64, 3)))).shape
        (64, 3)
    """
    state, kind = _state(arrays)
    fmt = _KINDS[kind](int(state["blocksize"]), "nested_absmax" in arrays)
    out, rows = _matrix(state["shape"], fmt)
    count = rows // fmt.block
    _check_table("quant_map", arrays, fmt.values)
    codes = _sized(arrays, "weight", out * rows // 2, np.uint8).reshape(out, -1).T
    packed: dict[str, Any] = {"codes": (codes >> 4) | (codes << 4)}
    kind_of_scale = np.uint8 if fmt.double else np.float32
    packed["absmax"] = _sized(arrays, "absmax", out * count, kind_of_scale).reshape(out, count).T
    if fmt.double:
        packed |= _nested(arrays, state, count, out)
    check(packed, fmt, (rows, out))
    return Quantized(packed, fmt, (rows, out))


def to_bitsandbytes(weight: Quantized, dtype: str = "bfloat16") -> Arrays:
    """The tensors of a file for a weight: the inverse of `from_bitsandbytes`.

    Args:
        weight: packed arrays of one matrix in `nf4` or `fp4`.
        dtype: that bitsandbytes computes in when it reads the file, a torch name.

    Returns:
        Arrays by the names that `from_bitsandbytes` takes.

    Raises:
        ValueError: another format, a stack of weights, or a slice of the columns of a doubly
            quantized weight, whose blocks of 256 scales no longer start where a file has them.
    """
    packed, fmt, shape = weight
    if not isinstance(fmt, Codebook) or len(shape) != 2:
        raise ValueError(f"{fmt} of shape {shape} is no nf4 or fp4 matrix. Give one layer's.")
    check(packed, fmt, shape)
    rows, out = shape
    codes = np.asarray(packed["codes"])
    state = {"quant_type": fmt.name, "blocksize": fmt.block, "dtype": dtype, "shape": [out, rows]}
    arrays: Arrays = {
        "weight": np.ascontiguousarray(((codes >> 4) | (codes << 4)).T).reshape(-1, 1),
        "absmax": np.ascontiguousarray(np.asarray(packed["absmax"]).T).reshape(-1),
        "quant_map": fmt.values,
    }
    if fmt.double:
        arrays["nested_absmax"] = _blocks_of_scales(packed, rows // fmt.block, out)
        arrays["nested_quant_map"] = dynamic_table()
        offset = float(np.asarray(packed["offset"])[0, 0])
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    arrays[_STATE + fmt.name] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    return arrays


def _state(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The JSON that a file keeps as bytes, and the name of the table."""
    found = [name for name in arrays if name.startswith(_STATE)]
    kind = found[0].removeprefix(_STATE) if len(found) == 1 else ""
    if kind not in _KINDS:
        raise ValueError(
            f"{sorted(arrays)} has no {_STATE}nf4 or {_STATE}fp4. Give all tensors whose names "
            "start with the weight's, without that start."
        )
    try:
        state = json.loads(np.asarray(arrays[found[0]]).astype(np.uint8).tobytes())
        # Only what the conversion reads: a file may say more.
        return {**state, "shape": [int(n) for n in state["shape"]]}, kind
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{found[0]} is damaged: {error}. Download the file again.") from error


def _matrix(shape: Shape, fmt: Codebook) -> tuple[int, int]:
    if len(shape) != 2 or shape[1] % fmt.block:
        raise ValueError(
            f"blocks of {fmt.block} cross the rows of a weight {tuple(shape)} (out, in). Load this "
            "weight dense (bitsandbytes dequantizes it) and quantize it again."
        )
    return shape[0], shape[1]


def _sized(arrays: Mapping[str, Any], name: str, size: int, dtype: Any) -> np.ndarray:
    """An array of `size` values, which a file may hold in the bytes of another dtype."""
    if name not in arrays:
        raise ValueError(f"{name!r} is missing among {sorted(arrays)}. Give all of the weight's.")
    array = np.ascontiguousarray(arrays[name]).reshape(-1)
    array = array.view(np.uint8) if dtype is np.uint8 else array
    if array.size != size or array.dtype != dtype:
        raise ValueError(
            f"{name!r} has {array.size} values of {array.dtype}; the weight needs {size} of "
            f"{np.dtype(dtype)}. Download the file again."
        )
    return array


def _check_table(name: str, arrays: Mapping[str, Any], table: np.ndarray) -> None:
    if not np.allclose(_sized(arrays, name, table.size, np.float32), table, rtol=1e-5, atol=1e-7):
        raise ValueError(f"{name!r} holds other values than the format. Load this weight dense.")


def _nested(arrays: Mapping[str, Any], state: dict[str, Any], count: int, out: int) -> Packed:
    _check_table("nested_quant_map", arrays, dynamic_table())
    if state.get("nested_blocksize") != BLOCK or "nested_offset" not in state:
        raise ValueError(
            f"nested_blocksize={state.get('nested_blocksize')!r} with nested_offset="
            f"{state.get('nested_offset')!r} is unknown. Load this weight dense."
        )
    nested = _sized(arrays, "nested_absmax", -(-count * out // BLOCK), np.float32)
    return {
        "nested_absmax": nested[reached(count, out)],
        "nested_phase": phases(count, out),
        "offset": np.full((1, 1), state["nested_offset"], np.float32),
    }


def _blocks_of_scales(packed: Mapping[str, Any], count: int, out: int) -> np.ndarray:
    """The scales of blocks of 256, once each, from what every column lists."""
    nested, index = np.asarray(packed["nested_absmax"]), reached(count, out)
    flat = np.zeros(-(-count * out // BLOCK), np.float32)
    flat[index] = nested
    same = np.array_equal(np.asarray(packed["nested_phase"]), phases(count, out))
    if not same or nested.shape[0] != reach(count) or not np.array_equal(flat[index], nested):
        raise ValueError(
            "these scales are a slice of a doubly quantized weight. Write the whole weight, or "
            "dequantize and quantize the slice."
        )
    return flat

"""Packed weight formats as pure functions: `quantize`, `dequantize`, `error`, and converters."""

from jaxpeft.quant.formats.base import Error as Error
from jaxpeft.quant.formats.base import Format as Format
from jaxpeft.quant.formats.base import Packed as Packed
from jaxpeft.quant.formats.base import Quantized as Quantized
from jaxpeft.quant.formats.base import check as check
from jaxpeft.quant.formats.base import dequantize as dequantize
from jaxpeft.quant.formats.base import error as error
from jaxpeft.quant.formats.base import quantize as quantize
from jaxpeft.quant.formats.bitsandbytes import from_bitsandbytes as from_bitsandbytes
from jaxpeft.quant.formats.bitsandbytes import to_bitsandbytes as to_bitsandbytes
from jaxpeft.quant.formats.codebook import FP4 as FP4
from jaxpeft.quant.formats.codebook import NF4 as NF4
from jaxpeft.quant.formats.codebook import fp4 as fp4
from jaxpeft.quant.formats.codebook import nf4 as nf4
from jaxpeft.quant.formats.integer import Int4 as Int4
from jaxpeft.quant.formats.integer import Int8 as Int8
from jaxpeft.quant.formats.integer import int4 as int4
from jaxpeft.quant.formats.integer import int8 as int8

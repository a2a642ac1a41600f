"""Quantized weights: packed formats, their arithmetic, and params that hold them."""

from jaxpeft.quant.formats import fp4 as fp4
from jaxpeft.quant.formats import fp8 as fp8
from jaxpeft.quant.formats import gguf as gguf
from jaxpeft.quant.formats import int4 as int4
from jaxpeft.quant.formats import int8 as int8
from jaxpeft.quant.formats import llm_int8 as llm_int8
from jaxpeft.quant.formats import mxfp4 as mxfp4
from jaxpeft.quant.formats import nf4 as nf4
from jaxpeft.quant.formats import nvfp4 as nvfp4
from jaxpeft.quant.merge import Merged as Merged
from jaxpeft.quant.merge import merge as merge
from jaxpeft.quant.offload import offload as offload
from jaxpeft.quant.quantize import quantize as quantize
from jaxpeft.quant.starts import loftq as loftq
from jaxpeft.quant.starts import pissa as pissa
from jaxpeft.quant.svd import exact_svd as exact_svd
from jaxpeft.quant.svd import randomized_svd as randomized_svd
from jaxpeft.quant.weight import QuantizedWeight as QuantizedWeight
from jaxpeft.quant.weight import wrap as wrap

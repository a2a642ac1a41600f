"""Small models in the styles that public code is written in; every law runs over all of them."""

from tests.cases.case import Built as Built
from tests.cases.case import Case as Case
from tests.cases.control_cases import CONTROL
from tests.cases.linen_cases import LINEN
from tests.cases.nnx_cases import NNX
from tests.cases.product_cases import PRODUCTS

CASES = (*LINEN, *NNX, *PRODUCTS, *CONTROL)

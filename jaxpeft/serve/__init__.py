"""Generation."""

from jaxpeft.serve.generate import generate as generate
from jaxpeft.serve.generate import stream as stream
from jaxpeft.serve.sample import sample as sample

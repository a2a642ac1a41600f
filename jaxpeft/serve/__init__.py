"""Generation."""

from jaxpeft.serve.generate import generate as generate
from jaxpeft.serve.generate import stream as stream
from jaxpeft.serve.sample import sample as sample
from jaxpeft.serve.seq2seq import generate_seq2seq as generate_seq2seq

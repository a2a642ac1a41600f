"""Training: loss, step, optimizers, data, loop, checkpoints, plots."""

from jaxpeft.train.batches import Batch as Batch
from jaxpeft.train.batches import Batches as Batches
from jaxpeft.train.batches import Example as Example
from jaxpeft.train.batches import bucket_lengths as bucket_lengths
from jaxpeft.train.batches import pad as pad
from jaxpeft.train.data import encode as encode
from jaxpeft.train.loss import causal_lm_loss as causal_lm_loss
from jaxpeft.train.loss import cross_entropy as cross_entropy
from jaxpeft.train.loss import next_token_loss as next_token_loss
from jaxpeft.train.optim import OPTIMIZERS as OPTIMIZERS
from jaxpeft.train.optim import SCHEDULES as SCHEDULES
from jaxpeft.train.optim import optimizer as optimizer
from jaxpeft.train.optim import schedule as schedule
from jaxpeft.train.records import Record as Record
from jaxpeft.train.records import Rendered as Rendered
from jaxpeft.train.records import read_jsonl as read_jsonl
from jaxpeft.train.records import render as render
from jaxpeft.train.step import Metrics as Metrics
from jaxpeft.train.step import State as State
from jaxpeft.train.step import evaluate as evaluate
from jaxpeft.train.step import init_state as init_state
from jaxpeft.train.step import make_evaluation as make_evaluation
from jaxpeft.train.step import make_step as make_step

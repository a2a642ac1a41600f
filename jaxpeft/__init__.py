"""Parameter-efficient fine-tuning for JAX and Flax, as pure function transforms."""

from jaxpeft.core.lift import MaterializeError as MaterializeError
from jaxpeft.core.lift import MaterializeWarning as MaterializeWarning
from jaxpeft.core.lift import lift as lift
from jaxpeft.core.rules import chain as chain
from jaxpeft.core.rules import rules as rules
from jaxpeft.core.sites import Site as Site
from jaxpeft.core.transform import Adapter as Adapter
from jaxpeft.core.transform import Method as Method
from jaxpeft.core.transform import Tuned as Tuned
from jaxpeft.core.tree import combine as combine
from jaxpeft.core.tree import labels as labels
from jaxpeft.core.tree import mask as mask
from jaxpeft.core.tree import partition as partition
from jaxpeft.flax import transform as transform
from jaxpeft.methods.full import full as full
from jaxpeft.methods.inits import gaussian as gaussian
from jaxpeft.methods.inits import kaiming_uniform as kaiming_uniform
from jaxpeft.methods.lora import lora as lora
from jaxpeft.methods.lora import rslora as rslora

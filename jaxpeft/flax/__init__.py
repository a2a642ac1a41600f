"""The doors: the only place where the engine meets Flax."""

from jaxpeft.flax.doors import transform as transform
from jaxpeft.flax.mark import Point as Point

"""Routing: which rule trains each parameter of a model, decided from its modules, with a reason for each.

Hidden Linear and convolution weights go to the spectral rule, read by the matrices they hold: fused projections part by
part, expert banks expert by expert. Embeddings and everything that shares their memory, output heads, norms, biases, routers
and tables go to AdamW. A matrix of a module that no one here knows raises: which rule it gets is the user's to say.
"""

from schatten.routing.entries import Entry, Plan
from schatten.routing.places import named_parameters
from schatten.routing.planning import plan

__all__ = ["Entry", "Plan", "named_parameters", "plan"]

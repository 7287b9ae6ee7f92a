"""Choosing tokens: `Chooser` for a reply, `check_request` before it is scheduled, `choose_seed`."""

from dsmoe_local.engine.sampling.check import check_request, is_constrained
from dsmoe_local.engine.sampling.chooser import Choice, Chooser, choose_seed
from dsmoe_local.engine.sampling.constraint import Language

__all__ = ["Choice", "Chooser", "Language", "check_request", "choose_seed", "is_constrained"]

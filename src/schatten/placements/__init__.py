"""Placements: where a direction is computed, and how ranks agree.

One mechanism serves DDP, FSDP2, HSDP and tensor parallel: every logical block has one owner; what the owner needs travels
to it, what the holders need travels back, in one collective each for a bucket of parameters.
"""

from schatten.placements.flight import Context
from schatten.placements.overlap import Overlap
from schatten.placements.ranks import PLACEMENTS, Ranks

__all__ = ["PLACEMENTS", "Context", "Overlap", "Ranks"]

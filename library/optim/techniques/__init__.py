"""The techniques that optimizers are chained from, one file each."""

from .adopt import ADOPT, Adam
from .agr import AGR
from .alora import PairScale
from .base import Technique, Work
from .cautious import Cautious
from .grams import Grams
from .importance import Importance
from .lr_mask import LRMask
from .orthograd import OrthogonalGradient
from .relations import Relations
from .spd import SelectiveProjection
from .tam import Momentum, TorqueAware
from .weight_decay import Descent, DynamicWeightDecay

__all__ = [
    "ADOPT",
    "AGR",
    "Adam",
    "Cautious",
    "Descent",
    "DynamicWeightDecay",
    "Grams",
    "Importance",
    "LRMask",
    "Momentum",
    "OrthogonalGradient",
    "PairScale",
    "Relations",
    "SelectiveProjection",
    "Technique",
    "TorqueAware",
    "Work",
]

"""The techniques that optimizers are chained from, one file each."""

from .adaptive_decay import AdaptiveDecay
from .adopt import ADOPT, Adam
from .agr import AGR
from .alora import PairScale
from .base import Technique, Work
from .came import CAME, Confidence
from .cautious import Cautious
from .grams import FadingGrams, Grams
from .importance import Importance
from .lr_mask import LRMask
from .orthograd import OrthogonalGradient
from .relations import Relations
from .row_scale import RowScale
from .spd import SelectiveProjection
from .tam import Consistent, Momentum, TorqueAware
from .weight_decay import Descent, DynamicWeightDecay

__all__ = [
    "ADOPT",
    "AGR",
    "CAME",
    "Adam",
    "AdaptiveDecay",
    "Cautious",
    "Confidence",
    "Consistent",
    "Descent",
    "DynamicWeightDecay",
    "FadingGrams",
    "Grams",
    "Importance",
    "LRMask",
    "Momentum",
    "OrthogonalGradient",
    "PairScale",
    "Relations",
    "RowScale",
    "SelectiveProjection",
    "Technique",
    "TorqueAware",
    "Work",
]

"""Controls: sliders in, completions and pictures out. No science in here."""

from .claims import ClaimsPanel
from .explorer import ExplorerPanel
from .heatmap import HeatmapPanel
from .steering import SteeringPanel
from .strength import StrengthPanel
from .token import TokenPanel

__all__ = [
    "ClaimsPanel",
    "ExplorerPanel",
    "HeatmapPanel",
    "SteeringPanel",
    "StrengthPanel",
    "TokenPanel",
]

"""Controls: sliders in, completions and pictures out. No science in here."""

from .app import AppPanel
from .explorer import ExplorerPanel
from .heatmap import HeatmapPanel
from .overview import ClaimsPanel
from .steering import SteeringPanel
from .strength import StrengthPanel
from .token import TokenPanel

__all__ = [
    "AppPanel",
    "ClaimsPanel",
    "ExplorerPanel",
    "HeatmapPanel",
    "SteeringPanel",
    "StrengthPanel",
    "TokenPanel",
]

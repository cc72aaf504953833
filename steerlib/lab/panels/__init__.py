"""Controls: sliders in, completions and pictures out. No science in here."""

from .explorer import ExplorerPanel
from .heatmap import HeatmapPanel
from .steering import SteeringPanel
from .token import TokenPanel

__all__ = ["ExplorerPanel", "HeatmapPanel", "SteeringPanel", "TokenPanel"]

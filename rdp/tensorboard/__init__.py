"""Pictures of feature reuse, as images and live in TensorBoard. Needs the extra `tensorboard`.

`Panels` logs an attached model from any training loop; `feature_panel`, `feature_film`, `similarity_panel`,
`training_panel`, `comparison_panel` and `lesion_panel` draw one image each. Nothing else in the library draws.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
    import PIL as _pil  # noqa: F401
    import tensorboard as _tensorboard  # type: ignore[import-untyped]  # noqa: F401
except ImportError as _error:
    raise ImportError(
        f"rdp.tensorboard needs {_error.name}, of the extra `tensorboard`; in a checkout: pip install '.[tensorboard]'"
    ) from _error

from rdp.tensorboard.charts import comparison_panel, lesion_panel, similarity_panel
from rdp.tensorboard.colors import Image
from rdp.tensorboard.events import Events, Log, png
from rdp.tensorboard.feature_panel import feature_film, feature_panel
from rdp.tensorboard.maps import Layer, evenly, layer_of, node_maps
from rdp.tensorboard.panels import Panels
from rdp.tensorboard.training import History, training_panel

__all__ = [
    "Events",
    "History",
    "Image",
    "Layer",
    "Log",
    "Panels",
    "comparison_panel",
    "evenly",
    "feature_film",
    "feature_panel",
    "layer_of",
    "lesion_panel",
    "node_maps",
    "png",
    "similarity_panel",
    "training_panel",
]

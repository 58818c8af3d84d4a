"""Expert-parallel serving of sparse Mixture-of-Experts models with balanced experts.

The three verbs of the Python API are loaded on first use, so that `import rq_ep` costs milliseconds:

    stats = rq_ep.calibrate(model, texts)
    placement = rq_ep.place(stats, num_ranks=8, budget="ep")
    model = rq_ep.load(path, placement=placement)       # on every rank, under any torch.distributed launcher
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rq_ep.model.calibration.calibrate import calibrate
    from rq_ep.model.load.load_model import load
    from rq_ep.placing.place import place

__all__ = ["calibrate", "load", "place"]

_HOMES = {
    "calibrate": "rq_ep.model.calibration.calibrate",
    "place": "rq_ep.placing.place",
    "load": "rq_ep.model.load.load_model",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rq_ep' has no attribute {name!r}")

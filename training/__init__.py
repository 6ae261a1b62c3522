"""Training retention gates: data, objective and the accelerate loop."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.training', not {__name__!r}: a second name would give duplicate classes")

from .config import TrainConfig
from .data import Example, ExampleSource, load_examples
from .objective import GateObjective, Losses
from .packing import Batch, PackedSource, collate
from .synthetic import RetrievalDocuments
from .trainer import NotFiniteError, train

__all__ = [
    "Batch",
    "Example",
    "ExampleSource",
    "GateObjective",
    "Losses",
    "NotFiniteError",
    "PackedSource",
    "RetrievalDocuments",
    "TrainConfig",
    "collate",
    "load_examples",
    "train",
]

"""Training retention gates: data, objective and the accelerate loop."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.training', not {__name__!r}: a second name would give duplicate classes")

from typing import TYPE_CHECKING

from tenure.lazy_names import lazy_names

if TYPE_CHECKING:
    from .batching import Batch, PackedSource, collate
    from .data import Example, ExampleSource, load_examples
    from .launch import RUN_AGAIN, TrainingInterrupted
    from .objective import GateObjective, Losses
    from .synthetic import RetrievalDocuments
    from .train_config import TrainConfig
    from .trainer import NotFiniteError, train

__all__ = [
    "RUN_AGAIN", "Batch", "Example", "ExampleSource", "GateObjective", "Losses", "NotFiniteError", "PackedSource",
    "RetrievalDocuments", "TrainConfig", "TrainingInterrupted", "collate", "load_examples", "train",
]  # fmt: skip

# Imported on first use: `tenure train --help` reads the settings and needs no torch.
_NAMES = {
    "batching": "Batch PackedSource collate",
    "data": "Example ExampleSource load_examples",
    "launch": "RUN_AGAIN TrainingInterrupted",
    "objective": "GateObjective Losses",
    "synthetic": "RetrievalDocuments",
    "train_config": "TrainConfig",
    "trainer": "NotFiniteError train",
}
__getattr__ = lazy_names(__name__, _NAMES)

"""Continuous batching over the tiers: who is computed next. No model and no clock of its own."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import tenure.serving.scheduling, not {__name__!r}: a second name would give duplicate classes")

from ..keep import Keep
from .limits import Limits
from .request import Ended, Request, RequestOutcome, Times
from .scheduler import Scheduler
from .statistics import SchedulerStatistics
from .work import Decode, Prefill, Work

__all__ = [
    "Decode",
    "Ended",
    "Keep",
    "Limits",
    "Prefill",
    "Request",
    "RequestOutcome",
    "Scheduler",
    "SchedulerStatistics",
    "Times",
    "Work",
]

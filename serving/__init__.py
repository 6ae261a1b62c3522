"""Step graph, prefix tree, tiers of memory, the order of eviction, prefetch and the scheduler."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving', not {__name__!r}: a second name would give duplicate classes")

from .adapters import (
    workflow_from_dict,
    workflow_from_json,
    workflow_from_langgraph,
    workflow_from_networkx,
    workflow_from_yaml,
)
from .belady import Belady
from .copies import Urgency
from .disk import DiskPool
from .draw import draw_svg
from .estimates import Estimates
from .eviction import Room, TierPolicy, WriteBack, get_tier_policy, tier_policy_names
from .hints import Hint, HintReader, hint_formats, request_fields
from .keep import Keep
from .lease import Lease, LoadState
from .markov import LearnedTransitions
from .matching import Match
from .node import Status, Tier
from .orders import LFU, LRU, ExpectedTime, LinearCosts, Order, StepsToExecution
from .outlook import Measure, Outlook
from .payload import Payload, Phantom, TensorPayload
from .pools import MemoryPool, PhantomPool
from .prefetch import Prefetcher
from .prefetch_limits import PrefetchLimits, PrefetchStatistics
from .scheduling import (
    Decode,
    Ended,
    Limits,
    Prefill,
    Request,
    RequestOutcome,
    Scheduler,
    SchedulerStatistics,
    Times,
    Work,
)
from .spec import AgentSpec, EdgeSpec, WorkflowSpec
from .statistics import TierStatistics
from .steps import StepGraph
from .suffixes import SuffixReuse
from .systems import System, build_system, system_names
from .threads import ThreadedCopies
from .tiers import TieredTree
from .virtual import LinkSpeed, VirtualClock, VirtualCopies
from .workflow import Workflow

__all__ = [
    "LFU",
    "LRU",
    "AgentSpec",
    "Belady",
    "Decode",
    "DiskPool",
    "EdgeSpec",
    "Ended",
    "Estimates",
    "ExpectedTime",
    "Hint",
    "HintReader",
    "Keep",
    "LearnedTransitions",
    "Lease",
    "Limits",
    "LinearCosts",
    "LinkSpeed",
    "LoadState",
    "Match",
    "Measure",
    "MemoryPool",
    "Order",
    "Outlook",
    "Payload",
    "Phantom",
    "PhantomPool",
    "PrefetchLimits",
    "PrefetchStatistics",
    "Prefetcher",
    "Prefill",
    "Request",
    "RequestOutcome",
    "Room",
    "Scheduler",
    "SchedulerStatistics",
    "Status",
    "StepGraph",
    "StepsToExecution",
    "SuffixReuse",
    "System",
    "TensorPayload",
    "ThreadedCopies",
    "Tier",
    "TierPolicy",
    "TierStatistics",
    "TieredTree",
    "Times",
    "Urgency",
    "VirtualClock",
    "VirtualCopies",
    "Work",
    "Workflow",
    "WorkflowSpec",
    "WriteBack",
    "build_system",
    "draw_svg",
    "get_tier_policy",
    "hint_formats",
    "request_fields",
    "system_names",
    "tier_policy_names",
    "workflow_from_dict",
    "workflow_from_json",
    "workflow_from_langgraph",
    "workflow_from_networkx",
    "workflow_from_yaml",
]

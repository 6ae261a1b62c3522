"""Step graph, prefix tree, tiers of memory, the order of eviction, prefetch and the scheduler."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving', not {__name__!r}: a second name would give duplicate classes")

from .engine import Engine
from .hints import Hint, HintReader, hint_formats, request_fields
from .kvcache.base import Payload, Phantom, Status, TensorPayload, Tier, Urgency
from .kvcache.belady import Belady
from .kvcache.disk_pool import DiskPool
from .kvcache.eviction_policy import (
    LFU,
    LRU,
    ExpectedTime,
    LinearCosts,
    Order,
    Room,
    StepsToExecution,
    SuffixReuse,
    TierPolicy,
    WriteBack,
    get_tier_policy,
    tier_policy_names,
)
from .kvcache.memory_pool import MemoryPool, PhantomPool
from .kvcache.radix_tree import Match
from .kvcache.tiered_cache import Estimates, Lease, LoadState, TieredTree
from .kvcache.transfer_threads import ThreadedCopies
from .metrics import SchedulerStatistics, TierStatistics
from .prediction import Measure, Outlook
from .prefetch import Prefetcher, PrefetchLimits, PrefetchStatistics
from .prompt_cache import Compression, PromptKV
from .request import Ended, Keep, Request, RequestOutcome, Times
from .scheduler.config import Limits
from .scheduler.request_state import Decode, Prefill, Work
from .scheduler.scheduler import Scheduler
from .simulation.clock import LinkSpeed, VirtualClock, VirtualCopies
from .system import System, build_system, system_names
from .workflow.graph import StepGraph
from .workflow.loaders import (
    workflow_from_dict,
    workflow_from_json,
    workflow_from_langgraph,
    workflow_from_networkx,
    workflow_from_yaml,
)
from .workflow.markov import LearnedTransitions
from .workflow.plot import draw_svg
from .workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec
from .workflow.workflow import Workflow

__all__ = [
    "LFU",
    "LRU",
    "AgentSpec",
    "Belady",
    "Compression",
    "Decode",
    "DiskPool",
    "EdgeSpec",
    "Ended",
    "Engine",
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
    "PromptKV",
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

"""Step graph, prefix tree, tiers of memory and the order of eviction."""

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
from .eviction import Room, TierPolicy, WriteBack, get_tier_policy, tier_policy_names
from .lease import Lease, LoadState
from .markov import LearnedTransitions
from .matching import Match
from .node import Status, Tier
from .orders import LFU, LRU, ExpectedTime, LinearCosts, Order, StepsToExecution
from .payload import Payload, Phantom, TensorPayload
from .pools import MemoryPool, PhantomPool
from .spec import AgentSpec, EdgeSpec, WorkflowSpec
from .statistics import TierStatistics
from .steps import StepGraph
from .threads import ThreadedCopies
from .tiers import TieredTree
from .virtual import LinkSpeed, VirtualClock, VirtualCopies
from .workflow import Workflow

__all__ = [
    "LFU",
    "LRU",
    "AgentSpec",
    "Belady",
    "DiskPool",
    "EdgeSpec",
    "ExpectedTime",
    "LearnedTransitions",
    "Lease",
    "LinearCosts",
    "LinkSpeed",
    "LoadState",
    "Match",
    "MemoryPool",
    "Order",
    "Payload",
    "Phantom",
    "PhantomPool",
    "Room",
    "Status",
    "StepGraph",
    "StepsToExecution",
    "TensorPayload",
    "ThreadedCopies",
    "Tier",
    "TierPolicy",
    "TierStatistics",
    "TieredTree",
    "Urgency",
    "VirtualClock",
    "VirtualCopies",
    "Workflow",
    "WorkflowSpec",
    "WriteBack",
    "draw_svg",
    "get_tier_policy",
    "tier_policy_names",
    "workflow_from_dict",
    "workflow_from_json",
    "workflow_from_langgraph",
    "workflow_from_networkx",
    "workflow_from_yaml",
]

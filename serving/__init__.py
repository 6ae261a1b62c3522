"""Workflow-aware serving: step graphs, a tiered prefix cache, eviction policies, prefetch, scheduler and engine."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving', not {__name__!r}: a second name would give duplicate classes")

from typing import TYPE_CHECKING, Any

from .answer_stream import AnswerStream
from .cache_report import CacheReport
from .client import EngineClient, EngineClientConfig, EngineHealth
from .engine_loop import EngineLoop
from .errors import (
    BadRequest,
    Draining,
    EngineDead,
    Gone,
    QueueFull,
    RequestEnded,
    RequestFailed,
    ServingError,
    TooLarge,
)
from .events import AnswerEvent, Detokenizer, TokenEvent
from .hints import Hint, HintConfig, HintReader, hint_formats, request_fields
from .kvcache.base import KVPayload, LoadState, PhantomPayload, Status, TensorPayload, Tier, Urgency
from .kvcache.belady import Belady
from .kvcache.disk_pool import DiskPool
from .kvcache.disk_store import DiskConfig
from .kvcache.estimates import Estimates
from .kvcache.eviction_history import ComputedSpan, EvictionHistoryConfig, MissReason
from .kvcache.eviction_policy import (
    LFU,
    LRU,
    AllocStatus,
    EagerWriteBackConfig,
    EvictionPolicy,
    ExpectedTime,
    LinearCosts,
    StepsToExecution,
    SuffixReuse,
    SuffixReuseConfig,
    TierPolicy,
    WriteBack,
    get_tier_policy,
    tier_policy_names,
)
from .kvcache.memory_pool import ArenaConfig, MemoryPool, PhantomPool
from .kvcache.radix_tree import Match
from .kvcache.tiered_cache import CacheHandle, TieredCache
from .kvcache.transfer import TierMetrics
from .kvcache.transfer_threads import ThreadedTransfer
from .metrics import SchedulerMetrics
from .prediction import NextCallPredictor, PredictionConfig, PredictionMode
from .prefetch import PrefetchConfig, Prefetcher, PrefetchMetrics
from .request import FinishReason, Request, RequestOutput, RequestTimes, StorePolicy
from .sampling.params import FinishedBy, SamplingParams, TokenMask
from .scheduler.request_state import ScheduledBatch, ScheduledDecode, ScheduledPrefill
from .scheduler.scheduler import Scheduler
from .scheduler.scheduler_config import SchedulerConfig
from .simulation.clock import LinkSpeed, VirtualClock, VirtualTransfer
from .system import System, build_system, system_names
from .workflow.graph import StepGraph
from .workflow.graph_config import GraphConfig, MarkovConfig
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

if TYPE_CHECKING:
    from .engine import Engine
    from .prompt_cache import Compression, PromptKV

__all__ = [
    "LFU", "LRU", "AgentSpec", "AllocStatus", "AnswerEvent", "AnswerStream", "ArenaConfig", "BadRequest", "Belady",
    "CacheHandle", "CacheReport", "Compression", "ComputedSpan", "Detokenizer", "DiskConfig", "DiskPool",
    "Draining", "EagerWriteBackConfig", "EdgeSpec", "Engine", "EngineClient", "EngineClientConfig", "EngineDead",
    "EngineHealth", "EngineLoop", "Estimates", "EvictionHistoryConfig", "EvictionPolicy", "ExpectedTime",
    "FinishReason", "FinishedBy", "Gone", "GraphConfig", "Hint", "HintConfig", "HintReader", "KVPayload",
    "LearnedTransitions", "LinearCosts", "LinkSpeed", "LoadState", "MarkovConfig", "Match", "MemoryPool",
    "MissReason", "NextCallPredictor", "PhantomPayload", "PhantomPool", "PredictionConfig", "PredictionMode",
    "PrefetchConfig", "PrefetchMetrics", "Prefetcher", "PromptKV", "QueueFull", "Request", "RequestEnded",
    "RequestFailed", "RequestOutput", "RequestTimes", "SamplingParams", "ScheduledBatch", "ScheduledDecode",
    "ScheduledPrefill", "Scheduler", "SchedulerConfig", "SchedulerMetrics", "ServingError", "Status", "StepGraph",
    "StepsToExecution", "StorePolicy", "SuffixReuse", "SuffixReuseConfig", "System", "TensorPayload",
    "ThreadedTransfer", "Tier", "TierMetrics", "TierPolicy", "TieredCache", "TokenEvent", "TokenMask", "TooLarge",
    "Urgency", "VirtualClock", "VirtualTransfer", "Workflow", "WorkflowSpec", "WriteBack", "build_system",
    "draw_svg", "get_tier_policy", "hint_formats", "request_fields", "system_names", "tier_policy_names",
    "workflow_from_dict", "workflow_from_json", "workflow_from_langgraph", "workflow_from_networkx",
    "workflow_from_yaml",
]  # fmt: skip

# These need torch and transformers; a simulation or a scheduler of another engine does not.
_LAZY = {"Engine": "engine", "Compression": "prompt_cache", "PromptKV": "prompt_cache"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    return value

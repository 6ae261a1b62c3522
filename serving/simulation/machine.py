"""What a simulated server runs on, and the real tree, tiers and scheduler built over it without any data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from ..copies import CopyJob
from ..node import Tier
from ..orders import Costs
from ..pools import PhantomPool
from ..scheduling.limits import Limits
from ..steps import StepGraph
from ..systems import build_system
from ..virtual import LinkSpeed, VirtualClock, VirtualCopies
from .costs import CostModel, Links

if TYPE_CHECKING:
    import numpy as np

    from ..prefetch_limits import PrefetchLimits
    from ..systems import System


class CountedCopies(VirtualCopies):
    """Counts the parts it has copied."""

    parts = 0

    def copy_layer(self, job: CopyJob) -> None:
        self.parts += 1
        super().copy_layer(job)


@dataclass(frozen=True)
class Machine:
    """A device, the memory below it, and the links.

    Attributes:
        costs: seconds of computing and of loading.
        links: between the tiers.
        device_bytes, host_bytes, disk_bytes: for KV; 0: no such tier (the device needs some).
        bytes_per_token: KV of a token.
        copy_parts: in how many pieces a node is copied; after each, a more urgent copy may go first.
        limits, prefetch: of the scheduler and the prefetcher; None: their defaults.
        believed: what the server believes that computing and loading take; None: what they do.
    """

    costs: CostModel
    links: Links
    device_bytes: int
    host_bytes: int = 0
    disk_bytes: int = 0
    bytes_per_token: int = 131_072
    page_size: int = 16
    copy_parts: int = 4
    limits: Limits = field(default_factory=Limits)
    prefetch: PrefetchLimits | None = None
    believed: Costs | None = None

    def __post_init__(self) -> None:
        if min(self.device_bytes, self.bytes_per_token, self.page_size, self.copy_parts) < 1:
            raise ValueError(
                f"got device_bytes={self.device_bytes}, bytes_per_token={self.bytes_per_token}, page_size="
                f"{self.page_size}, copy_parts={self.copy_parts}; accepted: 1 or more of each"
            )

    def build(self, name: str, prompts: Sequence[np.ndarray] | None = None) -> tuple[System, VirtualClock]:
        """The system of that name (`system_names`) on a clock of its own.

        Args:
            prompts: of all requests in the order in which they are served; Belady's order alone needs and reads them.
        """
        clock = VirtualClock()
        sizes = {Tier.DEVICE: self.device_bytes, Tier.HOST: self.host_bytes, Tier.DISK: self.disk_bytes}
        pools = {tier: PhantomPool(int(size)) for tier, size in sizes.items() if size}
        host = LinkSpeed(self.links.host_bytes_per_s or 1.0, self.links.latency_s)
        disk = LinkSpeed(self.links.disk_bytes_per_s or 1.0, self.links.latency_s)
        speeds = {}
        for low, high, speed in (
            (Tier.HOST, Tier.DEVICE, host),
            (Tier.DISK, Tier.HOST, disk),
            (Tier.DISK, Tier.DEVICE, disk),
        ):
            if low in pools and high in pools:
                speeds[low, high] = speeds[high, low] = speed
        system = build_system(
            name,
            pools,
            CountedCopies(clock, speeds),
            costs=self.believed or self.costs,
            bytes_per_token=self.bytes_per_token,
            clock=clock,
            page_size=self.page_size,
            graph=StepGraph(clock),
            limits=self.limits,
            prefetch=self.prefetch,
            prompts=cast("Sequence[Sequence[int]] | None", prompts),
        )
        return system, clock

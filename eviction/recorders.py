"""What is kept for policies while the model runs: their per-entry states, and statistics of the queries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .forward_state import Step
from .layer_view import LayerView
from .model_adapters import Rotary
from .policies.base import Policy
from .recorded import CHUNK, SINKS, Inputs, Part, QueryStatistics

if TYPE_CHECKING:
    from .cache_layer import RaggedLayer



class Observers:
    """Follows the forwards of a session's model for all policies of the session; costs nothing if none wants it.

    Attributes:
        policies: those that have states.
        observing: those of them that want to see every forward.
        rotary: the model's RoPE, if statistics of the queries are kept.
    """

    def __init__(self, policies: Iterable[Policy] = (), rotary: Rotary | None = None) -> None:
        self.policies = tuple(dict.fromkeys(policy for policy in policies if policy.states))
        self.observing = tuple(policy for policy in self.policies if policy.observes)
        self.rotary = rotary

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The names under which storages keep the policies' states."""
        return tuple(policy.state_key(state) for policy in self.policies for state in policy.states)

    @property
    def observed_keys(self) -> tuple[str, ...]:
        """Those of `state_keys` that change in every forward."""
        return tuple(policy.state_key(state) for policy in self.observing for state in policy.states)

    @property
    def accumulated(self) -> str:
        """What is a sum over all tokens so far and can be undone only by going back to an older one; may be empty."""
        names = [f"the states of {policy.name!r}" for policy in self.observing]
        return " and ".join(names + ["the statistics of the queries"] * (self.rotary is not None))

    def begin(self, step: Step, position_ids: torch.Tensor | None, columns: int) -> None:
        """Opens a forward: the layers' queries will be those of these positions.

        Args:
            position_ids: `(batch or 1, q_len)` as given to the model; None for the model's default, which counts
                columns.
            columns: columns seen before this forward.

        Raises:
            ValueError: position ids of another form.
        """
        if self.rotary is None:
            return
        batch, q_len = step.positions.shape
        device = step.positions.device
        if position_ids is None:
            position_ids = torch.arange(columns, columns + q_len, device=device).unsqueeze(0)
        elif position_ids.ndim != 2 or position_ids.shape[1] != q_len:
            raise ValueError(
                f"statistics of the queries need position_ids (batch, {q_len}), got {tuple(position_ids.shape)}"
            )
        positions = position_ids.to(device).long().expand(batch, q_len)
        step.rope_positions, step.angles = positions, self.rotary.angles(positions)

    @torch.no_grad()
    def observe(self, layer: RaggedLayer, queries: torch.Tensor, step: Step) -> None:
        """Shows a layer's post-RoPE queries `(batch, num_heads, step.q_len, head_dim)`; its new entries are stored."""
        queries = queries.detach()
        if self.rotary is not None:
            layer.statistics = self._counted(layer, queries, step)
        if not self.observing:
            return
        store = layer.store
        assert store is not None, "new entries are stored first"
        positions = step.positions.long()
        time = positions[:, -1] + 1  # padding repeats the position of the real token before it
        if step.valid is not None:
            positions = positions.masked_fill(~step.valid, -1)
        for policy in self.observing:
            view = LayerView(layer, time, None, policy)
            new = policy.observe(view, queries, positions)
            store.set_states({policy.state_key(state): values for state, values in new.items()})

    def _counted(self, layer: RaggedLayer, queries: torch.Tensor, step: Step) -> QueryStatistics:
        positions, angles = step.rope_positions, step.angles
        assert self.rotary is not None and positions is not None and angles is not None, "begin came first"
        batch, num_heads, q_len, head_dim = queries.shape
        statistics = layer.statistics
        if statistics is None:
            statistics = QueryStatistics.empty(batch, num_heads, head_dim, queries.device)
        real = positions if step.valid is None else positions.masked_fill(~step.valid, -1)
        following = real.amax(1) + 1  # 0 for a row that has only padding here
        after = torch.where(following > 0, following, statistics.next_position)
        counts = step.positions >= SINKS
        if step.valid is not None:
            counts &= step.valid
        for start in range(0, q_len, CHUNK):
            part = slice(start, start + CHUNK)
            turned = self.rotary.undo(queries[:, :, part], (angles[0][:, part], angles[1][:, part]))
            statistics = statistics.seen(turned, counts[:, part], after)
        return statistics


class InputRecorder:
    """Follows the forwards of a session's model; costs nothing if no policy needs hidden states.

    Attributes:
        rotary: the model's RoPE; None if nothing is recorded.
    """

    def __init__(self, rotary: Rotary | None = None) -> None:
        self.rotary = rotary
        self._positions: torch.Tensor | None = None
        self._step: Step | None = None

    def begin(self, step: Step, position_ids: torch.Tensor | None, columns: int) -> None:
        """Opens a forward.

        Args:
            position_ids: `(batch or 1, q_len)` as given to the model; None for the model's default, which counts
                columns.
            columns: columns seen before this forward.

        Raises:
            ValueError: position ids of another form.
        """
        if self.rotary is None:
            return
        batch, q_len = step.positions.shape
        if position_ids is None:
            position_ids = torch.arange(columns, columns + q_len).unsqueeze(0)
        elif position_ids.ndim != 2 or position_ids.shape[1] != q_len:
            raise ValueError(f"hidden states are recorded with position_ids (batch, {q_len}), got "
                             f"{tuple(position_ids.shape)}")  # fmt: skip
        self._step, self._positions = step, position_ids.to(step.positions.device).long().expand(batch, q_len)

    def record(self, layer: RaggedLayer, hidden_states: torch.Tensor) -> None:
        """Notes what the attention of `layer` is about to be given, `(batch, q_len, hidden_size)`."""
        step, positions = self._step, self._positions
        if self.rotary is None or step is None or positions is None:
            return
        if step.first:
            layer.inputs = Inputs(self.rotary, (None,) * len(step.counts))
        if layer.inputs is not None:
            layer.inputs = layer.inputs.added(Part(hidden_states.detach(), positions, step.valid))

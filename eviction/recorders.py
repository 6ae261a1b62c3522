"""Recorders of a session: policies' per-entry states and query statistics (`Observers`), attention inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .cache_layer import RaggedLayer
from .forward_state import ForwardStep
from .layer_view import LayerView
from .model_adapters import Rotary
from .policies.policy import Policy
from .recorded import QueryStatistics, RecordedForward, RecordedInputs, StatisticsConfig


class Observers:
    """Updates the policies' states and the query statistics in every forward; no cost if no policy needs either.

    Implements `cache_layer.LayerObserver`.

    Attributes:
        policies: those that have states.
        observing: those of them that observe every forward.
        rotary: the model's RoPE, if statistics of the queries are recorded.
        state_keys: the names under which storages keep the policies' states.
        observed_keys: those of `state_keys` that change in every forward.
        statistics: how query statistics are accumulated.
    """

    def __init__(
        self, policies: Iterable[Policy] = (), rotary: Rotary | None = None, statistics: StatisticsConfig | None = None
    ) -> None:
        self.policies = tuple(dict.fromkeys(policy for policy in policies if policy.states))
        self.observing = tuple(policy for policy in self.policies if policy.observes)
        self.rotary = rotary
        self.statistics = statistics or StatisticsConfig()
        self.state_keys = tuple(key for policy in self.policies for key in policy.state_keys().values())
        self.observed_keys = tuple(key for policy in self.observing for key in policy.state_keys().values())
        self._keys = [policy.state_keys() for policy in self.observing]

    @property
    def accumulated(self) -> str:
        """Names the sums over all tokens, which can be undone only by returning to a rollback point; may be empty."""
        names = [f"the states of {policy.name!r}" for policy in self.observing]
        return " and ".join(names + ["the statistics of the queries"] * (self.rotary is not None))

    def begin(self, step: ForwardStep, position_ids: torch.Tensor | None, columns: int) -> None:
        """Opens a forward whose queries are at these positions.

        Args:
            position_ids: `(batch or 1, q_len)` as given to the model; None for the model's default, which counts
                columns.
            columns: columns seen before this forward.

        Raises:
            ValueError: position ids of another shape.
        """
        if self.rotary is not None:
            axes, purpose = self.rotary.axes, "statistics of the queries need"
            positions = _rope_positions(step, position_ids, columns, purpose, axes)
            step.angles = self.rotary.angles(positions)
            step.rope_positions = positions.amax(0) if axes else positions

    def observe(self, layer: RaggedLayer, queries: torch.Tensor, step: ForwardStep) -> None:
        """Updates a layer from its post-RoPE queries `(batch, num_heads, step.q_len, head_dim)`.

        The layer's new entries are stored already.
        """
        if self.rotary is None and not self.observing:
            return
        with torch.no_grad():
            self._update(layer, queries.detach(), step)

    def _update(self, layer: RaggedLayer, queries: torch.Tensor, step: ForwardStep) -> None:
        if self.rotary is not None:
            layer.statistics = self._updated_statistics(layer, queries, step)
        if not self.observing:
            return
        store = layer.store
        assert store is not None, "new entries are stored first"
        positions = step.positions.long()
        time = positions[:, -1] + 1  # padding repeats the position of the real token before it
        if step.valid is not None:
            positions = positions.masked_fill(~step.valid, -1)
        for policy, keys in zip(self.observing, self._keys, strict=True):
            view = LayerView(layer, time, states=keys, window_size=policy.window_size)
            new = policy.observe(view, queries, positions)
            store.set_states({keys[state]: values for state, values in new.items()})

    def _updated_statistics(self, layer: RaggedLayer, queries: torch.Tensor, step: ForwardStep) -> QueryStatistics:
        positions, angles = step.rope_positions, step.angles
        assert self.rotary is not None and positions is not None and angles is not None, "begin came first"
        batch, num_heads, q_len, head_dim = queries.shape
        statistics, rotary = layer.statistics, self.rotary.of_layer(layer.layer_idx)
        if statistics is None:
            statistics = QueryStatistics.empty(batch, num_heads, head_dim, queries.device)
        real = positions if step.valid is None else positions.masked_fill(~step.valid, -1)
        following = real.amax(1) + 1  # 0 for a row that has only padding here
        after = torch.where(following > 0, following, statistics.next_position)
        counts = step.positions >= self.statistics.skipped_tokens
        if step.valid is not None:
            counts &= step.valid
        chunk = self.statistics.chunk
        for start in range(0, q_len, chunk):
            part = slice(start, start + chunk)
            unrotated = rotary.undo(queries[:, :, part], (angles[0][:, part], angles[1][:, part]))
            statistics = statistics.updated(unrotated, counts[:, part], after)
        return statistics


def _rope_positions(
    step: ForwardStep, given: torch.Tensor | None, columns: int, purpose: str, axes: int = 0
) -> torch.Tensor:
    """int64 `(batch, q_len)`: the position ids as given to the model, or its default, which counts columns.

    Args:
        axes: of M-RoPE: then the result is `(axes, batch, q_len)`, and ids may be given for each axis, behind the
            tokens' indices or without them.
    """
    batch, q_len = step.positions.shape
    device = step.positions.device
    if given is None:
        given = torch.arange(columns, columns + q_len, device=device).unsqueeze(0)
    apart = axes > 0 and given.ndim == 3 and len(given) in (axes, axes + 1)
    if (given.ndim != 2 and not apart) or given.shape[-1] != q_len:
        raise ValueError(f"{purpose} position_ids (batch, {q_len}), got {tuple(given.shape)}")
    own = given[-axes:] if apart else given
    return own.to(device).long().expand(*((axes,) if axes else ()), batch, q_len)


class InputRecorder:
    """Records the inputs of the attention layers; no cost if no policy needs hidden states.

    Attributes:
        rotary: the model's RoPE; None if nothing is recorded.
    """

    def __init__(self, rotary: Rotary | None = None) -> None:
        self.rotary = rotary
        self._positions: torch.Tensor | None = None
        self._step: ForwardStep | None = None

    def begin(self, step: ForwardStep, position_ids: torch.Tensor | None, columns: int) -> None:
        """Opens a forward; arguments and errors as `Observers.begin`."""
        if self.rotary is not None:
            positions = _rope_positions(step, position_ids, columns, "hidden states are recorded with")
            self._step, self._positions = step, positions

    def record(self, layer: RaggedLayer, hidden_states: torch.Tensor) -> None:
        """Records the input of `layer`'s attention, `(batch, q_len, hidden_size)`, before it runs."""
        step, positions = self._step, self._positions
        if self.rotary is None or step is None or positions is None:
            return
        if step.first:
            layer.inputs = RecordedInputs(self.rotary, (None,) * len(step.counts))
        if layer.inputs is not None:
            device, hidden_states = hidden_states.device, hidden_states.detach()
            own = RecordedForward(hidden_states, positions.to(device), step.on(device).valid)
            layer.inputs = layer.inputs.append(own)

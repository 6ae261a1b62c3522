"""The options that the model type `tenure` takes in `--model_args`, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

import torch

from tenure.checked import verify

from ...eviction import Policy, policy_text
from ...eviction.plan import CALIBRATED, EvictionPlan, calibrated
from ...eviction.presets import make_plan
from ...retention import RetentionGates
from .boundary import Boundaries

DTYPES = ("dtype", "softmax_dtype", "mixed_precision_dtype")
SEVERAL_DEVICES = ("parallelize", "tp_plan")
LM_EVAL_SCHEDULE = "once"  # nothing is evicted while question and answer are written, as in the published tables


@dataclass(frozen=True)
class Options:
    """The eviction of lm-eval's model type `tenure`.

    Attributes:
        policy: a name with options, as `snapkv(window=16)`; "full" evicts nothing.
        budget: as in `evict`: a share, entries per head, or text such as "512MiB"; "calibrated" asks the gates.
        scope: the entries that compete; None for the policy's default.
        gates: folder, demo or hub:OWNER/NAME of trained gates, for policies that need them.
        prefill_chunk: tokens of the chunks in which contexts are read, with an eviction after each; None: in one piece.
        sinks, recent, buffer, floor, preset: as in `evict`.
        schedule: as in `evict`, but by default "once": the prompt, or its context, is compressed, and nothing is
            evicted while question and answer are written. "bounded" evicts again whenever `buffer` tokens were added.
        question: "agnostic": a context is compressed before its question is read; "aware": the whole prompt is read and
            then compressed, as a served model does; "auto": by the field `aware` of the task's documents, and
            "aware" where there is none.
        question_field: the field of a document whose text, at its last place in the prompt, begins the question.
        question_pattern: a regular expression; its last match in the prompt begins the question.

    Raises:
        ValueError: an unknown policy, scope or `question`, a number out of range or no number, or a rule for where
            questions begin that nothing would use.
    """

    policy: str | Policy | None = None
    budget: float | int | str = 0.2
    scope: str | None = None
    gates: Any = None
    prefill_chunk: int | None = None
    sinks: int | None = None
    recent: int | None = None
    buffer: int = 128
    floor: float | None = None
    schedule: str | None = None
    preset: str | None = None
    question: Literal["auto", "agnostic", "aware"] = "auto"
    question_field: str | None = None
    question_pattern: str | None = None

    def __post_init__(self) -> None:
        verify(self)
        if self.question_field and self.question_pattern:
            raise ValueError("question_field and question_pattern exclude each other: give one of them")
        if (self.question_field or self.question_pattern) and self.question != "agnostic":
            name = "question_field" if self.question_field else "question_pattern"
            raise ValueError(f"{name} is used with question=agnostic only; question is {self.question!r}")
        _ = self.plan, self.boundaries

    @classmethod
    def split(cls, arguments: dict[str, Any], alike: float = 0.8) -> tuple[Options, dict[str, Any]]:
        """The options among keyword arguments, and the other arguments.

        Args:
            alike: share of letters in common (difflib's ratio) from which on another argument's name is taken for a
                misspelt option; lm-eval hands names that it does not know on to transformers.

        Raises:
            ValueError: see above; or another argument's name is an option's misspelt.
        """
        known = {field.name for field in fields(cls)}
        for name in arguments.keys() - known:
            meant = get_close_matches(name, known, n=1, cutoff=alike)
            if meant:
                raise ValueError(f"no option {name!r}; {meant[0]!r} is one")
        given = {name: value for name, value in arguments.items() if name in known}
        return cls(**given), {name: value for name, value in arguments.items() if name not in known}

    @property
    def chosen(self) -> Policy:
        return self.plan.policy

    @property
    def plan(self) -> EvictionPlan:
        """The plan that `evict` makes of the options, a calibrated budget not yet looked up."""
        names = ("budget", "preset", "scope", "sinks", "recent", "buffer", "floor", "prefill_chunk")
        plain = self.preset is None and self.schedule is None
        schedule = LM_EVAL_SCHEDULE if plain else self.schedule
        return make_plan(self.policy, schedule=schedule, **{name: getattr(self, name) for name in names})

    @property
    def evicts(self) -> bool:
        """Whether anything can be evicted."""
        return self.budget == CALIBRATED or self.plan.evicts

    @property
    def needs_gates(self) -> bool:
        return "log_beta" in self.chosen.needs or self.budget == CALIBRATED

    @property
    def boundaries(self) -> Boundaries:
        """The rule that finds the beginnings of questions."""
        return Boundaries(self.question, self.question_field, self.question_pattern)

    @property
    def evict_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `evict`, the gates left out."""
        names = ("policy", "budget", "scope", "prefill_chunk", "sinks", "recent", "buffer", "floor", "preset")
        return {name: getattr(self, name) for name in names} | {"schedule": self.plan.schedule}

    def to_dict(self) -> dict[str, Any]:
        """For the results: plain values by name, the policy with its options, the scope as it is used."""
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        gates = None if self.gates is None else getattr(self.gates, "info", None) or str(self.gates)
        if not self.evicts:
            shown |= {"budget": 1.0}
        plan = self.plan
        shown |= {"policy": policy_text(plan.policy), "scope": plan.scope if self.evicts else "none"}
        shown |= {"schedule": plan.schedule, "floor": plan.floor}
        return shown | {"gates": gates if gates is None or isinstance(gates, str) else gates.base_model}


def load_gates(options: Options) -> RetentionGates | None:
    """The gates that the options name, on the CPU; None where the policy needs none.

    Raises:
        ValueError: they are needed and not given, cannot be loaded, or have no calibration that is asked for.
    """
    if not options.needs_gates:
        return None
    if options.gates is None:
        raise ValueError(f"policy {policy_text(options.chosen)!r} needs gates: add gates=FOLDER to --model_args")
    own = isinstance(options.gates, RetentionGates)
    gates = options.gates if own else RetentionGates.from_pretrained(options.gates)
    if options.budget == CALIBRATED:
        calibrated(options.plan, gates)
    return gates


def check_config(options: Options, gates: RetentionGates | None, config: Any, others: dict[str, Any]) -> None:
    """Refuses what cannot work with a model of this configuration, before the model is loaded.

    Args:
        config: the model's configuration.
        others: lm-eval's own model arguments.

    Raises:
        ValueError: gates of another shape, a model that has no decoder to evict from, a `max_length` beyond the model's
            positions, a dtype that there is not, or a model spread over several devices.
    """
    for name in DTYPES:
        asked = others.get(name)
        known = getattr(torch, asked, None) if isinstance(asked, str) and asked != "auto" else torch.float32
        if not isinstance(known, torch.dtype) or not known.is_floating_point:
            raise ValueError(f"{name} is {asked!r}; auto, float32, bfloat16, float16 and so on are accepted")
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    longest = others.get("max_length")
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise ValueError(f"max_length is {longest!r}; a number of tokens is accepted")
    if longest is not None and positions is not None and longest > positions:
        raise ValueError(f"max_length is {longest}; the model has {positions} positions")
    if getattr(config, "is_encoder_decoder", False) or others.get("backend") == "seq2seq":
        raise ValueError("the model type 'tenure' takes decoders only: use lm-eval's own 'hf' for this model")
    several = [name for name in SEVERAL_DEVICES if others.get(name)]
    if several and options.evicts:
        raise ValueError(f"eviction needs the model on one device: leave out {several[0]}")
    if gates is None:
        return
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    found = {"hidden_size": text.hidden_size, "num_kv_heads": heads}
    wrong = [f"{name} {getattr(gates.config, name)} against {now}" for name, now in found.items()
             if getattr(gates.config, name) != now]  # fmt: skip
    if max(gates.layer_indices) >= text.num_hidden_layers:
        wrong.append(f"layer {max(gates.layer_indices)} against {text.num_hidden_layers} layers")
    if wrong:
        name = gates.info.base_model or "another model"
        raise ValueError(f"the gates, of {name}, do not fit this model: {'; '.join(wrong)} in the model")


def find_config(name: str, others: dict[str, Any]) -> tuple[str, Any]:
    """(what `from_pretrained` is given for the model `name`, its configuration).

    Args:
        name: a Hub id, a local folder, or `demo`.
        others: lm-eval's own model arguments.

    Raises:
        ValueError: there is no such model.
    """
    from transformers import AutoConfig

    from ...training.assets import resolve_model

    source = resolve_model(name, others.get("revision"))
    own = {key: others[key] for key in ("revision", "trust_remote_code", "subfolder", "gguf_file") if others.get(key)}
    return source, AutoConfig.from_pretrained(source, **own)

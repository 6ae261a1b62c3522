"""The objective on models with something of their own: scaled logits, dropout, recurrent states, positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tenure.retention import RetentionGates, SoftEviction, attach_after, read_prompt
from tenure.retention.continuation import check_token_ids, continues_from_cache
from tenure.retention.decoder_layers import text_decoder
from tenure.retention.seams import OutputHead
from tenure.scripts.bench.tiny_models import TEXT_ARCHITECTURES, Architecture
from tenure.scripts.bench.tiny_vision_models import VISION_MODELS
from tenure.training import Batch, GateObjective

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(2))
PROMPT = 14


def batch(positions: torch.Tensor | None = None, prompt_tokens: tuple[int, ...] = ()) -> Batch:
    loss_mask = torch.ones_like(IDS, dtype=torch.bool)
    loss_mask[:, : max(1, *prompt_tokens, 1) + 1] = False
    positions = torch.arange(IDS.shape[1]) if positions is None else positions
    return Batch(IDS, positions.expand(IDS.shape).contiguous(), None, loss_mask, prompt_tokens)


def forgetful(model: PreTrainedModel) -> RetentionGates:
    torch.manual_seed(3)
    return RetentionGates.for_model(model, gate_width=16, initial_bias=1.0, init_std=0.4)


SCALED = {
    "cohere": TEXT_ARCHITECTURES["cohere"],  # times logit_scale
    "granite": Architecture("granite", {"logits_scaling": 8.0}),  # divided by it
    "modernbert-decoder": TEXT_ARCHITECTURES["modernbert-decoder"],  # a dense layer and a norm before the embedding
    "gemma2": Architecture("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0}),
}


@pytest.mark.parametrize("name", SCALED)
def test_logits_are_the_models_own(name: str) -> None:
    model = SCALED[name].build()
    head, runs = OutputHead(model), []
    text_decoder(model).register_forward_hook(lambda *given: runs.append(1))
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits.flatten(0, 1)
        hidden = text_decoder(model)(input_ids=IDS, use_cache=False).last_hidden_state.flatten(0, 1)
        got = head(hidden)
        again = head(hidden[:3])
    assert got.shape == want.shape
    torch.testing.assert_close(again, want[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(runs) == 3, "two forwards, and one token to see the decoder's output"
    hidden.requires_grad_()
    head(hidden).sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


PACKING = {"qwen3_next": "LinearAttentionLayer", "opt": "hidden states of the second one differ",
           "afmoe": "hidden states of the second one differ"}  # fmt: skip


@pytest.mark.parametrize("name", PACKING)
def test_packing_is_refused_where_documents_would_mix(name: str) -> None:
    model = TEXT_ARCHITECTURES[name].build()
    objective = GateObjective(model, forgetful(model), budget=5)
    message = f"does not separate packed documents: .*{PACKING[name]}.*; set pack to false"
    with pytest.raises(ValueError, match=message):
        objective.require_packing()
    with pytest.raises(ValueError, match=message):  # whoever makes the batches
        objective(batch(torch.cat([torch.arange(9), torch.arange(15)])))
    objective(batch())


def test_packing_is_refused_for_positions_of_images(tiny_llama: PreTrainedModel) -> None:
    model, _ = VISION_MODELS["qwen2_vl"]()
    with pytest.raises(ValueError, match="Qwen2VLForConditionalGeneration does not separate packed documents"):
        GateObjective(model, forgetful(model), budget=5).require_packing()
    GateObjective(tiny_llama, forgetful(tiny_llama), budget=5).require_packing()


@pytest.mark.parametrize("name", ["opt", "biogpt"])
def test_checkpointing_has_no_dropout(name: str) -> None:
    """Their layers apply dropout by functions that follow the layer's mode, in which transformers checkpoints."""
    model, gradients = TEXT_ARCHITECTURES[name].build(), []
    assert model.config.hidden_dropout_prob if name == "biogpt" else model.config.dropout
    for checkpointing in (False, True):
        gates = forgetful(model)
        objective = GateObjective(model, gates, budget=5)
        if checkpointing:
            objective.enable_gradient_checkpointing()
        objective(batch()).total.backward()
        gradients.append([parameter.grad for parameter in gates.parameters()])
        assert not any(module.training for module in model.modules())
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_next", "olmo_hybrid", "lfm2"])
def test_a_prompt_of_a_hybrid_model_is_continued_from_its_own_state(name: str) -> None:
    """State-space layers write in place: every continuation, teacher's and student's, needs a state of its own."""
    model = TEXT_ARCHITECTURES[name].build()
    decoder, rest = text_decoder(model), IDS[:1, PROMPT:]
    kept = RetentionGates.for_model(model, gate_width=8, initial_bias=1e4)
    with torch.no_grad():
        whole = decoder(input_ids=IDS[:1], use_cache=False).last_hidden_state[:, PROMPT:]
        prompt = read_prompt(model, IDS[:1, :PROMPT])
        for _ in range(2):
            again = decoder(input_ids=rest, past_key_values=prompt.new_cache(), use_cache=True).last_hidden_state
            torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)
            with attach_after(model, kept, prompt):
                student = decoder(input_ids=rest, use_cache=True).last_hidden_state
            torch.testing.assert_close(student, whole, rtol=1e-4, atol=1e-4)


def test_gradients_pass_recurrent_states() -> None:
    model = TEXT_ARCHITECTURES["qwen3_next"].build()
    gates = forgetful(model)
    objective = GateObjective(model, gates, budget=0.3, evictions=[SoftEviction(0.4, sinks=1, recent=2)])
    objective(batch(prompt_tokens=(PROMPT, PROMPT))).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in gates.parameters())


@pytest.mark.parametrize("name", ["jamba", "bamba"])
def test_prompts_are_refused_where_a_model_cannot_continue_them(name: str) -> None:
    """Their state-space layers start anew with every input of several tokens."""
    model = TEXT_ARCHITECTURES[name].build()
    objective = GateObjective(model, forgetful(model), budget=5, evictions=[SoftEviction(0.4, sinks=1, recent=2)])
    objective(batch())
    message = "does not continue a prompt from its cache: .*; set prompt_share to 0"
    with pytest.raises(ValueError, match=message):
        objective(batch(prompt_tokens=(PROMPT, PROMPT)))


@pytest.mark.real
def test_rounding_in_bf16_is_not_taken_for_a_fault(real_model_path: str) -> None:
    """Its first ids are control tokens, on whose massive states rounding is as large as the faults looked for."""
    model: Any = AutoModelForCausalLM.from_pretrained(real_model_path, dtype=torch.bfloat16).eval()
    ids = check_token_ids(model, 16)
    assert ids.unique().numel() == 16 and ids[0, 1] > 1000 and ids.max() < model.config.vocab_size
    assert continues_from_cache(model)

"""Models with something of their own: masks by kind of layer, positions of images, image features in the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from tenure.eviction import evict
from tenure.eviction.modalities import kept_by_modality, modality_ranges
from tenure.eviction.model_adapters import has_output_weight, output_weight
from tenure.eviction.mrope import RopeDeltas
from tenure.retention.decoder_layers import full_attention_layers, text_decoder
from tenure.scripts.bench.tiny_models import TEXT_ARCHITECTURES
from tenure.scripts.bench.tiny_vision_models import BEGIN, END, VIDEO, VISION_MODELS

MROPE = ("qwen2_vl", "qwen3_vl", "glm4v", "qwen3_5")
QUESTION = torch.randint(3, 140, (2, 5), generator=torch.Generator().manual_seed(5))


def words(rows: int = 2, tokens: int = 30) -> torch.Tensor:
    return torch.randint(3, 140, (rows, tokens), generator=torch.Generator().manual_seed(7))


def answer(model: PreTrainedModel, inputs: dict, count: int = 4) -> torch.Tensor:
    """Logits of `count` greedy tokens, `(rows, count, vocab_size)`."""
    out = model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits, 1)


def question(inputs: dict, cache: Cache) -> dict:
    """The arguments of `generate` that continue `inputs`, which `cache` has seen, by `QUESTION`."""
    ids = torch.cat([inputs["input_ids"], QUESTION], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(QUESTION)], 1)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}


@pytest.mark.parametrize("name", sorted(set(VISION_MODELS) - {"paligemma"}))
def test_a_prompt_with_images_at_budget_1_is_the_models_own(name: str) -> None:
    model, inputs = VISION_MODELS[name]()
    plain = answer(model, inputs)
    with evict(model, "knorm", 1.0):
        torch.testing.assert_close(answer(model, inputs), plain, rtol=1e-4, atol=1e-4)
    with evict(model, "knorm", 0.3, sinks=1, recent=2, buffer=2) as session:
        answer(model, inputs, 6)
        session.last_cache.check()
        assert session.report().kept_share < 0.6


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_a_prompt_with_a_video(name: str) -> None:
    """Frames have positions in time, height and width: at once, in chunks, behind a fork; and a row of their own."""
    model, inputs = VISION_MODELS[name]()
    frames, rows, columns = 3, 4, 6
    pixels = torch.randn(frames * rows * columns, inputs["pixel_values"].shape[1])
    video = [VIDEO] * (frames * rows * columns // 4)  # four patches become a token
    ids = torch.cat([words(1, 8)[0], torch.tensor([BEGIN, *video, END]), words(1, 20)[0]])[None]
    given = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == VIDEO).int() * 2,
        "pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[frames, rows, columns]]),
    }  # fmt: skip
    plain = answer(model, given)
    assert not torch.allclose(answer(model, given | {"pixel_values_videos": pixels.flip(0)}), plain, atol=1e-3)
    for chunk in (None, 7):
        with evict(model, "knorm", 1.0, prefill_chunk=chunk):
            torch.testing.assert_close(answer(model, given), plain, rtol=1e-4, atol=1e-4)
    with evict(model, "knorm", 1.0) as session:
        context = session.new_cache()
        model(**given, past_key_values=context)
        logits = [session.extend(context.fork(), QUESTION[:1]) for _ in range(2)]
        model.model.rope_deltas = None
        assert torch.equal(*logits) and torch.equal(session.extend(context, QUESTION[:1]), logits[0])
    with evict(model, "knorm", 0.3, sinks=1, recent=2) as session:
        model(**given, past_key_values=(cache := session.new_cache()))
        (ranges,) = modality_ranges(model.config, ids)
        found = {one.modality: one for one in kept_by_modality(cache, ranges)}
        assert ranges["video"] == ((9, 9 + len(video)),) and found["video"].tokens == len(video)
        assert 0 < found["video"].entries < len(video) * cache.lengths().numel()


def test_a_mask_for_each_kind_of_layer() -> None:
    """Gemma-3 as released: text in chunks too; what images would need there is refused before anything runs."""
    model, inputs = VISION_MODELS["gemma3"]()
    text = {"input_ids": words(), "attention_mask": torch.ones(2, 30, dtype=torch.long)}
    text["attention_mask"][1, :9] = 0
    plain = answer(model, text)
    with evict(model, "knorm", 1.0, prefill_chunk=8) as session:
        torch.testing.assert_close(answer(model, text), plain, rtol=1e-4, atol=1e-4)
        cache = session.new_cache()
        with pytest.raises(ValueError, match="an image that attends in both directions cannot follow"):
            model(**inputs, past_key_values=cache)
        assert cache.columns_seen == 0
    with torch.no_grad(), evict(model, "knorm", 1.0) as session:
        cache = session.new_cache()
        model(**text, past_key_values=cache)
        mask = torch.cat([text["attention_mask"], inputs["attention_mask"]], 1)
        types = torch.cat([torch.zeros_like(text["input_ids"]), inputs["token_type_ids"]], 1)
        with pytest.raises(ValueError, match="got a mask by which new tokens see later ones"):
            model(**inputs | {"attention_mask": mask, "token_type_ids": types}, past_key_values=cache)
        assert cache.columns_seen == 30


@pytest.mark.parametrize("name", MROPE)
@torch.no_grad()
def test_positions_belong_to_the_cache(name: str, tmp_path: Path) -> None:
    """A context is asked after another prompt has run, after a fork, after selecting its rows, and from a file."""
    model, inputs = VISION_MODELS[name]()
    with evict(model, "knorm", 1.0) as session:
        context = session.new_cache()
        model(**inputs, past_key_values=context)
        at_once = answer(model, question(inputs, context.fork()))
        answer(model, {"input_ids": words()})  # another prompt, whose positions the model now holds
        torch.testing.assert_close(answer(model, question(inputs, context.fork())), at_once)
        answer(model, {"input_ids": words(1)})
        logits = session.extend(context.fork(), QUESTION)
        torch.testing.assert_close(logits[:, -1], at_once[:, 0], rtol=1e-4, atol=1e-4)
        swapped = context.fork()
        swapped.select_rows(torch.tensor([1, 0]))
        logits = session.extend(swapped, QUESTION.flip(0))
        torch.testing.assert_close(logits[:, -1].flip(0), at_once[:, 0], rtol=1e-4, atol=1e-4)
        if name != "qwen3_5":  # whose other layers cannot be saved
            context.save(tmp_path / "context.safetensors")
            model.model.rope_deltas = None
            loaded = session.load_cache(tmp_path / "context.safetensors")
            torch.testing.assert_close(answer(model, question(inputs, loaded)), at_once)
            torch.testing.assert_close(session.stack([context]).rows.rope_deltas, context.rows.rope_deltas)


@torch.no_grad()
def test_a_text_after_an_image_starts_without_offsets() -> None:
    """Plain transformers gives the second forward of a text the offsets of the image before it."""
    model, inputs = VISION_MODELS["qwen2_vl"]()
    ids = words()
    alone = model(ids).logits[:, -1]
    with evict(model, "knorm", 1.0) as session:
        model(**inputs, past_key_values=session.new_cache())
        cache = session.new_cache()
        model(ids[:, :20], past_key_values=cache)
        torch.testing.assert_close(model(ids[:, 20:], past_key_values=cache).logits[:, -1], alone, rtol=1e-4, atol=1e-4)


def test_generate_is_the_models_own_again_after_the_block(tiny_llama: PreTrainedModel) -> None:
    model, _ = VISION_MODELS["qwen2_vl"]()
    prepare = model._prepare_position_ids_for_generation
    with RopeDeltas(model).in_generate():
        assert model._prepare_position_ids_for_generation != prepare
    assert model._prepare_position_ids_for_generation == prepare
    assert "_prepare_position_ids_for_generation" not in vars(model)
    with RopeDeltas(tiny_llama).in_generate():
        assert "_prepare_position_ids_for_generation" not in vars(tiny_llama)


@pytest.mark.parametrize("size", [5, 7, 16])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_vl", "internvl"])
def test_images_in_chunks(name: str, size: int) -> None:
    """Chunks cut images; Qwen3-VL adds image features in several decoder layers, which are cut with them."""
    model, inputs = VISION_MODELS[name]()
    plain = answer(model, inputs)
    with evict(model, "knorm", 1.0, prefill_chunk=size):
        torch.testing.assert_close(answer(model, inputs), plain, rtol=1e-4, atol=1e-4)


def test_chunks_need_rope_that_does_not_depend_on_their_length(tiny_model) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=scaling)
    with evict(model, "knorm"):
        pass
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM has dynamic: leave prefill_chunk unset"),
        evict(model, "knorm", prefill_chunk=8),
    ):
        pass


@torch.no_grad()
def test_several_tokens_after_a_cache_are_contiguous() -> None:
    """AFMoE takes a view of the attention's output."""
    model, ids = TEXT_ARCHITECTURES["afmoe"].build(), words()
    want = model(ids).logits[:, 20:]
    with evict(model, "knorm", 1.0) as session:
        cache = session.new_cache()
        model(ids[:, :20], past_key_values=cache)
        torch.testing.assert_close(model(ids[:, 20:], past_key_values=cache).logits, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_report_names_what_is_not_evicted(tiny_llama: PreTrainedModel) -> None:
    """Mllama's images are keys and values of layers of their own; they stay whole, and text is removed around them."""
    model, inputs = VISION_MODELS["mllama"]()
    with evict(model, "knorm", 0.3, sinks=1, recent=2) as session:
        cache = session.new_cache()
        model(**inputs, past_key_values=cache)
        layers: list[Any] = cache.layers
        images = layers[1].keys
        report = session.report()
        assert report.layer_indices == (0, 2)
        assert report.other_bytes == {"DynamicLayer": 4 * images.nbytes}  # keys and values of two layers
        seen = cache.columns_seen
        model(QUESTION[:, :2], past_key_values=cache, cross_attention_mask=inputs["cross_attention_mask"][:, -2:])
        cache.crop(-2)
        assert cache.columns_seen == seen and torch.equal(layers[1].keys, images)
    with evict(tiny_llama, "knorm") as session:
        tiny_llama(words().clamp(max=127))
        assert session.report().other_bytes == {}


@torch.no_grad()
def test_images_of_cross_attention_are_saved(tmp_path: Path) -> None:
    model, inputs = VISION_MODELS["mllama"]()
    seen = inputs["cross_attention_mask"][:, -1:].expand(-1, 5, -1, -1)
    with evict(model, "knorm", 0.5, sinks=1, recent=2) as session:
        cache = session.new_cache()
        model(**inputs, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = session.load_cache(tmp_path / "cache.safetensors")
        want = model(QUESTION, past_key_values=cache, cross_attention_mask=seen).logits
        assert torch.equal(model(QUESTION, past_key_values=loaded, cross_attention_mask=seen).logits, want)


@pytest.mark.parametrize(
    ("name", "projection"), [("opt", "out_proj"), ("phi", "dense"), ("gpt2", "c_proj"), ("modernbert-decoder", "Wo")]
)
@torch.no_grad()
def test_output_projections_by_other_names(name: str, projection: str) -> None:
    """W_O by head, applied to the heads' outputs, is the module's own projection; policies that read it run."""
    model = TEXT_ARCHITECTURES[name].build()
    layer = full_attention_layers(model)[0]
    assert has_output_weight(layer)
    module, heads = getattr(layer.module, projection), torch.randn(3, layer.num_heads, 8)
    want = module(heads.flatten(1)) - module(torch.zeros(3, layer.num_heads * 8))
    got = torch.einsum("thv,hvo->to", heads, output_weight(layer, torch.float32))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with evict(model, "criticalkv", 0.3, sinks=1, recent=2) as session:
        model(words())
        assert session.report().kept_share < 0.4


@torch.no_grad()
def test_a_decoder_called_directly_has_no_offsets_of_another_prompt() -> None:
    model, inputs = VISION_MODELS["qwen2_vl"]()
    with evict(model, "knorm", 1.0) as session:
        model(**inputs, past_key_values=session.new_cache())
        cache = session.new_cache()
        text_decoder(model)(input_ids=words(1), past_key_values=cache, use_cache=True)
        assert cache.rows.rope_deltas is None
        cache.check()


@pytest.mark.parametrize("name", ["jamba", "bamba", "qwen3_next", "granitemoehybrid"])
@torch.no_grad()
def test_several_tokens_after_a_cache_of_a_hybrid_model(name: str) -> None:
    """Refused where state-space layers would start anew with them; one token at a time is the model's own."""
    model, ids = TEXT_ARCHITECTURES[name].build(), words(1, 24)
    want = model(ids, use_cache=False).logits[:, 20:]
    with evict(model, "knorm", 1.0) as session:
        cache = session.new_cache()
        model(ids[:, :20], past_key_values=cache)
        single = cache.fork()
        if name in ("jamba", "bamba"):
            with pytest.raises(ValueError, match="does not continue several tokens from its cache: its state-space"):
                model(ids[:, 20:], past_key_values=cache)
        else:
            torch.testing.assert_close(model(ids[:, 20:], past_key_values=cache).logits, want, rtol=1e-3, atol=1e-3)
        ours = [model(ids[:, t : t + 1], past_key_values=single).logits for t in range(20, 24)]
    plain = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=plain)
    own = [model(ids[:, t : t + 1], past_key_values=plain).logits for t in range(20, 24)]
    torch.testing.assert_close(torch.cat(ours, 1), torch.cat(own, 1), rtol=1e-4, atol=1e-4)

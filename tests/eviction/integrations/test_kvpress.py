"""Presses of kvpress as policies: they keep here what they keep in kvpress, and the memory of the rest is free.

Needs kvpress, which pins an older transformers than constraints.txt does; CONTRIBUTING.md says how to run this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

kvpress = pytest.importorskip("kvpress")

from tenure.eviction import RaggedCache, SnapKV, evict  # noqa: E402
from tenure.eviction.integrations.kvpress import PressPolicy, from_press  # noqa: E402
from tenure.scripts.bench.kvpress_kept import _kept as positions_kept  # noqa: E402

N, RATIO = 320, 0.75  # a quarter of them is a whole number
LAYERS, HEADS = 3, 2
logging.getLogger("kvpress").setLevel(logging.ERROR)  # "not tested", for models in evict() and experimental presses


@dataclass
class NewestKeys(kvpress.BasePress):
    """Somebody's press with a selection of its own: every second entry, then the newest."""

    compression_ratio: float = 0.0

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        n = keys.shape[2]
        kept = int(n * (1 - self.compression_ratio))
        index = torch.cat([torch.arange(0, kept, 2), torch.arange(n - kept // 2, n)])
        return keys[:, :, index], values[:, :, index]


@dataclass
class Alignment(kvpress.ScorerPress):
    """Somebody's scorer that reads the hidden states."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        size = hidden_states.norm(dim=-1)
        return size.unsqueeze(1) * keys.norm(dim=-1) * kwargs["position_embeddings"][0].sum(-1).unsqueeze(1)


def snap() -> Any:
    return kvpress.SnapKVPress(window_size=16)


def loaded(press: Any, **values: Any) -> Any:
    """A press with what it would have loaded from the network."""
    vars(press).update(values)
    return press


def statistics() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(LAYERS, 4, 8, 8, generator=generator)
    return {"mu": torch.randn(LAYERS, 4, 8, generator=generator), "cov": half @ half.mT}


def kvzap_model() -> Any:
    from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel  # pyright: ignore[reportMissingImports]

    torch.manual_seed(1)
    return KVzapModel(KVzapConfig(input_dim=32, output_dim=HEADS, n_modules=LAYERS, hidden_dim=8))


def kvzip_gates() -> list[Any]:
    from kvpress.presses.fastkvzip_press import FastKVzipGate  # pyright: ignore[reportMissingImports]

    torch.manual_seed(1)
    return [FastKVzipGate(index, 32, HEADS, 2, torch.float32, 8, 4) for index in range(LAYERS)]


def curves() -> Any:
    rate = torch.linspace(0.6, 0.9, LAYERS * HEADS).view(1, LAYERS, HEADS)  # 0.75 on average
    return rate.expand(99, -1, -1).numpy()


def streaming() -> dict[str, Any]:
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    return {"streaming_mask": mask, "sink_size": 4, "recent_size": 32}


PRESSES: dict[str, Callable[[], Any]] = {
    "knorm": kvpress.KnormPress,
    "keydiff": kvpress.KeyDiffPress,
    "snapkv": snap,
    "tova": kvpress.TOVAPress,
    "random": lambda: kvpress.RandomPress(seed=3),
    "streaming_llm": kvpress.StreamingLLMPress,
    "lagkv": lambda: kvpress.LagKVPress(lag_size=32, cross_scoring=True),  # its ranks would repeat: ties
    "cur": kvpress.CURPress,
    "cap": kvpress.CapPress,
    "compactor": lambda: kvpress.CompactorPress(sketch_dimension=8, chunk_size=64),
    "leverage": lambda: kvpress.LeverageScorePress(sketch_dimension=8),
    "non_causal": lambda: kvpress.NonCausalAttnPress(chunk_size=64),
    "expected_attention": kvpress.ExpectedAttentionPress,
    "expected_attention_stats": lambda: loaded(kvpress.ExpectedAttentionStatsPress(), **statistics()),
    "observed_attention": kvpress.ObservedAttentionPress,
    "qfilter": lambda: loaded(kvpress.QFilterPress(), q_filters=statistics()["mu"][:, :HEADS]),
    "kvzap": lambda: loaded(kvpress.KVzapPress(), kvzap_model=kvzap_model()),
    "criticalkv": lambda: kvpress.CriticalKVPress(snap()),
    "alignment": Alignment,
    "adakv": lambda: kvpress.AdaKVPress(snap()),
    "adakv_knorm": lambda: kvpress.AdaKVPress(kvpress.KnormPress(), alpha_safeguard=0.0),
    "ada_criticalkv": lambda: kvpress.CriticalAdaKVPress(snap()),
    "pyramidkv": lambda: kvpress.PyramidKVPress(window_size=4, beta=10),
    "chunk": lambda: kvpress.ChunkPress(kvpress.KnormPress(), chunk_length=64),
    "chunkkv": lambda: kvpress.ChunkKVPress(snap(), chunk_length=16),
    "entropy_chunkkv": lambda: kvpress.EntropyGatedChunkKVPress(snap()),
    "block": lambda: kvpress.BlockPress(kvpress.KeyDiffPress(), block_size=64),
    "lukv": lambda: loaded(kvpress.LUKVPress(kvpress.KnormPress()), _budget_curves=curves()),
    "fastkvzip": lambda: loaded(kvpress.FastKVzipPress(), gates=kvzip_gates()),
    "fastkvzip_layerwise": lambda: loaded(kvpress.FastKVzipPress(layerwise=True), gates=kvzip_gates()),
    "newest_keys": NewestKeys,
}
# These decide by themselves how much they keep: the budget is the most that stays.
OWN_BUDGETS: dict[str, Callable[[], Any]] = {
    "dms": lambda: kvpress.DMSPress(kvpress.KnormPress(), threshold=-3.0, sliding_window_size=64),
    "simlayerkv": lambda: kvpress.SimLayerKVPress(lazy_threshold=0.2, n_recent=64),
    "duo_attention": lambda: loaded(kvpress.DuoAttentionPress(), **streaming()),
    "per_layer": lambda: kvpress.PerLayerCompressionPress(kvpress.KnormPress(), [0.25, 0.5, 0.75]),
}
HEADWISE = ("adakv", "adakv_knorm", "ada_criticalkv", "lukv", "fastkvzip", "fastkvzip_layerwise")


@pytest.fixture
def model(tiny_model) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=512)


@pytest.fixture
def ids() -> torch.Tensor:
    """No token comes twice: in the first layer it would have the same score each time, and ties are anybody's."""
    return torch.randperm(500, generator=torch.Generator().manual_seed(0))[None, :N] + 3


@torch.no_grad()
def kept_by_kvpress(model: PreTrainedModel, press: Any, ids: torch.Tensor) -> list[list[list[int]]]:
    """`[layer][head]` positions; the press's own hooks on the model, prompts row 0 only."""
    kind = "eager" if isinstance(press, kvpress.ObservedAttentionPress) else "sdpa"
    model.set_attn_implementation(kind)
    press.post_init_from_model = lambda model: None  # there is no network, and all is loaded
    caches = DynamicCache(), DynamicCache()
    # Newer transformers do not tell layers the cache position unless the caller does, and the hooks read it.
    given = {"cache_position": torch.arange(ids.shape[1]), "logits_to_keep": 1}
    model(ids, past_key_values=caches[0], **given)
    torch.manual_seed(0)  # for the presses that draw a sketch
    with press(model):
        model(ids, past_key_values=caches[1], **given)
    model.set_attn_implementation("sdpa")
    layers = zip(*(cache.layers for cache in caches), model.model.layers, strict=True)
    return [positions_kept(full.keys[0], part.keys[0], layer.self_attn) for full, part, layer in layers]


@torch.no_grad()
def kept_by_us(model: PreTrainedModel, press: Any, ids: torch.Tensor, budget: Any) -> list[list[list[int]]]:
    torch.manual_seed(0)
    with evict(model, from_press(press), budget, sinks=0, recent=0) as session:
        model(ids, logits_to_keep=1)
        cache = session.last_cache
        cache.check()
        return [[head.tolist() for head in cache.kept(index)[0]] for index in range(LAYERS)]


@pytest.mark.parametrize("name", PRESSES)
def test_what_is_kept_is_what_kvpress_keeps(model, ids, name):
    press = PRESSES[name]()
    ours = kept_by_us(model, press, ids, 1 - RATIO)
    assert getattr(press, "compression_ratio", 0.0) == 0.0, "the user's press is left alone"
    press.compression_ratio = RATIO
    theirs = kept_by_kvpress(model, press, ids)
    assert ours == theirs
    assert sum(len(head) for layer in ours for head in layer) < N * LAYERS * HEADS / 2, "something was evicted"


@pytest.mark.parametrize("name", OWN_BUDGETS)
def test_presses_with_budgets_of_their_own_keep_what_they_keep(model, ids, name):
    ours = kept_by_us(model, OWN_BUDGETS[name](), ids, 0.99)
    assert ours == kept_by_kvpress(model, OWN_BUDGETS[name](), ids)
    total = sum(len(head) for layer in ours for head in layer)
    assert total < 0.9 * N * LAYERS * HEADS, "something was evicted"
    capped = kept_by_us(model, OWN_BUDGETS[name](), ids, 16)
    assert sum(len(head) for layer in capped for head in layer) <= 16 * LAYERS * HEADS, "the budget is the most"


@pytest.mark.parametrize("name", HEADWISE)
@torch.no_grad()
def test_what_kvpress_masks_is_freed(model, ids, name):
    with evict(model, "full") as session:
        model(ids)
        whole = session.report()
    press = PRESSES[name]()
    with evict(model, from_press(press), 1 - RATIO, sinks=0, recent=0) as session:
        model(ids)
        report = session.report()
    entry = 8 * 4 * 2 + 4  # key, value, position; the policy's score is 4 more
    assert whole.bytes == N * LAYERS * HEADS * entry
    # LU-KV rounds each layer's entries to a whole number.
    assert report.entries == pytest.approx((1 - RATIO) * N * LAYERS * HEADS, abs=LAYERS)
    assert report.kept_bytes == report.entries * (entry + 4)
    assert report.bytes < 0.3 * whole.bytes
    assert len({int(length) for length in report.lengths.flatten()}) > 1, "heads keep different numbers"


@pytest.mark.parametrize("name", ["snapkv", "adakv", "chunkkv", "dms"])
@torch.no_grad()
def test_rows_are_scored_alone_whatever_stands_beside_them(tiny_llama, prompt, name):
    press = (PRESSES | OWN_BUDGETS)[name]()
    rows = [prompt(1, 150, seed=1), prompt(1, 96, seed=2)]
    alone = []
    for row in rows:
        with evict(tiny_llama, from_press(press), 0.5, sinks=1, recent=2) as session:
            tiny_llama(row)
            alone.append([session.last_cache.kept(index)[0] for index in range(LAYERS)])
    padding = 150 - 96
    ids = torch.cat([rows[0], torch.cat([torch.zeros(1, padding, dtype=torch.long), rows[1]], 1)])
    mask = (torch.arange(150) >= torch.tensor([[0], [padding]])).long()
    with evict(tiny_llama, from_press(press), 0.5, sinks=1, recent=2) as session:
        tiny_llama(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        for index in range(LAYERS):
            for row in range(2):
                for ours, theirs in zip(session.last_cache.kept(index)[row], alone[row][index], strict=True):
                    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["knorm", "adakv", "chunkkv", "pyramidkv", "dms"])
@torch.no_grad()
def test_generation_stays_in_the_budget_and_on_what_the_press_kept(model, ids, name):
    press = (PRESSES | OWN_BUDGETS)[name]()
    options: dict[str, Any] = {"sinks": 0, "recent": 4, "buffer": 8}
    with evict(model, from_press(press), 80, **options) as session:
        model(ids)
        prompt = [[set(head.tolist()) for head in session.last_cache.kept(index)[0]] for index in range(LAYERS)]
    with evict(model, from_press(press), 80, **options) as session:
        output = model.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False)
        cache, report = session.last_cache, session.report()
        cache.check()
    assert output.shape == (1, N + 30)
    assert report.evictions > 1 and report.entries <= (80 + 8) * LAYERS * HEADS
    for index in range(LAYERS):
        for head, before in zip(cache.kept(index)[0], prompt[index], strict=True):
            now = head.tolist()
            assert {place for place in now if place < N} <= before, "nothing comes back"
            late = [place for place in now if place >= N]
            assert late == list(range(N + 29 - len(late), N + 29)), "of the later tokens the newest stay"


def held(cache: RaggedCache) -> int:
    """Columns whose hidden states the first layer holds."""
    inputs = cache.ragged[0].inputs
    assert inputs is not None
    return sum(part.hidden_states.shape[1] for part in inputs.forwards)


@torch.no_grad()
def test_hidden_states_are_held_until_the_first_eviction_only(tiny_llama, prompt):
    """A prompt below the budget is scored with what follows it, as if it had come at once."""
    ids = prompt(1, 120)
    press = from_press(snap())
    with evict(tiny_llama, press, 100, sinks=0, recent=0, buffer=9) as session:
        cache = session.new_cache()
        tiny_llama(ids[:, :90], past_key_values=cache)
        for token in ids[:, 90:109].split(1, 1):
            tiny_llama(token, past_key_values=cache)
        assert cache.report().evictions == 0 and held(cache) == 109
        tiny_llama(ids[:, 109:110], past_key_values=cache)
        assert cache.report().evictions == 1 and held(cache) == 0
        pieces = [cache.kept(index)[0] for index in range(LAYERS)]
        tiny_llama(ids[:, 110:111], past_key_values=cache)
        assert held(cache) == 0
    with evict(tiny_llama, press, 100, sinks=0, recent=0) as session:
        tiny_llama(ids[:, :110])
        for index in range(LAYERS):
            for ours, theirs in zip(session.last_cache.kept(index)[0], pieces[index], strict=True):
                torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_one_prompt_many_presses(model, ids):
    names = ("knorm", "adakv", "chunk")
    expected = {name: kept_by_us(model, PRESSES[name](), ids, 1 - RATIO) for name in names}
    with evict(model, "full", observe=[*(from_press(PRESSES[name]()) for name in names), "snapkv"]) as session:
        cache = session.new_cache()
        model(ids, past_key_values=cache)
        for name in names:
            fork = cache.fork().compress(from_press(PRESSES[name]()), 1 - RATIO, sinks=0, recent=0)
            ours = [[head.tolist() for head in fork.kept(index)[0]] for index in range(LAYERS)]
            assert ours == expected[name]
        fork = cache.fork().compress("snapkv", 0.5)
        with pytest.raises(ValueError, match=r"KnormPress\(\) scores a prompt as a whole .* evicted by SnapKV"):
            fork.compress(from_press(kvpress.KnormPress()), 0.25)
        with pytest.raises(ValueError, match="name the policy in evict"):
            cache.fork().compress(from_press(kvpress.KeyDiffPress()), 0.25)


@torch.no_grad()
def test_the_model_is_as_before(model, ids):
    module = model.model.layers[0].self_attn
    module.masked_key_indices = None  # kvpress leaves this behind
    before, modules = dict(vars(module)), [name for name, _ in model.named_modules()]
    for name in ("adakv", "expected_attention"):
        kept_by_us(model, PRESSES[name](), ids, 0.25)
        assert vars(module) == before and [name for name, _ in model.named_modules()] == modules


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "gemma3"])
@torch.no_grad()
def test_families(tiny_model, prompt, family):
    model = tiny_model(family)
    with evict(model, from_press(kvpress.AdaKVPress(snap())), 0.25, sinks=0, recent=0) as session:
        model(prompt(1, 200))
        assert session.report().kept_share == 0.25
        ours = session.last_cache.kept(1)[0]
    # The policy of that name has the queries that the model had, the press makes them from hidden states.
    with evict(model, SnapKV(window=16), 0.25, scope="layer", floor=0.2, sinks=0, recent=0) as session:
        model(prompt(1, 200))
        for one, other in zip(ours, session.last_cache.kept(1)[0], strict=True):
            assert len(set(one.tolist()) & set(other.tolist())) >= 0.95 * len(one)


@torch.no_grad()
def test_queries_without_their_norm_are_refused(tiny_model, prompt):
    """kvpress knows the norms of Qwen3 and Gemma-3; elsewhere it would leave them out and say nothing."""
    model = tiny_model("qwen3_moe")
    with evict(model, from_press(kvpress.KnormPress()), 0.25) as session:
        model(prompt(1, 100))
        assert session.report().kept_share == 0.25
    message = "without the norm that Qwen3MoeAttention has"
    with evict(model, from_press(snap()), 0.25), pytest.raises(ValueError, match=message):
        model(prompt(1, 100))
    assert not {"q_proj", "k_proj", "rotary_emb"} & vars(model.model.layers[0].self_attn).keys()


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "think": (lambda: kvpress.ThinKPress(0.5), "ThinKPress cannot run under evict(): it zeroes channels of the keys"),
    "rerotation": (lambda: kvpress.KeyRerotationPress(snap()), "it rotates the keys that it keeps"),
    "merging": (lambda: kvpress.MergingPress(snap()), "it adds what it evicts to the values that it keeps"),
    "finch": (kvpress.FinchPress, "it cuts a delimiter token out of the prompt"),
    "kvzip": (kvpress.KVzipPress, "it runs the model over the prompt again"),
    "kvgrad": (kvpress.KVgradPress, "KVgradPress cannot run under evict(): it runs the model over the prompt again"),
    "restorekv": (kvpress.RestoreKVPress, "it runs the model over the prompt again"),
    "kvcompose": (kvpress.KVComposePress, "it runs the model over the prompt again"),
    "decoding": (lambda: kvpress.DecodingPress(snap()), "after every `buffer` tokens: give its base_press"),
    "cam": (lambda: kvpress.CAMPress(snap()), "CAMPress cannot run under evict(): it evicts while tokens"),
    "ratio_decoding": (lambda: kvpress.CompressionRatioDecodingPress(snap()), "evicts while tokens are generated"),
    "prefill_decoding": (lambda: kvpress.PrefillDecodingPress(snap()), "give its prefilling_press"),
    "composed": (lambda: kvpress.ComposedPress([snap(), snap()]), "chains presses that have a ratio each"),
    "dms_decoding": (lambda: kvpress.DMSPress(snap(), threshold=0.1, decoding=True), "set decoding=False"),
    "dms_without": (lambda: kvpress.DMSPress(snap()), "has no threshold"),
    "base": (kvpress.BasePress, "presses with a score() or compress() of their own are accepted"),
    "class": (lambda: kvpress.KnormPress, "accepts an instance of a press of kvpress, got <class"),
    "text": (lambda: "knorm", "accepts an instance of a press of kvpress, got 'knorm'"),
    "qfilter": (kvpress.QFilterPress, "QFilterPress needs its q_filters for a model: give from_press(press, model)"),
    "inside": (lambda: kvpress.AdaKVPress(kvpress.KVzapPress()), "KVzapPress needs its kvzap_model"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_presses_that_do_more_than_select_are_refused(name):
    make, message = REFUSALS[name]
    with pytest.raises(ValueError) as raised:
        from_press(make())
    assert message in str(raised.value)


def test_every_press_of_kvpress_is_run_or_refused():
    """A new press of kvpress fails here until somebody has looked at it."""
    makers = [*PRESSES.values(), *OWN_BUDGETS.values(), *(make for make, _ in REFUSALS.values())]
    looked_at = {type(press).__name__ for make in makers if isinstance(press := make(), kvpress.BasePress)}
    known = {name for name in kvpress.__all__ if name.endswith("Press")}
    assert known - looked_at - {"ScorerPress"} == set()


@dataclass
class Halves(kvpress.BasePress):
    """Changes what it keeps, and nothing about its class tells."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys[:, :, :10], values[:, :, :10] / 2


@torch.no_grad()
def test_what_shows_only_at_the_prompt_is_refused_there(model, ids):
    def run(press: Any, **options: Any) -> None:
        with evict(model, from_press(press), 0.25, **options):
            model(ids[:, :40])

    with pytest.raises(ValueError, match="Halves changes the keys or values that it keeps"):
        run(Halves())
    with pytest.raises(ValueError, match=r"SnapKVPress\(window_size=64.*refuses the prompt: Query length 40"):
        run(kvpress.SnapKVPress())
    with pytest.raises(ValueError, match=r"QFilterPress\(.* gave NaN in layer 0, expected numbers \(1, 2, 40\)"):
        run(loaded(kvpress.QFilterPress(), q_filters=torch.full((LAYERS, HEADS, 8), torch.nan)))
    with pytest.raises(ValueError, match="'kvpress' scores a prompt as a whole: leave prefill_chunk unset"):
        run(kvpress.KnormPress(), prefill_chunk=16)


def test_policies_of_equal_presses_are_equal():
    assert from_press(kvpress.KnormPress(0.2)) == from_press(kvpress.KnormPress(0.7)), "the ratio does not count"
    assert from_press(kvpress.AdaKVPress(snap())) != from_press(kvpress.AdaKVPress(kvpress.SnapKVPress()))
    one = from_press(kvpress.DMSPress(kvpress.KnormPress(), threshold=-1.0))
    assert one == from_press(kvpress.DMSPress(kvpress.KnormPress(), threshold=-1.0))
    assert len({one, from_press(kvpress.KnormPress())}) == 2
    press = snap()
    policy = from_press(press)
    press.window_size = 64
    assert isinstance(policy, PressPolicy) and policy.press.window_size == 16, "it is a copy"

"""Texts of answers as their tokens arrive: equal to the decoded whole, cut at stop texts however tokens divide them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tenure.serving.sampling.stop import MAX_OPEN_TOKENS, REPLACEMENT, StopChecker, TextDelta

Decode = Callable[[list[int]], str]


def byte_level() -> Tokenizer:
    """A token for each byte, and some of several, also of parts of characters."""
    signs = byte_signs()
    vocab = {sign: byte for byte, sign in enumerate(signs)}
    merges = []
    for pair in ((b" ", b"a"), (b"b", b"\xe4"), (b"\xbd", b"\xa0"), (b"\xa0", b"\xe5"), (b"\xf0", b"\x9f")):
        left, right = ("".join(signs[byte] for byte in part) for part in pair)
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_signs() -> list[str]:
    """The sign that stands for each byte in a byte-level vocabulary (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def sentencepiece() -> Tokenizer:
    """Llama's scheme: words with their space, bytes for what is in no token, and the first space dropped."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ("▁", "a", "b", "c", "o", "n", "e", "▁a", "▁b", "on", "one", "▁one", "é"):
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁", "b"), ("o", "n"), ("on", "e"), ("▁", "one")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}
TEXTS = st.text(alphabet="ab cone é你好🙂\n\u200d\ufffd", max_size=40) | st.text(max_size=20)


def decoder(tokenizer: Tokenizer) -> Decode:
    return partial(tokenizer.decode, skip_special_tokens=True)


def streamed(checker: StopChecker, tokens: Sequence[int]) -> tuple[list[TextDelta], str]:
    """All deltas of tokens until a stop text or the end, and their text."""
    deltas = []
    for token in tokens:
        deltas.append(checker.push(token))
        if deltas[-1].stopped_by is not None:
            break
    else:
        deltas.append(checker.finish())
    return deltas, "".join(delta.text for delta in deltas)


def cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop text that is complete first, the longest of those, character by character."""
    for end in range(1, len(text) + 1):
        found = [one for one in stop if text[:end].endswith(one)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_joined_deltas_are_the_decoded_whole(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    deltas, found = streamed(StopChecker(decoder(tokenizer)), ids)
    assert found == tokenizer.decode(ids)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in delta.text for delta in deltas), "a character was split"


@given(ids=st.lists(st.integers(0, TOKENIZERS["byte level"].get_vocab_size() - 1), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_tokens_of_a_byte_level_vocabulary_give_the_decoded_whole(ids: list[int]) -> None:
    decode = decoder(TOKENIZERS["byte level"])
    assert streamed(StopChecker(decode), ids)[1] == decode(ids)


@given(ids=st.lists(st.integers(1, TOKENIZERS["sentencepiece"].get_vocab_size() - 1), max_size=60))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_text_differ_in_replacement_signs_only(ids: list[int]) -> None:
    """Byte fallback shows a run of bytes with one wrong one as signs only; a stream has shown the characters before."""
    decode = decoder(TOKENIZERS["sentencepiece"])
    found, whole = streamed(StopChecker(decode), ids)[1], decode(ids)
    if REPLACEMENT not in whole:
        assert found == whole
    letters = {"a", "b", "c", "o", "n", "e", " "}
    assert [one for one in whole if one in letters and one not in found] == []


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, stop=st.lists(st.text(alphabet="ab cone你", min_size=1, max_size=4), max_size=4))
@settings(max_examples=200, deadline=None)
def test_stop_texts_are_found_across_tokens(name: str, text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    deltas, found = streamed(StopChecker(decoder(tokenizer), stop), ids)
    wanted, by = cut(tokenizer.decode(ids), stop)
    assert found == wanted and deltas[-1].stopped_by == by


def pieces(*texts: str) -> tuple[Decode, list[int]]:
    """Tokens with these texts."""
    return lambda ids: "".join(texts[one] for one in ids), list(range(len(texts)))


@given(text=st.text(alphabet="ab", max_size=24), cuts=st.lists(st.integers(0, 24)),
       stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4))  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_where_an_answer_ends_is_independent_of_its_division(text: str, cuts: list[int], stop: list[str]) -> None:
    marks = sorted({0, len(text), *(one for one in cuts if one < len(text))})
    decode, ids = pieces(*(text[begin:end] for begin, end in pairwise(marks)))
    deltas, found = streamed(StopChecker(decode, stop), ids)
    wanted, by = cut(text, stop)
    assert found == wanted and deltas[-1].stopped_by == by


def test_text_is_held_back_only_while_it_may_be_a_stop_text() -> None:
    decode, ids = pieces("one<", "/s", "x<<", "/s>", "rest")
    checker = StopChecker(decode, ["</s>", "nothing"])
    found = [checker.push(one) for one in ids[:4]]
    assert found == [TextDelta("one"), TextDelta(""), TextDelta("</sx<"), TextDelta("", "</s>")]
    with pytest.raises(ValueError, match="got a token after the stop text '</s>'; accepted: none"):
        checker.push(4)
    assert checker.finish() == TextDelta("")
    ended = StopChecker(decode, ["</s>"])
    assert [ended.push(0), ended.push(1), ended.finish(), ended.finish()] == [
        TextDelta("one"), TextDelta(""), TextDelta("</s"), TextDelta("")]  # fmt: skip
    with pytest.raises(ValueError, match="got an empty stop text"):
        StopChecker(decode, [""])


def test_the_first_tokens_cannot_complete_a_stop_text() -> None:
    decode, ids = pieces("ab", "a", "b", "c")
    for least, wanted in ((0, ("", "ab")), (1, ("ab", "ab")), (2, ("ab", "ab")), (3, ("ababc", None))):
        deltas, found = streamed(StopChecker(decode, ["ab"], least), ids)
        assert (found, deltas[-1].stopped_by) == wanted, least
    decode, ids = pieces("ab", "a", "ba")
    deltas, found = streamed(StopChecker(decode, ["aba"], 2), ids)
    assert (found, deltas[-1].stopped_by) == ("ab", "aba"), "it overlaps with one that was too early"


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a好", add_special_tokens=False).ids
    deltas, _ = streamed(StopChecker(decoder(tokenizer)), ids[:-1])
    assert [one.text for one in deltas] == ["a", "", "", REPLACEMENT]


def test_the_first_word_keeps_its_space_after_the_prompt() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    prompt, answer = tokenizer.encode("one b").ids, tokenizer.encode("one a").ids
    assert streamed(StopChecker(decoder(tokenizer)), answer)[1] == "one a"
    assert streamed(StopChecker(decoder(tokenizer), context=prompt[-4:]), answer)[1] == " one a"


def test_special_tokens_between_words_keep_the_space() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    end, word = (tokenizer.get_vocab()[name] for name in ("<end>", "▁one"))
    assert streamed(StopChecker(decoder(tokenizer)), [word, end, end, word, end, word])[1] == "one one one"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_without_end_cost_the_same_at_every_token(name: str) -> None:
    """A client can make a model write them; the text after them is read again."""
    tokenizer, lengths = TOKENIZERS[name], []
    byte = tokenizer.get_vocab()["<0xFF>" if name == "sentencepiece" else byte_signs()[0xFF]]

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return tokenizer.decode(ids)

    after = tokenizer.encode("a b你c", add_special_tokens=False).ids
    _, found = streamed(StopChecker(decode), [*[byte] * 1000, *after])
    assert max(lengths) <= 2 * MAX_OPEN_TOKENS
    lengths.clear()
    streamed(StopChecker(decode), after * 20)
    assert max(lengths) <= 8, "of a text only the last tokens"
    assert found.rstrip("a b你c") == REPLACEMENT * 1000 and found.endswith("a b你c")


@pytest.mark.real
def test_the_demo_tokenizer(real_model_path: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model_path)
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = "def f(x):\n    return x  # 你好, naïve 🙂👩‍👩‍👧 — end .\n\n" * 3

    @given(st.text(max_size=30) | st.just(text), st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    @settings(max_examples=100, deadline=None)
    def check(text: str, others: list[int]) -> None:
        ids = [*tokenizer(text).input_ids, *others]
        assert streamed(StopChecker(decode), ids)[1] == decode(ids)
        _, found = streamed(StopChecker(decode, ["end .", "\ufffd\ufffd"]), ids)
        assert found == cut(decode(ids), ["end .", "\ufffd\ufffd"])[0]

    check()

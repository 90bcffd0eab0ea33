"""Public files by URL and SHA-256: GPT-2's vocabulary and the evaluation sets.

A file is downloaded to NAME.part, continued from there after a break (HTTP Range), checked against its
SHA-256, and only then given its name: what stands under its name is right. Proxies are taken from the
environment (https_proxy).
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt2.data.files import sha256_of, sync_directory, temporary_name

TIMEOUT_SECONDS = 60.0
ATTEMPTS = 3
_BLOCK = 1 << 18


class FetchError(Exception):
    """The network, a server or a file's content failed us. Names the URL and what to do."""


@dataclass(frozen=True)
class PublicFile:
    """One file: stands at OUTPUT/folder/name once fetched.

    urls: where it is, tried in order.   member: the file inside the .zip that the URLs give, if they give
    one.
    """

    folder: str
    name: str
    sha256: str
    size: int
    urls: tuple[str, ...]
    licence: str
    member: str | None = None


def fetch_file(
    file: PublicFile,
    output: Path,
    local: Path | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
    retry_seconds: float = 2.0,
) -> bool:
    """Bring `file` to output/folder/name, verified. Returns False if it already was there.

    With `local`, it is copied from local/folder/name or local/name, and the network is not used.
    `on_bytes(done, size)` is called as it grows. Raises FetchError, or ValueError when `local` lacks the
    file.
    """
    target = output / file.folder / file.name
    if target.is_file() and sha256_of(target) == file.sha256:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    if local is not None:
        _copy_verified(file, local, target)
        return True
    failures = []
    for url in file.urls:
        try:
            _fetch_from(url, file, target, on_bytes or (lambda done, size: None), retry_seconds)
            return True
        except FetchError as error:
            failures.append(str(error))
    raise FetchError(
        "; ".join(failures)
        + f"; check the network and https_proxy, or bring {file.name} by hand and pass --from FOLDER"
    )


def _copy_verified(file: PublicFile, local: Path, target: Path) -> None:
    candidates = [local / file.folder / file.name, local / file.name]
    source = next((path for path in candidates if path.is_file()), None)
    if source is None:
        raise ValueError(f"--from {local} has neither {file.folder}/{file.name} nor {file.name}")
    temporary = temporary_name(target)
    try:
        shutil.copyfile(source, temporary)
        found = sha256_of(temporary)
        if found != file.sha256:
            raise FetchError(
                f"{source}: SHA-256 is {found}, wanted {file.sha256}; it is another version or damaged"
            )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(target.parent)


def _fetch_from(
    url: str, file: PublicFile, target: Path, on_bytes: Callable[[int, int], None], retry_seconds: float
) -> None:
    """Download from one URL, in several attempts, each going on where the last one broke off."""
    # The part is named by URL too: a mirror's archive must not be continued with another's.
    tag = hashlib.sha256(url.encode()).hexdigest()[:8]
    part = target.with_name(f"{target.name}.{tag}.part")
    for attempt in range(ATTEMPTS):
        resumed = part.is_file() and part.stat().st_size > 0
        try:
            _download(url, part, file.size, on_bytes)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # 4xx will be the same next time; everything else may pass.
            final = (
                isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code != 429
            )
            if final or isinstance(error, ValueError) or attempt == ATTEMPTS - 1:
                kept = f" ({part.stat().st_size} bytes kept in {part.name})" if part.is_file() else ""
                raise FetchError(f"{url}: {_reason(error)}{kept}") from error
            time.sleep(retry_seconds * 2**attempt)
            continue
        found = _install(file, part, target)
        if found is None:
            return
        part.unlink(missing_ok=True)
        if not resumed:
            raise FetchError(
                f"{url}: SHA-256 is {found}, wanted {file.sha256}: the server has another version"
            )
        # The old part may have been the bad half: once more, from the start.
    raise FetchError(f"{url}: what was downloaded does not have SHA-256 {file.sha256}")


def _download(url: str, part: Path, size: int, on_bytes: Callable[[int, int], None]) -> None:
    """GET `url` into `part`, continuing it if the server can. Raises OSError when the connection breaks."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "megagpt2", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after `have`: it was complete, or is longer than the file
            return
        raise
    with response:
        if response.status != 206:
            have = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        with part.open("ab" if have else "wb") as output:
            done = have
            while block := response.read(_BLOCK):
                output.write(block)
                done += len(block)
                on_bytes(done, size)
        if length is not None and done - have != int(length):
            raise ConnectionError(f"the connection broke off after {done} bytes of {have + int(length)}")


def _install(file: PublicFile, part: Path, target: Path) -> str | None:
    """Verify `part` and give it its name; or return the SHA-256 that it has instead."""
    content = part
    if file.member is not None:
        content = temporary_name(target)
        try:
            with (
                zipfile.ZipFile(part) as archive,
                archive.open(file.member) as source,
                content.open("wb") as output,
            ):
                shutil.copyfileobj(source, output)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            content.unlink(missing_ok=True)
            return f"unknown ({error})"
    found = sha256_of(content)
    if found != file.sha256:
        if content != part:
            content.unlink()
        return found
    content.replace(target)
    part.unlink(missing_ok=True)
    sync_directory(target.parent)
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection ({error.reason})"
    return str(error) or type(error).__name__


def select(names: Sequence[str], catalog: Sequence[PublicFile]) -> list[PublicFile]:
    """The files of the named folders, or single files (folder/name); all without names. Raises ValueError."""
    if not names:
        return list(catalog)
    chosen: list[PublicFile] = []
    for name in names:
        found = [file for file in catalog if name in (file.folder, f"{file.folder}/{file.name}")]
        if not found:
            folders = ", ".join(sorted({file.folder for file in catalog}))
            raise ValueError(f"unknown data set {name!r}; known: {folders}")
        chosen.extend(file for file in found if file not in chosen)
    return chosen

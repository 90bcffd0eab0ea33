"""Fetching: resumes where it broke off, believes only the SHA-256, leaves no half file under a good name."""

import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from megagpt2.data.catalog import CATALOG
from megagpt2.data.fetch import FetchError, PublicFile, fetch_file, select

ROOT = Path(__file__).resolve().parents[2]
CONTENT = np.random.default_rng(1).bytes(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; can ignore ranges, and break the connection after some bytes."""

    def do_GET(self) -> None:  # noqa: N802  (the name http.server calls)
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if server.breaks:
            body = body[: server.breaks.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Quiet."""


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.breaks, server.ranges = {"/file": CONTENT}, [], [], True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def public_file(server, path="/file", content=CONTENT, **changes) -> PublicFile:
    fields = {
        "folder": "set",
        "name": "file.txt",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "urls": (f"http://127.0.0.1:{server.server_port}{path}",),
        "licence": "none",
    }
    return PublicFile(**{**fields, **changes})


def fetch(file: PublicFile, output: Path, **options) -> bool:
    return fetch_file(file, output, retry_seconds=0.01, **options)


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "set").iterdir())


def test_a_file_arrives_once(server, tmp_path):
    seen = []
    file = public_file(server)
    assert fetch(file, tmp_path, on_bytes=lambda done, size: seen.append((done, size))) is True
    assert (tmp_path / "set" / "file.txt").read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert fetch(file, tmp_path) is False, "it was fetched again"
    assert len(server.requests) == 1
    assert names(tmp_path) == ["file.txt"]


def test_a_broken_connection_is_continued_where_it_broke(server, tmp_path):
    server.breaks = [100_000, 50_000]
    fetch(public_file(server), tmp_path)
    assert (tmp_path / "set" / "file.txt").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", "bytes=150000-"]


def test_the_next_run_continues_what_the_last_one_left(server, tmp_path):
    server.breaks = [1000, 1000, 1000]
    with pytest.raises(FetchError, match="broke off after 3000 bytes of 300000 .*3000 bytes kept"):
        fetch(public_file(server), tmp_path)
    assert not (tmp_path / "set" / "file.txt").exists()
    fetch(public_file(server), tmp_path)
    assert server.requests[-1] == ("/file", "bytes=3000-")
    assert (tmp_path / "set" / "file.txt").read_bytes() == CONTENT
    assert names(tmp_path) == ["file.txt"]


def test_a_server_without_ranges_sends_it_whole(server, tmp_path):
    server.ranges, server.breaks = False, [1000]
    fetch(public_file(server), tmp_path)
    assert (tmp_path / "set" / "file.txt").read_bytes() == CONTENT


def leave_part(server, output: Path, content: bytes) -> None:
    server.breaks = [1, 1, 1]
    with pytest.raises(FetchError):
        fetch(public_file(server), output)
    (part,) = (output / "set").glob("*.part")
    part.write_bytes(content)


@pytest.mark.parametrize("part", [b"x" * 5000, CONTENT + b"too long", CONTENT])
def test_a_wrong_or_complete_part_ends_well(server, tmp_path, part):
    leave_part(server, tmp_path, part)
    fetch(public_file(server), tmp_path)
    assert (tmp_path / "set" / "file.txt").read_bytes() == CONTENT
    assert names(tmp_path) == ["file.txt"]


def test_other_content_is_refused_and_not_kept(server, tmp_path):
    server.files["/file"] = CONTENT[:-1] + b"?"
    with pytest.raises(FetchError, match="SHA-256 is .* wanted"):
        fetch(public_file(server), tmp_path)
    assert names(tmp_path) == []


def test_the_second_url_is_tried_and_all_failures_are_named(server, tmp_path):
    base = f"http://127.0.0.1:{server.server_port}"
    fetch(public_file(server, urls=(f"{base}/gone", f"{base}/file")), tmp_path)
    assert [path for path, _ in server.requests] == ["/gone", "/file"], "404 was asked for again"
    with pytest.raises(
        FetchError, match="/gone: the server says 404.*/also: the server says 404.*--from FOLDER"
    ):
        fetch(public_file(server, name="b", urls=(f"{base}/gone", f"{base}/also")), tmp_path)


def test_a_member_of_an_archive_is_taken_out_and_verified(server, tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("inside/file.raw", CONTENT)
    server.files["/file"] = archive.getvalue()
    fetch(public_file(server, member="inside/file.raw"), tmp_path)
    assert (tmp_path / "set" / "file.txt").read_bytes() == CONTENT
    assert names(tmp_path) == ["file.txt"]
    with pytest.raises(FetchError, match="SHA-256 is unknown"):
        fetch(public_file(server, name="b", member="inside/other"), tmp_path)


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.txt").write_bytes(b"half")
    assert fetch(public_file(server), tmp_path) is True
    assert (tmp_path / "set" / "file.txt").read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["set/file.txt", "file.txt"])
def test_from_a_folder_with_the_same_verification(server, tmp_path, place):
    source = tmp_path / "from" / place
    source.parent.mkdir(parents=True)
    source.write_bytes(CONTENT)
    assert fetch(public_file(server), tmp_path / "out", local=tmp_path / "from")
    assert (tmp_path / "out" / "set" / "file.txt").read_bytes() == CONTENT
    source.write_bytes(b"other")
    with pytest.raises(FetchError, match="another version or damaged"):
        fetch(public_file(server), tmp_path / "out2", local=tmp_path / "from")
    assert names(tmp_path / "out2") == []
    source.unlink()
    with pytest.raises(ValueError, match="has neither"):
        fetch(public_file(server), tmp_path / "out3", local=tmp_path / "from")
    assert server.requests == []


def test_catalog_is_consistent():
    places = [(file.folder, file.name) for file in CATALOG]
    assert len(set(places)) == len(places)
    for file in CATALOG:
        assert len(file.sha256) == 64 and file.size > 0 and file.licence
        assert all(url.startswith("https://") for url in file.urls) and file.urls
    assert {file.name for file in select(["gpt2-tokenizer"], CATALOG)} == {"encoder.json", "vocab.bpe"}
    assert [file.name for file in select(["ptb/ptb.test.txt", "ptb/ptb.test.txt"], CATALOG)] == [
        "ptb.test.txt"
    ]
    assert len(select([], CATALOG)) == len(CATALOG)


def tool(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "fetch_data.py"), *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-such", "--output", "x"], "unknown data set 'nothing-such'; known: 1bw"),
        (["ptb"], "--output DIR is missing"),
        (["ptb", "--output", "x", "--from", "/nowhere"], "is not a folder"),
    ],
)
def test_wrong_requests_exit_2(arguments, message):
    result = tool(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_list_needs_no_network():
    result = tool("--list")
    assert result.returncode == 0
    assert "encoder.json" in result.stdout and "Modified MIT" in result.stdout


def test_no_network_exits_1_and_says_what_to_do(tmp_path, server):
    # A proxy that is not there: the way out is closed whatever the machine's network.
    port = server.server_port
    server.files.clear()
    proxy = f"http://127.0.0.1:{port}"  # answers CONNECT with an error, as a proxy that forbids does
    result = tool(
        "winograd", "--output", tmp_path, https_proxy=proxy, HTTPS_PROXY=proxy, no_proxy="", NO_PROXY=""
    )
    assert result.returncode == 1
    assert "no connection" in result.stderr and "--from FOLDER" in result.stderr


def test_all_public_files_verify_from_the_data_folder(tmp_path):
    root = os.environ.get("MEGAGPT2_DATA")
    if not root:
        pytest.skip("MEGAGPT2_DATA is not set: this test needs the public data files")
    result = tool("--output", tmp_path, "--from", root)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("SHA-256 verified") == len(CATALOG)

"""Shards behind a web server and in object stores, through gopen: whole, cut short, stalled, refused, missing."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_shards import parts_of, write

from configs.errors import UserError
from pretrain.data.index import ShardIndex
from pretrain.data.shards import ShardReader
from pretrain.data.staging import Staging, StagingError

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="gopen fetches http by curl")


class Server(ThreadingHTTPServer):
    """Serves a folder. `faults` says by file name what happens to it, and how often."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.asked = folder, dict[str, tuple[str, int]](), Counter[str]()
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        kind, times = self.server.faults.get(name, ("", 0))
        fault = kind if self.server.asked[name] <= times else ""
        path = self.server.folder / name
        if fault == "refuse" or not path.is_file():
            self.send_error(403 if fault else 404)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: 1000 if fault else None])
        if fault == "stall":
            self.server.over.wait(60)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write(tmp_path / "far")
    server = Server(tmp_path / "far")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def reader(server: Server, folder: Path, **options: Any) -> ShardReader:
    index = ShardIndex.open(f"{server.url}/{{000..002}}.tar", cache_dir=folder)
    server.asked.clear()
    return ShardReader(index, Staging(folder / "shards", **{"timeout_s": 1.0, "retries": 2, **options}))


def test_a_set_is_indexed_staged_once_and_read(server: Server, tmp_path: Path) -> None:
    shards = reader(server, tmp_path / "cache")
    assert all(shards.read(n) == parts_of(n // 5, n % 5) for n in (14, 0, 7, 1, 13))
    assert server.asked == {"000.tar": 1, "001.tar": 1, "002.tar": 1}


def test_an_index_beside_the_shards_is_taken_over(server: Server, tmp_path: Path) -> None:
    ShardIndex.open(tmp_path / "far")
    ShardIndex.open(f"{server.url}/{{000..002}}.tar", cache_dir=tmp_path / "cache")
    assert server.asked == {"index.safetensors": 1}


@pytest.mark.parametrize("fault", ["cut", "stall", "refuse"])
def test_a_fault_that_passes_is_tried_again(server: Server, tmp_path: Path, fault: str) -> None:
    shards = reader(server, tmp_path / "cache")
    server.faults["001.tar"] = (fault, 2)
    assert shards.read(7) == parts_of(1, 2)
    assert server.asked == {"001.tar": 3}
    assert not list((tmp_path / "cache" / "shards").glob(".*.part"))


@pytest.mark.parametrize(
    ("fault", "cause"), [("cut", "exit status 18"), ("stall", "no byte for 1 s"), ("refuse", "exit status 22")]
)
def test_a_fault_that_stays_is_an_error_with_its_cause_in_time(
    server: Server, tmp_path: Path, fault: str, cause: str
) -> None:
    shards = reader(server, tmp_path / "cache", retries=1)
    server.faults["001.tar"] = (fault, 99)
    begin = time.monotonic()
    with pytest.raises(StagingError, match=rf"cannot fetch {server.url}/001\.tar .*{cause}.*after 2 attempts"):
        shards.read(7)
    assert time.monotonic() - begin < 20


def test_a_missing_shard_is_named_when_the_set_is_opened(server: Server, tmp_path: Path) -> None:
    (tmp_path / "far" / "001.tar").unlink()
    (tmp_path / "far" / "index.safetensors").unlink(missing_ok=True)
    with pytest.raises(UserError, match=rf"cannot read {server.url}/001\.tar: .*exit status 22; check the address"):
        ShardIndex.open(f"{server.url}/{{000..002}}.tar", cache_dir=tmp_path / "cache")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the server's certificate")
def test_https_checks_the_certificate(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, "-keyout", key, "-out", certificate]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = server.url.replace("http:", "https:")
    with pytest.raises(UserError, match="exit status 60"):  # curl's for a certificate that nobody it trusts has signed
        ShardIndex.open(f"{server.url}/{{000..002}}.tar", cache_dir=tmp_path / "cache")
    monkeypatch.setenv("CURL_CA_BUNDLE", str(certificate))
    assert reader(server, tmp_path / "cache").read(7) == parts_of(1, 2)


@pytest.mark.parametrize(
    ("scheme", "program", "arguments"), [("s3", "aws", "s3 cp --quiet {url} -"), ("gs", "gsutil", "cat {url}")]
)
def test_object_stores_are_read_by_their_own_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, program: str, arguments: str
) -> None:
    """Stand-ins for the programs: they write down what they are asked for, and print the file."""
    write(tmp_path / "far")
    stand_in = tmp_path / "bin" / program
    stand_in.parent.mkdir()
    url = next(word for word in arguments.split() if "url" in word)
    place = arguments.split().index(url) + 1
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexec cat {tmp_path}/far/"${{{place}##*/}}"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(stand_in.parent), prepend=":")
    index = ShardIndex.open(f"{scheme}://bucket/a b/{{000..002}}.tar", cache_dir=tmp_path / "cache")
    (tmp_path / "asked").unlink()
    assert ShardReader(index, Staging(tmp_path / "cache" / "shards", retries=0)).read(7) == parts_of(1, 2)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert arguments.format(url=f"{scheme}://bucket/a b/001.tar") in asked

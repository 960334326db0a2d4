"""An address as a source: what breaks goes on where it stopped, and what has changed is fetched anew."""
import http.server
import threading

import httpx
import pytest
from small_archives import jpg, make_zip

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import Recipe, load_settings
from nbs_lib.data import sources
from nbs_lib.data.sources import download, open_source, public, source_signature


@pytest.fixture
def settings(home): return load_settings(home)



class Server(http.server.BaseHTTPRequestHandler):
    "One file, with ranges and an ETag; the first `breaks` replies stop after a third of what they announce."
    content, etag, breaks, ranges, requests = b"", '"one"', 0, True, []

    def do_HEAD(self): self.reply(head=True)
    def do_GET(self): self.reply()

    def reply(self, head=False):
        cls, start, status = type(self), 0, 200
        cls.requests.append((self.command, self.headers.get("Range"), self.headers.get("If-Range")))
        if self.path != "/photos.zip": return self.send_error(404)
        if self.headers.get("If-None-Match") == cls.etag: status = 304
        elif cls.ranges and (wanted := self.headers.get("Range")) and self.headers.get("If-Range") == cls.etag:
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
        if start >= len(cls.content) > 0: return self.send_error(416)
        body = b"" if status == 304 else cls.content[start:]
        self.send_response(status)
        self.send_header("ETag", cls.etag)
        if status != 304: self.send_header("Content-Length", str(len(body)))
        if status == 206: self.send_header("Content-Range", f"bytes {start}-{len(cls.content) - 1}/{len(cls.content)}")
        self.end_headers()
        if head: return
        if cls.breaks and body:
            cls.breaks -= 1
            body = body[:len(body) // 3]
        self.wfile.write(body)

    def log_message(self, *_): pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.time, "sleep", lambda _: None)
    files = {f"{c}/{n}.jpg": jpg(n) for c in ("cat", "dog") for n in range(300)}
    content = make_zip(tmp_path / "served.zip", files).read_bytes()
    handler = type("Handler", (Server,), {"content": content, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{server.server_port}/photos.zip"
        yield handler
        server.shutdown()


def test_broken_connection_goes_on_where_it_stopped(web, tmp_path):
    web.breaks = 2
    path = download(web.url, tmp_path / "raw")
    assert path.read_bytes() == web.content and len(web.requests) == 3
    assert web.requests[1][1:] == (f"bytes={len(web.content) // 3}-", '"one"')
    assert not list((tmp_path / "raw").glob("*.part*"))
    assert download(web.url, tmp_path / "raw") == path
    assert len(web.requests) == 4, "and the next time the server says 304"


def test_next_run_goes_on(web, tmp_path):
    web.breaks = sources.ATTEMPTS
    with pytest.raises(UserError, match="goes on where this stopped"): download(web.url, tmp_path / "raw")
    part = next((tmp_path / "raw").glob("*.part"))
    assert 0 < part.stat().st_size < len(web.content) and web.content.startswith(part.read_bytes())
    assert download(web.url, tmp_path / "raw").read_bytes() == web.content
    assert web.requests[-1][1] == f"bytes={part_size(web)}-"


def part_size(web) -> int:
    "Where the last attempt began: what four replies of a third of the rest leave."
    size = 0
    for _ in range(sources.ATTEMPTS): size += (len(web.content) - size) // 3
    return size


def test_file_that_changed_meanwhile_is_begun_anew(web, tmp_path):
    web.breaks = sources.ATTEMPTS
    with pytest.raises(UserError): download(web.url, tmp_path / "raw")
    web.content, web.etag = make_zip(tmp_path / "new.zip", {"cat/1.jpg": jpg(9) * 50}).read_bytes(), '"two"'
    path = download(web.url, tmp_path / "raw")
    assert path.read_bytes() == web.content
    web.content, web.etag = web.content + b"!", '"three"'
    assert download(web.url, tmp_path / "raw").read_bytes() == web.content


@pytest.mark.parametrize("part", [b"", b"rubbish", b"x" * 10_000_000])
def test_part_of_unknown_origin(web, tmp_path, part):
    path = download(web.url, tmp_path / "raw")
    for file in (tmp_path / "raw").iterdir(): file.unlink()
    path.with_name(path.name + ".part").write_bytes(part)
    assert download(web.url, tmp_path / "raw").read_bytes() == web.content


def test_part_that_is_too_long(web, tmp_path):
    web.breaks = sources.ATTEMPTS
    with pytest.raises(UserError): download(web.url, tmp_path / "raw")
    part = next((tmp_path / "raw").glob("*.part"))
    part.write_bytes(bytes(len(web.content) + 5))
    assert download(web.url, tmp_path / "raw").read_bytes() == web.content


def test_server_without_ranges(web, tmp_path):
    web.ranges, web.breaks = False, 1
    assert download(web.url, tmp_path / "raw").read_bytes() == web.content


def test_sha256(web, tmp_path):
    import hashlib
    right = hashlib.sha256(web.content).hexdigest()
    with pytest.raises(UserError, match=f"SHA-256 is {right}"): download(web.url, tmp_path / "raw", "0" * 64)
    assert not [p for p in (tmp_path / "raw").iterdir() if p.suffix == ".zip"]
    path, asked = download(web.url, tmp_path / "raw", right.upper()), len(web.requests)
    assert download(web.url, tmp_path / "raw", right) == path
    assert len(web.requests) == asked, "the server is not asked again"


def test_what_else_goes_wrong(web, tmp_path, settings):
    recipe = Recipe()
    with pytest.raises(UserError, match="HTTP 404"): download(web.url + "x", tmp_path / "raw")
    with pytest.raises(UserError, match="allowed are 1e-05"): download(web.url, tmp_path / "raw", max_gb=1e-5)
    with pytest.raises(UserError, match="check the address"):
        download("http://127.0.0.1:9/photos.zip", tmp_path / "raw")
    with pytest.raises(UserError, match="check the address") as error:
        download("http://ada:secret@127.0.0.1:9/photos.zip", tmp_path / "raw")
    assert "secret" not in str(error.value) and public("http://ada:secret@x.org/a.zip") == "http://x.org/a.zip"
    web.content = b"<html>Please log in</html>"
    with pytest.raises(UserError, match="not a zip, it begins with b'<html>"):
        list(open_source(web.url, recipe, settings))
    assert not list((settings.home / "data" / "raw").glob("*.zip"))


def test_address_as_source(web, settings):
    recipe = Recipe(target="animal")
    signature = source_signature(web.url, recipe, settings)
    assert signature and signature == source_signature(web.url, recipe, settings)
    items = list(open_source(web.url, recipe, settings))
    assert len(items) == 600 and items[0].labels == {"animal": "cat"} and items[5].data == jpg(5)
    web.etag = '"two"'
    assert source_signature(web.url, recipe, settings) != signature
    assert source_signature("http://127.0.0.1:9/x.zip", recipe, settings) is None
    with httpx.Client() as client: assert client.get(web.url).content == web.content

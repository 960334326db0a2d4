"""Messages: what arrives at a real mail server, a real webhook, a tracker, and that nobody else is told a password."""
import base64
import email
import email.policy
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from nbs_lib.core.settings import load_settings
from nbs_lib.runs.messages import notify, secret_names

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
PASSWORD = "p@ss/w:rd %1+"


class Mail:
    def __init__(self): self.received, self.logins = [], []

    async def handle_DATA(self, server, session, envelope):
        self.received.append((envelope, email.message_from_bytes(envelope.content, policy=email.policy.default)))
        return "250 OK"

    def login(self, server, session, envelope, mechanism, data):
        self.logins.append((data.login.decode(), data.password.decode()))
        return AuthResult(success=self.logins[-1] == ("robot", PASSWORD), handled=False)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def mail():
    "A mail server that wants a login."
    mail = Mail()
    mail.port = free_port()
    controller = Controller(mail, hostname="127.0.0.1", port=mail.port, authenticator=mail.login,
                            auth_required=True, auth_require_tls=False)
    controller.start()
    yield mail
    controller.stop()


@pytest.fixture
def hook():
    "A web server that keeps what is posted to it; it answers with `hook.status`."
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.received.append((self.path, dict(self.headers), body))
            self.send_response(server.status)
            self.end_headers()
            self.wfile.write(f"you said {self.headers} to {self.path}".encode())
        def log_message(self, *_): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.received, server.status, server.port = [], 200, server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def told(home, monkeypatch):
    "Write `[notify]` with these addresses and settings, and load them."
    monkeypatch.setenv("ROBOT_PASSWORD", PASSWORD)
    def write(*urls, **keys):
        lines = [f"{k} = {v}" for k, v in {"alerts": "no", "timeout": 10, **keys}.items()]
        head = ["[tracking]", "backend = trackio", "[notify]", "urls =", *(f"    {u}" for u in urls)]
        (home / "settings.ini").write_text("\n".join(head + lines))
        return load_settings()
    return write


def spellings(secret: str) -> set[str]:
    "Ways in which a secret may be written."
    login = base64.b64encode(f"robot:{secret}".encode()).decode()
    return {secret, quote(secret), quote(secret, safe=""), secret.replace(" ", "+"), repr(secret)[1:-1], login,
            json.dumps(secret)[1:-1]}


def test_a_mail_arrives(told, mail, capfd):
    server = f"robot:${{ROBOT_PASSWORD}}@127.0.0.1:{mail.port}"
    settings = told(f"mailto://{server}?from=loop@example.org&to=team@example.org")
    text = "cell 7/23: <b>MemoryError</b> & more\nhttps://me:hidden@host/birds.zip"
    assert notify("failure", "faces: train\nfailed", text, settings) == []
    [(envelope, message)] = mail.received
    assert mail.logins == [("robot", PASSWORD)] and envelope.rcpt_tos == ["team@example.org"]
    assert message["subject"] == "faces: train failed" and message["from"] == "loop@example.org"
    content = message.get_content().replace("\r", "")
    assert text.replace("me:hidden@", "") in content and "hidden" not in content
    assert not any(s in str(message) for s in spellings(PASSWORD)) and capfd.readouterr() == ("", "")


def test_a_webhook_is_called(told, hook):
    settings = told(f"json://robot:${{ROBOT_PASSWORD}}@127.0.0.1:{hook.port}/loop", f"jsons://127.0.0.1:{hook.port}")
    problems = notify("promotion", "faces-model:v3 is in production", "because", settings)
    [(path, headers, body)] = hook.received
    assert path == "/loop" and base64.b64decode(headers["Authorization"].split()[1]).decode() == f"robot:{PASSWORD}"
    assert (body["title"], body["message"], body["type"]) == ("faces-model:v3 is in production", "because", "success")
    assert [p.split(":")[0] for p in problems] == ["message not sent, [notify] address 2 (jsons)"]


def test_a_whole_address_in_a_variable(told, hook, monkeypatch):
    monkeypatch.setenv("TEAM_CHAT", f"json://127.0.0.1:{hook.port}/T1/B2/secret")
    settings = told("${TEAM_CHAT}")
    assert notify("digest", "a week", "all well", settings) == [] and hook.received[0][0] == "/T1/B2/secret"
    assert secret_names(settings) == {"LOOPBOOK_NOTIFY__URLS", "TEAM_CHAT"}


def test_what_goes_wrong_is_told_without_the_password(told, mail, hook, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WRONG", PASSWORD + "!")
    silent = socket.create_server(("127.0.0.1", 0))                    # accepts, and never says a word
    hook.status = 403
    who, robot = "from=b@example.org&to=a@example.org", "robot:${ROBOT_PASSWORD}@127.0.0.1"
    refused = told(f"mailto://robot:${{WRONG}}@127.0.0.1:{mail.port}?{who}")
    assert notify("failure", "train failed", "why", refused) == [
        "message not sent, [notify] address 1 (mailto): the server answered 535"]
    settings = told(f"json://{robot}:{hook.port}/${{ROBOT_PASSWORD}}",
                    f"json://127.0.0.1:{free_port()}/${{ROBOT_PASSWORD}}",
                    "slack://${NOT_SET}", "${ROBOT_PASSWORD}", "nowhere://${ROBOT_PASSWORD}",
                    f"mailto://{robot}:{silent.getsockname()[1]}?{who}&cto=60", timeout=2)
    began = time.monotonic()
    problems = notify("failure", "train failed", "why", settings, log=tmp_path / "log.txt")
    assert 1.5 < time.monotonic() - began < 50, "2 s as [notify] has it, not 60 as the address has it"
    assert [p.partition("[notify] address ")[2] for p in problems] == [
        "1 (json): the server answered 403", "2 (json): Connection refused",
        "3 (slack): environment variable NOT_SET is not set", "4: apprise does not take this address",
        "5 (nowhere): apprise does not take this address", "6 (mailto): no answer within 2 s"]
    assert (tmp_path / "log.txt").read_text().splitlines() == problems
    seen = "".join(capfd.readouterr()) + repr(settings) + settings.model_dump_json() + str(problems)
    assert not [s for s in spellings(PASSWORD) if s in seen] and "robot" not in seen
    silent.close()


def test_only_what_was_asked_for(told, hook):
    settings = told(f"json://127.0.0.1:{hook.port}", events="promotion, digest")
    for event in ("failure", "paused", "refusal", "parked", "promotion", "completed"):
        assert notify(event, event, "", settings) == []
    assert [body["title"] for _, _, body in hook.received] == ["promotion", "completed"]
    assert notify("failure", "nobody", "listens", told()) == []


def test_a_message_without_text(told, hook):
    assert notify("failure", "train failed", "", told(f"json://127.0.0.1:{hook.port}")) == []
    assert hook.received[0][2]["message"] == "train failed"


def test_the_settings_are_checked(home, told):
    from nbs_lib.core.errors import UserError
    with pytest.raises(UserError, match=r"\[notify\] events = 'failur'.*failure"): told(events="failur")
    with pytest.raises(UserError, match=r"\[notify\] url: no such key; did you mean 'urls'"): told(url="json://secret")


ALERT = """
import json
from nbs_lib.runs.messages import notify
from nbs_lib.core.settings import load_settings
from nbs_lib.tracking.tracker import open_tracker
settings = load_settings()
tracker = open_tracker(settings)
with tracker.start("faces-train", "train") as run: run.summary({"accuracy": 0.9})
problems = notify("failure", "faces: train failed", "cell 7/23", settings, run.id)
problems += notify("digest", "a week", "all well", settings)
print(json.dumps([run.id, problems, tracker._backend.storage.get_alerts("loopbook"), tracker.resolve("nothing")]))
"""


@pytest.mark.parametrize("backend", ["trackio", "wandb-offline"])
def test_alerts_in_the_local_store(home, hook, backend):
    urls = f"json://127.0.0.1:{hook.port}"
    (home / "settings.ini").write_text(f"[tracking]\nbackend = {backend}\n[notify]\nurls = {urls}\n")
    # a process tracks in one home only
    done = subprocess.run([sys.executable, "-c", ALERT], capture_output=True, text=True, timeout=120)
    run, problems, found, _ = json.loads(done.stdout.splitlines()[-1])
    alerts = {a["title"]: a for a in found}
    failed, week = alerts["faces: train failed"], alerts["a week"]
    assert not problems and failed["run"] == run and failed["level"] == "error"
    assert week["run"].startswith("alert-") and week["text"] == "all well" and len(hook.received) == 2
    to_sync = list((home / "data" / "wandb").glob("offline-run-*"))
    assert len(to_sync) == (3 if backend == "wandb-offline" else 0), "to be sent with the next `wandb sync`"


def test_alerts_in_wandb(home, wandb_server, monkeypatch):
    from nbs_lib.tracking.tracker import open_tracker
    for name, value in wandb_server.env.items(): monkeypatch.setenv(name, value)
    (home / "settings.ini").write_text("[project]\nname = alerts\n[tracking]\nbackend = wandb\n")
    settings = load_settings()
    with open_tracker(settings).start("faces-train", "train") as run: run.summary({"accuracy": 0.9})
    title = "faces-model:v3 is in production, and this title is longer than W&B takes"
    assert notify("promotion", title, "because", settings, run.id) == []
    [found] = wandb_server.state("alerts")["runs"]
    assert found["alerts"] == [{"title": title[:63], "text": "because", "severity": "INFO"}]
    assert found["state"] == "finished" and found["summary"]["accuracy"] == 0.9


def test_a_tracker_that_is_away_harms_nobody(home, told, hook, monkeypatch):
    (home / "settings.ini").write_text(f"[tracking]\nbackend = wandb\n[notify]\nurls = json://127.0.0.1:{hook.port}\n")
    problems = notify("failure", "train failed", "", load_settings())
    assert len(hook.received) == 1 and len(problems) == 1
    assert problems[0].startswith("message not sent, [notify] alert: ") and "no key" in problems[0]


def test_messages_of_runs(home):
    from dataclasses import replace
    from pathlib import Path

    from nbs_lib.runs import records
    from nbs_lib.runs.messages import messages
    run = records.begin(Path("46_merge.ipynb"), parameters={"recipe": "faces"})
    (Path(run.folder) / "result.json").write_text(json.dumps({"run": {"id": "faces-merge-1"}}))
    why = [{"outcome": "waits", "reason": "nobody knows it: for an expert", "images": 3},
           {"outcome": "waits", "reason": "people disagree: for a review", "images": 5}]
    done = records.finish(run.id, "completed", summary={"joins": 2, "why": why})
    [message] = messages(done)
    assert message["event"] == "parked" and message["title"].startswith("faces: 3 images")
    assert message["run"] == "faces-merge-1" and message["log"] == Path(run.folder) / "log.txt"
    assert messages(replace(done, summary={"why": why[1:]})) == [] == messages(replace(done, status="cancelled"))
    failed = messages(replace(done, status="failed", cell="2/9", error="KeyError: 'x'"))
    assert [(m["event"], m["title"]) for m in failed] == [("failure", "faces: merge failed")]
    assert "cell 2/9: KeyError: 'x'" in failed[0]["text"]
    assert os.sep + "merge.html" in failed[0]["text"]


NOSY = """
import os
from nbs_lib.core.settings import load_settings
print(dict(os.environ))
print(load_settings(), open(os.environ['LOOPBOOK_HOME'] + '/settings.ini').read())
1 / 0
"""


def test_no_notebook_sees_the_password(told, home, hook, tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    from nbs_lib.runs.execute import run_notebook
    from nbs_lib.runs.messages import messages
    settings = told(f"json://robot:${{ROBOT_PASSWORD}}@127.0.0.1:{hook.port}")
    nbformat.write(new_notebook(cells=[new_code_cell(NOSY)]), tmp_path / "10_nosy.ipynb")
    run = run_notebook(tmp_path / "10_nosy.ipynb")
    for message in messages(run): assert notify(settings=settings, **message) == []
    assert [body["title"] for _, _, body in hook.received] == ["nosy failed"]
    files = [p for p in home.rglob("*") if p.is_file()]
    assert len(files) > 4 and "LOOPBOOK_RUN_ID" in (home / "outputs" / run.id / "log.txt").read_text()
    for file in files: assert not [s for s in spellings(PASSWORD) if s.encode() in file.read_bytes()], file

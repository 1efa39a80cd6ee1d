"""``nanomolmo2 serve`` as people start it: what it prints, refuses and logs, and how it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from nanomolmo2 import cli
from nanomolmo2.cli.options import UsageError
from nanomolmo2.cli.serve import KEY_VARIABLE, read_keys, read_models
from nanomolmo2.convert.pretrained import load_nanomolmo2, weight_bytes
from nanomolmo2.serve import running

ROOT = Path(__file__).parents[2]
QUESTION = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Is my-question asked?"}],
}


class Server(NamedTuple):
    """A process that serves, and where."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    client: httpx.Client

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, body: Any = QUESTION, **arguments: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=body, **arguments)

    def held_request(self, body: dict[str, Any]) -> tuple[socket.socket, bytes]:
        """A request whose last byte is still to be sent: it is inside until then."""
        data = json.dumps(body).encode()
        upload = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        upload.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data[:-1]
        )
        return upload, data[-1:]

    def wait_for(self, status: int) -> None:
        """Until this is what its health is."""
        deadline = time.monotonic() + 60
        while self.client.get("/health").status_code != status:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextlib.contextmanager
def served(folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    log = folder / "log.txt"
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "nanomolmo2", "serve", "--port", "0", *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"serving (.*) at (http://127\.0\.0\.1:[1-9]\d*)\n", line)
        assert found is not None, line + log.read_text(encoding="utf-8")
        with httpx.Client(base_url=found[2], timeout=60, trust_env=False) as client:
            yield Server(process, found[2], log, client)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With keys of all three kinds, and small limits."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text("\nkey-of-file\n")
    options = ["--api-key", "key-given", "--api-key-file", str(folder / "keys")]
    options += ["--max-body", "1M", "--allow-remote-images"]
    options += ["--model", "tiny", "--model", "second=tiny"]
    with served(folder, *options, **{KEY_VARIABLE: "key-of-env"}) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# ---- the process ----


def test_a_key_opens_v1_and_nothing_else_does(guarded: Server) -> None:
    for key in ("key-given", "key-of-file", "key-of-env"):
        response = guarded.client.get("/v1/models", headers=bearer(key))
        assert [model["id"] for model in response.json()["data"]] == ["tiny", "second"]
    for headers in ({}, bearer("key"), {"Authorization": "key-given"}):
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            response = guarded.client.get(path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert guarded.post(headers=headers).status_code == 401
    assert guarded.client.get("/health").status_code == 200
    assert "server" not in guarded.client.get("/health").headers


def test_a_name_of_strangers_is_refused(guarded: Server) -> None:
    response = guarded.client.get("/health", headers={"Host": f"evil.test:{guarded.port}"})
    assert response.status_code == 403
    assert guarded.client.get("/health", headers={"Host": "localhost"}).status_code == 200


@pytest.mark.parametrize("told", [True, False])
def test_a_request_that_is_too_long_is_answered(told: bool, guarded: Server) -> None:
    """While it is still being sent, and the connection is good for the next request."""
    pieces = [b"x" * 100_000] * 100
    response = guarded.client.post(
        "/v1/chat/completions",
        content=b"".join(pieces) if told else iter(pieces),
        headers=bearer("key-given"),
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert guarded.post(headers=bearer("key-given")).status_code == 200


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1/my-picture.png", "not of the public internet"),
        ("http://2130706433/my-picture.png", "not of the public internet"),
        ("https://[::ffff:7f00:1]/my-picture.png", "not of the public internet"),
        ("http://127.0.0.1:PORT/page/examples/scene.png", "names port PORT"),
        ("http://my-key@127.0.0.1/", "name or password"),
        ("file:///etc/passwd", "neither a data URL nor an http address"),
        ("/etc/passwd", "neither a data URL nor an http address"),
    ],
)
def test_no_address_leads_into_this_computer(address: str, message: str, guarded: Server) -> None:
    """Though those of the public internet are allowed."""
    address = address.replace("PORT", str(guarded.port))
    shown = {"type": "image_url", "image_url": {"url": address}}
    content = [shown, {"type": "text", "text": "What is it?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    response = guarded.post(body, headers=bearer("key-given"))
    assert response.status_code == 400
    assert message.replace("PORT", str(guarded.port)) in response.json()["error"]["message"]
    assert "/page/" not in guarded.log.read_text(encoding="utf-8")  # it did not ask itself


def test_a_model_is_chosen_by_its_name(guarded: Server) -> None:
    """`second` is the same model, loaded only now."""
    ask = {**QUESTION, "max_tokens": 5}
    first = guarded.post({**ask, "model": "tiny"}, headers=bearer("key-given")).json()
    second = guarded.post({**ask, "model": "second"}, headers=bearer("key-given")).json()
    assert (first["model"], second["model"]) == ("tiny", "second")
    assert first["choices"][0]["message"] == second["choices"][0]["message"]
    other = guarded.post({**ask, "model": "/etc/passwd"}, headers=bearer("key-given"))
    assert other.status_code == 404
    assert "choose one of tiny, second" in other.json()["error"]["message"]


def test_the_metrics_are_those_of_what_was_asked(guarded: Server) -> None:
    def value(name: str) -> float:
        text = guarded.client.get("/metrics", headers=bearer("key-given")).text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        return float(lines.get(name, 0))

    answers = 'nanomolmo2_requests_total{route="/v1/chat/completions",status="200"}'
    first = "nanomolmo2_time_to_first_token_seconds_count"
    tokens = 'nanomolmo2_output_tokens_total{model="tiny"}'
    before = [value(name) for name in (answers, first, tokens)]
    usage = guarded.post({**QUESTION, "max_tokens": 3}, headers=bearer("key-given")).json()["usage"]
    after = [value(name) for name in (answers, first, tokens)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        *(1, 1, usage["completion_tokens"])
    ]
    assert value('nanomolmo2_rows_running{model="tiny"}') == 0


def test_the_log_tells_methods_routes_and_times(guarded: Server) -> None:
    guarded.post({"messages": "my-question"}, headers=bearer("key-given"))
    guarded.client.get("/my-path?my-query=1", headers=bearer("key-wrong"))
    guarded.client.get("/v1/models?my-query=1", headers=bearer("key-given"))
    log = guarded.log.read_text(encoding="utf-8")
    lines = log.splitlines()
    assert lines[0] == "on the CPU, float32"
    line = r"[\d-]{10} [\d:]{8} (GET|POST) (/[\w/{}.]*|\(none\)) \d{3} \d+\.\d{3} s"
    assert [text for text in lines[1:] if not re.fullmatch(line, text)] == []
    assert any("POST /v1/chat/completions 400 " in text for text in lines)
    for secret in ("my-", "key-", str(ROOT), "evil", "Traceback"):
        assert secret not in log


def test_running_answers_finish_after_sigterm_and_new_ones_are_refused(tmp_path: Path) -> None:
    """One answer has begun and one request is still arriving when the signal comes."""
    with served(tmp_path) as server:
        held, rest = server.held_request({**QUESTION, "stream": True, "max_tokens": 8})
        body = {**QUESTION, "stream": True, "max_tokens": 200, "temperature": 1.0, "seed": 1}
        with held, server.client.stream("POST", "/v1/chat/completions", json=body) as stream:
            events = stream.iter_lines()
            assert next(events).startswith("data: {")
            server.process.send_signal(signal.SIGTERM)
            server.wait_for(503)
            refused = server.post()
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            error = refused.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == ("server_error", "shutting_down")
            assert [line for line in events if line][-1] == "data: [DONE]"
            assert server.process.poll() is None  # it waits for the other
            held.sendall(rest)
            answer = b"".join(iter(lambda: held.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"data: [DONE]" in answer
        assert server.process.wait(timeout=60) == 0


def test_ctrl_c_ends_an_idle_server_at_once(tmp_path: Path) -> None:
    """Right after the line that says where it is: signals are its own by then."""
    with served(tmp_path) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=60) == 0
        assert server.log.read_text(encoding="utf-8").count("\n") >= 1
        assert "Traceback" not in server.log.read_text(encoding="utf-8")


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("options", [["--shutdown-seconds", "0.2"], []])
def test_a_request_that_never_ends_does_not_keep_the_server(
    options: list[str], tmp_path: Path
) -> None:
    """Its time is up, or a second signal comes."""
    with served(tmp_path, *options) as server:
        held, _ = server.held_request(QUESTION)
        with held:
            server.wait_for(200)
            server.process.send_signal(signal.SIGINT)
            if not options:
                server.wait_for(503)
                server.process.send_signal(signal.SIGINT)
            assert server.process.wait(timeout=60) == 0


# ---- the command line ----


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be run, which returns at once."""
    runs: list[dict[str, Any]] = []

    def run(app: Any, admission: Any, settings: Any, bound: Any, on_start: Any) -> None:
        on_start()
        runs.append({"settings": settings, "store": app.state.server.models, "bound": bound})

    monkeypatch.setattr(running, "run", run)
    monkeypatch.setattr(running, "log_lines", lambda write: None)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return runs


def test_the_options_are_the_settings(started: list[dict[str, Any]], tmp_path: Path) -> None:
    options = {
        "--max-running": "3",
        "--max-waiting": "0",
        "--max-seconds": "1.5",
        "--max-body": "2MiB",
        "--max-images": "4",
        "--max-pixels": "5000",
        "--max-new-tokens": "6",
        "--memory": "1GB",
        "--shutdown-seconds": "7",
        "--allowed-host": "proxy.test",
    }
    words = [word for pair in options.items() for word in pair]
    flags = "--allow-remote-images", "--batch-invariant"
    assert cli.main(["serve", "--port", "0", *flags, *words]) == 0
    settings = started[0]["settings"]
    assert settings.batch_invariant is True
    assert (settings.max_running, settings.max_waiting, settings.max_seconds) == (3, 0, 1.5)
    assert (settings.max_body_bytes, settings.max_images) == (2 * 2**20, 4)
    assert (settings.max_pixels, settings.max_new_tokens) == (5000, 6)
    assert (settings.memory_bytes, settings.shutdown_seconds) == (10**9, 7.0)
    assert settings.allow_remote_images is True
    assert set(settings.allowed_hosts) == {"127.0.0.1", "localhost", "::1", "proxy.test"}
    assert settings.api_keys == ()


@pytest.mark.parametrize(
    ("key", "is_local", "warned"),
    [(None, True, False), (None, False, True), ("my-key", False, False), ("my-key", True, False)],
)
def test_one_warning_where_everyone_may_ask(
    key: str | None,
    is_local: bool,
    warned: bool,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(running, "is_loopback", lambda bound: is_local)
    if key is not None:
        monkeypatch.setenv(KEY_VARIABLE, key)
    assert cli.main(["serve", "--port", "0"]) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if line.startswith("warning:")] == (
        [
            f"warning: every computer that reaches {out.split(' at ')[1].strip()} may use the "
            f"models: set {KEY_VARIABLE} or --api-key-file, or listen at 127.0.0.1"
        ]
        if warned
        else []
    )
    assert "my-key" not in out + err
    hosts = started[0]["settings"].allowed_hosts  # elsewhere its names are not known
    assert bool(hosts) is is_local


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("127.0.0.2", True), ("::1", True)]
)
def test_what_only_this_computer_reaches(host: str, local: bool) -> None:
    try:
        bound = running.bind(host, 0)
    except ValueError:
        pytest.skip(f"{host} is not an address here")
    with bound:
        assert running.is_loopback(bound) is local
        port = bound.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        assert running.address_of(bound) == f"http://{shown}:{port}"


class _Failing:
    def __del__(self) -> None:
        read_models(["my secret"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_lines_of_the_log_leave_out_what_errors_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of asyncio have the error's text, the traceback and the files of the code."""
    lines: list[str] = []
    handlers, root = list(logging.getLogger().handlers), logging.getLogger()
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for name in ("uvicorn", "uvicorn.error"):  # a server of another test may have set them up
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        logging.getLogger(name).setLevel(logging.NOTSET)
    running.log_lines(lines.append)
    try:
        with pytest.raises(UsageError) as raised:
            read_models(["my secret"])
        error = raised.value
        logging.getLogger("asyncio").error("future: %r", error, exc_info=error)
        logging.getLogger("asyncio").error("Task was destroyed: %s", "/home/secret.py")
        logging.getLogger("asyncio").warning("socket.send() raised exception.")
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
        logging.getLogger("uvicorn.error").info("nothing to tell")
        logging.getLogger("uvicorn.error").error("Traceback:\n /home/secret.py")
        logging.getLogger("nanomolmo2.serve").info("GET / 200 0.001 s")
        thread = threading.Thread(target=read_models, args=[["my secret"]])
        thread.start()
        thread.join()
        logging.getLogger("python_multipart").warning("Expected character 45, got %s", "secret")
        warnings.showwarning("a secret", UserWarning, "/home/secret.py", 1)
        _Failing()  # nobody keeps it
    finally:
        logging.captureWarnings(False)
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
        for name in ("nanomolmo2.serve", "asyncio"):
            logging.getLogger(name).setLevel(logging.NOTSET)
    place = r"error: UsageError in nanomolmo2\.cli\.serve:\d+"
    patterns = [
        place,
        "error of asyncio",
        r"Invalid HTTP request received\.",
        r"error of uvicorn\.error",
        "GET / 200 .*",
        place,
        "warning of python_multipart",
        r"warning of py\.warnings",
        place,
    ]
    # Loops of other tests that are collected meanwhile may add lines of asyncio.
    rest = iter(lines)
    for pattern in patterns:
        whole = re.compile(rf"[\d-]{{10}} [\d:]{{8}} {pattern}")
        assert any(whole.fullmatch(line) for line in rest), (pattern, lines)
    for unsaid in ("secret", "nothing to tell", "socket.send", "Traceback"):
        assert unsaid not in "\n".join(lines)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 1
    out, err = capsys.readouterr()
    assert err == (
        f"nanomolmo2: the server cannot listen at port {port} of 127.0.0.1 (Address already in "
        f"use): choose another with --port, or 0 for one that is free\n"
    )
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--port", "65536"], 2, "port must be 0"),
        (["--port", "-1"], 2, "--port must be 0 or more"),
        (["--host", "no such host"], 1, "there is no host 'no such host'"),
        (["--api-key", ""], 2, "an API key must be of visible ASCII"),
        (["--api-key", "a b"], 2, "an API key must be of visible ASCII"),
        (["--memory", "much"], 2, "--memory is 'much', expected a size"),
        (["--max-body", "0MB"], 2, "--max-body is '0MB', expected a size"),
        (["--max-seconds", "-1"], 2, "max_seconds must be 0 or more"),
        (["--model", "no-such-model"], 1, "there is no model 'no-such-model'"),
        (["--model", "tiny", "--model", "other=no-such"], 1, "there is no model 'no-such'"),
        (["--memory", "1MB"], 1, "the model tiny needs "),
        (["--api-key-file", "no-such-file"], 1, "no-such-file: No such file"),
    ],
)
def test_what_is_wrong_is_told_before_it_serves(
    arguments: list[str],
    code: int,
    message: str,
    started: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["serve", "--port", "0", *arguments]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert started == []


def test_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "nanomolmo2.serve.running")
    monkeypatch.delattr("nanomolmo2.serve.running")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve"]) == 1
    assert "pip install 'nanomolmo2[serve]'" in capsys.readouterr().err


# ---- models and keys ----


def test_models_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "a=b").mkdir()
    assert read_models(()) == {"tiny": "tiny"}
    assert read_models(["base", "allenai/Molmo2-4B"]) == {
        "base": "base",
        "allenai/Molmo2-4B": "allenai/Molmo2-4B",
    }
    assert read_models(["runs/mine", "my/name=runs/mine"]) == {
        "mine": "runs/mine",
        "my/name": "runs/mine",
    }
    assert read_models([str(tmp_path / "runs" / "mine")]) == {"mine": f"{tmp_path}/runs/mine"}
    assert read_models(["x=a=b"]) == {"x": "a=b"}
    for wrong in (["tiny", "tiny"], ["a=tiny", "a=base"], ["=tiny"], ["a="], ["a b=tiny"], [""]):
        with pytest.raises(
            UsageError, match=r"two models are called|expected a model or NAME=MODEL"
        ):
            read_models(wrong)


def test_keys_come_from_three_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("two\n\n  three \r\none\n")
    assert read_keys(["one"], file, {KEY_VARIABLE: "four"}) == ("one", "four", "two", "three")
    assert read_keys([], None, {}) == ()
    for empty in ("", " "):
        with pytest.raises(UsageError, match=f"{KEY_VARIABLE} is set and empty"):
            read_keys(["one"], None, {KEY_VARIABLE: empty})
    file.write_text("\n \n")
    with pytest.raises(UsageError, match="holds no key"):
        read_keys(["one"], file, {})
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="no text in UTF-8"):
        read_keys([], file, {})
    with pytest.raises(ValueError, match="is a folder"):
        read_keys([], tmp_path, {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_the_weights_are_measured_without_being_read(
    dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: by what there is once they are read."""
    model = load_nanomolmo2("tiny", dtype=dtype)
    there = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert weight_bytes("tiny", dtype=dtype) == sum(there.values())

"""The contract from outside: a plain client against slave.py, server-update and a plain server."""

import ctypes
import json
import os
import re
import socket
import subprocess
import time
from signal import SIGINT, SIGTERM

import pytest
from farm import answering, refusing_entry
from processes import wait_until

RECORD_KEYS = {
    "repo", "update", "ref", "state", "requested", "started", "finished", "commit", "previous",
    "message",
}
COMMIT, OLDER = "1" * 40, "2" * 40
BAD_NAMES = [
    "", ".", "..", "-x", ".git", "a..b", "a/b", "../a", "a.git", "a.lock", "a b", "a\n", "é",
    "a" * 101, "a%00", "--upload-pack=x", "a\\b", "~a", "$(id)",
]
BAD_REFS = [
    "-x", "--upload-pack=x", "a..b", "a b", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b", "/a",
    "a/", "a//b", ".a", "a/.b", "a.lock", "a.lock/b", "a.", "@", "a@{1}", "a\n", "a\x7f",
    "x" * 256,
]
GOOD_REFS = ["main", "v1.0", "feature/x", "a@b", "é", "x" * 200, COMMIT]


# -- slave.py, asked by anybody --------------------------------------------


@pytest.mark.parametrize("path", ["/?repo=hanuman", "/get/?repo=hanuman", "/get?repo=hanuman"])
def test_a_signal_is_accepted_with_an_update_to_follow(start_slave, upstream, path):
    repo = upstream.create("hanuman")
    slave = start_slave()
    before = int(time.time() * 1000)
    status, headers, body = slave.get(path)
    answer = json.loads(body.decode("utf-8"))
    assert (status, headers["Content-Type"].split(";")[0]) == (202, "application/json")
    assert set(answer) == {"repo", "update", "state", "ref"}
    assert answer["repo"] == "hanuman"
    assert answer["state"] in ("queued", "running")
    assert before <= answer["update"] <= time.time() * 1000 + 1
    assert headers["Location"] == "/status?repo=hanuman&update=%d" % answer["update"]
    record = slave.wait_update(update=answer["update"])
    assert set(record) >= RECORD_KEYS
    assert (record["state"], record["commit"]) == ("live", repo.head())
    assert record["update"] == answer["update"]
    assert before / 1000 - 1 <= record["requested"] <= record["started"] <= record["finished"]
    assert slave.json("/status?repo=hanuman")["commit"] == repo.head()
    whole = slave.json("/status")
    assert set(whole) == {"version", "repos"}
    assert list(whole["repos"]) == ["hanuman"]
    assert whole["repos"]["hanuman"]["commit"] == repo.head()


def test_a_ref_is_put_live_and_named_in_the_answers(start_slave, upstream):
    repo = upstream.create("hanuman")
    side = repo.commit({"x": "side"}, branch="side/way")
    slave = start_slave()
    accepted = slave.json("/?repo=hanuman&ref=side/way", status=202)
    assert accepted["ref"] == "side/way"
    record = slave.wait_update("hanuman", accepted["update"])
    assert (record["state"], record["ref"], record["commit"]) == ("live", "side/way", side)
    back = slave.wait_update("hanuman", slave.signal("hanuman", repo.head("main")))
    assert (back["state"], back["commit"], back["previous"]) == ("live", repo.head("main"), side)


def test_ids_grow_over_restarts_and_a_lost_state_folder(start_slave, upstream):
    upstream.create("hanuman")
    slave = start_slave()
    first = slave.signal()
    slave.wait_update("hanuman", first)
    assert slave.stop() == 0
    second = slave.start().signal()
    assert second > first
    slave.wait_update("hanuman", second)
    assert slave.stop() == 0
    for path in slave.state.iterdir():
        path.unlink()
    third = slave.start().signal()
    assert third > second
    assert slave.wait_update("hanuman", third)["state"] == "live"


def test_a_failure_is_a_line_to_act_on(start_slave, upstream, http_upstream):
    upstream.create("hanuman")
    slave = start_slave(BASE_URL=http_upstream.url)
    record = slave.wait_update("nope")
    assert record["state"] == "failed"
    assert "not found" in record["message"]
    assert "exit" not in record["message"]
    assert "\n" not in record["message"]


def test_an_update_replaced_before_it_started_answers_with_the_newer_one(
    start_slave, upstream, http_upstream
):
    repo = upstream.create("hanuman")
    slave = start_slave(BASE_URL=http_upstream.url)
    http_upstream.fault = "hang"
    slave.signal()
    wait_until(lambda: slave.json("/status?repo=hanuman")["state"] == "running")
    replaced, newest = slave.signal(), slave.signal()
    assert replaced < newest
    last = repo.commit({"x": "1"})
    http_upstream.fault = None
    record = slave.wait_update(update=replaced)
    assert (record["update"], record["state"], record["commit"]) == (newest, "live", last)


def test_a_long_poll_is_held_until_its_time_is_up(start_slave, upstream, http_upstream):
    upstream.create("hanuman")
    slave = start_slave(BASE_URL=http_upstream.url)
    http_upstream.fault = "hang"
    update = slave.signal()
    began = time.monotonic()
    record = slave.json("/status?repo=hanuman&update=%d&wait=1" % update)
    assert record["state"] in ("queued", "running")
    assert 0.9 < time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nope", 404), ("/get/x?repo=hanuman", 404), ("/../etc/passwd", 404),
        ("/status?repo=never", 404), ("/status?repo=hanuman&update=1", 404),
        ("/?repo=hanuman&repo=other", 400), ("/?repo=%ff", 400), ("/?repo=%zz", 400),
        ("/?repo=hanuman&ref=", 400), ("/status?repo=hanuman&update=x", 400),
        ("/status?repo=..", 400), ("/status?repo=hanuman&update=1&wait=soon", 400),
        ("/" + "x" * 9000, 414),
    ],
)
def test_a_mistake_is_a_short_json_error(idle_slave, path, status):
    slave = idle_slave
    got, headers, body = slave.get(path)
    assert (got, headers["Content-Type"].split(";")[0]) == (status, "application/json")
    assert set(json.loads(body.decode("ascii"))) == {"error"}
    assert len(body) < 600
    assert "Traceback" not in slave.log()
    assert [p.name for p in slave.repos.glob("*") if p.name != ".server-update"] == []


def test_too_many_headers_are_431(idle_slave):
    headers = {"X-%d" % number: "x" * 200 for number in range(200)}
    assert idle_slave.get("/healthz", headers=headers)[0] == 431


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"])
def test_another_method_is_405_with_allow(idle_slave, method):
    status, headers, body = idle_slave.get("/?repo=hanuman", method=method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert "error" in json.loads(body.decode("ascii"))


def test_head_answers_as_get_without_a_body_and_starts_nothing(start_slave, upstream):
    upstream.create("hanuman")
    slave = start_slave()
    for path in ("/", "/healthz", "/status"):
        status, headers, body = slave.get(path, method="HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) == len(slave.get(path)[2])
    assert slave.get("/?repo=hanuman", method="HEAD")[0] == 405
    assert slave.json("/status")["repos"] == {}


def test_healthz_and_the_text_at_the_root(idle_slave):
    slave = idle_slave
    assert slave.get("/healthz")[0] == 200
    assert slave.get("/healthz")[2].strip() == b"ok"
    status, headers, body = slave.get("/")
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    assert b"server-update" in body


def test_python3_slave_py_file_serves_it_while_it_listens(start_slave, upstream, tmp_path):
    upstream.create("hanuman")
    page = tmp_path / "index.html"
    page.write_text("<title>one</title>")
    slave = start_slave(args=[page])
    status, headers, body = slave.get("/")
    assert (status, body) == (200, b"<title>one</title>")
    assert headers["Content-Type"].split(";")[0] == "text/html"
    again = {"If-Modified-Since": headers["Last-Modified"]}
    assert slave.get("/", headers=again)[0] == 304
    page.write_text("<title>two, longer</title>")
    assert slave.get("/")[2] == b"<title>two, longer</title>"
    assert slave.wait_update("hanuman")["state"] == "live"
    page.unlink()
    status, _, body = slave.get("/")
    assert status == 404
    assert b"served file" in body


def test_who_may_not_is_refused(start_slave, upstream):
    upstream.create("hanuman")
    slave = start_slave(ALLOW_REPOS="han*, www")
    assert slave.get("/?repo=other")[0] == 403
    assert slave.wait_update("hanuman")["state"] == "live"
    assert start_slave(ALLOW_FROM="10.0.0.0/8").get("/?repo=hanuman")[0] == 403


def test_with_a_secret_unsigned_is_401_but_for_healthz(start_slave, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123\n")
    secret.chmod(0o600)
    slave = start_slave(SECRET_FILE=secret)
    assert slave.get("/healthz")[0] == 200
    for path in ("/?repo=hanuman", "/status", "/status?repo=hanuman", "/?repo=../x"):
        assert slave.get(path)[0] == 401
    signed = {"X-Server-Update-Signature": "t=1,n=00,s=00"}
    assert slave.get("/?repo=hanuman", headers=signed)[0] == 401


def test_a_stopping_slave_says_503_or_is_gone(start_slave, upstream, http_upstream):
    upstream.create("hanuman")
    slave = start_slave(BASE_URL=http_upstream.url)
    http_upstream.fault = "hang"
    update = slave.signal()
    wait_until(lambda: slave.json("/status?repo=hanuman")["state"] == "running")
    slave.process.terminate()
    answers, end = [], time.monotonic() + 60
    while slave.process.poll() is None and time.monotonic() < end:
        try:
            status, headers, _ = slave.get("/?repo=hanuman")
            answers.append((status, headers["Retry-After"] is not None))
        except (OSError, ValueError):
            break
    assert set(answers) <= {(202, False), (503, True)}
    assert slave.process.wait(60) == 0
    http_upstream.fault = None
    slave.start()
    assert slave.wait_update(update=update)["state"] == "live"


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_it_stops_whichever_of_its_threads_gets_the_signal(start_slave, number):
    slave = start_slave()
    with socket.create_connection(("127.0.0.1", slave.port), 5):  # has a thread of its own
        threads = wait_until(lambda: os.listdir("/proc/%d/task" % slave.process.pid)[1:])
        assert ctypes.CDLL(None).tgkill(slave.process.pid, int(threads[-1]), number) == 0
        assert slave.process.wait(60) == 0


# -- names and refs, judged the same by each of the three ------------------


def quoted(text):
    """Percent-encoded as UTF-8."""
    return "".join("%%%02X" % byte for byte in text.encode("utf-8"))


@pytest.mark.slow
def test_names_are_judged_alike_by_all_three(server_update, slave, start_slave, run_script):
    running = start_slave()
    for name in BAD_NAMES:
        assert not server_update.is_repo_name(name), name
        assert not slave.is_repo_name(name), name
        assert running.get("/?repo=" + quoted(name))[0] == 400, name
        done = run_script("slave-activate", name)
        assert (done.returncode, done.stdout) == (2, ""), name
        done = run_script("server-update", "--list", "-", "--", name, input=running.url + "\n")
        assert (done.returncode, done.stdout) == (2, ""), name
    assert [p.name for p in running.repos.glob("*") if p.name != ".server-update"] == []


def test_refs_are_judged_as_git_does(server_update, slave, start_slave, run_script, upstream):
    upstream.create("hanuman")
    running = start_slave()
    for ref in BAD_REFS + GOOD_REFS:
        good = ref in GOOD_REFS
        command = ["git", "check-ref-format", "--allow-onelevel", ref]
        if not ref.startswith("-") and len(ref) < 256:
            assert (subprocess.call(command) == 0) == good, ref
        assert server_update.is_ref(ref) == slave.is_ref(ref) == good, ref
        if not good:
            assert running.get("/?repo=hanuman&ref=" + quoted(ref))[0] == 400, ref
            done = run_script("slave-activate", "hanuman", ref)
            assert (done.returncode, done.stdout) == (2, ""), ref
    assert running.json("/status")["repos"] == {}


# -- server-update, answered by anything -----------------------------------


def record(state="live", **changes):
    """A slave's record."""
    whole = {"repo": "hanuman", "update": 7, "ref": None, "state": state, "message": ""}
    whole.update({"requested": 1.0, "started": 1.1, "finished": 1.2})
    whole.update({"commit": COMMIT, "previous": OLDER})
    return dict(whole, **changes)


FAILED = record("failed", message="no space left")
ACCEPTED = (202, {"repo": "hanuman", "update": 7, "state": "queued", "ref": None})


@pytest.fixture
def update_one(farm, update):
    """update_one({"/?repo": ...}, *options): (exit status, result, paths asked for)."""

    def run(answers, *options):
        entry = farm.add(answering(answers))
        done = update([entry], "--json", *options)
        return done.returncode, done.results[entry], [request.path for request in farm.requests]

    return run


def test_a_live_slave_is_signalled_once_and_followed(update_one):
    answers = {"/?repo=hanuman": ACCEPTED, "/status": (200, record())}
    status, result, (first, *polls) = update_one(answers)
    assert (status, result["outcome"]) == (0, "live")
    assert (result["commit"], result["previous"]) == (COMMIT, OLDER)
    assert re.fullmatch(r"/\?repo=hanuman&by=[^&]+", first)
    status_path = re.compile(r"/status\?repo=hanuman&update=7(&wait=\d+)?$")
    assert polls and all(status_path.match(path) for path in polls)


@pytest.mark.parametrize(
    ("answers", "status", "outcome", "message"),
    [
        ({"/": (200, "Updating hanuman\n")}, 1, "signalled", "no update id"),
        ({"/": (204, b"")}, 1, "signalled", "no update id"),
        ({"/?": ACCEPTED, "/status": (200, FAILED)}, 1, "failed", "no space left"),
        ({"/": (403, {"error": "not allowed"})}, 1, "refused", "not allowed"),
        ({"/": (404, "<h1>Not found</h1>")}, 1, "refused", "404"),
        ({"/": (302, "elsewhere")}, 1, "refused", "302"),
        ({"/": (500, "oops")}, 1, "failed", "500"),
        ({"/": (503, {"error": "too much is queued"})}, 1, "failed", "too much is queued"),
        ({"/?": ACCEPTED, "/status": (200, record("running"))}, 1, "timeout", ""),
    ],
)
def test_each_answer_has_its_outcome(update_one, answers, status, outcome, message):
    timeout_s = "2" if outcome == "timeout" else "60"
    got = update_one(answers, "--timeout", timeout_s, "--retries", "0")
    assert (got[0], got[1]["outcome"]) == (status, outcome)
    assert message in got[1]["message"]


def test_no_wait_ends_when_the_signal_is_taken(update_one):
    for answer in (ACCEPTED, (200, "Updating hanuman\n"), (204, b"")):
        status, result, asked = update_one({"/?repo": answer}, "--no-wait")
        assert (status, result["outcome"]) == (0, "signalled")
        assert re.fullmatch(r"/\?repo=hanuman&by=[^&]+", asked[-1])


def test_nobody_listening_is_unreachable(update):
    entry, holder = refusing_entry()
    with holder:
        done = update([entry], "--retries", "0")
    assert done.returncode == 1
    assert re.search("%s .*unreachable.*refused" % entry, done.stdout)


def test_an_update_in_a_list_url_keeps_its_path_and_query(farm, update):
    url = "http://%s/hooks/x?key=1" % farm.add(answering({"/hooks/x?key=1&repo=": (200, "ok")}))
    assert update([url], "--no-wait").returncode == 0
    (asked,) = [request.path for request in farm.requests]
    assert re.fullmatch(r"/hooks/x\?key=1&repo=hanuman&by=[^&]+", asked)


def test_half_a_request_gets_no_answer_and_harms_nobody(start_slave, upstream):
    upstream.create("hanuman")
    slave = start_slave()
    with socket.create_connection(("127.0.0.1", slave.port)) as half:
        half.sendall(b"GET /?repo=hanu")
        assert slave.wait_update("hanuman")["state"] == "live"

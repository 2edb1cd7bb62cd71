"""POST /hook: from what a forge sends to an update, or to a reason why there is none."""

import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from forge_support import (
    AFTER,
    FORGES,
    GONE,
    azure_headers,
    encode,
    encode_form,
    gitea,
    gitea_headers,
    github,
    github_headers,
    gitlab_headers,
    make_key,
    post,
    push,
    sign_body,
)
from processes import rss_kib, wait_until
from product import SOURCES, copy_scripts, daily, shorten_pauses
from slave_support import (
    SECRET,
    Slave,
    make_secret,
    record_file,
    runs,
    stand_in,
    stop_for_good,
)

ALL = sorted(FORGES)
MIB = 1 << 20
MOST = 25 * MIB
SOON_S = 10  # on a busy machine; else it takes a hundredth of that
MAX_GROWTH_KIB = 30 * 1024
NEW_KEY = "a second secret that is as long"
NOTES_EXPECT = ('#!/bin/sh\necho "$* expects $SERVER_UPDATE_EXPECT" >>"$HOME/runs"\nexit 1\n')


@pytest.fixture
def hooked(start_slave, tmp_path):
    """hooked(...): a slave with a secret, which notes what is run."""

    def start(**settings):
        secret = make_secret(tmp_path / "secret", SECRET)
        slave = start_slave(SECRET_FILE=secret, **settings)
        stand_in(slave, text=NOTES_EXPECT)
        return slave

    return start


@pytest.fixture(scope="module")
def idle_hooked(tmp_path_factory):
    """A slave with a secret for all tests that start nothing at it: no_update() is true."""
    folder = tmp_path_factory.mktemp("idle-hooked")
    secret = make_secret(folder / "secret", SECRET)
    slave = Slave(folder, {"BASE_URL": folder / "upstream", "SECRET_FILE": secret})
    yield slave.start()
    stop_for_good(slave)


def no_update(slave):
    return not list(slave.state.glob("*.json"))


# -- what a push leads to


@pytest.mark.parametrize("forge", daily(2, ALL))
def test_a_push_starts_an_update(hooked, forge):
    slave = hooked()
    status, said = push(slave, forge)
    assert (status, said["repo"], said["ref"]) == (202, "hanuman", None)
    wait_until(lambda: runs(slave) == ["hanuman expects " + AFTER], what="a run that expects it")
    record = record_file(slave)
    assert record["update"] == said["update"]
    assert record["by"] == "a forge"
    assert "asked for by 127.0.0.1, a forge\n" in slave.log()
    again, said = push(slave, forge)
    assert (again, said["update"] > record["update"]) == (202, True), "sent again by hand"


@pytest.mark.parametrize("forge", daily(2, ALL))
def test_a_hook_for_a_ref(hooked, forge):
    slave = hooked()
    status, said = push(slave, forge, hook_ref="v1", ref="refs/tags/v1")
    assert (status, said["ref"]) == (202, "v1")
    wait_until(lambda: runs(slave) == ["hanuman v1 expects " + AFTER])
    assert push(slave, forge, hook_ref="v1") == (
        200, {"repo": "hanuman", "ignored": "another branch or tag"})


@pytest.mark.parametrize("forge", ALL)
def test_what_means_nothing_here_is_200_with_a_reason(idle_hooked, forge):
    slave = idle_hooked
    assert push(slave, forge, after=GONE)[1]["ignored"] == "a deletion"
    assert push(slave, forge, ref="refs/tags/v1")[1]["ignored"] == "another branch or tag"
    event = FORGES[forge][2]
    if event:
        assert push(slave, forge, event=event) == (200, {"repo": "hanuman", "ignored": "no push"})
    assert no_update(slave)


def test_pings(idle_hooked):
    slave = idle_hooked
    ping = encode({"zen": "Keep it logically awesome.", "hook_id": 1,
                   "hook": {"type": "Organization", "active": True, "events": ["push"]}})
    for headers in (github_headers, gitea_headers):
        status, _, said = post(slave, "/hook?repo=hanuman", ping,
                               headers(make_key(), ping, "ping"))
        assert (status, said) == (200, {"repo": "hanuman", "ignored": "no push"})
    assert no_update(slave)


def test_forms(hooked):
    """GitHub signs the form as it is sent, Gitea the JSON in it."""
    slave = hooked()
    for told, is_signed_inside in ((github(), False), (gitea(), True)):
        form = encode_form(told)
        signed = encode(told) if is_signed_inside else form
        make_headers = gitea_headers if is_signed_inside else github_headers
        headers = dict(make_headers(make_key(), signed),
                       **{"Content-Type": "application/x-www-form-urlencoded"})
        assert post(slave, "/hook?repo=hanuman", form, headers)[0] == 202
        other = encode_form(dict(told, ref="refs/heads/x"))
        assert post(slave, "/hook?repo=hanuman", other, headers)[0] == 401
    other = encode_form(github("refs/heads/x"))
    headers = github_headers(make_key(), other)
    assert post(slave, "/hook?repo=hanuman", other, headers)[0] == 200


@pytest.mark.parametrize("body", daily(3, [
    b"[" * 200000, b"", b"\0\0", b"\xff", b'{"a":' * 40000, b"9" * 200000, b"payload=%00",
    b'{"ref": 5, "after": [], "ref": null}',
]), ids=lambda body: repr(body[:8]) + str(len(body)))
def test_what_is_proved_and_not_understood_is_an_update(hooked, body):
    slave = hooked()
    for headers in (github_headers, gitlab_headers, azure_headers):
        status, _, said = post(slave, "/hook?repo=hanuman", body, headers(make_key(), body))
        assert (status, said["repo"]) == (202, "hanuman")
    wait_until(lambda: runs(slave)[:1] == ["hanuman expects "])
    assert slave.get("/healthz")[0] == 200
    assert "Traceback" not in slave.log()


def test_a_web_page_may_post_what_it_has_no_key_for(hooked):
    slave = hooked()
    body = encode(github())
    headers = dict(github_headers(make_key(), body), Origin="https://forge.example.org")
    assert post(slave, "/hook?repo=hanuman", body, headers)[0] == 202
    assert post(slave, "/hook?repo=hanuman", body, {"Origin": "https://x.example"})[0] == 401


def test_only_repository_and_ref_of_the_url_count(hooked):
    slave = hooked()
    body = encode(github())
    path = "/hook?commit=%s&by=somebody&note=else&via=%s&repo=hanuman" % ("c" * 40, "1" * 16)
    assert post(slave, path, body, github_headers(make_key(), body))[0] == 202
    record = record_file(slave)
    assert [record[key] for key in ("pin", "note", "via", "by")] == [None] * 3 + ["a forge"]


def test_what_it_expects_is_known_after_a_restart(hooked):
    slave = hooked()
    stand_in(slave, text='#!/bin/sh\necho begins >>"$HOME/runs"\nsleep 1000\n')
    push(slave)
    wait_until(lambda: runs(slave) == ["begins"])
    slave.kill()
    stand_in(slave, text=NOTES_EXPECT)
    slave.start()
    wait_until(lambda: runs(slave)[1:] == ["hanuman expects " + AFTER])


def test_a_signal_expects_nothing_whatever_the_environment_says(start_slave):
    slave = start_slave(env={"SERVER_UPDATE_EXPECT": AFTER})
    stand_in(slave, text=NOTES_EXPECT)
    slave.wait_update()
    assert runs(slave) == ["hanuman expects "]


# -- who may


@pytest.mark.parametrize("forge", ALL)
def test_a_key_of_something_else_is_401(idle_hooked, forge):
    slave = idle_hooked
    wrong = [make_key("other"), make_key("hanuman", "main"), make_key(secret=NEW_KEY), SECRET,
             make_key().upper(), make_key()[:-1], ""]
    for key in wrong:
        assert push(slave, forge, key=key or "x") == (401, {"error": "proof missing or wrong"})
    right = make_key()
    assert push(slave, forge, hook_ref="main", key=right)[0] == 401
    assert push(slave, forge, repo="other", key=right)[0] == 401
    assert no_update(slave)
    told = slave.log()
    assert right not in told and SECRET not in told


@pytest.mark.parametrize("headers", [
    {},
    {"X-Hub-Signature": "sha1=" + "a" * 40},
    {"X-Hub-Signature": sign_body(make_key(), b"{}", "sha1")},
    {"X-Hub-Signature-256": "sha256="},
    {"X-Hub-Signature-256": make_key()[:63]},
    {"X-Hub-Signature-256": sign_body(make_key(), b"{ }")},
    {"X-Hub-Signature-256": sign_body(make_key(), b"{}"), "X-Gitlab-Token": "wrong"},
    {"X-Gitlab-Token": make_key(), "X-Hub-Signature": sign_body(make_key(), b"")},
    {"X-Gitlab-Token": "\xe9" * 64},
    {"Authorization": "Bearer x"},
    {"Authorization": "Basic " + "A" * 4000},
    {"X-Server-Update-Signature": "t=1,n=%s,s=%s" % ("0" * 32, "0" * 64)},
])
def test_no_proof_or_a_wrong_one_is_401(idle_hooked, headers):
    slave = idle_hooked
    status, _, said = post(slave, "/hook?repo=hanuman", b"{}", headers)
    assert (status, said) == (401, {"error": "proof missing or wrong"})
    assert no_update(slave)


def test_every_proof_that_is_given_must_hold(hooked):
    slave = hooked()
    right = github_headers(make_key(), b"{}")
    good = dict(right, **{"X-Gitlab-Token": make_key()})
    assert post(slave, "/hook?repo=hanuman", b"{}", good)[0] == 202
    proxy = dict(right, Authorization="Basic cHJveHk6d29yZA==")
    assert post(slave, "/hook?repo=hanuman", b"{}", proxy)[0] == 202, "that one is for a proxy"


def test_without_a_secret_there_are_no_hooks(start_slave):
    slave = start_slave()
    assert push(slave) == (403, {"error": "no hooks without a secret"})
    assert no_update(slave)


def test_any_line_of_the_secret_file_holds_at_once(hooked, tmp_path):
    slave = hooked()
    new = make_key(secret=NEW_KEY)
    assert push(slave, key=new)[0] == 401
    make_secret(tmp_path / "secret", NEW_KEY, SECRET)
    for forge in ALL:
        assert push(slave, forge, key=new)[0] == push(slave, forge)[0] == 202
    make_secret(tmp_path / "secret", NEW_KEY)
    assert (push(slave)[0], push(slave, key=new)[0]) == (401, 202)


def test_addresses_and_repositories_come_first(hooked):
    slave = hooked(ALLOW_REPOS="site*")
    assert push(slave) == (403, {"error": "not an allowed repository"})
    assert push(slave, repo="site-1")[0] == 202
    assert push(hooked(ALLOW_FROM="10.0.0.0/8"))[0] == 403


@pytest.mark.parametrize("query, status", [
    ("", 400), ("ref=main", 400), ("repo=", 400), ("repo=..", 400), ("repo=%ff", 400),
    ("repo=hanuman&repo=hanuman", 400), ("repo=hanuman&ref=-x", 400), ("repo=hanuman&ref=", 400),
])
def test_bad_parameters(idle_hooked, query, status):
    slave = idle_hooked
    got, _, said = post(slave, "/hook?" + query, b"{}", github_headers(make_key(), b"{}"))
    assert (got, list(said)) == (status, ["error"])
    assert post(slave, "/hook?" + query, b"{}", {})[0] == 401, "who has no key learns nothing"
    assert no_update(slave)


def test_a_ref_is_decoded_before_it_is_part_of_the_key(hooked):
    slave = hooked()
    body = encode(github("refs/heads/é+x"))
    headers = github_headers(make_key("hanuman", "é+x"), body)
    status, _, said = post(slave, "/hook?repo=hanuman&ref=%C3%A9+x", body, headers)
    assert (status, said["ref"]) == (202, "é+x")


def test_other_methods_and_paths(idle_hooked):
    slave = idle_hooked
    for method in ("GET", "HEAD", "PUT", "DELETE", "BREW"):
        status, headers, _ = slave.get("/hook?repo=hanuman", method=method)
        assert (status, headers["Allow"]) == (405, "POST"), method
    body = encode(github())
    for path in ("/", "/?repo=hanuman", "/status", "/hook/", "/hooks?repo=hanuman", "/get"):
        status, headers, _ = post(slave, path, body, github_headers(make_key(), body))
        assert (status, headers["Allow"]) == (405, "GET, HEAD"), path
    assert no_update(slave)


# -- bodies


def ask(slave, head, body=b""):
    """Sends bytes and returns what comes until the other side closes."""
    with socket.create_connection(("127.0.0.1", slave.port), 60) as connection:
        connection.sendall(head.replace(b"\n", b"\r\n") + b"\r\n" + body)
        got = b""
        while True:
            part = connection.recv(65536)
            if not part:
                return got
            got += part


def head(body, extra=""):
    """The head of GitHub's request, as bytes."""
    headers = github_headers(make_key(), body)
    lines = ["POST /hook?repo=hanuman HTTP/1.1", "Host: x"]
    lines += ["%s: %s" % one for one in headers.items()]
    lines += ["Content-Length: %d" % len(body)]
    return ("\n".join(lines) + "\n" + extra).encode()


@pytest.mark.parametrize("lines, status", [
    (b"", 411),
    (b"Transfer-Encoding: chunked\n", 411),
    (b"Transfer-Encoding: chunked\nContent-Length: 2\n", 411),
    (b"Content-Length: x\n", 400),
    (b"Content-Length: -1\n", 400),
    (b"Content-Length: +2\n", 400),
    (b"Content-Length: 2\nContent-Length: 2\n", 400),
    (b"Content-Length: 2, 2\n", 400),
    (b"Content-Length: " + b"9" * 5000 + b"\n", 400),
    (b"Content-Length: %d\n" % (MOST + 1), 413),
])
def test_lengths(idle_hooked, lines, status):
    slave = idle_hooked
    start = b"POST /hook?repo=hanuman HTTP/1.1\nX-Gitlab-Token: %s\n" % make_key().encode()
    smuggled = b"{}GET /?repo=hanuman HTTP/1.1\r\n\r\n"
    answer = ask(slave, start + lines, smuggled)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1 ") == 1, "a body is never taken for a request"
    assert b"\r\nConnection: close\r\n" in answer
    assert no_update(slave)


def test_a_refused_body_is_no_request(idle_hooked):
    slave = idle_hooked
    body = b"GET /healthz HTTP/1.1\r\n\r\n"
    for start in (b"POST /hook?repo=hanuman HTTP/1.1\n", b"POST /nothing HTTP/1.1\n",
                  b"POST /hook?repo=.. HTTP/1.1\nX-Gitlab-Token: x\n"):
        answer = ask(slave, start + b"Content-Length: %d\n" % len(body), body)
        assert answer.count(b"HTTP/1.1 ") == 1 and b" 200 " not in answer
    answer = ask(slave, b"POST /hook?repo=hanuman HTTP/1.1\n", body)
    assert answer.count(b"HTTP/1.1 ") == 1, "nor one without a length"
    assert no_update(slave)


def test_expect_100_continue(hooked):
    slave = hooked()
    body = encode(github())
    with socket.create_connection(("127.0.0.1", slave.port), 60) as connection:
        wanted = head(body, extra="Expect: 100-continue\n").replace(b"\n", b"\r\n") + b"\r\n"
        connection.sendall(wanted)
        assert connection.recv(999) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(9999).startswith(b"HTTP/1.1 202 ")
    refused = ask(slave, b"POST /hook?repo=hanuman HTTP/1.1\nExpect: 100-continue\n"
                         b"Content-Length: 9\n")
    assert refused.startswith(b"HTTP/1.1 401 "), "a body that is not wanted is not asked for"


def test_a_body_that_is_cut_off_starts_nothing(idle_hooked):
    slave = idle_hooked
    body = encode(github())
    with socket.create_connection(("127.0.0.1", slave.port), 60) as connection:
        connection.sendall(head(body).replace(b"\n", b"\r\n") + b"\r\n" + body[:-1])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(999) == b""
    assert no_update(slave)
    assert "Traceback" not in slave.log()


def large(size):
    """A push with so many bytes of body."""
    body = encode(github(ref="refs/heads/other"))
    return body + b" " * (size - len(body))


@pytest.mark.parametrize("size, status", [(256 * 1024, 200), (256 * 1024 + 1, 202)])
def test_a_large_body_is_only_proved(hooked, size, status):
    slave = hooked()
    body = large(size)
    assert post(slave, "/hook?repo=hanuman", body, github_headers(make_key(), body))[0] == status
    wrong = github_headers(make_key("other"), body)
    assert post(slave, "/hook?repo=hanuman", body, wrong)[0] == 401


def test_the_largest_body_is_answered_at_its_end(hooked):
    slave = hooked()
    body = large(MOST)
    start = head(body).replace(b"\n", b"\r\n") + b"\r\n"
    times = []
    for _ in range(2):  # this machine may do something else for a while
        with socket.create_connection(("127.0.0.1", slave.port), 60) as connection:
            connection.sendall(start + body[:-1])
            time.sleep(0.2)  # so that it has read as much
            connection.sendall(body[-1:])
            began = time.monotonic()
            assert connection.recv(999).startswith(b"HTTP/1.1 202 ")
            times.append(time.monotonic() - began)
    assert min(times) < SOON_S


def test_twenty_of_the_largest_bodies_at_once(hooked):
    slave = hooked(constants={"HEADER_TIMEOUT_S": 120, "BODY_TIMEOUT_S": 120})
    body = large(MOST)
    headers = github_headers(make_key(), body)
    assert post(slave, "/hook?repo=hanuman", body, headers)[0] == 202
    before = rss_kib(slave.process.pid)
    most = [before]
    over = threading.Event()

    def watch():
        while not over.wait(0.02):
            most.append(rss_kib(slave.process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(post, slave, "/hook?repo=hanuman", body, headers, 120)
                     for _ in range(20)]
            answers = [(one.result()[0], one.result()[1]["Retry-After"]) for one in asked]
    finally:
        over.set()
        watcher.join()
    assert set(answers) <= {(202, None), (503, "2")}, answers
    assert (202, None) in answers
    assert max(most) - before < MAX_GROWTH_KIB
    assert post(slave, "/hook?repo=hanuman", body, headers)[0] == 202, "there is room again"


def test_at_most_four_large_bodies_at_once(hooked):
    slave = hooked()
    body = large(MIB)
    start = head(body, "Expect: 100-continue\n").replace(b"\n", b"\r\n") + b"\r\n"
    four = [socket.create_connection(("127.0.0.1", slave.port), 60) for _ in range(4)]
    try:
        for connection in four:
            connection.sendall(start)
            assert connection.recv(999).startswith(b"HTTP/1.1 100 "), "it has a place"
            connection.sendall(body[:-1])
        headers = github_headers(make_key(), body)
        assert post(slave, "/hook?repo=hanuman", body, headers)[0] == 503, "one too many"
        assert push(slave)[0] == 202, "small ones are always taken"
        for connection in four:
            connection.sendall(body[-1:])
            assert connection.recv(999).startswith(b"HTTP/1.1 202 ")
    finally:
        for connection in four:
            connection.close()
    assert post(slave, "/hook?repo=hanuman", body, headers)[0] == 202


@pytest.mark.slow
def test_a_body_has_thirty_seconds_in_all(hooked):
    slave = hooked()
    body = encode(github())
    with socket.create_connection(("127.0.0.1", slave.port), 0.5) as connection:
        connection.sendall(head(body).replace(b"\n", b"\r\n") + b"\r\n")
        began = time.monotonic()
        ended = False
        while not ended and time.monotonic() < began + 60:
            try:
                connection.sendall(b" ")
                ended = connection.recv(999) == b""
            except socket.timeout:
                pass
            except ConnectionError:
                ended = True
        assert ended
        assert 25 < time.monotonic() - began < 55
    assert no_update(slave)


def test_bodies_that_drip_give_way(hooked):
    slave = hooked()
    body = encode(github())
    start = head(body).replace(b"\n", b"\r\n") + b"\r\n"
    dripping = [socket.create_connection(("127.0.0.1", slave.port), 60) for _ in range(256)]
    try:
        for connection in dripping:
            connection.sendall(start)
        wait_until(lambda: len(os.listdir("/proc/%d/fd" % slave.process.pid)) > 250)
        for _ in range(20):
            assert slave.get("/healthz")[0] == 200
        assert push(slave)[0] == 202
    finally:
        for connection in dripping:
            connection.close()


# -- the key


def test_the_key_is_printed_for_a_forge(hooked, run_script, tmp_path):
    secret = make_secret(tmp_path / "two", SECRET, NEW_KEY)
    for args, key in ((["hanuman"], make_key()), (["hanuman", "é/x"], make_key("hanuman", "é/x"))):
        done = run_script("slave.py", "--secret-file", secret, "--hook-key", *args)
        assert (done.returncode, done.stdout, done.stderr) == (0, key + "\n", "")
    conf = tmp_path / "conf"
    conf.write_text("SECRET_FILE=%s\n" % secret)
    done = run_script("slave.py", "--hook-key", "hanuman", env={"SERVER_UPDATE_CONF": str(conf)})
    assert done.stdout == make_key() + "\n"


@pytest.mark.parametrize("args, complaint", [
    (["--hook-key", "../x"], "bad name '../x' or ref None"),
    (["--hook-key", "x", "-y"], None),
    (["--hook-key", "x", "a..b"], "bad name 'x' or ref 'a..b'"),
    (["--hook-key", "x", "y", "z"], None),
    (["--hook-key"], None),
    (["--secret-file", "NOTHING", "--hook-key", "x"], "can't use 'NOTHING': No such file"),
])
def test_what_no_key_can_be_made_of_is_exit_2(run_script, tmp_path, args, complaint):
    secret = make_secret(tmp_path / "secret", SECRET)
    nothing = str(tmp_path / "nothing")
    args = [one.replace("NOTHING", nothing) for one in args]
    done = run_script("slave.py", "--secret-file", secret, *args)
    assert (done.returncode, done.stdout) == (2, "")
    if complaint:
        assert done.stderr.startswith("slave.py: " + complaint.replace("NOTHING", nothing))
        assert done.stderr.count("\n") == 1


def test_without_a_secret_there_is_no_key(run_script, tmp_path):
    etc = tmp_path / "alone" / "slave.py" / "etc" / "server-update"
    etc.mkdir(parents=True)
    done = run_script("slave.py", "--hook-key", "x", env={"SERVER_UPDATE_CONF": os.devnull})
    assert (done.returncode, done.stdout) == (2, "")
    advice = r"slave\.py: no secret; do: \(umask 077; openssl rand -hex 32 >\S+/secret\)\n"
    assert re.fullmatch(advice, done.stderr)


def test_a_push_that_does_not_come_is_told(hooked, upstream, http_upstream):
    """The real slave-activate, at an upstream that never shows the commit."""
    repo = upstream.create("hanuman")
    slave = hooked(BASE_URL=http_upstream.url)
    copy_scripts(SOURCES, slave.bin, "slave-activate")
    shorten_pauses(slave.bin, "[124]")

    def end_of(update):
        wait_until(lambda: record_file(slave)["finished"], what="its end")
        record = record_file(slave)
        assert record["update"] == update
        return record
    record = end_of(push(slave)[1]["update"])
    assert (record["state"], record["commit"]) == ("live", repo.head()), str(record)
    assert record["message"] == (
        AFTER[:7] + " is not there yet: no branch or tag of upstream has it; signal again")
    assert end_of(push(slave, after=repo.head())[1]["update"])["message"] == ""

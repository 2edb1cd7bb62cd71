"""Who may ask slave.py for what: signatures, addresses, names, TLS."""

import hashlib
import hmac
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from signal import SIGHUP

import pytest
from certificates import Authority
from processes import wait_until
from product import ROOT, VERSION
from slave_support import (
    LONG_POLLS,
    ONE,
    SECRET,
    make_secret,
    runs,
    signature,
    stand_in,
    start_by_hand,
    wait_runs,
)

OTHER = "another one, for the change"
NEW_SECRET = "(umask 077; openssl rand -hex 32 >{0})"
FLOOD = 500  # signatures; what each would leave is more than 1 KB
DIFFERENT = {"error": "signature missing or wrong"}


@pytest.fixture
def signed_slave(start_slave, tmp_path):
    slave = start_slave(SECRET_FILE=make_secret(tmp_path / "secret", SECRET))
    stand_in(slave)
    return slave


def ask(slave, target="/?repo=hanuman", sent=None, method="GET", **how):
    headers = signature(target, method=method, **how)
    return slave.get(sent or target, headers=headers, method=method)


# -- signatures


def test_the_right_signature_is_taken(signed_slave):
    status, _, body = ask(signed_slave)
    assert status == 202
    update = json.loads(body.decode())["update"]
    assert signed_slave.wait_update(update=update, secret=SECRET)["state"] == "live"
    for when in (-270, 298):  # of 300; that far back, as what comes late is older
        assert ask(signed_slave, "/status", when=time.time() + when)[0] == 200
    assert ask(signed_slave, "/status", method="HEAD")[0] == 200
    assert ask(signed_slave, "/get/?repo=hanuman&ref=a%2Fb")[0] == 202


def test_the_page_signs_with_curl_and_a_shell(signed_slave, tmp_path):
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(target=.*?)```", page, re.S)
    for shown, here in (
        ("/etc/server-update/secret", str(tmp_path / "secret")),
        ("http://web1:9999", signed_slave.url),
    ):
        assert script.count(shown) == 1
        script = script.replace(shown, here)
    done = subprocess.run(["sh", "-ec", script], stdout=subprocess.PIPE, check=True, timeout=300)
    assert json.loads(done.stdout.decode())["repo"] == "hanuman"
    wait_runs(signed_slave, 1)


def wrong_requests():
    """(name, what is sent, headers) of requests that must not pass."""
    good, now = "/?repo=hanuman", int(time.time())
    right = signature(good, when=now, nonce="ab" * 16)["X-Server-Update-Signature"]

    def header(value):
        return {"X-Server-Update-Signature": value}

    yield "unsigned", good, {}
    yield "wrong key", good, signature(good, secret=OTHER)
    yield "altered repo", "/?repo=hanuman2", header(right)
    yield "altered ref", good + "&ref=v1", header(right)
    yield "altered path", "/get?repo=hanuman", header(right)
    yield "altered spelling", "/?repo=h%61numan", header(right)
    yield "altered time", good, header(right.replace("t=%d" % now, "t=%d" % (now + 1)))
    yield "altered nonce", good, header(right.replace("ab" * 16, "ab" * 15 + "ac"))
    yield "altered mac", good, header(right[:-1] + ("0" if right[-1] != "0" else "1"))
    yield "other method", good, signature(good, method="HEAD")
    yield "empty", good, header("")
    yield "only a mac", good, header(right[right.index("s=") :])
    yield "other order", good, header(",".join(reversed(right.split(","))))
    yield "blanks", good, header(right.replace(",", ", "))
    yield "capitals", good, header(right[:-64] + right[-64:].upper())
    yield "short nonce", good, signature(good, nonce="ab" * 15)
    yield "no number", good, signature(good, when="now")
    yield "negative time", good, signature(good, when=-1)
    yield "trailing comma", good, header(right + ",")
    yield "huge", good, header("t=1,n=%s,s=" % ("a" * 7000))
    yield "status", "/status", {}
    yield "status of a repository", "/status?repo=hanuman", {}
    yield "status of none", "/status?repo=nothing", {}
    yield "no such path", "/nowhere", {}


def test_everything_else_is_401_in_the_same_shape(signed_slave):
    stand_in(signed_slave)
    shapes = set()
    for name, target, headers in wrong_requests():
        status, got, body = signed_slave.get(target, headers=headers)
        assert status == 401, name
        assert json.loads(body.decode()) == DIFFERENT, name
        shapes.add(tuple(key for key in got if key != "Date") + (len(body),))
    assert len(shapes) == 1
    right = signature("/?repo=hanuman")["X-Server-Update-Signature"]
    with socket.create_connection(("127.0.0.1", signed_slave.port), 60) as connection:
        twice = "X-Server-Update-Signature: %s\r\n" % right * 2
        connection.sendall(("GET /?repo=hanuman HTTP/1.1\r\n%s\r\n" % twice).encode())
        assert connection.recv(9999).startswith(b"HTTP/1.1 401 ")
    assert not list(signed_slave.state.glob("*.json")), "nothing was even recorded"
    assert runs(signed_slave) == []
    log = signed_slave.log()
    assert SECRET not in log and "s=" not in log and right[-64:] not in log


def test_the_time_of_the_newest_signal_is_kept_anew_where_its_file_is_none(signed_slave):
    """It was restored by somebody else, say: what can't be read now is written."""
    signed = signed_slave.state / "signed"
    signed.unlink()
    os.mkfifo(str(signed))
    assert ask(signed_slave)[0] == 202
    assert int(signed.read_text()) > time.time() - 60


def test_a_replay_is_401(signed_slave):
    headers = signature("/?repo=hanuman")
    assert signed_slave.get("/?repo=hanuman", headers=headers)[0] == 202
    wait_runs(signed_slave, 2)
    assert signed_slave.json("/?repo=hanuman", status=401, headers=headers) == DIFFERENT
    with ThreadPoolExecutor(8) as pool:  # at the same moment: one of them
        headers = signature("/?repo=hanuman")
        answers = list(
            pool.map(lambda _: signed_slave.get("/?repo=hanuman", headers=headers)[0], range(24))
        )
    assert sorted(answers) == [202] + [401] * 23


def test_the_clock_is_told_only_to_who_knows_the_secret(signed_slave):
    for off_by in (-301, 360, -90000):
        before = int(time.time())
        when = before + off_by
        status, _, body = ask(signed_slave, when=when)
        after = int(time.time())
        text = json.loads(body.decode())["error"]
        assert status == 401
        apart = int(re.fullmatch("the clocks are ([0-9]+) s apart", text).group(1))
        assert apart in range(abs(off_by) - (after - before) - 1, abs(off_by) + after - before + 2)
        assert json.loads(ask(signed_slave, when=when, secret=OTHER)[2].decode()) == DIFFERENT
    assert runs(signed_slave) == []


def test_what_needs_no_signature(start_slave, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("hello")
    slave = start_slave(SECRET_FILE=make_secret(tmp_path / "secret", SECRET), args=[page])
    assert slave.get("/healthz")[::2] == (200, b"ok\n")
    assert slave.get("/")[::2] == (200, b"hello")
    assert slave.get("/?repo=hanuman")[0] == 401
    assert slave.get("/?x=1&repo=hanuman")[0] == 401
    assert slave.get("/?rep%6f=hanuman")[2] == b"hello", "that is no 'repo', so nothing starts"
    assert slave.get("/index.html")[0] == 401


def test_the_secret_changes_without_a_gap(signed_slave, tmp_path):
    secret = tmp_path / "secret"
    answers = []
    for lines, current in (((SECRET, OTHER), SECRET), ((OTHER, SECRET), OTHER), ((OTHER,), OTHER)):
        make_secret(secret, *lines)
        answers.append((ask(signed_slave, secret=current)[0], ask(signed_slave)[0]))
    assert answers == [(202, 202), (202, 202), (202, 401)]
    for spoil in (lambda: secret.write_text(""), lambda: secret.chmod(0o644)):
        spoil()
        assert ask(signed_slave, secret=OTHER)[0] == 202, "the good secret from before holds"
        assert signed_slave.get("/?repo=hanuman")[0] == 401, "and never nothing at all"
    assert signed_slave.log().count("the secret stays what it was: ") == 2
    secret.unlink()
    for answer in (ask(signed_slave, secret=OTHER), signed_slave.get("/?repo=hanuman")):
        assert answer[0] == 503, "one that vanishes is refused to all"
        assert json.loads(answer[2].decode()) == {
            "error": "can't read the secret: No such file or directory"
        }
    make_secret(secret, OTHER)
    assert ask(signed_slave, secret=OTHER)[0] == 202


def test_a_secret_that_becomes_a_fifo_holds_up_nobody(signed_slave, tmp_path):
    secret = tmp_path / "secret"
    secret.unlink()
    os.mkfifo(str(secret), 0o600)
    assert ask(signed_slave)[0] == 503
    assert signed_slave.get("/healthz")[0] == 200
    secret.unlink()
    make_secret(secret, SECRET)
    assert ask(signed_slave)[0] == 202


# -- replays across a restart


def signal_at(slave, when, **how):
    """(status, headers, JSON) of a signal that was signed at `when`."""
    status, headers, body = ask(slave, when=when, **how)
    return status, headers, json.loads(body.decode())


def test_a_replay_after_a_restart(signed_slave):
    when = int(time.time())
    headers = signature("/?repo=hanuman", when=when)
    assert signed_slave.get("/?repo=hanuman", headers=headers)[0] == 202
    signed_slave.kill()
    signed_slave.start()
    status, got, body = signed_slave.get("/?repo=hanuman", headers=headers)
    floor = json.loads(body.decode())["floor"]
    assert (status, when <= floor <= when + 5) == (503, True)
    wait_s = floor + 1 - when
    assert got["Retry-After"] == str(wait_s)
    assert json.loads(body.decode())["error"] == (
        "signed too long ago to be told from a replay; sign again in %d s" % wait_s
    )
    status, _, body = ask(signed_slave, "/status?repo=hanuman", when=when)
    assert status == 200, "a poll is no signal: %r" % body
    assert signal_at(signed_slave, floor)[0] == 503
    wait_until(lambda: time.time() > floor + 1, what="a fresh time")
    assert ask(signed_slave)[0] == 202, "whoever signs again gets through"
    assert signed_slave.get("/?repo=hanuman", headers=headers)[0] == 401, "its nonce is known now"


def test_two_masters_whose_clocks_differ_are_both_taken(signed_slave):
    now = int(time.time())
    for when in (now, now - 60, now + 60, now - 59):
        assert signal_at(signed_slave, when)[0] == 202, "while it runs the clocks may differ"
    signed_slave.stop()
    signed_slave.start()
    told, later = {}, int(time.time())
    for behind in (0, 60):
        status, headers, body = signal_at(signed_slave, later - behind)
        assert status == 503
        told[behind] = int(headers["Retry-After"])
        assert now + 60 <= body["floor"] <= now + 65
    assert told[60] - told[0] == 60, "each is told how long it takes by its own clock"
    assert signal_at(signed_slave, now + 66)[0] == 202


def test_the_floor_is_on_disk_before_the_answer_and_written_seldom(signed_slave):
    now = int(time.time())
    kept = signed_slave.state / "signed"
    assert int(kept.read_text()) < now, "made at the start, as there is a secret"
    writes = set()
    for when in (now, now - 3, now + 1, now + 2, now + 5, now + 6, now + 7):
        assert signal_at(signed_slave, when)[0] == 202
        assert int(kept.read_text()) >= when
        writes.add(kept.stat().st_ino)
    assert len(writes) <= 3


def test_a_floor_that_is_broken_or_gone(signed_slave):
    kept = signed_slave.state / "signed"
    now = int(time.time())
    assert signal_at(signed_slave, now)[0] == 202
    kept.unlink()
    assert signal_at(signed_slave, now)[0] == 202
    assert int(kept.read_text()) >= now, "it is there again before the answer"
    signed_slave.stop()
    kept.write_bytes(b"\0\0")
    signed_slave.start()
    assert signal_at(signed_slave, int(time.time()) + 200)[0] == 503, "all that may be a replay"
    signed_slave.state.rename(signed_slave.repos / ".moved")
    assert signal_at(signed_slave, int(time.time()))[0] == 503, "what it knows it still knows"


def test_a_floor_that_cannot_be_written_is_an_honest_503(signed_slave):
    now = int(time.time())
    kept = signed_slave.state / "signed"
    kept.rename(signed_slave.state / "aside")
    kept.mkdir()
    status, _, body = signal_at(signed_slave, now)
    assert (status, body) == (503, {"error": "can't record the update: Is a directory"})
    assert not list(signed_slave.state.glob("*.json"))
    kept.rmdir()
    assert signal_at(signed_slave, now)[0] == 202


# -- a secret that was there once


def test_a_slave_that_has_had_a_secret_does_not_start_without_one(signed_slave, tmp_path):
    secret = tmp_path / "secret"
    signed_slave.stop()
    del signed_slave.settings["SECRET_FILE"]
    mark = signed_slave.state / "signed"
    status, stderr = start_by_hand(signed_slave, "--port", 0, "--bind", "127.0.0.1",
                                   "--repos-dir", signed_slave.repos)
    assert (status, stderr) == (
        2, "slave.py: there was a secret here, and there is none in '%s'; bring it back or, to "
        "serve without one, remove %s\n" % (signed_slave.etc / "secret", mark))
    secret.rename(signed_slave.etc / "secret")
    signed_slave.start()
    assert signed_slave.get("/?repo=hanuman")[0] == 401
    assert signed_slave.stop() == 0
    (signed_slave.etc / "secret").unlink()
    mark.unlink()
    signed_slave.start()
    assert signed_slave.get("/?repo=hanuman")[0] == 202
    # One that comes while it runs is marked with the first signal that it signs.
    make_secret(signed_slave.etc / "secret", SECRET)
    assert ask(signed_slave)[0] == 202
    signed_slave.stop()
    (signed_slave.etc / "secret").unlink()
    assert start_by_hand(signed_slave, "--port", 0, "--repos-dir", signed_slave.repos)[0] == 2


# -- a key for each slave


def derived_key(origin, master_key="a master key that only the master has"):
    """The key of a slave, made without any of the product's code."""
    text = "server-update-slave-1\n" + origin
    return hmac.new(master_key.encode(), text.encode(), hashlib.sha256).hexdigest()


def test_a_slaves_key_does_nothing_at_another_slave(start_slave, tmp_path):
    """Nor does what was signed for one, sent to another as it was overheard."""
    keys, slaves = [], []
    for name in ("web1", "web2"):
        key = derived_key("http://%s:9999" % name)
        slave = start_slave(SECRET_FILE=make_secret(tmp_path / name, key))
        stand_in(slave)
        keys.append(key)
        slaves.append(slave)
    heard = signature("/?repo=hanuman", secret=keys[0])
    assert slaves[0].get("/?repo=hanuman", headers=heard)[0] == 202
    assert slaves[1].json("/?repo=hanuman", status=401, headers=heard) == DIFFERENT
    for target in ("/?repo=hanuman", "/status", "/status?repo=hanuman", "/get/?repo=hanuman"):
        status, _, body = ask(slaves[1], target, secret=keys[0])
        assert (status, json.loads(body.decode())) == (401, DIFFERENT)
    assert runs(slaves[1]) == []
    assert ask(slaves[1], secret=keys[1])[0] == 202


FEW = 50  # nonces of a key, in this copy


def test_a_flood_of_one_key_takes_nothing_from_another(start_slave, tmp_path):
    secret = make_secret(tmp_path / "secret", SECRET, OTHER)
    slave = start_slave(SECRET_FILE=secret, constants={"MAX_NONCES": FEW})
    stand_in(slave)
    early = signature("/?repo=hanuman", secret=OTHER)
    assert slave.get("/?repo=hanuman", headers=early)[0] == 202
    began = int(time.time())
    flood = [signature("/status", when=began + number // 10) for number in range(3 * FEW)]
    taken = [slave.get("/status", headers=headers)[0] for headers in flood]
    assert taken.count(200) > 2 * FEW, "a flood goes on, too, as its times do"
    assert slave.json("/?repo=hanuman", status=401, headers=early) == DIFFERENT
    assert ask(slave, secret=OTHER)[0] == 202
    # What may be a replay of what was forgotten is refused, and told when to sign again.
    status, headers, body = slave.get("/status", headers=flood[0])
    assert (status, json.loads(body.decode())["floor"] >= began) == (503, True)
    assert int(headers["Retry-After"]) >= 1
    assert all(slave.get("/status", headers=one)[0] in (401, 503) for one in flood)


@pytest.mark.parametrize(
    "text, mode, complaint",
    [
        (SECRET, 0o644, "others can read secret file '{0}'; do: chmod 600 {0}"),
        (SECRET, 0o640, "others can read secret file '{0}'; do: chmod 600 {0}"),
        (
            "",
            0o600,
            "secret file '{0}' has no secret in it; do: " + NEW_SECRET,
        ),
        (
            "\n \n",
            0o600,
            "secret file '{0}' has no secret in it; do: " + NEW_SECRET,
        ),
        (
            "fifteen letters",
            0o600,
            "secret file '{0}' has a line of less than 16 bytes; do: " + NEW_SECRET,
        ),
        (
            SECRET + "\nshort\n",
            0o600,
            "secret file '{0}' has a line of less than 16 bytes; do: " + NEW_SECRET,
        ),
    ],
)
def test_a_bad_secret_file_keeps_it_from_starting(idle_slave, tmp_path, text, mode, complaint):
    secret = make_secret(tmp_path / "secret")
    secret.write_text(text)
    secret.chmod(mode)
    status, stderr = start_by_hand(idle_slave, "--port", 0, "--secret-file", secret)
    assert (status, stderr) == (2, "slave.py: %s\n" % complaint.format(secret))


def test_the_log_begins_with_the_settings_and_that_there_is_no_secret(start_slave, signed_slave):
    slave = start_slave(BASE_URL="https://example.org/x")
    lines = [line.partition(" ")[2] for line in slave.log().splitlines()]
    assert lines[0].startswith("slave.py %s, settings and keys in " % VERSION)
    assert lines[1] == (
        "no secret: who can reach the port can have repositories of https://example.org/x updated "
        "here; to change that, put one into %s" % (slave.etc / "secret")
    )
    assert "no secret" not in signed_slave.log()


def test_a_size_never_tells_whether_a_repository_exists(signed_slave):
    assert ask(signed_slave)[0] == 202
    wait_runs(signed_slave, 2)
    answers = set()
    for target in (
        "/status?repo=hanuman",
        "/status?repo=nothing",
        "/?repo=hanuman",
        "/status?repo=hanuman&update=1&wait=30",
        "/status?repo=hanuman&update=1",
    ):
        began = time.monotonic()
        status, _, body = signed_slave.get(target)
        assert time.monotonic() - began < 25  # not the 30 that it asks to be held back
        answers.add((status, body))
    assert len(answers) == 1


def test_a_flood_of_signatures_takes_bounded_memory(signed_slave):
    """Wrong ones leave nothing; right ones 16 bytes and an entry each."""

    def flood(secret):
        connection = http.client.HTTPConnection("127.0.0.1", signed_slave.port)
        for _ in range(FLOOD):
            connection.request("GET", "/status", headers=signature("/status", secret=secret))
            connection.getresponse().read()
        connection.close()

    def rss():
        with open("/proc/%d/status" % signed_slave.process.pid) as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1))

    flood(OTHER)
    before = rss()
    flood(OTHER)
    assert rss() - before < 500
    flood(SECRET)
    assert rss() - before < 2000


# -- addresses and names


def test_allow_from(start_slave):
    slave = start_slave(ALLOW_FROM="10.0.0.0/8 192.168.1.1")
    for target in ("/?repo=hanuman", "/status", "/"):
        assert slave.json(target, status=403) == {"error": "not from this address"}
    slave = start_slave(ALLOW_FROM="127.0.0.0/8,::1", BIND="")
    stand_in(slave)
    assert slave.get("/?repo=hanuman")[0] == 202, "though its socket says ::ffff:127.0.0.1"
    slave = start_slave(ALLOW_FROM="::1", BIND="")
    assert slave.get("/?repo=hanuman")[0] == 403


def test_allow_repos(start_slave):
    slave = start_slave(ALLOW_REPOS="hanuman web-*")
    stand_in(slave)
    for repo in ("hanuman", "web-1"):
        assert slave.get("/?repo=" + repo)[0] == 202
    for target in ("/?repo=other", "/get/?repo=Hanuman", "/status?repo=other"):
        assert slave.json(target, status=403) == {"error": "not an allowed repository"}
    assert not (slave.state / "other.json").exists()


# -- TLS


def https(slave, target, authority, host="127.0.0.1", **limits):
    """An answer over TLS from a client that trusts the authority only: (status, body)."""
    context = ssl.create_default_context(cafile=str(authority.cert))
    for name, value in limits.items():
        setattr(context, name, value)
    connection = http.client.HTTPSConnection(host, slave.port, timeout=120, context=context)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def ended(answer):
    """The record of an answer, once the update has ended."""
    record = json.loads(answer[1].decode())
    return record if record["finished"] else None


def test_tls(start_slave, authority, tmp_path):
    slave = start_slave(TLS_CERT=authority.issue("right"))
    stand_in(slave)
    assert "(127.0.0.1, TLS)" in slave.log()
    status, body = https(slave, "/?repo=hanuman", authority)
    assert status == 202
    update = json.loads(body.decode())["update"]
    target = "/status?repo=hanuman&update=%d&wait=20" % update
    record = wait_until(lambda: ended(https(slave, target, authority)))
    assert record["commit"] == ONE
    other = Authority(tmp_path / "other")
    with pytest.raises(ssl.SSLError):
        https(slave, "/healthz", other)
    plain = socket.create_connection(("127.0.0.1", slave.port), 60)
    plain.sendall(b"GET /?repo=plain HTTP/1.1\r\n\r\n")
    try:
        assert not plain.recv(99).startswith(b"HTTP/1.1 2")
    except ConnectionError:
        pass
    plain.close()
    wait_until(lambda: "connection of 127.0.0.1: " in slave.log())
    assert not (slave.state / "plain.json").exists()
    assert "Traceback" not in slave.log()


def test_tls_wrong_name_and_expired(start_slave, authority):
    for name, about in (
        ("name", {"host": "DNS:other.example"}),
        ("old", {"end": "20210101000000Z"}),
    ):
        slave = start_slave(TLS_CERT=authority.issue(name, **about))
        with pytest.raises(ssl.SSLError) as error:
            https(slave, "/healthz", authority)
        assert re.search("doesn't match|mismatch|not valid for|expired", str(error.value))


def test_tls_1_2_or_newer(start_slave, authority):
    slave = start_slave(TLS_CERT=authority.issue("versions"))
    for version, taken in (("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)):
        command = [
            "openssl",
            "s_client",
            "-connect",
            "127.0.0.1:%d" % slave.port,
            "-cipher",
            "ALL:@SECLEVEL=0",
            "-" + version.lower().replace("v", ""),
        ]
        done = subprocess.run(command, input=b"", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert (b"BEGIN CERTIFICATE" in done.stdout) == taken, done.stdout[-2000:]


def test_tls_handshakes_that_never_end_hold_up_nobody(start_slave, authority):
    """Ten seconds each; fewer in this copy."""
    slave = start_slave(TLS_CERT=authority.issue("silent"), constants={"HEADER_TIMEOUT_S": 5})
    stand_in(slave)
    silent = [socket.create_connection(("127.0.0.1", slave.port), 60) for _ in range(20)]
    silent[0].sendall(b"\x16\x03\x01")
    began = time.monotonic()
    assert https(slave, "/?repo=hanuman", authority)[0] == 202
    assert time.monotonic() - began < 80, "it waits for none of them to end, 5 s each"
    for connection in silent:
        connection.settimeout(60)
        assert connection.recv(9) == b"", "5 s, then it ends"
        connection.close()


def test_a_renewed_certificate_is_taken_on_sighup(start_slave, authority, tmp_path):
    path = tmp_path / "slave.pem"
    shutil.copy(str(authority.issue("before", host="DNS:other.example")), str(path))
    # What waits for its next request for as long as the rest takes.
    slave = start_slave(TLS_CERT=path, constants=dict(LONG_POLLS, HEADER_TIMEOUT_S=300))
    stand_in(slave, 'until [ -e "$HOME/go" ]; do sleep 0.02; done')
    context = ssl.create_default_context(cafile=str(authority.cert))
    context.check_hostname = False
    kept = http.client.HTTPSConnection("127.0.0.1", slave.port, timeout=300, context=context)
    kept.request("GET", "/?repo=hanuman")
    update = json.loads(kept.getresponse().read().decode())["update"]
    with pytest.raises(ssl.SSLError):
        https(slave, "/healthz", authority)
    path.write_text("garbage")
    slave.process.send_signal(SIGHUP)
    wait_until(lambda: "the certificate stays what it was: bad TLS_CERT" in slave.log())
    shutil.copy(str(authority.issue("after")), str(path))
    slave.process.send_signal(SIGHUP)
    wait_until(lambda: slave.log().count("the TLS certificate is read") == 2)
    assert https(slave, "/healthz", authority)[0] == 200
    kept.request("GET", "/status?repo=hanuman&update=%d&wait=240" % update)
    (slave.home / "go").touch()
    assert json.loads(kept.getresponse().read().decode())["state"] == "live"
    kept.close()


def test_a_bad_certificate_keeps_it_from_starting(start_slave, authority, tmp_path):
    slave = start_slave()
    (tmp_path / "bad.pem").write_text("x")
    (tmp_path / "key.pem").write_text("x")
    free = tmp_path / "free"
    for args in (
        ["--tls-cert", tmp_path / "bad.pem"],
        ["--tls-cert", tmp_path / "none.pem"],
        ["--tls-cert", authority.issue("mixed"), "--tls-key", tmp_path / "key.pem"],
    ):
        status, stderr = start_by_hand(slave, "--port", 0, "--repos-dir", free, *args)
        assert status == 2
        assert stderr.startswith("slave.py: bad TLS_CERT '%s' or TLS_KEY '" % args[1])
        assert stderr.count("\n") == 1

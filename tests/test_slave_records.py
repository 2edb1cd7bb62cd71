"""The pure core of slave.py: records, what a run's end means, settings, queries, signatures."""

import json
import random
import re
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
from product import ROOT, load


slave = load("slave.py")
ONE, TWO = "1" * 40, "2" * 64
LIVE_CHANGES = {"state": "live", "message": ""}
SECRET = b"0123456789abcdef0123456789abcdef"
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def accepted(records=None, ref=None, now=1000.0):
    return slave.Records.accept(records or slave.Records(), "hanuman", ref, now, {})


def test_how_long_it_waits_is_as_promised():
    """Tests shorten these times in copies, see start_slave in conftest.py."""
    assert slave.HEADER_TIMEOUT_S == slave.KILL_AFTER_S == slave.BACKSTOP_S == 10


# -- the records of a repository


def test_accept_start_finish():
    records = slave.Records.start(accepted(ref="v1"), ONE, 1001.0)
    assert (records.running.state, records.running.tries) == ("running", 0)
    assert records.running.commit == records.running.previous == ONE
    changes = {"state": "live", "message": "", "commit": TWO, "previous": ONE}
    records = slave.Records.finish(records, 1000000, changes, 1002.0)
    assert slave.Records.newest(records) == slave.Record(
        "hanuman", 1000000, "v1", "live", 1000.0, 1001.0, 1002.0, TWO, ONE, first=1000000,
        lived=1002.0,
    )


@pytest.mark.parametrize("is_kill", [False, True])
def test_what_is_cut_off_once_live_still_knows_what_was_before(is_kill):
    cut = slave.Records.start(accepted(), ONE, 1001.0)
    again = slave.Records.resume(cut) if is_kill else slave.Records.requeue(cut)
    records = slave.Records.start(again, TWO, 1002.0)
    assert (records.running.commit, records.running.previous) == (TWO, ONE)
    changes = {"state": "live", "message": "", "commit": TWO, "previous": TWO}
    done = slave.Records.newest(slave.Records.finish(records, 1000000, changes, 1003.0))
    assert (done.commit, done.previous) == (TWO, ONE)


def test_ids_grow_although_the_clock_does_not():
    records = accepted(now=1000.0)
    assert records.queued.update == 1000000
    assert accepted(records, now=1000.0).queued.update == 1000001
    assert accepted(records, now=1.0).queued.update == 1000001
    assert accepted(records, now=2000.0).queued.update == 2000000


def test_a_later_signal_takes_the_place_of_the_queued_one():
    records = slave.Records.start(accepted(ref="v1"), None, 1001.0)
    records = accepted(accepted(records, "v2", 1002.0), "v3", 1003.0)
    assert [(one.state, one.ref) for one in slave.Records.all(records)] == [
        ("running", "v1"),
        ("queued", "v3"),
    ]
    assert slave.Records.find(records, 1002000) == records.queued, "who asked for v2 hears of v3"
    assert slave.Records.find(records, 1000000) == records.running
    assert slave.Records.find(records, 1003001) is None
    assert slave.Records.newest(slave.Records()) is None


def test_only_so_many_ended_updates_are_remembered():
    records = slave.Records()
    for number in range(25):
        records = slave.Records.start(accepted(records, now=number + 1.0), None, number + 1.5)
        records = records.finish(records.running.update, LIVE_CHANGES, number + 1.7)
    assert len(slave.Records.all(records)) == slave.MAX_ENDED
    assert slave.Records.newest(records).update == 25000
    assert slave.Records.find(records, 16000).update == 16000
    for update in (15000, 1):
        assert slave.Records.find(records, update) is None, "never another's outcome"


def test_what_was_interrupted_three_times_is_not_begun_again():
    records = accepted()
    for _ in range(2):
        records = slave.Records.resume(slave.Records.start(records, ONE, 1001.0))
        assert records.queued and not records.running
    records = slave.Records.resume(slave.Records.start(records, ONE, 1001.0))
    assert records.running and not records.queued, "for the updater to end"


def test_a_clean_stop_is_no_try():
    records = accepted()
    for _ in range(5):
        records = slave.Records.requeue(slave.Records.start(records, None, 1001.0))
    assert (records.queued.tries, records.queued.started) == (0, None)


def test_a_newer_queued_update_takes_the_place_of_an_interrupted_one():
    records = accepted(slave.Records.start(accepted(ref="old"), None, 1001.0), "new", 1002.0)
    records = slave.Records.resume(records)
    assert [one.ref for one in slave.Records.all(records)] == ["new"]


def test_records_survive_the_file():
    records = slave.Records.start(accepted(), ONE, 1001.0)
    records = slave.Records.finish(records, 1000000, {"state": "failed", "message": "é"}, 1002.0)
    records = accepted(
        slave.Records.start(accepted(records, "v1", 1003.0), ONE, 1004.0), None, 1005.0
    )
    data = slave.Records.encode(records)
    # What has been counted since the slave began is not remembered.
    assert records.counts == {"failed": 1}
    assert slave.decode_records("hanuman", data) == records._replace(counts={})
    assert list(json.loads(data.decode()))[:16] == list(slave.TOLD)


def test_a_hand_made_file_with_the_ten_fields_alone_is_read():
    records = slave.Records.start(accepted(), ONE, 1001.0)
    records = slave.Records.finish(records, 1000000, LIVE_CHANGES, 1002.0)
    fields = dict(zip(slave.Record._fields[:10], slave.Records.newest(records)))
    newest = slave.decode_records("hanuman", json.dumps(fields).encode()).newest()
    assert (newest.state, newest.tries) == ("live", 0)


@pytest.mark.parametrize(
    "change",
    [
        {"repo": "other"},
        {"update": "1"},
        {"update": -1},
        {"update": float("nan")},
        {"update": 10**30},
        {"ref": "-x"},
        {"ref": 3},
        {"state": "done"},
        {"state": "queued"},
        {"requested": None},
        {"finished": "x"},
        {"finished": None},
        {"commit": "xyz"},
        {"commit": 1},
        {"message": None},
        {"tries": "1"},
        {"earlier": {}},
        {"pin": "xyz"},
        {"hook": "1"},
        {"by": "x" * 201},
        {"note": "\n"},
        {"via": "x"},
        {"first": "1"},
        {"earlier": ["same"]},
    ],
)
def test_no_record_with_a_wrong_value(change):
    fields = json.loads(
        slave.Records.encode(
            slave.Records.finish(
                slave.Records.start(accepted(), ONE, 1001.0), 1000000, LIVE_CHANGES, 1002.0
            )
        ).decode()
    )
    slave.decode_records("hanuman", json.dumps(fields).encode())
    if change.get("earlier") == ["same"]:
        change = {"earlier": [dict(fields, earlier=[])]}
    with pytest.raises((ValueError, TypeError, AttributeError)):
        slave.decode_records("hanuman", json.dumps(dict(fields, **change)).encode())


def test_two_queued_updates_are_no_records():
    fields = json.loads(slave.Records.encode(accepted()).decode())
    earlier = [dict(fields, update=1)]
    with pytest.raises(ValueError):
        slave.decode_records("hanuman", json.dumps(dict(fields, earlier=earlier)).encode())


def test_no_garbage_gets_past_decode():
    data = slave.Records.encode(slave.Records.start(accepted(), ONE, 1001.0))
    good = slave.decode_records("hanuman", data)
    dice = random.Random(4)
    for length in range(len(data) - 2):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            slave.decode_records("hanuman", data[:length])
    for _ in range(2000):
        torn = bytearray(data)
        torn[dice.randrange(len(data))] = dice.randrange(256)
        try:
            found = slave.decode_records("hanuman", bytes(torn))
        except (ValueError, TypeError, AttributeError):
            continue
        assert found.running and found.running.repo == good.running.repo


# -- what the end of a run means

LIVE = ("hanuman %s %s\n" % (TWO, ONE)).encode()


@pytest.mark.parametrize(
    "status, stdout, said, late, state, message",
    [
        (0, LIVE, {}, None, "live", ""),
        (0, LIVE, {"": "chatter"}, None, "live", ""),
        (0, b"", {"": "x"}, None, "failed", "slave-activate did not say which commit is live"),
        (
            0,
            LIVE + b"more\n",
            {},
            None,
            "failed",
            "slave-activate did not say which commit is live",
        ),
        (
            0,
            LIVE.replace(b"hanuman", b"other"),
            {},
            None,
            "failed",
            "slave-activate did not say which commit is live",
        ),
        (
            3,
            LIVE,
            {"slave-activate: ": "the post-update hook failed"},
            None,
            "live",
            "the post-update hook failed",
        ),
        (0, LIVE, {"slave-activate: ": "waiting for the lock"}, None, "live", ""),
        (
            0,
            LIVE,
            {"slave-activate: ": "cannot remove \"x\": it belongs to bob", "": "y"},
            None,
            "live",
            "cannot remove \"x\": it belongs to bob",
        ),
        (1, LIVE, {"slave-activate: ": "no"}, None, "failed", "no"),
        (1, b"", {"fatal: ": "a", "error: ": "b", "": "c"}, None, "failed", "a"),
        (1, b"", {"error: ": "b", "": "c"}, None, "failed", "b"),
        (-9, b"", {}, None, "failed", "slave-activate was killed by signal 9"),
        (127, b"", {}, None, "failed", "slave-activate ended with exit status 127"),
        (-15, b"", {}, 600, "failed", "stopped as it took longer than 600 s (TIMEOUT)"),
        (
            -15,
            b"",
            {"": "waiting"},
            600,
            "failed",
            "stopped as it took longer than 600 s (TIMEOUT), and had said: waiting",
        ),
        (-15, LIVE, {}, 600, "live", "stopped as it took longer than 600 s (TIMEOUT)"),
    ],
)
def test_judge(status, stdout, said, late, state, message):
    words = slave.Run.last_words(SimpleNamespace(said=said))
    changes = slave.judge("hanuman", status, stdout.rstrip(b"\n"), words, late)
    assert (changes["state"], changes["message"]) == (state, message)
    if state == "live":
        assert (changes["commit"], changes["previous"]) == (TWO, ONE)


def test_what_a_program_says_is_kept_as_it_may_be_told():
    """Printable, or the record would not be read again; short, without a password."""
    run = SimpleNamespace(name="hanuman", unfinished=b"", said={})
    text = "c\x1b[31m\u00a0of https://u:geheim@host/" + "x" * 9999
    slave.Run.take_stderr(run, text.encode() + b"\n")
    assert run.said == {"": ("c\\x1b[31m\\xa0of https://host/" + "x" * 9999)[:300]}


def test_of_a_line_without_end_a_start_is_looked_at(monkeypatch):
    """To look for URLs in all of one that has many takes a minute, in which nobody is answered."""
    looked_at = []
    look = SimpleNamespace(sub=lambda _, text: looked_at.append(len(text)) or text)
    monkeypatch.setattr(slave, "USER_RE", look)
    run = SimpleNamespace(name="hanuman", unfinished=b"", said={})
    slave.Run.take_stderr(run, b"://" * 20000 + b"\n")
    assert looked_at and max(looked_at) <= slave.MAX_LINE_BYTES + len("hanuman: ")


def test_judge_an_empty_repository_and_a_long_message():
    changes = slave.judge("hanuman", 0, ("hanuman - %s" % ONE).encode(), "", None)
    assert (changes["commit"], changes["previous"]) == (None, ONE)
    assert len(slave.judge("hanuman", 1, b"", "x" * 9999, None)["message"]) == 300


# -- names, queries, the log


@pytest.mark.parametrize("name", ["hanuman", "a", "_x", "9", "A.b-c_d", "x" * 100])
def test_good_names(name):
    assert slave.is_repo_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".a",
        "-a",
        "a/b",
        "a..b",
        "a.git",
        "a.lock",
        "a\n",
        "a b",
        "é",
        "x" * 101,
        "a\0",
        "a%",
        "../a",
        "٣",
    ],
)
def test_bad_names(name):
    assert not slave.is_repo_name(name)


def test_refs_are_what_git_takes():
    """Compared with git itself, on ten thousand texts made of what its rules are about."""
    dice = random.Random(2)
    alphabet = "ab./@{-~^: ?*[\\\x7f\té"
    texts = [
        "@",
        "a@",
        ".a",
        "a/.b",
        "a.lock",
        "a.lock/b",
        "a..b",
        "a//b",
        "/a",
        "a/",
        "a.",
        "a@{b",
        "v1.0",
        "a.lockx",
        "HEAD",
        "x" * 255,
    ]
    texts += [
        "".join(dice.choice(alphabet) for _ in range(dice.randint(1, 6))) for _ in range(400)
    ]
    for text in texts:
        git = subprocess.call(
            ["git", "check-ref-format", "--allow-onelevel", text], stderr=subprocess.DEVNULL
        )
        assert slave.is_ref(text) == (git == 0 and not text.startswith("-")), repr(text)
    assert not slave.is_ref("x" * 256)
    assert not slave.is_ref("")


def test_parse_query():
    assert slave.parse_query("repo=hanuman&ref=feature%2Fa+b&update=12&wait=3&zone=eu%zz") == {
        "repo": "hanuman",
        "ref": "feature/a+b",
        "update": "12",
        "wait": "3",
    }
    assert slave.parse_query("") == {}


@pytest.mark.parametrize(
    "query, text",
    [
        ("repo=", "bad 'repo'"),
        ("repo=a&repo=a", "'repo' is given twice"),
        ("repo=%ff", "bad 'repo'"),
        ("repo=%zz", "bad 'repo'"),
        ("repo=a%00", "bad 'repo'"),
        ("repo", "bad 'repo'"),
        ("repo=a&ref=", "bad 'ref'"),
        ("repo=a&ref=-x", "bad 'ref'"),
        ("repo=a&ref=%ff", "bad 'ref'"),
        ("ref=a&ref=b", "'ref' is given twice"),
        ("wait=-1", "bad 'wait'"),
        ("wait=1e9", "bad 'wait'"),
        ("update=x", "bad 'update'"),
        ("update=%D9%A3", "bad 'update'"),
        ("update=1%0a", "bad 'update'"),
    ],
)
def test_bad_queries(query, text):
    with pytest.raises(slave.Refusal) as refusal:
        slave.parse_query(query)
    assert refusal.value.args == (400, text)


def test_escape():
    assert slave.escape("plain é") == "plain é"
    assert slave.escape("a\x1b[2J\nb\r\u202e\udc80") == "a\\x1b[2J\\nb\\r\\u202e\\udc80"


# -- settings


def read(lines="", environ=None, options=None, tmp_path=None):
    conf = tmp_path / "slave.conf"
    conf.write_text(lines, encoding="utf-8")
    environ = dict({"SERVER_UPDATE_CONF": str(conf)}, **(environ or {}))
    return slave.read_settings(environ, options or {})


@pytest.mark.parametrize("home", ["relative", "/a\x1bb", "/a\nb"])
def test_a_home_that_is_no_folder_of_settings(tmp_path, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    with pytest.raises(ValueError) as mistake:
        read("REPOS_DIR=~/repos\n", tmp_path=tmp_path)
    assert mistake.value.args[0].endswith("bad REPOS_DIR '~/repos'")


def test_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = read(tmp_path=tmp_path)
    assert values == {
        "BASE_URL": "https://github.com/aiegoo",
        "REPOS_DIR": "/home/me/repos",
        "HOOKS_DIR": "/etc/server-update/hooks",
        "CONFIG": "/etc/server-update",
        "PORT": 9999,
        "BIND": None,
        "TIMEOUT": 600,
        "SUBMODULES": "yes",
        "SECRET_FILE": None,
        "ALLOW_FROM": None,
        "ALLOW_REPOS": None,
        "GIT_FROM": None,
        "VIEW_FROM": None,
        "SLAVELIST": None,
        "RELAY_OPTIONS": None,
        "TLS_CERT": None,
        "TLS_KEY": None,
    }


def test_file_environment_options(tmp_path):
    lines = (
        "# comment\r\n\r\n  PORT = 1 \r\nPORT='2'\nBASE_URL=\"/srv/git//\"\nTIMEOUT=5\n"
        "REPOS_DIR=/srv/my repos\nBIND=\n"
    )
    values = read(lines, tmp_path=tmp_path)
    assert (values["PORT"], values["BASE_URL"], values["TIMEOUT"]) == (2, "/srv/git", 5)
    assert values["REPOS_DIR"] == "/srv/my repos"
    values = read(
        lines, {"SERVER_UPDATE_PORT": "3", "SERVER_UPDATE_TIMEOUT": ""}, tmp_path=tmp_path
    )
    assert (values["PORT"], values["TIMEOUT"]) == (3, 5)
    values = read(lines, {"SERVER_UPDATE_PORT": "3"}, {"--port": "4"}, tmp_path=tmp_path)
    assert values["PORT"] == 4


@pytest.mark.parametrize(
    "line, text",
    [
        ("PORT=80x", "bad PORT '80x'"),
        ("PORT=65536", "bad PORT '65536'"),
        ("PORT=-1", "bad PORT '-1'"),
        ("PORT=٣", "bad PORT '٣'"),
        ("FOO=1", "unknown setting 'FOO'"),
        ("port=1", "unknown setting 'port'"),
        ("PORT", "no '=' in 'PORT'"),
        ("TIMEOUT=0", "bad TIMEOUT '0'"),
        ("BIND=web1", "bad BIND 'web1'"),
        ("REPOS_DIR=repos", "bad REPOS_DIR 'repos'"),
        ("SUBMODULES=maybe", "bad SUBMODULES 'maybe'"),
        ("BASE_URL=-x:y", "bad BASE_URL '-x:y'"),
        ("BASE_URL=https://a b", "bad BASE_URL 'https://a b'"),
        ("BASE_URL=relative", "bad BASE_URL 'relative'"),
        ("ALLOW_FROM=10.0.0.300", "bad ALLOW_FROM '10.0.0.300'"),
        ("ALLOW_FROM=10.0.0.1/8", "bad ALLOW_FROM '10.0.0.1/8'"),
        ("ALLOW_FROM=web1", "bad ALLOW_FROM 'web1'"),
        ("ALLOW_REPOS=a/b", "bad ALLOW_REPOS 'a/b'"),
        ("TLS_CERT=cert.pem", "bad TLS_CERT 'cert.pem'"),
        ("\x1b=1", "unknown setting '\\x1b'"),
    ],
)
def test_mistakes_in_the_file(line, text, tmp_path):
    with pytest.raises(ValueError) as mistake:
        read("# one\n" + line + "\n", tmp_path=tmp_path)
    assert mistake.value.args == ("%s:2: %s" % (tmp_path / "slave.conf", text),)


def test_mistakes_elsewhere(tmp_path):
    for environ, options, text in (
        ({"SERVER_UPDATE_PORT": "80x"}, {}, "bad PORT '80x' (set by SERVER_UPDATE_PORT)"),
        ({}, {"--port": "80x"}, "bad PORT '80x' (set by --port)"),
        ({}, {"--repos-dir": "~root/x"}, "bad REPOS_DIR '~root/x' (set by --repos-dir)"),
        ({}, {"--allow-from": ", "}, "bad ALLOW_FROM ',' (set by --allow-from)"),
        ({}, {"--allow-repos": ", ,"}, "bad ALLOW_REPOS ', ,' (set by --allow-repos)"),
        ({"SERVER_UPDATE_TLS_KEY": "/k"}, {}, "TLS_KEY is set, but TLS_CERT is not"),
    ):
        with pytest.raises(ValueError) as mistake:
            read("", environ, options, tmp_path)
        assert mistake.value.args == (text,)


# -- signatures


def vectors():
    """Those of the page's table, (secret, method, target, when, nonce, mac) each."""
    row = re.compile(r"^\| (.+) \| `(GET|HEAD) (\S+)` \| (\d+) \| `(\w+)` \| `(\w+)` \|$", re.M)
    found = []
    for secret, *more in row.findall(PAGE):
        found.append([found[-1][0] if secret == "the same" else secret.strip("`"), *more])
    return found


def test_signature_vectors(server_update):
    assert len(vectors()) == 4
    for secret, method, target, when, nonce, mac in vectors():
        assert slave.sign(secret.encode(), method, target, when, nonce) == mac
        assert server_update.sign(secret.encode(), method, target, when, nonce) == mac
        text = "\n".join(["server-update-1", method, target, when, nonce])
        openssl = ["openssl", "dgst", "-sha256", "-hmac", secret]
        said = subprocess.run(openssl, input=text.encode(), stdout=subprocess.PIPE, check=True)
        assert said.stdout.split()[-1].decode() == mac


def guard(tmp_path, **settings):
    path = tmp_path / "secret"
    path.write_bytes(SECRET + b"\n")
    path.chmod(0o600)
    settings = dict(
        {"SECRET_FILE": str(path), "ALLOW_FROM": None, "ALLOW_REPOS": None}, **settings
    )
    return slave.Guard(settings)


def test_nonces_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(slave, "MAX_NONCES", 100)
    one = guard(tmp_path)

    def ask(number, when, now, mac=None):
        nonce = "%032x" % number
        mac = mac or slave.sign(SECRET, "GET", "/status", str(when), nonce)
        return one.check_signature(["t=%d,n=%s,s=%s" % (when, nonce, mac)], "GET", "/status", now)

    def taken():
        return sum(len(key.taken) for key in one.nonces.values())

    for number in range(1000):  # not one with a wrong MAC is remembered
        with pytest.raises(slave.Refusal):
            ask(number, 5000, 5000.0, "0" * 64)
    assert not taken()
    for number in range(100):
        ask(number, 5000, 5000.0)
    with pytest.raises(slave.Refusal) as refusal:
        ask(100, 5000, 5300.0)
    assert refusal.value.args[0] == 503
    ask(101, 5301, 5301.0)
    assert taken() == 1, "what may be a replay is refused by its time"


def test_a_secret_never_goes_away_by_accident(tmp_path):
    one = guard(tmp_path)
    for spoil, status in (
        (lambda path: path.write_bytes(b"short\n"), 401),
        (lambda path: path.chmod(0o644), 401),
        (lambda path: path.unlink(), 503),
    ):
        spoil(tmp_path / "secret")
        with pytest.raises(slave.Refusal) as refusal:
            one.check_signature([], "GET", "/status", 5000.0)
        assert refusal.value.args[0] == status


def test_a_secret_that_comes_later_and_is_no_good_lets_nobody_in(tmp_path):
    one, path = guard(tmp_path), tmp_path / "secret"
    one.secrets = []  # as it is where there was no file at the start
    path.chmod(0o644)
    with pytest.raises(slave.Refusal) as refusal:
        one.check_signature([], "GET", "/status", 5000)
    assert refusal.value.args == (401, "signature missing or wrong")
    path.unlink()
    one.check_signature([], "GET", "/status", 5000)


def test_allow_from(tmp_path):
    networks = slave.SETTINGS["ALLOW_FROM"].parse(
        "10.0.0.0/8, 192.168.1.7 fe80::/10,::1 ::FFFF:172.16.0.1,2001:db8::ffff:1"
    )
    one = guard(tmp_path, ALLOW_FROM=networks)
    assert slave.MAPPED_RE.sub("", "2001:db8::ffff:10.1.2.3") == "2001:db8::ffff:10.1.2.3"
    assert slave.MAPPED_RE.sub("", "::ffff:10.1.2.3") == "10.1.2.3"
    inside = ("10.1.2.3", "192.168.1.7", "::1", "fe80::1%eth0", "172.16.0.1", "2001:db8::ffff:1")
    for address in inside:
        one.check_address(address)
    for address in ("11.0.0.1", "192.168.1.8", "::2", "2001:db8::1"):
        with pytest.raises(slave.Refusal) as refusal:
            one.check_address(address)
        assert refusal.value.args == (403, "not from this address")


def test_allow_repos(tmp_path):
    one = guard(tmp_path, ALLOW_REPOS=slave.SETTINGS["ALLOW_REPOS"].parse("hanuman, web-* [ab]"))
    for repo in ("hanuman", "web-1", "a"):
        one.check_repo(repo)
    for repo in ("hanuman2", "Web-1", "c"):
        with pytest.raises(slave.Refusal):
            one.check_repo(repo)


# -- the journal


def test_what_tries_the_disk_at_the_start_is_no_repositorys_record(tmp_path):
    folder = tmp_path / "repos/.server-update"
    folder.mkdir(parents=True)
    records = slave.Records().accept("test", None, 1000.0, {})
    (folder / "test.json").write_bytes(records.encode())
    assert slave.Journal(str(folder)).records == {"test": records}
    assert (folder / "test.json").read_bytes() == records.encode()


def test_what_writes_records_runs_before_anything_is_served(tmp_path, monkeypatch):
    """A thread whose first steps find no memory ends, so it has to have made them by then."""
    steps = []

    def start_late(function, *args):
        def run():
            time.sleep(0.3)  # as on a busy machine
            steps.append("it runs")
            function(*args)

        threading.Thread(target=run, daemon=True).start()

    monkeypatch.setattr(slave, "start_thread", start_late)
    journal = slave.Journal(str(tmp_path / "repos/.server-update"))
    assert steps == ["it runs"]
    assert (journal.records, journal.unsaved) == ({}, set())

"""A key for each slave, made from the master's: whose it is, what it signs, what mistakes do."""

import getpass
import hashlib
import hmac
import os
import re
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
from farm import after, at_once, error, http, updates
from product import PYTHON, ROOT, need
from slave_support import make_secret, signature, stand_in

MASTER_KEY = "0123456789abcdef0123456789abcdef"
SECRET = "a secret that all of them know"
# Entries, and the origin that their key is made of.
ORIGINS = {
    "http://web1:9999": ["web1", "web1:9999", "WEB1", "web1.", "http://web1:9999/get/?site=3"],
    "http://web1:80": ["http://web1", "web1:80", "HTTP://Web1.:80/x"],
    "https://web1:443": ["https://web1/", "https://web1:443/get/"],
    "http://xn--bcher-kva.example:9999": ["bücher.example", "BÜCHER.example.:9999"],
    "http://[2001:db8::7]:9999": ["[2001:DB8:0:0::7]", "http://[2001:db8::7]:9999"],
    "http://192.0.2.7:8000": ["192.0.2.7:8000"],
}
VECTOR = re.compile(r"^\| `(\S+?)` \| `(http\S+)` \| `([0-9a-f]{64})` \|$", re.M)
RUNNING = '{"error": "this slave has just started: signed too early", "floor": 1}'


def security_page():
    """What docs/security.md says of keys."""
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    return text[text.index("\n## A key for each slave") :]


def key_of(origin, master_key=MASTER_KEY):
    """The key of the slave there, made without any of the product's code."""
    text = "server-update-slave-1\n" + origin
    return hmac.new(master_key.encode(), text.encode(), hashlib.sha256).hexdigest()


def is_signed(request, key):
    """Whether a request that the farm got is signed with that key."""
    given = re.fullmatch(
        "t=([0-9]+),n=([0-9a-f]{32}),s=([0-9a-f]{64})",
        request.headers["X-Server-Update-Signature"],
    )
    expected = signature(request.path, key, "GET", *given.groups()[:2])
    return request.headers["X-Server-Update-Signature"] in expected.values()


@pytest.fixture
def master_key(tmp_path):
    """A file with a master key."""
    return make_secret(tmp_path / "master-key", MASTER_KEY)


@pytest.fixture
def find_key(run_script, master_key):
    """find_key(ENTRY): what --slave-key prints for it."""

    def find(entry):
        done = run_script("server-update", "--master-key-file", master_key, "--slave-key", entry)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return find


# -- whose key it is


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_key_of_a_slave_is_made_of_what_is_connected_to(find_key, origin):
    found = {entry: find_key(entry) for entry in ORIGINS[origin]}
    assert found == dict.fromkeys(ORIGINS[origin], key_of(origin) + "\n")


def test_the_vectors_of_the_security_page_are_openssls(find_key):
    vectors = VECTOR.findall(security_page())
    assert len(vectors) >= 4
    for master_key, origin, key in vectors:
        assert key == key_of(origin, master_key)
        assert master_key != MASTER_KEY or find_key(origin) == key + "\n"
        if shutil.which("openssl"):
            openssl = ["openssl", "dgst", "-sha256", "-hmac", master_key]
            text = ("server-update-slave-1\n" + origin).encode()
            assert subprocess.check_output(openssl, input=text).split()[-1].decode() == key


@pytest.mark.parametrize(
    ("lines", "mode", "entry", "message"),
    [
        ([], 0o600, "web1", "secret file '{0}' has no secret in it; do: (umask 077; openssl"),
        (["short"], 0o600, "web1", "secret file '{0}' has a line of less than 16 bytes; do: "),
        ([MASTER_KEY] * 2, 0o600, "web1", "master key file '{0}' has more than one line\n"),
        ([MASTER_KEY], 0o640, "web1", "others can read secret file '{0}'; do: chmod 600 {0}\n"),
        ([MASTER_KEY], 0o600, "web1:80x", "bad port '80x'\n"),
        ([MASTER_KEY], 0o600, "", "bad host ''\n"),
        ([MASTER_KEY], 0o600, "web1 web2", "bad host 'web1 web2'\n"),
        (None, None, "web1", "{0}: No such file or directory\n"),
    ],
)
def test_no_key_is_made_of_a_mistake(run_script, tmp_path, lines, mode, entry, message):
    path = tmp_path / "master-key"
    if lines is not None:
        make_secret(path, *lines, mode=mode)
    done = run_script("server-update", "--master-key-file", path, "--slave-key", entry)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("server-update: " + message.format(path))


def test_without_a_master_key_no_slave_has_a_key(server_update, monkeypatch, tmp_path, capsys):
    path = tmp_path / "master-key"
    monkeypatch.setattr(server_update, "config_folder", lambda script: str(tmp_path))
    assert server_update.main(["--slave-key", "web1"]) == 2
    advice = "no master key; do: (umask 077; openssl rand -hex 32 >%s)" % path
    assert capsys.readouterr() == ("", "server-update: %s\n" % advice)
    make_secret(path, MASTER_KEY)
    assert server_update.main(["--slave-key", "web1"]) == 0
    assert capsys.readouterr().out == key_of("http://web1:9999") + "\n"
    # what is there and can't be looked at is not absent
    path.unlink()
    path.symlink_to(tmp_path / "gone" / "too")
    assert server_update.main(["--slave-key", "web1"]) == 2
    assert capsys.readouterr() == ("", "server-update: %s: No such file or directory\n" % path)


# -- what it signs


def test_each_slave_is_asked_with_its_own_key_and_nothing_else(farm, update, master_key, tmp_path):
    """Whatever else there is; entries that differ in path alone have one key."""
    secret = make_secret(tmp_path / "secret", SECRET)
    entries = [farm.add(updates(0.2)) for _ in range(3)]
    entries.append("http://%s/other/?site=3" % entries[0])
    options = ["--master-key-file", str(master_key), "--secret-file", str(secret)]
    assert update(entries, *options, "--no-wait").returncode == 0
    assert len(farm.requests) == len(entries)
    for request in farm.requests:
        own = key_of("http://%s:%d" % (request.slave, farm.port))
        assert is_signed(request, own)
        assert not is_signed(request, SECRET)
        assert not is_signed(request, MASTER_KEY)


@pytest.mark.parametrize("option", ["--status", "--history", "--no-wait"])
def test_every_kind_of_question_is_signed_with_it(farm, update, master_key, option):
    entry = farm.add(updates())
    update([entry], "--master-key-file", str(master_key), option)
    assert [is_signed(one, key_of("http://" + entry)) for one in farm.requests] == [True]


def test_a_master_key_that_is_no_good_sends_nothing(farm, update, tmp_path):
    path = make_secret(tmp_path / "master-key", MASTER_KEY, mode=0o644)
    done = update([farm.add(updates())], "--master-key-file", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("server-update: others can read secret file")
    assert not farm.requests


def test_a_slaves_key_is_worth_nothing_at_another(start_slave, tmp_path, update, master_key):
    """Real slaves, each with the key of its own in its file; then one takes another's."""
    slaves = [start_slave(SECRET_FILE=tmp_path / ("secret-%d" % n), wait=False) for n in (1, 2)]
    for number, slave in enumerate(slaves, 1):
        slave.process.wait()  # it has no secret yet
        make_secret(tmp_path / ("secret-%d" % number), "0" * 64)
        slave.start()
        make_secret(tmp_path / ("secret-%d" % number), key_of(slave.url))
        stand_in(slave)
    entries = ["127.0.0.1:%d" % slave.port for slave in slaves]
    done = update(entries, "--json", "--master-key-file", str(master_key))
    assert done.outcomes == dict.fromkeys(entries, "live"), done.stdout
    stolen = key_of(slaves[0].url)
    for target in ("/?repo=hanuman", "/status", "/status?repo=hanuman"):
        assert slaves[0].get(target, headers=signature(target, stolen))[0] in (200, 202)
        assert slaves[1].get(target, headers=signature(target, stolen))[0] == 401
    # nor is what was sent to one worth anything there
    header = signature("/?repo=hanuman", stolen)
    assert slaves[1].get("/?repo=hanuman", headers=header)[0] == 401
    assert slaves[0].get("/?repo=hanuman", headers=header)[0] == 202


def test_a_key_is_made_once_for_a_slave(server_update, master_key):
    """Not for each question: 10,000 slaves are asked 30,000 of them."""
    find = server_update.choose_key(SimpleNamespace(master_key_file=str(master_key)))
    first = find("http://web1:9999")
    assert first == key_of("http://web1:9999").encode()
    assert find("http://web1:" + "9999") is first
    assert find("http://web2:9999") == key_of("http://web2:9999").encode()


# -- a slave that has just started


def late(times, then):
    """A kind that takes no signal before the `times` + 1st, as it was signed too early."""

    def kind(request):
        if request.count <= times and not request.path.startswith("/status"):
            return at_once(http("503 Later", RUNNING, headers="Retry-After: 1\r\n"))
        return then(request)

    return kind


def test_a_slave_that_has_just_started_is_waited_for(farm, update, master_key):
    """As long as it says and as often as need be, with no --retries; each try is signed anew."""
    entry = farm.add(late(3, updates()))
    options = ["--retries=0", "--master-key-file", str(master_key)]
    begun = time.monotonic()
    done = update([entry], "--json", *options)
    assert done.outcomes == {entry: "live"}
    assert time.monotonic() - begun >= 3
    signals = [one for one in farm.requests if not one.path.startswith("/status")]
    assert len(signals) == 4
    sent = [one.headers["X-Server-Update-Signature"] for one in signals]
    assert len({re.search("n=([0-9a-f]+)", one).group(1) for one in sent}) == 4
    assert all(is_signed(one, key_of("http://" + entry)) for one in signals)


def test_a_slave_that_starts_for_ever_has_failed_by_the_timeout(farm, update):
    entry = farm.add(late(1000, updates()))
    busy = farm.add(error("503 Later", "too much is queued", "Retry-After: 1\r\n"))
    done = update([entry, busy], "--json", "--retries=0", "--timeout=5")
    assert done.outcomes == {entry: "failed", busy: "failed"}
    message = "this slave has just started: signed too early (HTTP 503)"
    assert done.results[entry]["message"] == message
    assert farm.signals[entry.split(":")[0]] >= 2
    assert farm.signals[busy.split(":")[0]] == 1


def test_what_comes_too_late_for_the_timeout_takes_back_nothing(farm, update):
    """The last question is asked just before that; what the slave has said before holds."""
    starting = farm.add(after(0.5, late(1000, updates())))
    running = farm.add(after(0.5, updates(1000)))
    done = update([starting, running], "--json", "--parallel=2", "--timeout=5")
    assert done.outcomes == {starting: "failed", running: "timeout"}
    message = "this slave has just started: signed too early (HTTP 503)"
    assert done.results[starting]["message"] == message
    assert done.results[running]["message"] == "no outcome within 5 s"


def test_a_master_whose_clock_is_behind_waits_for_a_slave_that_has_restarted(
    start_slave, update, tmp_path
):
    """What another master, two seconds ahead, has signed is the floor after the restart."""
    secret = make_secret(tmp_path / "secret", SECRET)
    slave = start_slave(SECRET_FILE=secret, constants={"FLOOR_STEP_S": 1})  # to wait for less
    stand_in(slave)
    ahead = signature("/?repo=hanuman", SECRET, when=time.time() + 2)
    assert slave.get("/?repo=hanuman", headers=ahead)[0] == 202
    assert slave.stop() == 0
    slave.start()
    entry = "127.0.0.1:%d" % slave.port
    done = update([entry], "--json", "--retries=0", "--secret-file", str(secret))
    assert done.outcomes == {entry: "live"}, done.stdout
    assert time.time() > float(re.search("t=([0-9]+)", str(ahead))[1])


# -- by hand


def shell_block(beginning):
    """The shell lines of the page that begin so."""
    text = security_page().partition("```sh\n" + beginning)[2]
    return beginning + text.partition("```")[0]


def run_shell(shell, lines, **kwargs):
    """Run lines as `sh -eu` does; what they print."""
    return subprocess.check_output([shell, "-euc", lines], timeout=300, **kwargs).decode()


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_the_page_signs_with_a_key_of_its_own(start_slave, tmp_path, shell):
    need("openssl")
    need("curl")
    slave = start_slave(SECRET_FILE=make_secret(tmp_path / "secret", SECRET))
    stand_in(slave)
    make_secret(tmp_path / "secret", key_of(slave.url))
    make_secret(tmp_path / "master-key", MASTER_KEY)
    lines = shell_block("origin=http://web1:9999; ")
    lines = lines.replace("http://web1:9999", slave.url).replace("curl ", "curl -s ")
    assert '"update": ' in run_shell(shell, lines.replace("/etc/server-update", str(tmp_path)))


def test_keys_are_brought_to_their_slaves(tmp_path):
    """With a stand-in for ssh that runs what it is told on this machine, as root if it can be."""
    need("openssl")
    user = getpass.getuser() if os.getuid() else "nobody"  # who runs the slave
    (tmp_path / "ssh").write_text('#!/bin/sh\necho "$*" >"$TOLD"\nexec sh -c "$2"\n')
    (tmp_path / "server-update").write_text(
        '#!/bin/sh\nexec %s %s --master-key-file "$KEY" "$@"\n' % (PYTHON, ROOT / "server-update")
    )
    for name in ("ssh", "server-update"):
        (tmp_path / name).chmod(0o755)
    master_key, secret, told = (tmp_path / name for name in ("key", "secret", "told"))
    lines = shell_block("(umask 077; openssl")
    lines = lines.replace("/etc/server-update/master-key", str(master_key))
    lines = lines.replace("cd /etc/server-update ", "cd %s " % tmp_path)
    lines = lines.replace("chown deploy ", "chown %s " % user)
    assert "/etc/" not in lines and "chown %s " % user in lines
    path = "%s:%s" % (tmp_path, os.environ["PATH"])
    env = {"PATH": path, "KEY": str(master_key), "TOLD": str(told)}
    run_shell("sh", lines, env=env)
    key = secret.read_text().strip()
    assert key == key_of("http://web1:9999", master_key.read_text().strip())
    assert key not in told.read_text()
    assert [path.stat().st_mode & 0o777 for path in (master_key, secret)] == [0o600, 0o600]
    assert secret.owner() == user
    # Where there is no key, what was there stays.
    (tmp_path / "server-update").write_text("#!/bin/sh\nexit 2\n")
    bring = lines.splitlines()[-2:]
    assert subprocess.call(["sh", "-c", "\n".join(bring)], env=env) != 0
    assert secret.read_text().strip() == key

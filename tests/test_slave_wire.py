"""What slave.py takes and tells beside the update itself: pin, hook, by, note, via, history."""

import json
import os
import shutil

import pytest
from processes import wait_until
from slave_support import (
    ONE,
    SECRET,
    SOON_ENDED,
    make_secret,
    runs,
    signature,
    stand_in,
    start_by_hand,
    wait_runs,
)

NOBODY = 65534
TWO = "2" * 40
ENDS = '#!/bin/sh\necho "$1 %s -"\n' % ONE
ID = "0123456789abcdef"


# -- parameters


def test_the_commit_by_note_and_via_are_kept(start_slave):
    slave = start_slave()
    stand_in(slave, text='#!/bin/sh\necho "$*" >>"$HOME/runs"\nexit 1\n')
    told = slave.json("/?repo=hanuman&ref=main&commit=%s&by=me%%40web&note=it%%20is%%20time&via=%s"
                      % ("AB" * 20, ID), status=202)
    assert list(told) == ["repo", "update", "state", "ref"]
    record = slave.wait_update(update=told["update"])
    assert (record["pin"], record["by"], record["note"]) == ("ab" * 20, "me@web", "it is time")
    assert runs(slave) == ["--commit %s hanuman main" % ("ab" * 20)]
    assert "was asked for by 127.0.0.1, me@web, it is time\n" in slave.log()
    kept = json.loads((slave.state / "hanuman.json").read_text())
    assert (kept["via"], kept["pin"]) == (ID, "ab" * 20)
    slave.stop()
    slave.start()
    assert slave.json("/status?repo=hanuman")["note"] == "it is time"
    record = slave.wait_update()
    assert [record[key] for key in ("pin", "by", "note", "hook", "beneath", "beneath_bad")] == (
        [None] * 6
    )


@pytest.mark.parametrize("query, text", [
    ("commit=" + "a" * 39, "bad 'commit'"),
    ("commit=" + "a" * 41, "bad 'commit'"),
    ("commit=" + "g" * 40, "bad 'commit'"),
    ("commit=", "bad 'commit'"),
    ("by=" + "x" * 201, "bad 'by'"),
    ("by=%0a", "bad 'by'"),
    ("note=%ff", "bad 'note'"),
    ("note=a&note=a", "'note' is given twice"),
    ("via=" + ID[1:], "bad 'via'"),
    ("via=" + ID.upper(), "bad 'via'"),
    ("via=" + ",".join([ID] * 9), "bad 'via'"),
    ("via=%s," % ID, "bad 'via'"),
    ("history=2", "bad 'history'"),
])
def test_bad_parameters(idle_slave, query, text):
    assert idle_slave.json("/?repo=a&" + query, status=400) == {"error": text}
    assert not list(idle_slave.state.glob("*.json"))


def test_parameters_that_just_fit(start_slave):
    slave = start_slave()
    stand_in(slave)
    for query in ("commit=" + "a" * 64, "by=" + "%C3%A9" * 200, "via=" + ",".join([ID] * 8)):
        slave.json("/?repo=a&" + query, status=202)


def test_history(start_slave):
    slave = start_slave()
    stand_in(slave)
    ids = [slave.wait_update()["update"] for _ in range(12)]
    told = slave.json("/status?repo=hanuman&history=1")
    assert list(told) == ["repo", "updates"] and told["repo"] == "hanuman"
    assert [one["update"] for one in told["updates"]] == ids[:1:-1]
    assert told["updates"][0] == slave.json("/status?repo=hanuman")
    assert slave.json("/status?repo=nothing&history=1", status=404)
    assert slave.json("/status?repo=hanuman&history=0") == told["updates"][0]


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": ""},
])
def test_a_web_page_starts_nothing(start_slave, headers):
    slave = start_slave()
    assert slave.json("/?repo=a", headers=headers, status=403) == {
        "error": "a web page may not start an update"
    }
    assert slave.get("/status", headers=headers)[0] == 200
    assert not list(slave.state.glob("*.json"))
    stand_in(slave)
    slave.json("/?repo=a", headers={"Sec-Fetch-Site": "none"}, status=202)


# -- the post-update hook


@pytest.mark.parametrize("line, hook", [
    ("live, but post-update hook failed (1): nginx: [emerg] bad config in line 7", 1),
    ("live, but post-update hook failed (143): it was stopped", 143),
    ("live, but post-update hook failed (126)", 126),
    ("live, but post-update hook failed (7): (9): x", 7),
    ("something else", 1),
])
def test_a_post_update_hook_that_failed(start_slave, line, hook):
    slave = start_slave()
    stand_in(slave, text="%secho 'slave-activate: %s' >&2\nexit 3\n" % (ENDS, line))
    record = slave.wait_update()
    assert (record["state"], record["commit"]) == ("live", None), "there is no tree here"
    assert (record["hook"], record["message"]) == (hook, line)
    stand_in(slave, text=ENDS)
    assert slave.wait_update()["hook"] is None


def test_a_post_update_hook_that_the_slave_had_to_end(start_slave):
    slave = start_slave(TIMEOUT=1, constants=SOON_ENDED)
    stand_in(slave, text=ENDS + "exec sleep 1000\n")
    record = slave.wait_update()
    assert (record["state"], record["hook"]) == ("live", 128 + 15)


# -- nothing fails open


@pytest.fixture
def without_rights(start_slave, tmp_path):
    """A slave whose /etc/server-update is a folder of the test's, and another user's."""
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv")
    slave = start_slave()
    slave.stop()
    etc = tmp_path / "etc"
    etc.mkdir()
    script = slave.bin / "slave.py"
    text = script.read_text(encoding="utf-8")
    script.write_text(text.replace('"/etc/server-update', '"%s' % etc), encoding="utf-8")
    shutil.rmtree(str(slave.repos))
    shutil.rmtree(str(slave.etc))
    os.chown(str(etc), NOBODY, NOBODY)
    slave.command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search",
                     "--inh-caps=-all", *slave.command]
    slave.etc = etc
    return slave


def test_a_folder_of_settings_that_cannot_be_looked_into_is_an_error(without_rights):
    slave = without_rights
    make_secret(slave.etc / "secret", SECRET)
    (slave.etc / "slave.conf").write_text("ALLOW_FROM=10.0.0.0/8\n")
    slave.etc.chmod(0o700)
    args = ["--port", 0, "--bind", "127.0.0.1", "--repos-dir", slave.home / "r"]
    status, stderr = start_by_hand(slave, *args)
    assert (status, stderr) == (
        1, "slave.py: can't use '%s': Permission denied\n" % (slave.etc / "slave.conf")
    )
    (slave.etc.parent / "conf").write_text("")
    status, stderr = start_by_hand(
        slave, *args, SERVER_UPDATE_CONF=str(slave.etc.parent / "conf"))
    assert (status, stderr) == (
        1, "slave.py: can't use '%s': Permission denied\n" % (slave.etc / "secret")
    )


def test_a_running_slave_that_cannot_look_refuses(without_rights):
    slave = without_rights
    slave.settings["HOOKS_DIR"] = ""
    slave.start()
    assert slave.get("/?repo=a")[0] == 202
    slave.etc.chmod(0o700)
    for target in ("/?repo=a", "/status"):
        assert slave.json(target, status=503) == {
            "error": "can't read the secret: Permission denied"
        }
    slave.etc.chmod(0o755)
    assert slave.get("/?repo=a")[0] == 202
    slave.etc.rename(slave.etc.parent / "moved")
    slave.etc.symlink_to("nowhere")
    assert slave.get("/?repo=a")[0] == 503, "a link that leads nowhere is not absent"
    slave.etc.unlink()
    assert slave.get("/?repo=a")[0] == 202


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.mkdir(),
    lambda path: os.mkfifo(str(path)),
])
def test_a_secret_that_is_no_file_is_an_error(without_rights, make):
    slave = without_rights
    make(slave.etc / "secret")
    status, stderr = start_by_hand(slave, "--port", 0, "--repos-dir", slave.home / "r")
    assert status == 1
    assert stderr.startswith("slave.py: can't use '%s': " % (slave.etc / "secret"))


def test_a_hooks_folder_that_is_named_must_exist(start_slave, tmp_path):
    slave = start_slave()
    status, stderr = start_by_hand(slave, "--port", 0, "--repos-dir", tmp_path / "free",
                                      "--hooks-dir", tmp_path / "nothing")
    assert (status, stderr) == (
        1, "slave.py: can't use '%s': No such file or directory\n" % (tmp_path / "nothing")
    )


def test_a_pre_update_hook_that_vanishes_is_no_reason_to_go_live(start_slave):
    slave = start_slave()
    stand_in(slave, 'until [ -e "$HOME/go" ]; do sleep 0.02; done')
    hook = slave.hooks / "pre-update"
    hook.write_text("#!/bin/sh\nexit 1\n")
    gone = "the pre-update hook is gone; if that is meant, restart the slave"
    slave.signal("first")
    wait_runs(slave, 1)
    queued = slave.signal("first")
    hook.unlink()
    assert slave.json("/?repo=a", status=503) == {"error": gone}
    (slave.home / "go").touch()
    record = slave.wait_update("first", queued)
    assert (record["state"], record["message"]) == ("failed", gone)
    hook.write_text("")
    assert slave.wait_update("a")["state"] == "live"
    slave.hooks.rename(slave.hooks.parent / "moved")
    assert slave.get("/?repo=a")[0] == 503
    slave.hooks.mkdir()
    slave.stop()
    slave.start()
    assert slave.get("/?repo=a")[0] == 202


# -- words


def test_no_user_or_password_of_a_url_is_told(start_slave, http_upstream):
    http_upstream.create("hanuman", files={"a": "1"})
    url = http_upstream.url.replace("://", "://us3r:hunter2@")
    slave = start_slave(BASE_URL=url)
    assert slave.wait_update()["state"] == "live"
    stand_in(slave, text="#!/bin/sh\necho \"fatal: can't reach $SERVER_UPDATE_BASE_URL/x\" >&2\n"
                         "echo \"see ssh://us3r@host/x and mail@example.org\" >&2\nexit 1\n")
    record = slave.wait_update()
    assert record["message"] == "can't reach %s/x" % http_upstream.url
    assert "see ssh://host/x and mail@example.org" in slave.log()
    slave.get("/?repo=..&x=http://us3r:hunter2@x/")
    told = json.dumps(slave.json("/status")) + slave.log()
    assert "hunter2" not in told and "us3r" not in told


@pytest.mark.parametrize("password", ["pw/hunter2", "1/2@hunter2", "it's?#hunter2"])
def test_nor_where_what_it_should_be_is_not_encoded(start_slave, password):
    """In its first lines, and in the complaint that it does not start with."""
    url = "http://us3r:%s@x/y" % password
    slave = start_slave(BASE_URL=url)
    slave.stop()
    assert "repositories of http://x/y updated" in slave.log()
    status, told = start_by_hand(slave, "--base-url", url + "/a b")
    assert (status, told) == (2, "slave.py: bad BASE_URL 'http://x/y/a b' (set by --base-url)\n")
    slave.conf.write_text("BASE_URL %s\n" % url)
    status, told = start_by_hand(slave, SERVER_UPDATE_CONF=str(slave.conf))
    assert (status, told.count("no '='")) == (2, 1)
    assert "hunter2" not in told + slave.log()


def test_a_base_url_of_slashes_alone_is_the_root(start_slave):
    slave = start_slave(BASE_URL="/")
    stand_in(slave, text='#!/bin/sh\necho "$SERVER_UPDATE_BASE_URL" >>"$HOME/runs"\nexit 1\n')
    slave.wait_update()
    assert runs(slave) == ["/"]
    assert "repositories of / updated" in slave.log()


def test_no_python_in_the_log(start_slave):
    slave = start_slave()
    stand_in(slave, text="#!/bin/sh\nprintf 'error: a\\tb\\n\\n' >&2\nexit 1\n")
    record = slave.wait_update()
    assert record["message"] == "a b"
    wait_until(lambda: "live is nothing: a b\n" in slave.log())
    assert "None" not in slave.log() and "\\t" not in slave.log()


def test_a_served_file_and_settings_of_a_child_are_text(start_slave):
    """What slave-activate gets is what holds, whatever the environment had."""
    slave = start_slave(TIMEOUT=7, env={"SERVER_UPDATE_SUBMODULES": "no"})
    stand_in(slave, text='#!/bin/sh\nenv | grep ^SERVER_UPDATE_ | sort >>"$HOME/runs"\nexit 1\n')
    slave.wait_update()
    assert "SERVER_UPDATE_TIMEOUT=7" in runs(slave)
    assert "SERVER_UPDATE_SUBMODULES=no" in runs(slave)


def test_a_signed_signal_has_all_of_it_signed(start_slave, tmp_path):
    slave = start_slave(SECRET_FILE=make_secret(tmp_path / "secret", SECRET))
    stand_in(slave)
    target = "/?repo=a&commit=%s&note=why" % TWO
    right = signature(target)
    assert slave.get(target.replace("why", "not"), headers=right)[0] == 401
    assert slave.get(target.replace(TWO, ONE), headers=right)[0] == 401
    assert slave.get(target, headers=right)[0] == 202

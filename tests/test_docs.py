"""README.md and docs/: their commands run, their links lead somewhere, the README stays short.

Each block of commands (```sh) is run here, as it stands, by `sh -e` beside a slave `web1` that is
up and a repository `hanuman`; unless a table below says which other test runs it, or why none
does.
"""

import http.server
import json
import os
import re
import stat
import subprocess
import threading

import pytest
from forge_support import make_key
from pages import COMMANDS, PAGES, find_block, read
from processes import wait_until
from product import ROOT, SERVER_UPDATE, need, with_no_rights
from slave_support import SECRET, make_secret

MAX_README_LINES = 170
TIMEOUT_S = 300

# How a block begins that installs a hook of docs/examples.
HOOK_BY = "install -d /etc/server-update/hooks\ninstall docs/examples/%s"

# (page, how a block begins): the test that runs what is in it.
BY_TEST = {
    ("README.md", "sh tests/demo"): "test_the_demo_shows_both_commits_and_leaves_nothing",
    ("README.md", "./install.sh slave"): "test_the_readme_is_followed_to_the_letter",
    ("README.md", "./install.sh master web1"): "test_the_readme_is_followed_to_the_letter",
    ("README.md", "./install.sh master --new"): "test_the_readme_is_followed_to_the_letter",
    ("README.md", "server-update hanuman"): "test_the_readme_is_followed_to_the_letter",
    ("README.md", "curl "): "test_the_readme_is_followed_to_the_letter",
    ("operations.md", "journalctl"): "test_a_reload_reads_the_certificate_again",
    ("recipes.md", "server-update --batch 1,10"): "test_a_careful_rollout",
    ("recipes.md", "docs/examples/check_server_update"): "test_the_nagios_plugin",
    ("recipes.md", "server-update --status --json"): "test_the_textfile_for_node_exporter",
    ("recipes.md", "install -d /etc/server-update/hooks /srv"): "test_uploads_are_kept",
    ("recipes.md", "slave.py --hook-key"): "test_a_push_as_the_page_has_it",
    ("recipes.md", "key="): "test_a_push_as_the_page_has_it",
    ("recipes.md", "./install.sh relay"): "test_it_says_url_and_key_for_the_forge",
    ("recipes.md", "install -d /etc/server-update/hooks /etc"): "test_a_hold",
    ("recipes.md", HOOK_BY % "tell"): "test_a_chat_is_told",
    ("recipes.md", "install -d /etc/server-update/hooks/pre"): "test_several_hooks",
    ("recipes.md", "ssh-keygen"): "test_a_deploy_key",
    ("recipes.md", "git config --global credential"): "test_a_token",
    ("recipes.md", 'chown "root:'): "test_a_token_in_slave_conf",
    ("recipes.md", HOOK_BY % "only"): "test_only_signed_commits_go_live",
    ("recipes.md", 'server-update --commit "$(git'): "test_from_ci",
    ("recipes.md", "install -d -o deploy"): "test_a_hook_of_a_user_has_a_service_restarted",
    ("scale.md", "git config --global http."): "test_over_tls_as_the_page_has_it",
    ("security.md", "./install.sh master --new"): "test_the_readme_is_followed_to_the_letter",
    ("security.md", "target="): "test_the_page_signs_with_curl_and_a_shell",
    ("security.md", "origin="): "test_the_page_signs_with_a_key_of_its_own",
    ("security.md", "(umask 077; openssl"): "test_keys_are_brought_to_their_slaves",
}
# (page, how a block begins): why nothing runs it.
BY_NOTHING = {
    ("development.md", "sh tests/run "): "the tests themselves",
    ("development.md", "sh bench/against"): "it measures for minutes",
    ("promises.md", "sh tests/run tests/faults"): "the tests themselves, and for minutes",
}


RUN_HERE = [
    block for block in COMMANDS if not (block.find_in(BY_TEST) or block.find_in(BY_NOTHING))
]


# -- the pages


def test_the_readme_is_for_five_minutes():
    assert len(read(ROOT / "README.md").splitlines()) <= MAX_README_LINES


def without_code(text):
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def anchor(heading):
    """The name that a forge gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def anchors(page):
    return {anchor(line) for line in re.findall(r"(?m)^#+ (.*)$", without_code(read(page)))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(read(page)))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, part = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if part:
            assert part in anchors(target), link


def test_the_readme_leads_to_every_page():
    linked = re.findall(r"\]\(docs/(\w+\.md)", read(ROOT / "README.md"))
    assert set(linked) == {page.name for page in PAGES[1:]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_stands_between_fences(page):
    assert not re.search(r"\n\n    \S.*", without_code(read(page)))


# -- their commands


def test_every_block_is_accounted_for():
    for table in (BY_TEST, BY_NOTHING):
        for page, beginning in table:
            assert [block for block in COMMANDS if block.begins(page, beginning)], beginning
    files = (ROOT / "tests").glob("**/*.py")
    defined = {name for path in files for name in re.findall(r"(?m)^def (test_\w+)", read(path))}
    assert set(BY_TEST.values()) - defined == set()


WRAPPER = """#!/bin/sh
case " $* " in
  *' --list'*) exec %(program)s "$@" ;;
esac
exec %(program)s --list '%(list)s' "$@"
"""
CURL = """#!/bin/sh
exec /usr/bin/env PATH="$OUTER_PATH" curl --connect-to web1:9999:127.0.0.1:%d "$@"
"""


@pytest.fixture
def world(tmp_path, start_slave, upstream):
    """run(TEXT): as sh -e runs it beside one slave; its CompletedProcess, output as text.

    What needs no /etc does as it stands: `server-update` has a list with that slave, `curl` finds
    it as web1:9999, and slave-activate acts for it.
    """
    need("curl")
    repo = upstream.create("hanuman")
    repo.git("tag", "v1.4")
    slave = start_slave()
    slave_list = tmp_path / "slavelist.txt"
    slave_list.write_text("127.0.0.1:%d\n" % slave.port)
    program = " ".join("'%s'" % word for word in SERVER_UPDATE)
    tools = {
        "server-update": WRAPPER % {"program": program, "list": slave_list},
        "curl": CURL % slave.port,
    }
    for name, text in tools.items():
        (slave.bin / name).write_text(text)
        (slave.bin / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    env = dict(
        os.environ,
        HOME=str(slave.home),
        OUTER_PATH=os.environ["PATH"],
        PATH=os.pathsep.join([str(slave.bin), os.environ["PATH"]]),
        SERVER_UPDATE_CONF=str(slave.conf),
    )

    def run(text):
        return subprocess.run(
            ["sh", "-ec", text],
            cwd=str(work),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            timeout=TIMEOUT_S,
        )

    run.slave, run.upstream, run.work, run.list = slave, repo, work, slave_list
    done = run("server-update hanuman")
    assert done.returncode == 0, done.stdout
    return run


# What a block names that is not to be touched on the machine that runs the tests.
OF_THE_HOST = r"/(etc|opt|root|run|srv|usr|var)/|\b(apt|install\.sh|ssh|sudo|systemctl)\b"


@pytest.mark.parametrize("block", RUN_HERE, ids=str)
def test_a_block_runs_as_it_stands(world, block):
    found = re.search(OF_THE_HOST, block.text)
    assert not found, "'%s' is of this machine: name a test of its own above" % found.group()
    done = world(block.text)
    assert done.returncode == 0, done.stdout


# -- those that want something else around them


@pytest.mark.slow
def test_a_careful_rollout(world):
    carefully, again, window, history = find_block(
        "recipes.md", "server-update --batch 1,10"
    ).splitlines()
    world.list.write_text(world.list.read_text() + "127.0.0.1:1\n")
    done = world(carefully + " --retries 0")
    assert done.returncode == 1 and "1 live, 1 unreachable" in done.stdout, done.stdout
    assert re.findall("(?m)^[^#\n]\\S*", read(world.work / "failed.txt")) == ["127.0.0.1:1"]
    done = world(again.replace(" #", " --retries 0 #"))
    assert done.returncode == 1 and "1 unreachable" in done.stdout, done.stdout
    world.list.write_text(world.list.read_text().replace("127.0.0.1:1\n", ""))
    assert world(window).returncode == 0
    done = world(history)
    assert done.returncode == 0 and "new prices" in done.stdout


def test_a_push_as_the_page_has_it(world, tmp_path):
    need("openssl")
    slave = world.slave
    slave.settings["SECRET_FILE"] = make_secret(tmp_path / "secret", SECRET)
    slave.stop()
    slave.start()
    done = world(find_block("recipes.md", "slave.py --hook-key"))
    assert done.stdout.split() == [make_key(), make_key("hanuman", "v1")], done.stdout
    text = find_block("recipes.md", "key=").replace("relay1:", "web1:")
    assert world(text).returncode == 22, "the key on the page is not this slave's"
    done = world(re.sub("key=[0-9a-f]{64}", "key=" + make_key(), text))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('"repo": "hanuman"') == 3
    wait_until(lambda: slave.log().count("asked for by 127.0.0.1, a forge") == 3)


def test_from_ci(world):
    command = find_block("recipes.md", 'server-update --commit "$(git')
    built = world.upstream.commit({"file": "built\n"})
    assert world("git clone -q '%s' ." % world.upstream.path).returncode == 0
    world.upstream.commit({"file": "pushed since\n"})
    done = world(command)
    assert done.returncode == 0 and built[:7] in done.stdout, done.stdout
    assert (world.slave.repos / "hanuman/file").read_text() == "built\n"


def test_a_token(world):
    (world.work / "token").write_text("a token\n")
    done = world(find_block("recipes.md", "git config --global credential"))
    assert done.returncode == 0, done.stdout
    ask = "printf 'protocol=https\\nhost=git.example.org\\n\\n' | git credential fill"
    assert "username=deploy\npassword=a token\n" in world(ask).stdout
    assert stat.S_IMODE((world.slave.home / ".git-credentials").stat().st_mode) == 0o600
    assert not (world.work / "token").exists()


def test_a_token_in_slave_conf(world, tmp_path):
    if os.getuid():
        pytest.skip("to give a file to another group needs root")
    conf = tmp_path / "slave.conf"
    conf.touch()
    group = subprocess.check_output(["id", "-g", "nobody"])
    text = find_block("recipes.md", 'chown "root:')
    done = world(
        adapt(text, ("/etc/server-update/slave.conf", conf), ("-gn deploy", "-gn nobody"))
    )
    assert done.returncode == 0, done.stdout
    info = conf.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (0, int(group), 0o640)


def adapt(text, *pairs):
    """A block's text with paths of ours in place of those shown, each of which must be there."""
    for shown, here in pairs:
        assert shown in text
        text = text.replace(shown, str(here))
    return text


def test_a_hold(world, tmp_path):
    assert world("server-update hanuman").returncode == 0
    text = adapt(
        find_block("recipes.md", "install -d /etc/server-update/hooks /etc"),
        ("/etc/server-update/hooks", world.slave.hooks),
        ("/etc/server-update/hold", tmp_path / "hold"),
        ("docs/examples/", "%s/docs/examples/" % ROOT),
    )
    assert world(text).returncode == 0
    hook = world.slave.hooks / "pre-update"
    hook.write_text(adapt(read(hook), ("/etc/server-update/hold}", "%s/hold}" % tmp_path)))
    world.upstream.commit({"file": "pushed\n"})
    done = world("server-update hanuman")
    assert done.returncode == 1
    assert "on hold: rolled back for the fair, ask Ann" in done.stdout
    (tmp_path / "hold/hanuman").unlink()
    assert world("server-update hanuman").returncode == 0
    assert (world.slave.repos / "hanuman/file").read_text() == "pushed\n"


HOLD = str(ROOT / "docs/examples/hold")


def test_a_hold_that_cannot_be_read_holds(tmp_path):
    folder = tmp_path / "hold"
    command = with_no_rights() + ["sh", HOLD, "hanuman", "main", "0" * 40]

    def is_held():
        return subprocess.call(command, env=dict(os.environ, HOLD=str(folder))) != 0

    folder.mkdir()
    assert not is_held()
    folder.chmod(0)
    assert is_held()
    folder.chmod(0o755)
    link = folder / "hanuman"
    link.symlink_to("nowhere")
    assert is_held()
    link.rename(folder / "other")
    assert not is_held()
    folder.rename(tmp_path / "away")
    assert is_held()


class Chat(http.server.BaseHTTPRequestHandler):
    """Keeps what it is told in its server's `told`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.told.append(json.loads(body.decode())["text"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def chat():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    server.told = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_chat_is_told(world, chat, tmp_path):
    text = adapt(
        find_block("recipes.md", HOOK_BY % "tell"),
        ("/etc/server-update/hooks", world.slave.hooks),
        ("/etc/server-update/chat-url", tmp_path / "chat-url"),
        ("https://chat.example.org/hooks/1234", "http://127.0.0.1:%d/" % chat.server_port),
        ("docs/examples/", "%s/docs/examples/" % ROOT),
    )
    assert world(text).returncode == 0
    hook = world.slave.hooks / "update-ended"
    shown, here = "/etc/server-update/chat-url}", "%s/chat-url}" % tmp_path
    hook.write_text(adapt(read(hook).replace(" of /etc", ""), (shown, here)))
    assert world("server-update hanuman").returncode == 0
    assert world("server-update --ref nowhere hanuman").returncode == 1
    wait_until(lambda: chat.told, what="a message")
    (told,) = chat.told
    live = world.upstream.head()[:7]
    assert re.search(": hanuman: failed, live is %s. .*nowhere" % live, told), told


@pytest.mark.slow
def test_several_hooks(world, tmp_path):
    """A hold, and what is kept: both count, in the order of their names."""
    assert world("server-update hanuman").returncode == 0
    text = adapt(
        find_block("recipes.md", "install -d /etc/server-update/hooks/pre"),
        ("/etc/server-update/hooks", world.slave.hooks),
        ("/etc/server-update/hold", tmp_path / "hold"),
        ("/srv/keep", tmp_path / "keep-files"),
        ("docs/examples/", "%s/docs/examples/" % ROOT),
    )
    assert world(text).returncode == 0
    folder = world.slave.hooks / "pre-update.d"
    for name, shown in (("hold", "/etc/server-update/hold}"), ("keep-files", "/srv/keep}")):
        path = folder / name
        path.write_text(adapt(read(path), (shown, "%s/%s}" % (tmp_path, name))))
    hold, keep = tmp_path / "hold/hanuman", tmp_path / "keep-files/hanuman"
    hold.write_text("ask Ann\n")
    keep.mkdir()
    (keep / ".env").write_text("KEY=value\n")
    world.upstream.commit({"file": "pushed\n"})
    assert "on hold: ask Ann" in world("server-update hanuman").stdout
    hold.unlink()
    assert world("server-update hanuman").returncode == 0
    tree = world.slave.repos / "hanuman"
    assert (read(tree / "file"), read(tree / ".env")) == ("pushed\n", "KEY=value\n")
    folder.rename(tmp_path / "away")
    assert world("server-update hanuman").returncode == 1
    assert read(tree / ".env") == "KEY=value\n"


SIGNED_COMMIT = """
ssh-keygen -q -t ed25519 -N '' -f '%(key)s'
git clone -q '%(upstream)s' ann && cd ann
git config gpg.format ssh
git config user.signingKey '%(key)s.pub'
echo signed >file
git add file
git commit -q -S -m Signed
git push -q origin HEAD:main
"""


def test_only_signed_commits_go_live(world, tmp_path):
    need("ssh-keygen")
    signed = {"key": tmp_path / "ann", "upstream": world.upstream.path}
    done = world(SIGNED_COMMIT % signed)
    assert done.returncode == 0, done.stdout
    text = find_block("recipes.md", HOOK_BY % "only")
    for shown, here in (
        ("/etc/server-update/hooks", str(world.slave.hooks)),
        ("/etc/server-update/signers", str(tmp_path / "signers")),
        ("ann.pub", str(tmp_path / "ann.pub")),
        ("docs/examples/", str(ROOT / "docs/examples") + "/"),
    ):
        assert shown in text
        text = text.replace(shown, here)
    assert world(text).returncode == 0
    hook = world.slave.hooks / "pre-update"
    hook.write_text(read(hook).replace("/etc/server-update/signers", str(tmp_path / "signers")))
    done = world("server-update hanuman")
    assert done.returncode == 0, done.stdout
    live = world.slave.repos / "hanuman/file"
    assert live.read_text() == "signed\n"
    world.upstream.commit({"file": "by the forge alone\n"})
    done = world("server-update hanuman")
    assert done.returncode == 1 and "pre-update hook failed" in done.stdout, done.stdout
    assert live.read_text() == "signed\n"


# -- uploads and .env are kept


@pytest.fixture
def keeping(world, tmp_path):
    """What the recipe does, in a folder of our own in place of /srv/keep."""
    text = find_block("recipes.md", "install -d /etc/server-update/hooks /srv")
    keep = tmp_path / "keep"
    tree = world.slave.repos / "hanuman"
    (tree / "uploads").mkdir()
    (tree / "uploads/photo").write_text("a photo\n")
    (tree / ".env").write_text("KEY=value\n")
    for shown, here in (
        ("/etc/server-update/hooks", str(world.slave.hooks)),
        ("/srv/keep", str(keep)),
        ("docs/examples/", str(ROOT / "docs/examples") + "/"),
        ("server-update hanuman\n", ""),
    ):
        assert shown in text
        text = text.replace(shown, here)
    hook = world.slave.hooks / "pre-update"
    done = world(text)
    assert done.returncode == 0, done.stdout
    hook.write_text(read(hook).replace("/srv/keep}", "%s}" % keep))
    world.keep, world.tree = keep, tree
    return world


def test_uploads_are_kept(keeping):
    for number in range(2):
        keeping.upstream.commit({"file": str(number)})
        done = keeping("server-update hanuman")
        assert done.returncode == 0, done.stdout
        assert (keeping.tree / "file").read_text() == str(number)
        assert (keeping.tree / "uploads/photo").read_text() == "a photo\n"
        assert (keeping.tree / ".env").read_text() == "KEY=value\n"
    (keeping.tree / "uploads/another").write_text("by the web server\n")
    assert (keeping.keep / "hanuman/uploads/another").exists()


def test_what_the_repository_has_too_is_not_hidden(keeping):
    assert keeping("server-update hanuman").returncode == 0
    keeping.upstream.commit({"uploads": "a file of the repository\n"})
    done = keeping("server-update hanuman")
    assert done.returncode == 1
    assert "'uploads' is in %s/hanuman and in the repository" % keeping.keep in done.stdout
    assert (keeping.tree / "uploads/photo").read_text() == "a photo\n"


def test_without_its_files_nothing_goes_live(keeping):
    live = keeping("git -C ~/repos/hanuman rev-parse HEAD").stdout
    keeping.upstream.commit({"file": "new\n"})
    keeping.keep.rename(keeping.keep.parent / "away")
    assert keeping("server-update hanuman").returncode == 1
    assert keeping("git -C ~/repos/hanuman rev-parse HEAD").stdout == live


def test_a_repository_that_has_nothing_to_keep_is_updated(keeping):
    (keeping.keep / "hanuman").rename(keeping.keep / "other")
    keeping.upstream.commit({"file": "new\n"})
    assert keeping("server-update hanuman").returncode == 0

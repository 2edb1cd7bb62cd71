#!/bin/sh
# install.sh master [SLAVE...]   this machine has others update: server-update and its slave list
# install.sh slave               this machine is updated: slave.py, enabled and started
# install.sh uninstall           remove what these put here; settings and clones stay
#
#   --prefix DIR     install into DIR/bin and DIR/share (/usr/local)
#   --user NAME      who runs the slave, or owns the master's secret (who called sudo, else root)
#   --repos DIR      where the clones go live (~/repos); like the next two for a new slave.conf
#   --base-url URL   clone URL/NAME.git
#   --port N         listen on this port (9999)
#   --serve FILE     the slave also serves this file at /; '' ends that
#   --no-start       neither enable, start nor restart the slave
#   --new-secret     master: make a shared secret, and say how to bring it to a slave
#   --dry-run        say what would be done, and do nothing
#   -h, --help       print this
#
# To upgrade run it again: it replaces what differs, and restarts the slave only then. With
# DESTDIR=FOLDER in the environment all goes below FOLDER, and no service is touched.
# Exit status: 0 done, or nothing to do; 1 failed; 2 usage or a bad setting, nothing was touched.
set -euf
unset CDPATH; umask 022; export COLUMNS=80 NO_COLOR=1 # for --help
SERVICE=server-update-slave
PENDING=/run/$SERVICE.restart # there from before the slave changes until it has been restarted
role='' slaves='' given='' prefix='' user='' repos='' base_url='' port='' serve=''
no_start='' new_secret='' dry_run='' changed='' restart=''

say() { printf '%s\n' "$*"; }
die() { status=$1; shift; say "install.sh: $*" >&2; exit "$status"; }

act() { # DO DONE WHAT COMMAND...: run it (without the lock) and say so; a dry run only says so
  do=$1 done=$2 what=$3 changed=yes; shift 3
  if [ -n "$dry_run" ]; then say "would $do $what"; return; fi
  why=$("$@" 2>&1 9>&-) || die 1 "cannot $do $what: $(say "$why" | sed -n '$s/.*: //;$p')"
  say "$done $what"
}

put() { # MODE FILE TEXT [restart]: have FILE hold TEXT, unless it does already
  if [ -n "$(find "$2" -prune -type f -perm "$1" 2>/dev/null)" ] && say "$3" | cmp -s - "$2"; then
    [ -n "$dry_run" ] || rm -f "$2.new"
    return
  fi
  [ ! -d "$2" ] || die 1 "$2 is a folder, and should be a file: move it away first"
  restart=$restart${4-}
  [ -z "${4-}" ] || [ -z "$services" ] || [ -n "$dry_run" ] || touch "$PENDING"
  if [ -e "$2" ]; then set -- replace replaced "$@"; else set -- write wrote "$@"; fi
  act "$1" "$2" "$4" rename_over "$3" "$4" "$5"
}

rename_over() { # MODE FILE TEXT: nobody ever sees half of it
  mkdir -p "${2%/*}" && (umask 077; say "$3" | cat >"$2.new") && chmod "$1" "$2.new" &&
    mv -f "$2.new" "$2" && return
  rm -f "$2.new" 2>/dev/null; return 1
}

lack() { # FILE LINE: settings are kept as they are; say what is not in them
  [ ! -e "$1" ] || grep -Fqx -e "$2" "$1" ||
    say "kept $1, which has no line '$2': add it if you want it"
}

# slave.py alone reads, checks and explains settings: REPOS_DIR and PORT as slave.conf has them or,
# where there is none, as the options say; then a new slave.conf.
ask_slave() {
  HOME=$home SERVER_UPDATE_BASE_URL=$base_url SERVER_UPDATE_REPOS_DIR=$repos \
    SERVER_UPDATE_PORT=$port python3 -I -B -c '
import os, sys
sys.path.insert(0, sys.argv[1])
import slave
conf, asked = {"SERVER_UPDATE_CONF": sys.argv[2]}, dict(os.environ, SERVER_UPDATE_CONF="/dev/null")
try:
    now = slave.read_settings(conf if os.path.exists(sys.argv[2]) else asked, {})
except (OSError, ValueError) as mistake:
    sys.exit("install.sh: %s" % mistake.args[0].split(" (set by")[0])
print(now["REPOS_DIR"], now["PORT"], sep="\n")
print("# A line with # shows what holds without it. To change that, remove the # and restart.")
for key, (default, *_, meaning) in slave.SETTINGS.items():
    value = asked.get("SERVER_UPDATE_" + key)
    print("\n# %s\n%s%s=%s" % (meaning, "" if value else "#", key, value or default))
' "$here" "$conf" || exit 2
}

install_script() { # NAME INTERPRETER SECTION WHAT [restart]: and its --help as a man page
  put 755 "$bin/$1" "$(cat "$here/$1")" "${5-}"
  put 644 "$share/man/man$3/$1.$3" "$(
    printf '%s\n' '.\" by server-update' ".TH $1 $3" '.SH NAME' "$1 \\- $4" '.SH DESCRIPTION' .nf
    "$2" "$here/$1" --help | sed 's/\\/\\e/g; s/-/\\-/g; s/^[.'\'']/\\\&&/'
  )"
}

completion() { # for bash: options, and the names that end a command in the shell's history
  help=$(python3 "$here/server-update" --help)
  options() { say "$help" | sed -n "s/^  *\(-., \)*\(--[a-z-]*\)$1.*/\2/p" | tr '\n' ' '; }
  cat <<END
_server_update() {
  local word=\${COMP_WORDS[COMP_CWORD]} words='$(options '')' values=' $(options ' [A-Z]')'
  [[ \$values != *" \${COMP_WORDS[COMP_CWORD-1]} "* ]] || return 0 # a file, by -o default
  [[ \$word == -* ]] || words=\$(HISTTIMEFORMAT='' history |
    sed -n 's/.*server-update \(.* \)\{0,1\}\([A-Za-z0-9_][A-Za-z0-9._-]*\) *\$/\2/p')
  COMPREPLY=(\$(compgen -W "\$words" -- "\$word"))
}
complete -o default -F _server_update server-update
END
}

systemd_unit() {
  cat <<END
# Made by install.sh of server-update, which replaces it: use 'systemctl edit $SERVICE'.
[Unit]
Description=server-update slave: takes signals and updates the clones of this machine
After=network-online.target
Wants=network-online.target
[Service]
User=$user
Environment="PATH=$path"
ExecStart="$prefix/bin/slave.py"$served
Restart=on-failure
RestartSec=5
# 2 is a mistake in the settings; TERM goes to slave.py alone, which stops its updates, within 15 s
RestartPreventExitStatus=2
KillMode=mixed
TimeoutStopSec=20
# Closed: sudo in hooks (root's have no need of it), devices, kernel settings, unusual system calls
NoNewPrivileges=$(if [ "$user" = root ]; then echo no; else echo yes; fi)
$(printf '%s=yes\n' PrivateDevices PrivateTmp ProtectClock ProtectControlGroups \
  ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables LockPersonality \
  RemoveIPC RestrictNamespaces RestrictRealtime RestrictSUIDSGID)
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
# Open: the network for git over https and ssh, netlink to look names up, sockets of local agents
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
# Open: hooks write to /srv, /var and homes, where the clones and ~/.ssh are; not /usr, /boot, /etc
ProtectSystem=full
# Open: root's hooks give files away and become other users; PORT may be below 1024
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_SETGID CAP_SETUID
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
AmbientCapabilities=CAP_NET_BIND_SERVICE
# Open: a web server reads the clones
UMask=0022
# Open: hooks run node and java, which compile into memory
MemoryDenyWriteExecute=no
[Install]
WantedBy=multi-user.target
END
}

openrc_script() {
  cat <<END
#!/sbin/openrc-run
# Made by install.sh of server-update, which replaces it.
supervisor=supervise-daemon
command="'$prefix/bin/slave.py'"
command_args="$served"
command_user="$user"
respawn_delay=5
respawn_max=0
retry="TERM/20/KILL/5"
error_log="$log"
export PATH="$path"
depend() { need net; use dns; }
start_pre() { checkpath --file --owner "\$command_user" --mode 0640 "\$error_log"; }
END
}

find_manager() { # systemd, openrc or none; services is set where it may be told to do things
  manager=none unit='' log='' services=''
  [ -z "$private" ] || return 0
  if [ -e "$DESTDIR/sbin/openrc-run" ] && [ ! -d "$DESTDIR/run/systemd/system" ]; then
    manager=openrc unit=$DESTDIR/etc/init.d/$SERVICE log=/var/log/$SERVICE.log
  elif [ -n "$DESTDIR" ] || [ -d /run/systemd/system ]; then
    manager=systemd unit=$DESTDIR/etc/systemd/system/$SERVICE.service log="journalctl -u $SERVICE"
  fi
  [ -n "$DESTDIR" ] || services=$unit
}

service() { # is-enabled, is-active, enable, disable, start, stop, restart
  case $manager:$1 in
    systemd:*) systemctl -q "$1" $SERVICE ;;
    openrc:is-enabled) [ -e /etc/runlevels/default/$SERVICE ] ;;
    openrc:is-active) rc-service -q $SERVICE status >/dev/null ;;
    openrc:enable) rc-update -q add $SERVICE default ;;
    openrc:disable) rc-update -q delete $SERVICE default ;;
    openrc:*) rc-service -q $SERVICE "$1" ;;
  esac
}

start_service() {
  service is-enabled || act enable enabled "the service $SERVICE" service enable
  [ ! -e "$PENDING" ] || restart=yes
  [ -z "$restart" ] || [ $manager != systemd ] || act reload reloaded units systemctl daemon-reload
  verb=restart
  if ! service is-active; then verb=start; elif [ -z "$restart" ]; then return 0; fi
  act $verb ${verb}ed "the service $SERVICE" service $verb
  [ -z "$dry_run" ] || return 0
  sleep 2 # one that can't start has failed by then
  service is-active || die 1 "slave.py does not stay up: see $log"
  rm -f "$PENDING"
}

parse_args() {
  while [ $# -gt 0 ]; do
    case $1 in --*=*) option=${1%%=*} value=${1#*=}; shift; set -- "$option" "$value" "$@" ;; esac
    case $1 in
      -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      --prefix | --user | --repos | --base-url | --port | --serve)
        [ $# -gt 1 ] || die 2 "$1 needs a value"
        eval "$(say "${1#--}" | tr - _)=\$2" given="'$given $1'"; shift ;;
      --no-start | --new-secret | --dry-run)
        eval "$(say "${1#--}" | tr - _)=yes" given="'$given $1'" ;;
      -*) die 2 "unknown option '$1': see ./install.sh --help" ;;
      *) if [ -z "$role" ]; then role=$1; else slaves="$slaves $1"; fi ;;
    esac
    shift
  done
}

check_usage() {
  case "$role:$given " in
    slave:*--new-secret* | master:*--[rbs]* | master:*--port* | master:*--no-start* | \
      uninstall:*--[!pd]*) die 2 "not for $role:$given" ;;
    master:*) tools=python3 files='server-update slavelist.txt' ;;
    slave:*) tools='python3 git' files='slave.py slave-activate' ;;
    uninstall:*) tools=python3 files=slave.py ;;
    *) die 2 "unknown role '$role': it is master, slave or uninstall; see ./install.sh --help" ;;
  esac
  [ "$role" = master ] || [ -z "$slaves" ] || die 2 "$role takes no '${slaves# }'"
  case "$prefix|$serve" in
    *[\"\'\`\\\$%]* | *[[:cntrl:]]* | [!/\|]* | *\|[!/]*)
      die 2 "--prefix and --serve take absolute paths without quotes, \\, \$ and %" ;;
  esac
}

check_needs() {
  for tool in $tools; do command -v "$tool" >/dev/null || die 1 "no $tool: install it first"; done
  for file in $files; do [ -r "$here/$file" ] || die 1 "no $file beside install.sh"; done
  why=$(python3 -c 'import sys; version = sys.version_info[:2]
if version < (3, 7): sys.exit("python3 is %d.%d here, and must be 3.7 or newer" % version)
import ctypes, http.server, ssl' 2>&1) || die 1 "$(say "$why" | tail -n 1)"
}

find_places() {
  private='' with_list='' with_conf='' DESTDIR=${DESTDIR-}
  [ "$(id -u)" -eq 0 ] || [ -n "$DESTDIR" ] || private=yes # settings of their own, to be named
  [ "$private$prefix" != yes ] || die 1 "not root: use sudo, or --prefix \"\$HOME/.local\""
  here=$(cd "$(dirname "$0")" && pwd)
  prefix=${prefix:-/usr/local} prefix=${prefix%/}
  bin=$DESTDIR$prefix/bin share=$DESTDIR$prefix/share etc=$DESTDIR/etc/server-update
  [ -z "$private" ] || etc=$prefix$etc with_list=" --list '$etc/slavelist.txt'" \
    with_conf="SERVER_UPDATE_CONF='$etc/slave.conf' "
  conf=$etc/slave.conf list=$etc/slavelist.txt secret=$etc/secret link=$DESTDIR/bin/slave-activate
  path=$prefix/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  find_manager
}

find_user() { # an upgrade keeps who runs the slave, and what it serves
  before=$(cat "$unit" 2>/dev/null) || :
  user=${user:-$(say "$before" | sed -n 's/^User=//p; s/^command_user="\(.*\)"$/\1/p')}
  user=${user:-${SUDO_USER:-root}} home=$HOME served=''
  [ -z "$private" ] || user=$(id -un)
  case $user in *[!A-Za-z0-9._-]* | -*) die 2 "bad user name '$user'" ;; esac
  [ -n "$DESTDIR" ] || id "$user" >/dev/null 2>&1 || die 2 "there is no user '$user' here"
  [ -n "$private$DESTDIR" ] || eval "home=~$user"
  [ "${given#*--serve}" != "$given" ] || serve=$(say "$before" |
    sed -n "s/^ExecStart=.* '\(.*\)'\$/\1/p; s/^command_args=\" '\(.*\)'\"\$/\1/p")
  [ -z "$serve" ] || served=" '$serve'"
}

check_list() { # FILE, or - for standard input: server-update's own view of it
  python3 "$here/server-update" --list "$1" --dry-run all >/dev/null || exit 2
}

install_master() {
  [ -z "$slaves" ] || say "${slaves# }" | tr ' ' '\n' | check_list -
  ! grep -qs '^ *[^# ]' "$list" || check_list "$list"
  install_script server-update python3 1 'have all slaves update a repository'
  if [ -d "$share/bash-completion" ] || [ -d "$DESTDIR/usr/share/bash-completion" ]; then
    put 644 "$share/bash-completion/completions/server-update" "$(completion)"
  fi
  [ -e "$list" ] || put 644 "$list" "$(cat "$here/slavelist.txt"; say "${slaves# }" | tr ' ' '\n')"
  for slave in $slaves; do lack "$list" "$slave"; done
  [ -z "$new_secret" ] || make_secret
  say "List the slaves in $list and run ./install.sh slave on each; then here:"
  [ -z "$private" ] || [ ! -e "$secret" ] || with_list="$with_list --secret-file '$secret'"
  say "  '$prefix/bin/server-update'$with_list NAME"
}

make_secret() {
  [ ! -e "$secret" ] || say "kept $secret"
  [ -e "$secret" ] || put 600 "$secret" "$(python3 -c 'import os; print(os.urandom(32).hex())')"
  [ -n "$DESTDIR" ] || [ -n "$(find "$secret" -prune -user "$user" 2>/dev/null)" ] ||
    act give gave "$secret to $user" chown "$user" "$secret"
  say "To bring the secret to a slave, where USER runs slave.py:"
  say "  ssh root@SLAVE 'umask 077; cd /etc/server-update; cat >secret; chown USER secret' \\"
  say "    <'$secret'"
}

install_slave() {
  set -- "BASE_URL=$base_url" "REPOS_DIR=$repos" "PORT=$port"
  known=$(ask_slave)
  install_script slave-activate sh 8 'put a fresh clone live'
  install_script slave.py python3 8 'take signals and update the clones' restart
  [ -z "$DESTDIR" ] || [ -d "$DESTDIR/bin" ] || act make made "$DESTDIR/bin" mkdir "$DESTDIR/bin"
  [ -n "$private" ] || [ "$(readlink "$link")" = "$prefix/bin/slave-activate" ] ||
    { [ -e "$link" ] && [ ! -L "$link" ]; } ||
    act link linked "$link" ln -snf "$prefix/bin/slave-activate" "$link"
  [ -e "$conf" ] || put 644 "$conf" "$(say "$known" | sed 1,2d)" restart
  for line in "$@"; do [ -z "${line#*=}" ] || lack "$conf" "$line"; done
  repos=$(say "$known" | sed -n 1p) port=$(say "$known" | sed -n 2p)
  [ -n "$DESTDIR" ] || [ -d "$repos" ] || act make made "$repos" \
    install -d -o "$user" -g "$(id -g "$user")" "$repos"
  [ $manager != systemd ] || put 644 "$unit" "$(systemd_unit)" restart
  [ $manager != openrc ] || put 755 "$unit" "$(openrc_script)" restart
  [ -z "$services" ] || [ -n "$no_start" ] || start_service
  case $dry_run$DESTDIR:$services:$no_start in
    :?*:yes) say "The service $SERVICE is left as it was." ;;
    :?*:) say "slave.py runs as $user on port $port, with its clones in $repos; its log: $log" ;;
    ::*)
      say "To start slave.py as $user, on port $port, with its clones in $repos:"
      say "  $with_conf'$prefix/bin/slave.py'$served" ;;
  esac
  [ -n "$DESTDIR" ] || say "Settings: $conf. Next, on the master: ./install.sh master $(uname -n)"
}

uninstall() {
  grep -qsF "$prefix/bin/slave.py" "${unit:-/dev/null}" || unit='' services='' # of another prefix
  [ -z "$services" ] || ! service is-active || act stop stopped $SERVICE service stop
  [ -z "$services" ] || ! service is-enabled || act disable disabled $SERVICE service disable
  [ "$(readlink "$link")" != "$prefix/bin/slave-activate" ] ||
    act remove removed "$link" rm -f "$link"
  set -- "$share/man/man1/server-update.1" "$share/man/man8/slave.py.8" \
    "$share/man/man8/slave-activate.8" "$share/bash-completion/completions/server-update"
  for file in "$bin/server-update" "$bin/slave.py" "$bin/slave-activate" ${unit:+"$unit"} "$@"; do
    [ -n "$dry_run" ] || rm -f "$file.new"
    ! grep -qs server-update "$file" || act remove removed "$file" rm -f "$file"
  done
  say "kept: the settings in $etc, the clones in $(ask_slave | sed -n 1p)"
}

main() {
  parse_args "$@"
  check_usage
  find_places
  check_needs
  find_user
  exec 9</ # one run at a time: a kernel lock, which dies with us
  python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  case $role in master) install_master ;; slave) install_slave ;; uninstall) uninstall ;; esac
  [ -n "$changed" ] || say "Nothing had to be changed in $DESTDIR$prefix."
}

main "$@"

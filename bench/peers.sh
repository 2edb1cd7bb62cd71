#!/bin/sh
# Installs what the benchmark compares with into a folder of its own: sh bench/peers.sh DIR
# DIR/bin is to be put on PATH. What the machine has already is used; ansible, clush and Flask come by pip into
# a virtual environment, Debian's packages are unpacked, not installed. What can't be had is said, and left out.
set -eu
unset CDPATH

say() { printf 'bench: %s\n' "$*"; }
without() { say "WITHOUT $1: $2"; }

make_python() {
  if "$dir/venv/bin/python" -c 'import flask' 2>/dev/null; then return 0; fi
  python3 -m venv --clear "$dir/venv" 2>/dev/null || return 0
  say "installing Flask, ansible-core and ClusterShell into $dir/venv"
  "$dir/venv/bin/pip" install -q flask ansible-core ClusterShell >"$dir/pip.log" 2>&1 ||
    say "pip failed: $(tail -n 1 "$dir/pip.log")"
}

link_python() {
  for tool in ansible clush; do
    if [ -x "$dir/venv/bin/$tool" ]; then ln -sf "$dir/venv/bin/$tool" "$dir/bin/$tool"; continue; fi
    command -v "$tool" >/dev/null || without "$tool" "neither installed nor to be had by pip"
  done
  if "$dir/venv/bin/python" -c 'import flask' 2>/dev/null; then
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$dir/venv/bin/python" >"$dir/bin/python-with-flask"
    chmod +x "$dir/bin/python-with-flask"
  else
    without Flask "not to be had by pip"
  fi
}

# unpack PROGRAM PACKAGE...: the program's packages below DIR/root, unless the machine has the program
unpack() {
  program=$1; shift
  if [ -e "$dir/root/.has-$program" ] || PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null; then return 0; fi
  command -v apt-get >/dev/null || { without "$program" "not installed, and this is no Debian"; return 0; }
  mkdir -p "$dir/debs/$program" "$dir/root"
  ( cd "$dir/debs/$program" && apt-get -q download "$@" ) >"$dir/apt.log" 2>&1 ||
    { without "$program" "apt-get download: $(tail -n 1 "$dir/apt.log")"; return 0; }
  for deb in "$dir/debs/$program"/*.deb; do dpkg-deb -x "$deb" "$dir/root"; done
  : >"$dir/root/.has-$program"
  wrap "$program"
}

# Wrappers, as the programs look for parts of theirs in /usr/lib and for a user named sshd in /etc/passwd: root
# shows them those in a mount namespace of their own, the machine itself is not touched.
wrap() {
  libraries=$(dirname "$(find "$dir/root/usr/lib" -name '*.so*' | head -n 1)" 2>/dev/null || :)
  case $1 in
    pdsh)
      mkdir -p "$dir/root/named"; cp "$dir/root/usr/bin/pdsh.bin" "$dir/root/named/pdsh"
      modules=$(dirname "$(find "$dir/root/usr/lib" -name sshcmd.so)"); libraries=$(dirname "$modules")
      {
        echo '#!/bin/sh'
        echo "export LD_LIBRARY_PATH='$libraries' PDSH_MODULE_DIR='$modules'"
        echo "if [ \"\$(id -u)\" -ne 0 ]; then exec '$dir/root/named/pdsh' \"\$@\"; fi"
        echo "exec unshare -m sh -ec 'mount -t overlay overlay -o lowerdir=\"$dir/root/usr/lib\":/usr/lib /usr/lib"
        echo "  exec \"$dir/root/named/pdsh\" \"\$@\"' pdsh \"\$@\""
      } >"$dir/bin/pdsh" ;;
    sshd)
      { cat /etc/passwd; echo 'sshd:x:107:65534::/run/sshd:/usr/sbin/nologin'; } >"$dir/root/passwd"
      {
        echo '#!/bin/sh'
        echo "export LD_LIBRARY_PATH='$libraries'"
        echo "if [ \"\$(id -u)\" -ne 0 ]; then exec '$dir/root/usr/sbin/sshd' \"\$@\"; fi"
        echo "exec unshare -m sh -ec 'mount --bind \"$dir/root/passwd\" /etc/passwd"
        echo "  mount -t tmpfs tmpfs /run; mkdir /run/sshd; exec \"$dir/root/usr/sbin/sshd\" \"\$@\"' sshd \"\$@\""
      } >"$dir/bin/sshd" ;;
    webhook) ln -sf "$dir/root/usr/bin/webhook" "$dir/bin/webhook"; return 0 ;;
  esac
  chmod +x "$dir/bin/$1"
}

main() {
  [ $# -eq 1 ] || { echo "usage: peers.sh DIR" >&2; exit 2; }
  dir=$1
  mkdir -p "$dir/bin"
  make_python
  link_python
  unpack sshd openssh-server libwrap0
  unpack pdsh pdsh libgenders0
  unpack webhook webhook
  command -v curl >/dev/null || without curl "not installed"
  command -v ssh-keygen >/dev/null || without ssh "openssh-client is not installed"
  if [ "$(id -u)" -eq 0 ] && ! unshare -m true 2>/dev/null; then
    rm -f "$dir/bin/sshd" "$dir/bin/pdsh"
    without "sshd and pdsh" "no mount namespaces here, and these need one"
  fi
}

main "$@"; exit

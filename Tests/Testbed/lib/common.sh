# Shared by the testbed's scripts: messages, the cache folder, clear failures.
# Sourced, never run. Needs: TESTBED (the folder of this testbed), set by the caller.

REPO=$(cd "$TESTBED/../.." && pwd)
COMPARE=$REPO/Benchmarks/compare
CACHE=${VXD_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/vxd}
OUTPUT=${VXD_TESTBED_OUTPUT:-$REPO/.build/testbed}

say() { printf '%s\n' "testbed: $*"; }

die() {
  printf '%s\n' "testbed: error: $*" >&2
  exit 1
}

need_command() { # COMMAND PACKAGE
  command -v "$1" >/dev/null 2>&1 || die "'$1' is missing; install it with: apt-get install $2 (or run: make deps)"
}

check_machine() {
  [ "$(uname -m)" = x86_64 ] || die "the testbed runs on x86-64 machines only (this one is $(uname -m))"
  local free_kib need_mib=$1
  free_kib=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
  [ "$free_kib" -ge $((need_mib * 1024)) ] ||
    die "not enough memory: the testbed's machine needs $need_mib MiB available, this one has $((free_kib / 1024)) MiB"
}

#!/usr/bin/env bash
# Install what the benchmarks compare with: Redis, and Mooncake in an environment of its own.
#
# Debian and Ubuntu: redis-server, and libibverbs1 and librdmacm1, which Mooncake's library is linked
# against even where only TCP is used. Run as root, or have sudo; the distribution's own Redis service is
# not started or used: the benchmarks run their own on a socket in a temporary directory.
#
# Mooncake goes to build/bench-venv, so that 46 MB of its libraries and its wishes for other packages stay
# out of the project's environment. It is installed without its dependencies: the store needs none of them
# (they serve its HTTP servers). What is missing afterwards is skipped by `make bench`, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v redis-server >/dev/null || ! ldconfig -p | grep -q libibverbs.so.1 || ! ldconfig -p | grep -q librdmacm.so.1; then
    as_root=""
    [ "$(id -u)" = 0 ] || as_root="sudo"
    # A container without an init system refuses to start the packaged service; nothing here wants it.
    $as_root apt-get update -q
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive $as_root apt-get install -q -y --no-install-recommends \
        redis-server libibverbs1 librdmacm1
fi

venv=build/bench-venv
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
fi
"$venv/bin/pip" install -q --no-deps "mooncake-transfer-engine-non-cuda==0.3.13.post1"
"$venv/bin/python" -c "import mooncake.store"
echo "redis-server: $(redis-server --version | cut -d' ' -f3)"
echo "mooncake: $("$venv/bin/pip" list 2>/dev/null | awk '/^mooncake/ {print $2}')"

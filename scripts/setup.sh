#!/usr/bin/env bash
# What `make` needs from the machine. Installs system packages only as root on Debian or Ubuntu; else says which.
#
#   setup.sh python PYTHON        Python 3.11 or newer that can make a virtual environment
#   setup.sh gl PYTHON            a GL library that renders without a screen
#   setup.sh chromium             a browser, for tests of pages; without one they are skipped
#   setup.sh constraints PYTHON   resolve pyproject.toml again into constraints.txt
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "setup: $*" >&2
    exit 1
}

can_apt() { [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ] && command -v apt-get >/dev/null; }

apt_install() {
    echo "setup: apt-get install $*" >&2
    DEBIAN_FRONTEND=noninteractive apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

check_python() {
    local python=$1
    command -v "$python" >/dev/null || fail "no $python here; install Python 3.11 or newer, or say make PYTHON=/path/to/python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "insula needs Python 3.11 or newer, $python is $("$python" -V 2>&1 | cut -d' ' -f2); say make PYTHON=/path/to/a/newer/python3"
    has_venv "$python" && return
    local package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    can_apt || fail "$python cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install $package"
    apt_install "$package"
    has_venv "$python" || fail "$python still cannot make virtual environments, although $package is installed"
}

has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

# EGL must load and find a device (software rendering counts); OSMesa must load.
has_gl() {
    "$1" - <<'PYTHON'
import ctypes
import sys


def egl() -> bool:
    library = ctypes.CDLL("libEGL.so.1")
    library.eglGetProcAddress.restype = ctypes.c_void_p
    address = library.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return False
    count = ctypes.c_int32(0)
    query = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32))(address)
    return bool(query(0, None, ctypes.byref(count))) and count.value > 0


def osmesa() -> bool:
    for name in ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"):
        try:
            return bool(ctypes.CDLL(name))
        except OSError:
            continue
    return False


def works(backend) -> bool:
    try:
        return backend()
    except OSError:
        return False


sys.exit(not (works(egl) or works(osmesa)))
PYTHON
}

check_gl() {
    [ "$(uname)" = Linux ] || return 0 # MuJoCo brings its own way to draw elsewhere
    local packages="libegl1 libgl1-mesa-dri libopengl0 libosmesa6"
    has_gl "$1" && return
    can_apt || fail "no EGL or OSMesa library to render with; on Debian or Ubuntu: sudo apt-get install $packages"
    # shellcheck disable=SC2086
    apt_install $packages
    has_gl "$1" || fail "still no EGL or OSMesa to render with, although these are installed: $packages"
}

# The page of `insula inspect` is tested in a real browser, where there is one.
check_chromium() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return
    done
    if can_apt; then
        apt_install chromium
    else
        echo "setup: no Chromium here, so the tests of pages in a browser are skipped; on Debian: sudo apt-get install chromium" >&2
    fi
}

write_constraints() {
    check_python "$1"
    local venv=.cache/constraints
    rm -rf "$venv"
    "$1" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --upgrade -e ".[test,gemma,tensorboard,wandb,parity]"
    "$venv/bin/python" -m pip install -q --upgrade --no-deps lerobot-dataset openpi-client inspect-robots
    {
        echo "# Exact versions insula is tested with, resolved for Python $("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')."
        echo "# Refresh with \`make constraints\`, then \`make test\`."
        "$venv/bin/python" -m pip freeze --exclude-editable | grep -v '^insula\b' | sed 's/+cpu$//'
    } >"$venv/constraints.txt"
    mv "$venv/constraints.txt" constraints.txt
    rm -rf "$venv"
}

case "${1:-}" in
python) check_python "${2:-python3}" ;;
gl) check_gl "${2:-python3}" ;;
chromium) check_chromium ;;
constraints) write_constraints "${2:-python3}" ;;
*) fail "expected python, gl, chromium or constraints, got '${1:-}'" ;;
esac

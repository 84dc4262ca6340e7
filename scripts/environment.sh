# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: a virtual environment beside the code with this package in it, at the versions
# of requirements.lock (scripts/lock.sh moves them).
# Usage: make_environment EXTRAS   (EXTRAS such as "[test]" or ""; PYTHON and VENV may be set by the caller)

make_environment() {
  local extras="$1" python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "vlm_jax needs Python 3.11 or newer; $("$python" --version 2>&1) was found. Set PYTHON=/path/to/python3.11." >&2
    return 2
  }
  VENV="${VENV:-$PWD/.venv}"
  [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
  # shellcheck disable=SC1091
  . "$VENV/bin/activate"
  local stamp="$VENV/.installed$extras"
  if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ] || [ requirements.lock -nt "$stamp" ]; then
    echo "Installing vlm_jax$extras into $VENV (a minute or two) ..."
    # Python compiles the modules that are imported; compiling all of them takes a third of the installation.
    python -m pip install --quiet --disable-pip-version-check --no-compile -c requirements.lock -e ".$extras"
    python -c 'import importlib.metadata as m; print(*(f"{n} {m.version(n)}" for n in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers")), sep=", ")'
    touch "$stamp"
  fi
}

# Sourced by local.sh and test.sh: makes .venv and installs what it needs, once.
# ACCELERATOR=cpu|cuda12|cuda13|tpu chooses the jax to install; otherwise the hardware found decides.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed and none was found; set PYTHON=/path/to/python3." >&2
  exit 2
}

find_accelerator() {
  if [ -n "${ACCELERATOR:-}" ]; then
    echo "$ACCELERATOR"
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    echo cuda13
  elif compgen -G "/dev/accel*" >/dev/null || [ -n "${TPU_NAME:-}" ]; then
    echo tpu
  else
    echo cpu
  fi
}

# install FILE...: the requirement files, unless this very set is there already.
install() {
  local python accelerator wanted stamp=.venv/installed
  python=$(find_python)
  accelerator=$(find_accelerator)
  case "$accelerator" in
    cpu | cuda12 | cuda13 | tpu) ;;
    *)
      echo "error: ACCELERATOR=$accelerator: expected cpu, cuda12, cuda13 or tpu." >&2
      exit 2
      ;;
  esac
  wanted=$(cat "$@" constraints.txt; echo "$accelerator"; "$python" --version)
  if [ -x .venv/bin/python ] && [ -f "$stamp.$#" ] && [ "$(cat "$stamp.$#")" = "$wanted" ]; then
    return
  fi
  rm -f "$stamp.$#"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  local arguments=()
  for file in "$@"; do arguments+=(-r "$file"); done
  [ "$accelerator" = cpu ] || arguments+=("jax[$accelerator]")
  echo "installing into .venv (jax for $accelerator)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${arguments[@]}" -c constraints.txt
  echo "$wanted" >"$stamp.$#"
}

export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}

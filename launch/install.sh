# Sourced by the other scripts: goes to the root of the repository, makes .venv and installs what is missing.
# ACCELERATOR=cpu|cuda12|cuda13|tpu chooses the jax to install; otherwise the hardware found decides.
# PYTHON=/path/to/python3 chooses the interpreter; otherwise the newest of 3.11 to 3.13, then python3.

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $*" >&2
  exit 2
}

find_python() {
  local candidate candidates=(python3.13 python3.12 python3.11 python3)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is needed, tried ${candidates[*]}; install one, or set PYTHON=/path/to/python3."
}

find_accelerator() {
  local driver
  # CUDA 13 needs a driver of series 580 or newer; older ones get CUDA 12.
  if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
    driver=${driver%%.*}
    if [[ $driver =~ ^[0-9]+$ && $driver -lt 580 ]]; then echo cuda12; else echo cuda13; fi
  elif compgen -G "/dev/accel*" >/dev/null || [ -n "${TPU_NAME:-}${TPU_WORKER_HOSTNAMES:-}" ] || tpu_metadata; then
    echo tpu
  else
    echo cpu
  fi
}

# Newer TPU VMs have no /dev/accel*; the metadata server of the machine names the TPU.
tpu_metadata() {
  grep -qs Google /sys/class/dmi/id/product_name && curl -sf -m 1 -H "Metadata-Flavor: Google" -o /dev/null \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/accelerator-type 2>/dev/null
}

# install FILE...: each requirement file, unless .venv/installed/FILE says that it is there as asked for.
# A failed install leaves no such stamp, and what it left behind is completed by the next call.
install() {
  local python accelerator recorded version file
  python=$(find_python)
  accelerator=${ACCELERATOR:-$(find_accelerator)}
  [[ $accelerator =~ ^(cpu|cuda12|cuda13|tpu)$ ]] ||
    fail "ACCELERATOR=$accelerator: expected cpu, cuda12, cuda13 or tpu."
  version=$("$python" -c 'import sys; print(*sys.version_info[:2], sep=".")')
  recorded=$(cat .venv/accelerator 2>/dev/null || true)
  # What is installed for an accelerator runs on the CPU too; between two accelerators the environment starts anew.
  [ "$accelerator" != cpu ] || accelerator=${recorded:-cpu}
  if [ "$(.venv/bin/python -c 'import pip, sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)" != "$version" ] ||
    [[ -n $recorded && $recorded != cpu && $recorded != "$accelerator" ]]; then
    echo "making .venv with Python $version"
    "$python" -m venv --clear .venv ||
      fail "$python -m venv .venv failed; on Debian and Ubuntu it needs the package python3-venv."
  fi
  for file in "$@"; do
    install_file "$file" "$accelerator" "$version"
  done
}

install_file() {
  local file=$1 accelerator=$2 stamp=.venv/installed/$1 wanted jax=()
  wanted=$({ cat requirements.txt "$file" constraints.txt && echo "$2 $3"; } | .venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
    return
  fi
  [ "$accelerator" = cpu ] || jax=("jax[$accelerator]")
  echo "installing $file into .venv (jax for $accelerator); minutes the first time"
  rm -f "$stamp"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -c constraints.txt -r "$file" ${jax[@]+"${jax[@]}"} ||
    fail "installing $file failed, see above; the next call tries again."
  mkdir -p .venv/installed
  echo "$accelerator" >.venv/accelerator
  echo "$wanted" >"$stamp"
}

export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}

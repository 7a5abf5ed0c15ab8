#!/usr/bin/env bash
# What to run in a session with a GPU, in order of worth, within 25 minutes:
#
#     bash benchmarks/gpu_session.sh [tests] [steps] [train] [sanitizer]     (all four without an argument)
#
# Each step leaves its output, and what it measures as JSON, in $OUT (default runs/gpu_session); one that fails or outlasts its limit
# stops none of the others, and is named at the end. Parts can be run in calls of their own where a call has a limit: at most
# 7 minutes for tests, 10 for steps, 6 for train and 2 for sanitizer. COMMIT names what is measured where there is no git.
# Then move the JSON files to benchmarks/results/ and run `python benchmarks/speed_page.py`.
#
# Needs python3 with torch and triton, and pytest; pytest-xdist compiles the tests' kernels on several cores; hypothesis,
# transformers and the like are not needed. `steps` compares with what is installed of pytorch_optimizer, heavyball and
# gram-newton-schulz. Without a GPU its tests skip, the others run in Triton's interpreter, and the rest runs small.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-runs/gpu_session}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
failed=()
for part in "$@"; do
  case $part in
    tests | steps | train | sanitizer) ;;
    *)
      printf 'no part %s: tests, steps, train, sanitizer\n' "$part" >&2
      exit 2
      ;;
  esac
done

# The package asks for its own version, which a tree that is not installed does not have.
if ! python3 -c 'from importlib.metadata import version; version("schatten")' 2> /dev/null; then
  number=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
  site=$(mktemp -d)
  mkdir "$site/schatten-$number.dist-info"
  printf 'Metadata-Version: 2.1\nName: schatten\nVersion: %s\n' "$number" > "$site/schatten-$number.dist-info/METADATA"
  export PYTHONPATH="$PYTHONPATH:$site"
fi

# run NAME SECONDS COMMAND...: its output goes to $OUT/NAME.log, the end of it here.
run() {
  local name=$1 limit=$2 begun=$SECONDS status
  shift 2
  printf '\n== %s: %s\n' "$name" "$*"
  timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1
  status=$?
  tail -n "${SHOWN:-12}" "$OUT/$name.log"
  printf -- '-- %s: status %s after %s s\n' "$name" "$status" "$((SECONDS - begun))"
  [ "$status" -eq 0 ] || failed+=("$name ($status)")
}

has() { python3 -c "import $1" 2> /dev/null; }

# Kernels compiled for real, against fp64; then what only a GPU shows. Tests of memory and of waits want the device for
# themselves, so those run in one process.
tests() {
  local workers=()
  if has xdist; then workers=(-n "$(($(nproc) > 8 ? 8 : $(nproc)))"); fi
  run kernels 280 python3 -m pytest -q -p no:cacheprovider "${workers[@]}" tests/kernels
  run gpu_tests 140 python3 -m pytest -q -p no:cacheprovider tests/gpu
}

# One model in each call, the most asked for first: what was measured before a limit is kept.
steps() {
  local peers=() model limit
  if has pytorch_optimizer || has heavyball || has gram_newton_schulz; then peers=(--peers); fi
  while read -r model limit; do
    SHOWN=24 run "steps_$model" "$limit" python3 benchmarks/gpu.py --models "$model" "${peers[@]}" --out "$OUT/$STEPS"
  done <<< $'gpt2 150\nllama-1b 120\nexperts 90\nresnet18 90\nllama-8b 120'
}

train() {
  SHOWN=24 run train 340 python3 benchmarks/train_gpt2.py --minutes "$MINUTES" --out "$OUT/$TRAINING"
}

# Accesses out of bounds, where torch's allocator leaves no room between tensors.
sanitizer() {
  local tool
  if ! tool=$(command -v compute-sanitizer) || [ -z "$GPU" ]; then
    printf '\n== sanitizer: no compute-sanitizer or no GPU here\n'
    return
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run sanitizer 110 "$tool" --tool memcheck --error-exitcode 1 \
    python3 -m pytest -q -x -p no:cacheprovider tests/kernels -k "$CHECKED"
}

GPU=$(python3 -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
CHECKED=${CHECKED:-nowhere_else or begin_anywhere or odd_addresses}
MINUTES=${MINUTES:-4}
if [ -n "$GPU" ]; then
  STEPS=gpu.json TRAINING=train_gpt2.json
else
  STEPS=gpu_cpu.json TRAINING=train_gpt2_cpu.json
fi
printf '%s\n' "${GPU:-no GPU}"

if [ "$#" -eq 0 ]; then set -- tests steps train sanitizer; fi
for part in "$@"; do "$part"; done

if [ "${#failed[@]}" -gt 0 ]; then
  printf '\nfailed: %s\n' "${failed[*]}"
  exit 1
fi
printf '\nall passed; results in %s\n' "$OUT"

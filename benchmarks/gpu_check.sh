#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: GPU tests, then the benchmarks, then a table of the targets.
#
#   benchmarks/gpu_check.sh [--rehearse] [PART ...]
#
# PARTS: tests attention grpo_head step sweep elementwise (default: all, in this order). Needs a checkout and python3
# (or PYTHON=...) with torch, triton, numpy, pytest and matplotlib; phi4r need not be installed. liger-kernel and
# cut-cross-entropy are compared with where they can be imported.
#
# Each part runs in a process of its own under its own limit, so that a kernel that hangs costs that part alone.
# TOTAL_S (default 500) bounds all of them. Rows (CSV), pictures and the log go to OUT (default benchmarks/out). A copy
# without its git folder says its commit with PHI4R_COMMIT. --rehearse does the same on CPU with tiny shapes; kernels
# are not run there, so only the elementwise part writes rows.
#
# Exit code: 0 all parts went through, 1 one failed or was cut off, 2 no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT=${OUT:-benchmarks/out}
PYTHON=${PYTHON:-python3}
TOTAL_S=${TOTAL_S:-500}
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPLBACKEND=Agg

rehearse=0
if [[ ${1:-} == --rehearse ]]; then
  rehearse=1
  TOTAL_S=$((10 * TOTAL_S)) # a laptop, perhaps a busy one: nothing is lost by waiting
  shift
fi
parts=("$@")
((${#parts[@]})) || parts=(tests attention grpo_head step sweep elementwise)
for part in "${parts[@]}"; do
  case $part in
    tests | attention | grpo_head | step | sweep | elementwise) ;;
    *)
      echo "gpu_check: no part '$part' (tests attention grpo_head step sweep elementwise)" >&2
      exit 1
      ;;
  esac
done

if ((!rehearse)) && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: no GPU that this torch can use ($PYTHON); --rehearse runs tiny shapes on CPU" >&2
  exit 2
fi

mkdir -p "$OUT"
log=$OUT/log.txt
: >"$log"
outcomes=()
status=0

run() { # run NAME LIMIT_S COMMAND...: under its limit and what is left of the total
  local name=$1 limit=$2 left=$((TOTAL_S - SECONDS)) began=$SECONDS code
  shift 2
  ((rehearse)) && limit=$((10 * limit))
  if ((left < 10)); then
    outcomes+=("$name: not started, the time is over")
    status=1
    return 1
  fi
  ((limit > left)) && limit=$left
  printf '\n== %s (at most %s s)\n' "$name" "$limit" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$PYTHON" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) outcomes+=("$name: done in $((SECONDS - began)) s") ;;
    124 | 137) outcomes+=("$name: CUT OFF after $((SECONDS - began)) s") ;;
    *) outcomes+=("$name: FAILED with exit code $code after $((SECONDS - began)) s") ;;
  esac
  ((code == 0)) || status=1
  return "$code"
}

common=(--results "$OUT")
((rehearse)) && common=(--device cpu --shape tiny --no-check --seconds 0.01 --min-rounds 2)
sized() { # sized T...: sizes, unless this is a rehearsal
  ((rehearse)) || printf '%s\n' --tokens "$@"
}

((rehearse)) || run machine 60 -c 'from benchmarks import measure; print(measure.describe("cuda"))'
for part in "${parts[@]}"; do
  case $part in
    tests)
      if ((rehearse)); then
        run tests 60 -c 'print("tests need a GPU: not rehearsed")'
      else
        run tests 160 -m benchmarks.check kernels
      fi
      ;;
    attention)
      mapfile -t sizes < <(sized 32768)
      run attention 130 -m benchmarks.attention "${common[@]}" "${sizes[@]}" --mixes dense lognormal --seconds 0.3
      ;;
    grpo_head)
      mapfile -t sizes < <(sized 8192 32768)
      run grpo_head 110 -m benchmarks.grpo_head "${common[@]}" "${sizes[@]}" --modes grpo --seconds 0.3 --min-rounds 3
      ;;
    step)
      mapfile -t sizes < <(sized 8192 32768)
      run step 110 -m benchmarks.step "${common[@]}" "${sizes[@]}" --seconds 0.2 --min-rounds 3
      ;;
    sweep)
      mapfile -t sizes < <(sized 4096 8192 16384 65536)
      only=(ours sdpa_cudnn varlen_attn)
      ((rehearse)) && only=(sdpa)
      run "attention sweep" 70 -m benchmarks.attention "${common[@]}" "${sizes[@]}" --seconds 0.05 --min-rounds 3 \
        --only "${only[@]}"
      ;;
    elementwise)
      mapfile -t sizes < <(sized 8192)
      ((rehearse)) && common=(--device cpu --shape tiny --seconds 0.01 --min-rounds 2 --results "$OUT")
      run elementwise 50 -m benchmarks.elementwise "${common[@]}" "${sizes[@]}" --seconds 0.1
      ;;
  esac
done

# Past the limits of the parts there is always time for these.
TOTAL_S=$((rehearse ? TOTAL_S : SECONDS + 40))
[[ -f $OUT/attention.csv ]] && run "attention plots" 20 -m benchmarks.plot attention --results "$OUT"
[[ -f $OUT/grpo_head.csv ]] && run "grpo_head plot" 20 -m benchmarks.plot grpo_head --results "$OUT" --kinds scaling
[[ -f $OUT/elementwise.csv ]] && run "elementwise plot" 20 -m benchmarks.plot elementwise --results "$OUT" --kinds scaling
run targets 20 -m benchmarks.targets --results "$OUT"

printf '\n== outcome after %s s, commit %s; files under %s\n' "$SECONDS" \
  "$(git rev-parse --short HEAD 2>/dev/null || echo "${PHI4R_COMMIT:-unknown}")" "$OUT" | tee -a "$log"
printf '  %s\n' "${outcomes[@]}" | tee -a "$log"
exit "$status"

#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the operators, runs the tests marked gpu, measures operators and
# attention.
#
#     tools/bench/gpu.sh [FOLDER]     results go to FOLDER (build/bench-gpu)
#
# PYTHON names an interpreter other than python3, with torch for CUDA; nvcc, pytest and hypothesis must be there.
# Training's tests need DeepSpeed; without it they are left out, and the last lines say so. Two files of the operators'
# tests need pydantic; without it they fail to load, the others run. apex and liger-kernel are measured where they can be
# imported. Exit code 1 if anything failed, after all has run.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD # nothing is installed here
out=$(realpath -m "${1:-build/bench-gpu}")
python=${PYTHON:-python3}
mkdir -p "$out"
failed=()

step() { # step NAME COMMAND...: its output in FOLDER/NAME.log, its end here
	local name=$1 begin=$SECONDS
	shift
	if "$@" >"$out/$name.log" 2>&1; then
		echo "== $name: done in $((SECONDS - begin)) s"
	else
		failed+=("$name")
		echo "== $name: FAILED after $((SECONDS - begin)) s"
	fi
	tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 2
step build "$python" setup.py build_ext --inplace
problem=$("$python" -c 'from megagpt2.kernels.extension import EXTENSION; print(EXTENSION.problem("cuda") or "")' | tail -1)
if [ -n "$problem" ]; then
	echo "gpu.sh: $problem" >&2
	exit 2
fi
step operators "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors tests/numerics
LINES_SHOWN=80 step kernels "$python" tools/bench/kernels.py --device cuda --compile --json "$out/kernels.json"
step break_even "$python" tools/bench/break_even.py --device cuda --most 16777216 --json "$out/break_even.json"
LINES_SHOWN=40 step attention "$python" tools/bench/attention.py --device cuda --json "$out/attention.json"
if "$python" -c 'import deepspeed' 2>/dev/null; then
	step training "$python" -m pytest -q -m gpu -p no:cacheprovider tests/integration/test_gpu.py
else
	echo "== training: left out, DeepSpeed can't be imported"
fi
if [ ${#failed[@]} -gt 0 ]; then
	echo "failed: ${failed[*]} (logs in $out)"
	exit 1
fi

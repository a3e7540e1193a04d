#!/usr/bin/env bash
# All that a CUDA device must show: the tests marked gpu, and `mixerbench check` for every mixer with every backend.
# Usage: tests/gpu.sh FOLDER [processes] [seconds]   (make gpu). Everything runs side by side, since compiling is what takes
# time, spread over the GPUs. After the seconds, if any are given, what has not ended is stopped and counts as failed.
# Leaves FOLDER/check.json (all rows), FOLDER/tests.txt and FOLDER/summary.txt; exit 1 if anything failed.
set -u
out=$(realpath -m "$1"); side_by_side=${2:-12}; seconds=${3:-0}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out/parts"
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2
gpus=$(nvidia-smi --list-gpus | wc -l)
jobs() {
    printf '%s\n' "tests replay tests/test_replay.py" "tests speed tests/test_speed.py" \
        "tests mixers tests/test_mixers_gpu.py" "tests steps tests/test_one_step.py" "tests training tests/test_training.py" \
        "tests backbone tests/test_backbone.py"
    $python -W ignore -c 'from tests.test_kernels import CALLS, NEAR
for n, name in enumerate([*CALLS, *NEAR, "halves"]):
    print(f"tests kernels-{n} tests/test_kernels.py::test_so_it_is_on_the_gpu[{name}]")'
    for sam in true false misaligned; do echo "check quasiseparable sam=$sam"; done
    for file in configs/mixer/*.yaml; do
        name=$(basename "$file" .yaml)
        [ "$name" = quasiseparable ] || echo "check $name"
    done
}
one() {
    read -r number kind name rest <<<"$1"
    start=$SECONDS
    [ "$name" = training ] || export CUDA_VISIBLE_DEVICES=$((number % gpus))
    if [ "$kind" = tests ]; then
        # What the suite itself covers is left to the jobs that run it, a mixer each.
        # pytest-benchmark, where it is installed, warns of xdist, which is an error here.
        $python -m pytest -q -m gpu -k "not conformance_suite and not matrix_times_v" -p no:benchmark -p no:cacheprovider \
            "$rest" >"$out/parts/$name.txt" 2>&1
    else
        # shellcheck disable=SC2086
        $python -W ignore -m bench.cli check "$name" $rest where.device=cuda --json \
            >"$out/parts/$name-${rest#sam=}.json" 2>"$out/parts/$name-${rest#sam=}.err"
    fi
    echo "$? $kind $name $rest $((SECONDS - start)) s"
}
export -f one; export out python gpus
jobs | awk '{ print NR, $0 }' >"$out/parts/begun"
timeout "$seconds" xargs -d '\n' -P "$side_by_side" -I{} bash -c 'one "{}"' <"$out/parts/begun" | sort -n >"$out/parts/ended"
tail -n 40 "$out"/parts/*.txt >"$out/tests.txt"
$python - "$out" <<'PY' | tee "$out/summary.txt"
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
tables, failed = {}, 0
for path in sorted(out.glob("parts/*.json")):
    try:
        tables |= json.loads(path.read_text())
    except ValueError:
        print(path.name, "is no table:", path.with_suffix(".err").read_text()[-300:])
        failed += 1
(out / "check.json").write_text(json.dumps(tables, indent=1) + "\n")
for label, rows in tables.items():
    for row in rows:
        if row["verdict"] == "fail":
            print(label, row["property"], row["figure"], row["note"][:160])
            failed += 1
        elif row["verdict"] == "skip" and row["property"].startswith("backend "):
            print(label, row["property"], "not checked:", row["note"][:160])
ended = (out / "parts" / "ended").read_text().splitlines()
for line in ended:
    if not line.startswith("0 "):
        print("exit", line)
        failed += 1
if len(ended) < (all_of_them := len((out / "parts" / "begun").read_text().splitlines())):
    print(f"{all_of_them - len(ended)} of {all_of_them} did not end")
    failed += 1
print(f"{len(tables)} mixers and forms, {sum(map(len, tables.values()))} rows; {failed} failed")
sys.exit(min(failed, 1))
PY
exit "${PIPESTATUS[0]}"

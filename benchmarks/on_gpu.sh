#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, then step, update and memory of dense and sparse side by side, and a
# bf16 run of the demo. Some eight minutes on one H100 and 16 cores. Output goes to the directory that is named.
#
#     bash benchmarks/on_gpu.sh runs/gpu
set -u
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

part() { # its name, its time limit in seconds, its command
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    echo "== $name: exit status $?, $((SECONDS - start)) s"
    grep -E '^\{|^(FAILED|ERROR)|passed|failed' "$out/$name.log" | cut -c1-600 | tail -n 12
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
OMP_NUM_THREADS=1 part tests 230 "$python" -m pytest tests/training/test_gpu.py tests/test_machine.py -m gpu -n 12 -p no:cacheprovider --durations=5
part decode 45 "$python" benchmarks/decode_gpu.py
part step_60m 60 "$python" benchmarks/step.py --ways masked links --apart --steps 10 --bf16 --repeats 4 --tokens 64x256
part update_chtss 40 "$python" benchmarks/topology_update.py --methods chtss --tokens 16384 --repeats 3
part update_chts 40 "$python" benchmarks/topology_update.py --methods chts --tokens 16384 --repeats 3
part update_set 40 "$python" benchmarks/topology_update.py --methods set --tokens 16384 --repeats 3
part demo 90 "$python" train_llama.py --use_cpu false --bf16 true --dataloader_num_workers 2 --output_dir "$out/demo"
tail -n 4 "$out/demo.log" | cut -c1-300
part step_1b 75 "$python" benchmarks/step.py --ways masked links --apart --steps 10 --models llama_1b --bf16 --repeats 1 --tokens 16x256
part step_60m_compiled 75 "$python" benchmarks/step.py --ways masked links --steps 10 --bf16 --compile --repeats 1 --tokens 64x256

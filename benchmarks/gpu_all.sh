#!/bin/bash
# Takes every measurement that needs a GPU, in less than ten minutes; stages can be run alone:
#
#     benchmarks/gpu_all.sh RESULTS_FOLDER [ceiling_and_inference|many_prompts|training|compiled|memory|scaling|loader|parts] ...
#
# Each benchmark writes a JSON file into the folder and is ended after its share of the time, with the rows
# that it has by then.
set -u
cd "$(dirname "$0")/.."
folder=${1:?give a folder for the results}
shift
stages=${*:-ceiling_and_inference training memory many_prompts compiled scaling loader parts}
python=${PYTHON:-python}
mkdir -p "$folder"
failed=0

bench() { # seconds, name of the result, script, arguments
    local limit=$1 name=$2 script=$3
    shift 3
    timeout "$limit" "$python" "benchmarks/$script.py" "$@" --output "$folder/$name.json" || {
        echo "FAILED: $name (status $?)" >&2
        failed=1
    }
}

ceiling_and_inference() {
    bench 55 inference_few inference --precision fp16 --prompts 1 8 4 --repeats 5 --stored-text \
        --models stock-standard standard lite
    bench 20 inference_batch4 inference --precision fp16 --images 4 --prompts 1 --repeats 5 --models standard lite
}
many_prompts() {
    bench 45 inference_many inference --precision fp16 --prompts 80 16 --repeats 2 --stored-text \
        --models stock-standard lite
}
training() {
    bench 65 training_fp16 train_step --precisions fp16 --batch-sizes 4 --prompts 1 4 --repeats 3 \
        --models stock-standard standard lite depth16 small
    bench 30 training_fp32 train_step --precisions fp32 --batch-sizes 2 --prompts 1 --repeats 3 \
        --models stock-standard standard lite
    bench 30 training_batches train_step --precisions fp16 --batch-sizes 1 8 --prompts 1 --repeats 3 \
        --checkpointing off on --models lite
    bench 15 training_672 train_step --precisions fp16 --image-sizes 672 --batch-sizes 4 --prompts 4 --repeats 3 \
        --models lite
}
compiled() {
    bench 110 training_compiled train_step --precisions fp16 --batch-sizes 4 --prompts 4 --repeats 3 --compile on \
        --models lite
    bench 60 inference_compiled inference --precision fp16 --prompts 1 8 --repeats 5 --compile --models lite
    bench 55 inference_cuda_graphs inference --precision fp16 --prompts 1 --repeats 5 --compile reduce-overhead \
        --models lite
}
memory() {
    bench 40 memory_lite train_step --precisions fp16 --prompts 4 --checkpointing off on --fit 8 12 16 24 \
        --models lite
}
scaling() {
    bench 25 scaling scaling --model lite --precision fp16 --image-sizes 336 672 1008 --prompts 1 8 32 \
        --objects 1 20 --queries 100 200 --repeats 3
}
loader() {
    bench 20 loader loader generated --generated-images 8 --workers 0 2 --batches 8 --prompts 4
}
parts() {
    bench 30 parts parts --preset lite --image-size 672 --prompts 4 --precisions fp32 fp16 --repeats 3
}

for stage in $stages; do
    case $stage in
    ceiling_and_inference | many_prompts | training | compiled | memory | scaling | loader | parts)
        echo "== $stage ($(date -u +%H:%M:%S))"
        "$stage"
        ;;
    *)
        echo "no such stage: $stage" >&2
        failed=1
        ;;
    esac
done
exit $failed

#!/bin/sh
# What waits for a GPU: recordings, stacks of several kinds and sizes, precisions, and the paper's sweeps.
#
#   sh results/speed/on_gpu.sh OUT [DATA [PART...]]
#
# OUT receives the CSV files and results folders; DATA is the folder of data sets. The parts, all by default, in this order:
#   verify   the recordings, by the plain and the stacked trainer
#   speed    a training step of every trainer, 1 to 30 models, three precisions, beside the peers
#   scoring  scoring, AnoGAN's search included
#   sweep    30 trainings of GANomaly on MNIST, stacked in each way and precision; and three of them by the plain trainer
#   paper    the paper's sets, complete, both protocols, with relatives and classical methods
# DEVICE=cpu and QUICK=1 try the script out.
set -eu
out=${1:?usage: on_gpu.sh OUT [DATA [PART...]]}
data=${2:-datasets}
if [ $# -gt 2 ]; then shift 2; parts=$*; else parts="verify speed scoring sweep paper"; fi
device=${DEVICE:-cuda}
bench="python -m ganomaly_plugin"
size="--features 64 --batch-size 64 --image-size 32 --repeats 15"
jobs="1 3 10 30"
precisions="float32 tf32 bf16"
one=plain,compiled,captured
many=plain,stacked-grouped,captured-grouped,stacked-matmul,captured-matmul,captured-streams
ways="matmul grouped streams"
job="--epochs 15"
slice=""
peers=$(python -c 'import anomalib' 2>/dev/null && echo authors,anomalib || echo authors)
if [ -n "${QUICK:-}" ]; then
    size="--features 2 --batch-size 4 --image-size 32 --images 16 --repeats 5"
    jobs="1 2"
    one=plain
    many=plain,stacked-grouped,stacked-matmul,stacked-streams
    job="--epochs 1 --train-fraction 0.01 --hparams features=2 --classes 0,1"
    slice="--epochs 1 --train-fraction 0.01 --hparams features=2 --models ganomaly,pca --seeds 0-1 --limit 8"
fi
failed=0
mkdir -p "$out"

try() { # COMMAND...: go on with the rest when it fails, and say so at the end
    "$@" || {
        failed=$((failed + 1))
        echo "failed: $*" >&2
    }
}

sweep() { # NAME OPTION...: 30 trainings of GANomaly on MNIST, and how long they took
    name=$1
    shift
    began=$(date +%s)
    try $bench run --datasets mnist --seeds 0-2 --image_size 32 $job --data_root "$data" --device "$device" "$@" \
        --out "$out/mnist_$name"
    echo "$name: $(($(date +%s) - began)) s, start included" | tee -a "$out/sweeps.txt"
}

for part in $parts; do
    case $part in
    verify)
        for trainer in plain stacked; do
            try $bench verify tests/golden/*.npz --trainer "$trainer" --device "$device" >"$out/verify_$trainer.txt"
            cat "$out/verify_$trainer.txt"
        done
        ;;
    speed)
        for precision in $precisions; do
            for n in $jobs; do
                trainers=$([ "$n" = 1 ] && echo "$one" || echo "$many")
                try $bench speed --models ganomaly --trainers "$trainers" --jobs "$n" --peers "$peers" --measure training \
                    --precision "$precision" --device "$device" $size --out "$out/${precision}_$n.csv"
            done
        done
        ;;
    scoring)
        try $bench speed --models ganomaly,ae,vae,skip_ganomaly,egbad,anogan --peers none --measure scoring --device "$device" \
            $size --out "$out/scoring.csv"
        ;;
    sweep)
        for precision in $precisions; do
            for way in $ways; do
                sweep "${precision}_$way" --models "ganomaly[precision=$precision]" --trainer "stacked-$way"
            done
        done
        sweep "plain_3_jobs" --models ganomaly --trainer plain --limit 3
        ;;
    paper)
        for set in mnist cifar10; do
            try $bench run --config "benchmark_configs/paper_$set.yaml" --data_root "$data" --device "$device" $slice \
                --out "$out/paper_$set"
        done
        ;;
    *)
        echo "no part $part" >&2
        exit 2
        ;;
    esac
done
cat "$out"/*.csv "$out"/sweeps.txt 2>/dev/null || true
[ "$failed" = 0 ] || { echo "$failed commands failed" >&2 && exit 1; }

#!/bin/sh
# Everything that waits for a GPU, in one go: recordings, stacks of several kinds and sizes, precisions, and the paper's sweeps.
#
#   sh results/speed/on_gpu.sh OUT [DATA]
#
# OUT receives the CSV files and results folders; DATA is the folder of data sets. DEVICE=cpu and QUICK=1 try the script out.
set -eu
out=${1:?usage: on_gpu.sh OUT [DATA]}
data=${2:-datasets}
device=${DEVICE:-cuda}
bench="python -m ganomaly_plugin"
size="--features 64 --batch-size 64 --image-size 32 --repeats 15"
jobs="1 3 10 30"
trainers=compiled,captured,stacked-grouped,captured-grouped,stacked-matmul,captured-matmul,captured-streams
peers=$(python -c 'import anomalib' 2>/dev/null && echo authors,anomalib || echo authors)
sweep="--epochs 15"
if [ -n "${QUICK:-}" ]; then
    size="--features 2 --batch-size 4 --image-size 16 --images 16 --repeats 5"
    jobs="1 2"
    sweep="--epochs 1 --classes 0,1 --train-fraction 0.01 --hparams features=2"
    trainers=stacked-grouped,stacked-matmul,stacked-streams
fi
mkdir -p "$out"
for trainer in plain stacked; do
    $bench verify tests/golden/*.npz --trainer "$trainer" --device "$device" | tee "$out/verify_$trainer.txt" || true
done
for precision in float32 tf32 bf16; do
    for n in $jobs; do
        $bench speed --models ganomaly --trainers "plain,$trainers" --jobs "$n" --peers "$peers" \
            --measure training --precision "$precision" --device "$device" $size --out "$out/${precision}_$n.csv" || true
    done
done
$bench speed --models ganomaly,ae,vae,skip_ganomaly,egbad,anogan --peers none --measure scoring --device "$device" $size \
    --out "$out/scoring.csv" || true
began=$(date +%s)
for trainer in stacked-grouped stacked-matmul stacked-streams plain; do
    $bench run --models ganomaly --datasets mnist --seeds 0-2 --image_size 32 $sweep --data_root "$data" --device "$device" \
        --trainer "$trainer" --out "$out/mnist_$trainer" || true
    now=$(date +%s)
    echo "mnist, ganomaly, three seeds, $trainer: $((now - began)) s" | tee -a "$out/sweeps.txt"
    began=$now
done
for precision in tf32 bf16; do
    for trainer in stacked-grouped stacked-matmul stacked-streams; do
        began=$(date +%s)
        $bench run --models "ganomaly[precision=$precision]" --datasets mnist --seeds 0-2 --image_size 32 $sweep \
            --data_root "$data" --device "$device" --trainer "$trainer" --out "$out/mnist_${precision}_$trainer" || true
        echo "mnist, ganomaly, three seeds, $precision, $trainer: $(($(date +%s) - began)) s" | tee -a "$out/sweeps.txt"
    done
done
cat "$out"/*.csv "$out/sweeps.txt"

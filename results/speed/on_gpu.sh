#!/bin/sh
# What waits for a GPU: recordings, stacks of several kinds and sizes, precisions, and the paper's sweeps.
#
#   sh results/speed/on_gpu.sh OUT [DATA [PART...]]
#
# OUT receives the CSV files, results folders and log.txt, each as soon as it is there; DATA is the folder of data sets. The
# parts, all by default, in this order:
#   verify   the recordings, by the plain trainer and by stacks of each kind
#   speed    a training step of the plain trainer and of stacks that are replayed, 1 to 30 models, three precisions
#   sweep    30 trainings of GANomaly on MNIST, stacked; and some of them by the plain trainer
#   paper    the paper's sets, both protocols, with relatives and classical methods
#   more     torch.compile, stacks that are not replayed, and scoring, AnoGAN's search included
# A command that fails or takes too long leaves the others to be done. In the environment:
#   WITHIN=540                seconds for everything: a command still running then is interrupted, none is begun after it
#   PYTHON=python3            which Python
#   PRECISIONS, JOBS          "float32 tf32 bf16", "30 1 10 3": of `speed`
#   SWEEPS                    "tf32 plain float32 bf16": of `sweep`, plain, PRECISION or PRECISION_WAY, such as bf16_streams;
#                             without a WAY the runner takes the fastest
#   SETS, PAPER               "mnist cifar10", and more options of `bench run`, such as "--models ganomaly": of `paper`
#   EPOCHS=15, PLAIN=1        of `sweep`: the budget, and how many jobs the plain trainer does
#   QUICK=1 DEVICE=cpu        to try the script out
set -eu
out=${1:?usage: on_gpu.sh OUT [DATA [PART...]]}
data=${2:-datasets}
if [ $# -gt 2 ]; then shift 2; parts=$*; else parts="verify speed sweep paper more"; fi
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
bench="$python -m ganomaly_plugin"
size="--features 64 --batch-size 64 --image-size 32 --repeats 9"
precisions=${PRECISIONS:-float32 tf32 bf16}
jobs=${JOBS:-30 1 10 3}
sweeps=${SWEEPS:-tf32 plain float32 bf16}
one=plain,captured
ways="stacked-implicit stacked-matmul stacked-grouped stacked-streams"
many=plain,captured-implicit,captured-matmul,captured-grouped,captured-streams
eager=plain,stacked-implicit,stacked-matmul,stacked-grouped
most=30
job="--epochs ${EPOCHS:-15}"
paper=${PAPER:-}
scored=ganomaly,ae,vae,skip_ganomaly,egbad,anogan
if [ -n "${QUICK:-}" ]; then
    size="--features 2 --batch-size 4 --image-size 32 --images 16 --repeats 5"
    jobs="2 1"
    most=2
    one=plain
    many=plain,stacked-matmul,stacked-grouped,stacked-streams
    job="--epochs 1 --train-fraction 0.01 --hparams features=2 --classes 0,1"
    paper="--epochs 1 --train-fraction 0.01 --hparams features=2 --models ganomaly,pca --seeds 0-1 --limit 8"
    scored=ganomaly,ae
    ways="stacked-matmul stacked-grouped stacked-streams"
    eager=plain,stacked-matmul,stacked-grouped
fi
began=$(date +%s)
failed=0
export PYTHONUNBUFFERED=1
mkdir -p "$out"

try() { # COMMAND...: its output also to log.txt; go on with the rest when it fails, and say so at the end
    left=$((began + ${WITHIN:-86400} - $(date +%s)))
    echo "== at $(($(date +%s) - began)) s: $*"
    if [ "$left" -lt 10 ]; then
        failed=$((failed + 1))
        echo "failed: no time left"
        return
    fi
    { timeout -s INT -k 30 "$left" "$@" 2>&1 || echo "failed: $? from $*"; } | tee "$out/last.txt"
    ! grep -q "^failed: " "$out/last.txt" || failed=$((failed + 1))
    cat "$out/last.txt" >>"$out/log.txt"
}

speed() { # NAME TRAINERS OPTION...
    name=$1
    trainers=$2
    shift 2
    try $bench speed --models ganomaly --trainers "$trainers" --measure training --device "$device" $size "$@" \
        --out "$out/$name.csv"
}

sweep() { # NAME OPTION...: 30 trainings of GANomaly on MNIST, and how long they took
    name=$1
    shift
    start=$(date +%s)
    try $bench run --datasets mnist --seeds 0-2 --image_size 32 $job --data_root "$data" --device "$device" "$@" \
        --out "$out/mnist_$name"
    echo "$name: $(($(date +%s) - start)) s, start included" | tee -a "$out/sweeps.txt"
}

for part in $parts; do
    case $part in
    verify)
        for trainer in plain $ways; do
            try $bench verify tests/golden/*.npz --trainer "$trainer" --device "$device"
        done
        ;;
    speed)
        peers=$($python -c 'import anomalib' 2>/dev/null && echo authors,anomalib || echo authors)
        for precision in $precisions; do
            for n in $jobs; do
                speed "${precision}_$n" "$([ "$n" = 1 ] && echo "$one" || echo "$many")" --jobs "$n" --precision "$precision" \
                    --peers "$([ "$n" = 1 ] && echo "$peers" || echo none)"
            done
        done
        ;;
    sweep)
        for name in $sweeps; do
            if [ "$name" = plain ]; then
                sweep "plain_${PLAIN:-1}" --models ganomaly --trainer plain --limit "${PLAIN:-1}"
            else
                case $name in *_*) way=-${name#*_} ;; *) way= ;; esac
                sweep "$name" --models "ganomaly[precision=${name%_*}]" --trainer "stacked$way"
            fi
        done
        ;;
    paper)
        for set in ${SETS:-mnist cifar10}; do
            try $bench run --config "benchmark_configs/paper_$set.yaml" --data_root "$data" --device "$device" $paper \
                --out "$out/paper_$set"
        done
        ;;
    more)
        for precision in $precisions; do
            speed "eager_${precision}_$most" "$eager" --jobs "$most" --precision "$precision" --peers none
        done
        try $bench speed --models "$scored" --peers none --measure scoring --device "$device" $size --out "$out/scoring.csv"
        speed compiled plain,compiled --peers none
        ;;
    *)
        echo "no part $part" >&2
        exit 2
        ;;
    esac
done
cat "$out"/*.csv "$out"/sweeps.txt 2>/dev/null || true
[ "$failed" = 0 ] || { echo "$failed commands failed" >&2 && exit 1; }

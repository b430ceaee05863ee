#!/bin/sh
# The sweeps behind config_shakespeare.py and the ablations, resumable: `SEEDS=1,2,3 sh results/sweeps.sh [NAME …]`.
# 300 steps of the default are 46 s on one thread of an AMD EPYC. Ablations, rates and batches take equal tokens;
# shapes and vocabularies take as many steps as fit in the time of 300 of the default's (153 ms a step; width 96: 114,
# 192: 270; 2 layers: 93, 6: 207; vocabulary 1,024: 137, 4,096: 185).
set -e
seeds=${SEEDS:-1,2,3}
sweep() { python train.py sweep "$@" "seed=$seeds" --out_dir="out/$name" --max_minutes=none --eval_every=0; }
for name in ${*:-ablations learning_rate muon muon_steps embedding width depth batch vocabulary}; do
    case $name in
    ablations)
        for change in "" smear=false norm=none norm_position=post position=none qk_norm=false "ffn=silu d_ff=512"; do
        sweep $change --max_steps=300 --warmup_steps=30; done ;;
    learning_rate)
        sweep lr=1e-3,3e-3,1e-2,1e-1,30 --optimizer=adamw --embedding_lr=none --max_steps=300 --warmup_steps=30 ;;
    muon) sweep muon_lr=0.02,0.03,0.04 --max_steps=300 --warmup_steps=30 ;;
    muon_steps) sweep muon_steps=2,3,5 --max_steps=300 --warmup_steps=30 ;;
    embedding) sweep embedding_lr=0.008,0.04,0.16,0.64 --max_steps=300 --warmup_steps=30 ;;
    width) for shape in "96 403 40" "128 300 30" "192 170 17"; do set -- $shape
        sweep d_model=$1 max_steps=$2 warmup_steps=$3; done ;;
    depth) for shape in "2 492 49" "4 300 30" "6 221 22"; do set -- $shape
        sweep n_layers=$1 max_steps=$2 warmup_steps=$3; done ;;
    batch) for shape in "1024 600 60" "2048 300 30" "4096 150 15"; do set -- $shape
        sweep batch_tokens=$1 max_steps=$2 warmup_steps=$3; done ;;
    vocabulary) for shape in "1024 335 34" "2048 300 30" "4096 248 25"; do set -- $shape
        folder=data/shakespeare_$1
        [ -f $folder/meta.json ] || python data.py prepare shakespeare --vocab_size=$1 --data_dir=$folder
        sweep data_dir=$folder max_steps=$2 warmup_steps=$3; done ;;
    esac
    for kind in txt json png; do cp "out/$name/sweep.$kind" "results/sweep_$name.$kind"; done
done

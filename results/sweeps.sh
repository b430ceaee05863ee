#!/bin/sh
# The sweeps behind config_shakespeare.py and the course's ablations: `SEEDS=1,2,3 sh results/sweeps.sh`, resumable.
# 500 steps of the default are 77 s of CPU time on one thread of an AMD EPYC. Ablations, rates and batches take equal
# tokens; shapes and vocabularies take as many steps as fit in the CPU time of 500 of the default's (154 ms a step;
# width 96: 118, 192: 281, 256: 467; 2 layers: 95, 6: 216, 8: 275; vocabulary 1,024: 140, 4,096: 184).
set -e
seeds=${SEEDS:-1,2,3}
sweep() { out=$1; shift; python train.py sweep "$@" "seed=$seeds" --out_dir="out/$out"; }
draw() { for kind in txt json png; do cp "out/$1/sweep.$kind" "results/sweep_$1.$kind"; done; }

for change in "" norm=none norm_position=post position=none qk_norm=false "ffn=silu d_ff=512"; do
    sweep ablations $change --max_steps=500; done
sweep learning_rate lr=1e-3,3e-3,1e-2,3e-2,1e-1,1,30 --optimizer=adamw --max_steps=500
sweep muon optimizer=muon muon_lr=0.01,0.02,0.03,0.06 --max_steps=500
for shape in "96 652 65" "128 500 50" "192 274 27" "256 165 17"; do set -- $shape
    sweep width d_model=$1 max_steps=$2 warmup_steps=$3; done
for shape in "2 810 81" "4 500 50" "6 356 36" "8 280 28"; do set -- $shape
    sweep depth n_layers=$1 max_steps=$2 warmup_steps=$3; done
for shape in "1024 1000 100" "2048 500 50" "4096 250 25" "8192 125 12"; do set -- $shape
    sweep batch batch_tokens=$1 max_steps=$2 warmup_steps=$3; done
for shape in "1024 550 55" "2048 500 50" "4096 418 42"; do set -- $shape
    folder=data/shakespeare_$1
    [ -f $folder/meta.json ] || python data.py prepare shakespeare --vocab_size=$1 --data_dir=$folder
    sweep vocabulary data_dir=$folder max_steps=$2 warmup_steps=$3; done
for name in ablations learning_rate muon width depth batch vocabulary; do draw $name; done

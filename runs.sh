export OMP_NUM_THREADS=1
PY="nice -n 5 /work/venv/bin/python exp.py --eval_every=0 --num_samples=0 --overwrite=true --threads=1"
for s in 1 2; do
IDEA=ema BETA=0.98 FROM=0.7 $PY --max_steps=1300 --seed=$s --out_dir=out/a > log_ema_$s.txt 2>&1
IDEA=grow TOTAL=10400 PLAN="[(0.25,4),(0.55,8),(0.2,16)]" $PY --max_steps=1496 --seed=$s --out_dir=out/a > log_grow_$s.txt 2>&1
IDEA=cautious WD=0.1 $PY --max_steps=1300 --seed=$s --out_dir=out/a > log_caut_$s.txt 2>&1
IDEA=ema BETA=0.98 FROM=0.7 $PY --max_steps=1300 --seed=$s --min_lr_factor=0.15 --out_dir=out/a > log_emahi_$s.txt 2>&1
done

"""Shakespeare's plays on a laptop, from nothing to samples in under three minutes: `python train.py`.

Hardware: two CPU cores (an Intel Xeon with AMX, shared with other programs).
Time: 2.4 minutes of training, 1,833 to 1,955 steps in seven runs.
Target: 1.791 to 1.826 bits per byte of validation, four seeds.
Size: 1.9 million parameters: in so little time a small model that sees much text beats a large one that sees little.
Batch: 8 sequences of 256 = 2,048 tokens; 1,900 steps are 3.9 million tokens, 2.4 times the corpus.
From: results/sweeps.txt, the shapes that were tried; results/train.md, the width, shift_keys and rope_pattern.
"""
data_dir = "data/shakespeare"
out_dir = "out/shakespeare"
max_minutes = 2.4

context_length = 256
d_model = 160
n_layers = 4
n_heads = 1
qk_norm = True
zero_init = True
smear = True
shift_keys = True
rope_pattern = "RRRN"

batch_tokens = 8 * context_length
loader = "epochs"
optimizer = "muon"
lr = 8e-3
muon_lr = 0.03
muon_steps = 2
embedding_lr = 0.16
schedule = "wsd"
decay_fraction = 0.7
min_lr_factor = 0.02
warmup_steps = 50
eval_every = 200
eval_steps = 10
num_samples = 3

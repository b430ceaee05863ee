"""Shakespeare's plays on two CPU cores, from nothing to samples in under three minutes: `python train.py`.

132 seconds of training are about 900 steps of 2,048 tokens on two cores of an AMD EPYC: 1.9 million tokens, 1.3 times the
corpus, for 2.6 million parameters. In so little time a small model that sees much text beats a large one that
sees little: results/shakespeare_shapes.txt has the shapes that were tried. Target: 2.05 bits per byte of validation.
"""
data_dir = "data/shakespeare"
out_dir = "out/shakespeare"
max_minutes = 2.2

context_length = 128
d_model = 192
n_layers = 4
n_heads = 3
qk_norm = True
zero_init = True

batch_tokens = 16 * context_length
optimizer = "muon"
lr = 8e-3
muon_lr = 0.03
schedule = "wsd"
decay_fraction = 0.7
min_lr_factor = 0.02
warmup_steps = 50
eval_every = 200
eval_steps = 10
log_every = 100
num_samples = 3

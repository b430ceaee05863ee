"""Shakespeare's plays on two CPU cores, from nothing to samples in under three minutes: `python train.py`.

144 seconds of training are 1,300 to 1,600 steps of 2,048 tokens on two cores of an AMD EPYC: about 3 million tokens,
twice the corpus, for 1.3 million parameters. In so little time a small model that sees much text beats a large one that
sees little: results/shakespeare_shapes.txt has what was tried. Target: 1.96 bits per byte of validation.
"""
data_dir = "data/shakespeare"
out_dir = "out/shakespeare"
max_minutes = 2.4

context_length = 256
d_model = 128
n_layers = 4
n_heads = 1
qk_norm = True
zero_init = True
smear = True

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
log_every = 100
num_samples = 3

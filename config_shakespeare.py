"""Shakespeare's plays in two minutes of training on two CPU cores: `python train.py`."""
data_dir = "data/shakespeare"
out_dir = "out/shakespeare"
max_minutes = 2.3

context_length = 128
d_model = 256
n_layers = 4
n_heads = 4
qk_norm = True

batch_tokens = 16 * context_length
optimizer = "muon"
lr = 3e-3
muon_lr = 0.02
warmup_steps = 50
eval_every = 500
log_every = 100
num_samples = 3

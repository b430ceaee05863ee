"""OpenWebText in 90 minutes on one H100, the course's leaderboard: `python train.py config_owt.py`.

Hardware: one H100 SXM, 989 TFLOP/s in bfloat16.
Time: 88 minutes of training, 2 for evaluation. Not run: a step's parts on an H200 make 493,000 tokens/s (36 % MFU).
Target: 3.08 nats a token, the best of the course's board after 90 minutes of one H100; Chinchilla's law (2203.15556),
fitted to other text and tokens, says 3.34 for this size and so many tokens.
Size: 134.1 million parameters; 109.5 million in matrix products (84.9 blocks, 24.6 head); 0.714 GFLOP a token.
Batch: 256 sequences of 512 = 131,072 tokens, 4 micro-batches of 64; 493,000 tokens/s x 88 min = 2.60e9 = 19,860 steps.
From: 12 layers of 768 GPT-2 small (Radford 2019); vocabulary 32,000 and context 512 the course; Muon, QK-norm, last
matrices at 0, linear decay over the last 60 % Jordan's speed runs (github.com/KellerJordan/modded-nanogpt); AdamW's
rates and windows that do not overlap config_shakespeare.py, not swept at this size.
"""
data_dir = "data/owt"
out_dir = "out/owt"
max_minutes = 88

context_length = 512
d_model = 768
n_layers = 12
n_heads = 12
qk_norm = True
zero_init = True

batch_tokens = 256 * context_length
micro_batch_size = 64
loader = "epochs"
optimizer = "muon"
lr = 3e-3
embedding_lr = 0.06
muon_lr = 0.02
schedule = "wsd"
decay_fraction = 0.6
min_lr_factor = 0.0
warmup_steps = 300
eval_every = 500
checkpoint_every = 1000
num_samples = 3

"""TinyStories with the course's model: `python train.py config_tinystories.py`, meant for one GPU.

Tokens: 10,000 steps of 128 sequences of 256 = 327,680,000, the course's budget. Parameters: 22.7 million, of which
12.5 million in the blocks. FLOPs by 6 N + 12 L d T per token: 1.12e8, 3.7e16 in all, so the time is
3.7e16 / (MFU x peak): 4 minutes at an assumed 15 % of an H100's 989 TFLOP/s, two days on two CPU cores.
The course asks for a validation loss of 1.45 per token. The figure for this config has not been measured yet.
For a laptop: --max_minutes=30 --batch_tokens=8192, and the schedule is fitted to that.
"""
data_dir = "data/tinystories"
out_dir = "out/tinystories"

context_length = 256
d_model = 512
d_ff = 1344
n_layers = 4
n_heads = 16

batch_tokens = 128 * context_length
max_steps = 327_680_000 // batch_tokens
micro_batch_size = 128
loader = "epochs"
lr = 3e-3
warmup_steps = 200
weight_decay = 0.1
eval_every = 500
checkpoint_every = 500
log_every = 20
num_samples = 3

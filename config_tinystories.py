"""TinyStories with the course's model, meant for one GPU: `python train.py config_tinystories.py`.

Hardware: one H100 SXM; on a laptop add --max_minutes=30 --batch_tokens=8192, to which the schedule is fitted.
Time: 3.7e16 FLOP are 4 minutes at an assumed 15 % of 989 TFLOP/s, two days on two CPU cores. Not run yet.
Target: 1.45 nats a token of validation, the course's.
Size: 22.7 million parameters (vocabulary 10,000), 12.5 million in the blocks; 0.112 GFLOP a token.
Batch: 128 sequences of 256 = 32,768 tokens; 10,000 steps = 327,680,000 tokens, the course's budget.
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
num_samples = 3

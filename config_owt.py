"""OpenWebText in at most 90 minutes on one H100: `python train.py config_owt.py`, the course's leaderboard setting.

Where the choices come from. Vocabulary 32,000 and context 512: the course's rules. 12 layers of 768: GPT-2 small
(Radford 2019), untied as in the course. Muon for the matrices in the blocks with momentum 0.95, five Newton-Schulz
steps and lr 0.02, QK-norm, last matrices starting at 0, a linear decay to 0 over the last 60 %: Jordan's GPT-2 speed
runs (github.com/KellerJordan/modded-nanogpt), whose embedding also learns about 100 times as fast as the head. AdamW's
lr 3e-3 for the head and 20 times that for the embedding, windows that do not overlap, 131,072 tokens a step and warmup
300: ours, from the small model of config_shakespeare.py, not swept at this size.
Bill: 84.9 million parameters in the blocks + 24.6 million in the head = 109.5 million in matrix products; 714 MFLOP
a token by 6 N + 12 L d T; at an assumed MFU of 40 % of 989 TFLOP/s 554,000 tokens a second, so 88 minutes are 2.93
billion tokens, 22,300 steps and 2.1e18 FLOP. Assumed, not measured: it has not been run. The clock decides, not the
number of steps, and max_minutes leaves two minutes for evaluation. Best known on this board: 3.08 nats per token after
90 minutes of one H100 (AdamW and Muon entries), 3.035 after 45 of one B200.
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
log_every = 20
num_samples = 3

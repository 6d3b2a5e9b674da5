"""A batch by hand: what each mask says, and what the losses make of it."""

import dataclasses

import jax
import numpy as np

import insula
from insula.batch import Batch, Observation
from insula.losses import predict_tokens
from insula.tokens.text import embedded

config = dataclasses.replace(insula.preset("tiny"), horizon=4, action_dim=2, state_dim=2)
params = insula.init_params(config, jax.random.key(0))
rng = np.random.default_rng(0)
state = rng.uniform(-1, 1, (2, 2))  # [B, S], normalized
actions = rng.uniform(-1, 1, (2, 4, 2))  # [B, H, D], normalized

text = embedded()
codec = insula.FASTCodec.fit(rng.uniform(-1, 1, (64, 4, 2)), vocab_size=config.vocab_size - text.vocab_size)
tokenizer = insula.FASTTokenizer(text, codec, max_token_len=config.max_token_len, max_prompt_len=config.max_prompt_len)
samples = [tokenizer.tokenize("push the point", s, a) for s, a in zip(state, actions, strict=True)]
rows = {name: np.stack([getattr(sample, name) for sample in samples]) for name in vars(samples[0])}

size = config.vision.image_size
observation = Observation(
    images={name: rng.integers(0, 256, (2, size, size, 3), np.uint8) for name in config.cameras},
    image_mask={"front": np.array([True, True]), "wrist": np.array([True, False])},  # sample 1 has no wrist camera
    state=state.astype(np.float32),
    tokens=rows["tokens"],
    token_mask=rows["token_mask"],  # a real token, not padding
)
batch = Batch(
    observation,
    actions.astype(np.float32),
    action_is_pad=np.array([[False] * 4, [False, False, True, True]]),  # the episode of sample 1 ends: no flow loss
    action_dim_mask=np.ones((2, 2), bool),  # this robot has both dimensions
    ar_mask=rows["ar_mask"],  # causal from the first FAST token on; the prompt before it is bidirectional
    loss_mask=rows["loss_mask"],  # scored by the token loss: FAST tokens and "|"; never touches the flow loss
)

total, metrics = jax.jit(lambda p, b: insula.compute_loss(p, config, b, jax.random.key(1)))(params, batch)
print(f"total {total:.3f} =", {name: round(float(value), 3) for name, value in metrics.items()})
likeliest, targets = jax.jit(lambda p, b: predict_tokens(p, config, b))(params, batch)
print(
    "right, of the scored tokens:",
    int((likeliest == targets.labels)[targets.valid].sum()),
    "of",
    int(targets.valid.sum()),
)

"""What a run folder holds, by name. Everything that reads or writes one takes the names from here.

RUN/
  train.json          the settings it was started with
  data.json           the mapping of its data sets, and which episodes were held out
  metrics.jsonl       a row of metrics every few steps
  init.json           what `--init` loaded, left over and drew afresh
  lock                held by the process that trains here
  quarantine.jsonl    samples that were left out, and why
  name                what the run is called by wandb and trackio
  tensorboard/        and wandb/: what `--log-to` keeps here
  profile/            traces of `--profile-steps`
  skipped.jsonl       updates that were left out since a loss was not finite, and their samples
  checkpoints/STEP/   weights, training state, and beside them:
    config.json         the model and the version that wrote it
    certificate.json    its insulation, measured
    robots/NAME/        normalization, cameras, horizon
    tokenizer/          text tokenizer, FAST codec, dialect
    SHA256SUMS          of every file beside it, for `sha256sum -c`
  damaged/STEP/       checkpoints that were not as they had been written
"""

SETTINGS_FILE = "train.json"
MAPPING_FILE = "data.json"
METRICS_FILE = "metrics.jsonl"
INIT_FILE = "init.json"
QUARANTINE_FILE = "quarantine.jsonl"
SKIPPED_FILE = "skipped.jsonl"
LOCK_FILE = "lock"
NAME_FILE = "name"
PRETRAIN_FILE = "pretrain.json"
"""The settings of a pretraining, in a folder of its own."""
TENSORBOARD_FOLDER = "tensorboard"
PROFILE_FOLDER = "profile"
CHECKPOINTS_FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged"

MODEL_FILE = "config.json"
CERTIFICATE_FILE = "certificate.json"
ROBOTS_FOLDER = "robots"
TOKENIZER_FOLDER = "tokenizer"

"""Set before anything imports Transformers: no test talks to the Hub, and two workers share two cores."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch


torch.set_num_threads(1)

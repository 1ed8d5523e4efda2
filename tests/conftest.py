"""Set before anything imports Transformers: no test talks to the Hub, and two workers share two cores."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch


torch.set_num_threads(1)


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """A cache of its own: Datasets knows a folder that describes itself by its name, not by what lies in it now.

    Its environment variable is read once, at import, so setting that in a test would change nothing.
    """
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")

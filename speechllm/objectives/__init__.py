"""What is minimised: functions of tensors and masks. No model, no trainer, no I/O."""

from .info_nce import info_nce
from .layers import layerwise_contrastive_loss, parse_layer_schedule, parse_layers
from .similarity import cosine_similarity_matrix, masked_mean


__all__ = [
    "cosine_similarity_matrix",
    "info_nce",
    "layerwise_contrastive_loss",
    "masked_mean",
    "parse_layer_schedule",
    "parse_layers",
]

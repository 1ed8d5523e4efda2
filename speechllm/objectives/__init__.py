"""What is minimised: functions of tensors and masks. No model, no trainer, no I/O."""

from .distillation import next_token_kl
from .info_nce import info_nce
from .layers import ExtraTexts, layerwise_contrastive_loss, parse_layer_schedule, parse_layer_weights, parse_layers
from .mixed_speech_text import WordSpan, mixed_sequence, spoken_words
from .next_token import next_token_loss
from .norm import embedding_mean_square, scale_penalty
from .optimal_transport import exact_wasserstein_distance_matrix, transport_cost_matrix
from .similarity import cosine_similarity_matrix, masked_mean
from .sinkhorn import wasserstein_distance_matrix


__all__ = [
    "ExtraTexts",
    "WordSpan",
    "cosine_similarity_matrix",
    "embedding_mean_square",
    "exact_wasserstein_distance_matrix",
    "info_nce",
    "layerwise_contrastive_loss",
    "masked_mean",
    "mixed_sequence",
    "next_token_kl",
    "next_token_loss",
    "parse_layer_schedule",
    "parse_layer_weights",
    "parse_layers",
    "scale_penalty",
    "spoken_words",
    "transport_cost_matrix",
    "wasserstein_distance_matrix",
]

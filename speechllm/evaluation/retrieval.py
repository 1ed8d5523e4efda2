"""Retrieval between utterances and transcripts: does an utterance's nearest text say what was said?"""

import torch


def retrieval_metrics(similarity: torch.Tensor, texts: list[str], ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Recall@k and the mean rank of the right one, in both directions.

    Args:
        similarity: (texts, utterances); text i is the transcript of utterance i.
        texts: the transcripts; equal ones are all right answers for each other's utterances.
        ks: how many of the nearest may hold the right one.

    Returns:
        `recall@k` (as fractions) and `mean_rank` (best is 1) from utterance to transcript, and both of these with
        `text_to_speech_` before for the other direction.
        Ties count against us: an item's rank is the number of wrong ones at least as similar, plus 1.
    """
    ids = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    label = torch.tensor([ids[text] for text in texts], device=similarity.device)
    right = label[:, None] == label[None, :]
    metrics = {}
    for name, scores in (("", similarity.T), ("text_to_speech_", similarity)):  # queries x candidates
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        rank = 1 + (~(scores < best) & ~right).sum(1)  # NaN counts against us too
        for k in ks:
            metrics[f"{name}recall@{k}"] = (rank <= k).double().mean().item()
        metrics[f"{name}mean_rank"] = rank.double().mean().item()
    return metrics

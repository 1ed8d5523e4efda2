"""States of a whole held-out set, of which every text is compared with every utterance.

They can be many gigabytes: at paper size, seven layers of a token take 57 kB in bfloat16. So they are kept without padding,
on the CPU and in the LLM's dtype; on several processes the texts travel and each process keeps the states of its own
utterances; and the similarities are computed block by block on the device.
"""

from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence

from ..objectives.layers import Side, Similarity, layer_similarities


BLOCK = 64  # texts and utterances that are compared at once
Tokens = dict[int, torch.Tensor]  # layer -> (tokens, dim)


def tokens_of(states: dict[int, torch.Tensor], mask: torch.Tensor) -> list[Tokens]:
    """The valid tokens of each item of a batch, on the CPU."""
    return [{layer: state[i][valid].cpu() for layer, state in states.items()} for i, valid in enumerate(mask.bool())]


def padded(items: Sequence[Tokens]) -> Side:
    """Layer -> (items, length, dim), and the mask (items, length)."""
    lengths = [len(next(iter(item.values()))) for item in items]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {layer: pad_sequence([item[layer] for item in items], batch_first=True) for layer in items[0]}, mask


def held_out_matrices(
    similarity: Similarity,
    texts: Mapping[int, Tokens],
    utterances: Mapping[int, Tokens],
    device: torch.device,
    processes: int = 1,
) -> dict[int, torch.Tensor]:
    """Layer -> (texts, utterances) similarities, on the CPU, by ascending row.

    Args:
        texts: row -> tokens, of all rows.
        utterances: row -> tokens, of this process's rows.
        device: to compute on.
        processes: each of which calls this, and gets the same.
    """
    place = {row: i for i, row in enumerate(sorted(texts))}
    columns = {row: torch.zeros(len(next(iter(texts.values()))), len(texts)) for row in utterances}  # (layers, texts)
    text_blocks = [
        (torch.tensor([place[row] for row in rows]), padded([texts[row] for row in rows])) for rows in _blocks(texts)
    ]
    for rows in _blocks(utterances):
        speech = _on(device, padded([utterances[row] for row in rows]))
        for at, text in text_blocks:
            block = layer_similarities(similarity, _on(device, text), speech).float().cpu()
            for row, column in zip(rows, block.unbind(2)):
                columns[row][:, at] = column
    if processes > 1:
        columns = dict(gather_object(list(columns.items())))
    matrices = torch.stack([columns[row] for row in place], -1)  # (layers, texts, utterances)
    return dict(zip(next(iter(texts.values())), matrices))


def _blocks(items: Mapping[int, Tokens]) -> list[list[int]]:
    """Rows, those of similar length together."""
    order = sorted(items, key=lambda row: len(next(iter(items[row].values()))))
    return [order[first : first + BLOCK] for first in range(0, len(order), BLOCK)]


def _on(device: torch.device, side: Side) -> Side:
    states, mask = side
    return {layer: state.to(device) for layer, state in states.items()}, mask.to(device)

"""GradCache (Gao et al., arXiv 2101.06983): contrastive batches larger than what a device can differentiate at once.

1. Run the batch through the model in chunks, without graph, and keep only the states that the loss needs.
2. Take the loss of all chunks' states together, and its gradient with respect to the states.
3. Run each chunk again, with graph, and pass its share of that gradient on to the parameters.

The gradient is that of the whole batch, dropout included: each chunk's second run starts from the random state of its
first. Memory is that of one chunk and of all states; the price is one more forward pass of the model. Gradient
accumulation, in contrast, adds no negatives: its batches do not see each other.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from ..configuration_speechllm import SpeechLLMConfig


Chunk = dict[str, Any]
Output = TypeVar("Output")


class RandomState:
    """The random state of the CPU and of the devices of `tensors`, to return to. (SpecAugment draws from NumPy's.)"""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self.cpu, self.numpy = torch.get_rng_state(), np.random.get_state()
        self.devices, self.states = get_device_states(*tensors)

    @contextmanager
    def again(self):
        now = np.random.get_state()
        try:
            with torch.random.fork_rng(devices=self.devices):
                torch.set_rng_state(self.cpu)
                np.random.set_state(self.numpy)
                set_device_states(self.devices, self.states)
                yield
        finally:
            np.random.set_state(now)


def two_pass_backward(
    chunks: list[Chunk],
    encode: Callable[[Chunk], Output],
    states_of: Callable[[Output], list[torch.Tensor]],
    loss: Callable[[list[torch.Tensor]], torch.Tensor],
    further: Callable[[Output], torch.Tensor] | None = None,
    *,
    used: int | None = None,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """Leave the gradient of a batch's loss in the parameters, in the memory of one chunk.

    Args:
        chunks: the batch in parts.
        encode: runs the model on a chunk.
        states_of: what the loss needs of its output, each (items, ...).
        loss: of the states of all chunks, joined.
        further: terms of the loss that are taken of each chunk alone; zero for those that do not count.
        used: only so many chunks count; the others just run. (Where weights are sharded, all processes must run the model
            equally often.)
        scale: of losses, before their backward pass.
        no_sync: context in which a backward pass leaves this process's gradients to itself.

    Returns:
        The sum of `loss` and of all `further` terms, detached.
    """
    used = len(chunks) if used is None else used
    before, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            before.append(RandomState(value for value in chunk.values() if torch.is_tensor(value)))
            parts.append(states_of(encode(chunk)))
    leaves = [torch.cat(states).requires_grad_() for states in zip(*parts[:used])]
    value = loss(leaves)
    scale(value).backward()
    total = value.detach()

    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    sizes = [len(part[0]) for part in parts[:used]]
    shares = list(zip(*(gradient.split(sizes) for gradient in gradients)))
    for i, chunk in enumerate(chunks):
        with nullcontext() if i == len(chunks) - 1 else no_sync():
            with before[i].again():
                output = encode(chunk)
            ends = states_of(output)
            starts = list(shares[i]) if i < used else [torch.zeros_like(end) for end in ends]
            if further is not None:
                term = further(output)
                total = total + term.detach()
                ends, starts = [*ends, scale(term)], [*starts, torch.ones_like(term)]
            torch.autograd.backward(ends, starts)
    return total


def split_batch(batch: dict[str, Any], size: int, config: SpeechLLMConfig) -> list[dict[str, Any]]:
    """A collated batch in parts of `size` utterances each (the last may be smaller), the audio segments of an utterance
    with it: they are as many as it takes to fill its placeholders."""
    rule, count = config.speech_token_rule, len(batch["input_ids"])
    audio = next(name for name in ("speech_frames", "input_values", "input_features") if name in batch)
    lengths = batch[f"{audio}_mask"].sum(-1)
    ends = rule.tokens(lengths if audio == "speech_frames" else rule.frames(lengths)).cumsum(0)  # (segments,)
    wanted = (batch["input_ids"] == config.audio_token_id).sum(-1).cumsum(0)  # (batch,)
    segments = [0, *(torch.searchsorted(ends, wanted) + 1).tolist()]  # of the utterances before each one
    chunks = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        parts = slice(segments[start], segments[stop])
        chunks.append(
            {
                name: value[parts] if name.startswith(audio) else _part(value, slice(start, stop))
                for name, value in batch.items()
            }
        )
    return chunks


def _part(value: Any, items: slice) -> Any:
    if isinstance(value, dict):
        return {name: _part(inner, items) for name, inner in value.items()}
    return value[items] if isinstance(value, torch.Tensor | list) else value

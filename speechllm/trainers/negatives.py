"""Texts from beyond the batch as negatives. The LLM is frozen, so the states of the training set's texts are cached, and
comparing an utterance with any number of them costs no pass of the LLM.

They act where an utterance is the query (the speech-to-text half of the symmetric loss): the softmax of utterance j over
texts has more of them, log( exp(s_jj / tau) + sum over texts i != j, in and beyond the batch, of exp(s_ij / tau) ). In the
paper's direction a text is the query and *utterances* compete; a text without speech cannot take part.

- **Drawn** texts: a random part of the training set in each step.
- **Mined** texts: those that an utterance is most easily taken for. The query is the utterance's own latest mean state at
  one layer, kept from the last time it was trained on, or its transcript's before that. The search is exact: blocks of
  matrix products over all texts, repeated every so many steps.

Guards against false negatives, for drawn and mined texts, and for every utterance of the batch: never a text of the batch,
never a near-duplicate (`data/splits.py`) of the utterance's own text, and, when mining, never a text whose mean state is
more similar to the own text's than a threshold. (That similarity is the cosine after the mean of all texts is taken off:
plain cosines of an LLM's states are all close to 1.)

All choices follow from seed, step and the batch (with `gather_negatives`, of all processes together, so that they do not
depend on how many these are), and resume exactly.
Memory: texts x width float32 on the device for mining, and utterances x width float16 on the CPU.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..checkpoint_speechllm import CheckpointError
from ..data.feature_cache import FeatureCache, text_key
from ..data.schema import Row
from ..data.splits import near_duplicate_clusters
from ..objectives import ExtraTexts, masked_mean
from ..objectives.gathering import several_processes
from .aligned_states import AlignedStates
from .contrastive_config import ContrastiveArguments


FILE = "mined_negatives.safetensors"


class TrainingTexts:
    """The distinct texts of a training set, by number, and their cached states.

    Args:
        texts: of every row.
        keys: of every row; texts with equal keys count as one.
        states: cache of their states (see `frozen_states.py`).
    """

    def __init__(self, texts: Sequence[str], keys: Sequence[str], states: FeatureCache):
        first: dict[str, str] = {}
        for text, key in zip(texts, keys, strict=True):
            first.setdefault(key, text)
        number = {key: i for i, key in enumerate(first)}
        self.texts = list(first.values())
        self.of_row = [number[key] for key in keys]
        self.clusters = torch.tensor(near_duplicate_clusters(self.texts))
        self.states = states

    def __len__(self) -> int:
        return len(self.texts)

    def _cached(self, number: int) -> dict[str, torch.Tensor]:
        cached = self.states.get(text_key(self.texts[number]))
        if cached is None:
            raise RuntimeError(
                f"The states of {self.texts[number]!r} are no longer in {self.states.folder}. Start the run again, which "
                "computes what is missing, and keep that folder while it runs."
            )
        return cached

    def of(
        self, numbers: list[int], layers: list[int], device: torch.device
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Layer -> (texts, length, dim), and the mask (texts, length)."""
        cached = [self._cached(number) for number in numbers]
        tensors = {layer: [item[f"layer_{layer}"] for item in cached] for layer in layers}
        states = {layer: pad_sequence(values, batch_first=True).to(device) for layer, values in tensors.items()}
        lengths = torch.tensor([len(value) for value in tensors[layers[0]]])
        return states, (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)

    def means(self, layer: int, device: torch.device) -> torch.Tensor:
        """(texts, dim) mean state of each text, of length 1."""
        rows = [self._cached(number)[f"layer_{layer}"].float().mean(0) for number in range(len(self))]
        return F.normalize(torch.stack(rows), dim=-1).to(device)

    def draw(self, count: int, present: set[int], seed: str) -> list[int]:
        """`count` random texts (fewer if there are not as many) besides those `present`."""
        drawn = random.Random(seed).sample(range(len(self)), min(len(self), count + len(present)))
        return [number for number in drawn if number not in present][:count]


class HardNegatives:
    """For every row, the texts that its utterance is most easily taken for.

    Args:
        texts: to search.
        count: of negatives per row.
        layer: whose states are compared.
        refresh: steps between searches.
        maximum_similarity: of a negative to the row's own text, see the module's docstring.
        device: to search on.
    """

    def __init__(
        self,
        texts: TrainingTexts,
        count: int,
        layer: int,
        refresh: int,
        maximum_similarity: float,
        device: torch.device,
    ):
        self.texts, self.count, self.layer, self.refresh = texts, count, layer, refresh
        self.maximum_similarity, self.device = maximum_similarity, device
        self.means = texts.means(layer, device)
        self.own = torch.tensor(texts.of_row)
        centre = self.means.mean(0)
        self._along_centre, self._centre_square = self.means @ centre, centre @ centre
        self._centred_norm = (1 - 2 * self._along_centre + self._centre_square).clamp(min=1e-12).sqrt()
        self.speech = torch.zeros(len(self.own), self.means.shape[1], dtype=torch.float16)  # latest mean states
        self.seen = torch.zeros(len(self.own), dtype=torch.bool)
        self.mined = torch.full((len(self.own), count), -1)  # text numbers; -1: none
        self.searches = torch.tensor(0)

    def remember(self, row: int, mean: torch.Tensor) -> None:
        """Keep the utterance's mean state (dim,) as the query of later searches."""
        self.speech[row] = F.normalize(mean.float(), dim=-1)
        self.seen[row] = True

    def of(self, rows: list[int], step: int) -> list[int]:
        """The texts mined for `rows`, each once, after a new search if one is due at `step`."""
        if int(self.searches) != step // self.refresh + 1:
            self.search()
            self.searches = torch.tensor(step // self.refresh + 1)
        found = self.mined[rows].flatten().tolist()
        return [number for number in dict.fromkeys(found) if number >= 0]

    def similar(self, own: torch.Tensor, texts: list[int] | slice = slice(None)) -> torch.Tensor:
        """(rows, texts): whether a text is too similar to the text `own` (rows,) to be its negative."""
        own, clusters = own.to(self.device), self.texts.clusters.to(self.device)
        product = self.means[own] @ self.means[texts].T
        product -= self._along_centre[own][:, None] + self._along_centre[texts] - self._centre_square
        cosine = product / (self._centred_norm[own][:, None] * self._centred_norm[texts])
        return (cosine > self.maximum_similarity) | (clusters[own][:, None] == clusters[texts])

    @torch.no_grad()
    def search(self, block: int = 256) -> None:
        """Mine for every row, exactly. Cost: rows x texts x width multiply-adds, twice; memory: block x texts."""
        for start in range(0, len(self.own), block):
            rows = slice(start, start + block)
            own = self.own[rows]
            queries = torch.where(
                self.seen[rows, None].to(self.device),
                self.speech[rows].to(self.device).float(),
                self.means[own.to(self.device)],
            )
            scores = (queries @ self.means.T).masked_fill(self.similar(own), -torch.inf)
            best = scores.topk(min(self.count, len(self.texts)), dim=-1)
            found = best.indices.masked_fill(best.values == -torch.inf, -1)
            self.mined[rows, : found.shape[1]] = found.cpu()

    def save(self, folder: str) -> None:
        tensors = {"speech": self.speech[self.seen], "seen": self.seen, "mined": self.mined, "searches": self.searches}
        save_file(tensors, Path(folder) / FILE)

    def load(self, folder: str) -> None:
        path = Path(folder) / FILE
        saved = load_file(path) if path.is_file() else {}
        if not saved or saved["mined"].shape != self.mined.shape or saved["speech"].shape[1] != self.speech.shape[1]:
            raise CheckpointError(
                f"{folder} holds no mined negatives of this training set ({tuple(self.mined.shape)}). Resume with the "
                "data and `hard_negatives` of that run, or begin a new one."
            )
        self.seen, self.mined, self.searches = saved["seen"], saved["mined"], saved["searches"]
        self.speech[self.seen] = saved["speech"]


def extra_texts(
    texts: TrainingTexts,
    numbers: list[int],
    rows: list[int],
    layers: list[int],
    device: torch.device,
    hard: HardNegatives | None = None,
) -> ExtraTexts:
    """The texts `numbers` as negatives of the utterances `rows`, where the guards allow it."""
    states, mask = texts.of(numbers, layers, device)
    own = torch.tensor([texts.of_row[row] for row in rows], dtype=torch.long)
    if hard is not None:
        forbidden = hard.similar(own, numbers)
    else:
        forbidden = texts.clusters[own][:, None] == texts.clusters[numbers]
    return ExtraTexts(states, mask, ~forbidden.T.to(device))


class FurtherNegatives:
    """The texts from beyond the batch that a step compares its utterances with, drawn and mined as the settings say.

    Args:
        rows: of the training set; keys: see `TrainingTexts`; states: cache of the texts' states.
        args: settings; layers: all that are aligned.

    Raises:
        ValueError: if the layer to mine at is not aligned.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        keys: Sequence[str],
        states: FeatureCache,
        args: ContrastiveArguments,
        layers: Sequence[int],
    ):
        self.args = args
        self.texts = TrainingTexts([row["text"] for row in rows], keys, states)
        self.hard = None
        if not args.hard_negatives:
            return
        layer = layers[-1] if args.hard_negatives_layer < 0 else args.hard_negatives_layer
        if layer not in layers:
            raise ValueError(f"hard_negatives_layer is {layer}; it must be one of those aligned, {list(layers)}.")
        self.hard = HardNegatives(
            self.texts,
            args.hard_negatives,
            layer,
            refresh=args.hard_negatives_refresh,
            maximum_similarity=args.hard_negatives_similarity,
            device=args.device,
        )

    def __call__(self, states: AlignedStates, step: int, gather: bool) -> ExtraTexts | None:
        """Those of the batch, or with `gather` of the processes' batches together: the same on all of them."""
        rows = states.batch["rows"] if len(states.speech_mask) else []
        together = gather_object(rows) if gather else rows
        present = {self.texts.of_row[row] for row in together}
        seed = f"bank {self.args.seed} {step} {sorted(together)}"
        numbers = self.texts.draw(self.args.text_bank, present, seed)
        if self.hard is not None:
            numbers += [number for number in self.hard.of(together, step) if number not in present.union(numbers)]
            self._remember(states, rows)
        if not numbers:
            return None
        return extra_texts(self.texts, numbers, rows, list(states.text), self.args.device, self.hard)

    def _remember(self, states: AlignedStates, rows: list[int]) -> None:
        if self.hard.layer not in states.speech:
            return
        means = masked_mean(states.speech[self.hard.layer].detach(), states.speech_mask).float().cpu()
        latest = list(zip(rows, means))
        for row, mean in gather_object(latest) if several_processes() else latest:
            self.hard.remember(row, mean)

    def save(self, folder: str) -> None:
        if self.hard is not None:
            self.hard.save(folder)

    def load(self, folder: str) -> None:
        if self.hard is not None:
            self.hard.load(folder)

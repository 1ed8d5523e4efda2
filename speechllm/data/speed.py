"""Speed perturbation (Ko et al., "Audio augmentation for speech recognition", Interspeech 2015): each utterance also a
little slower and faster, pitch included, as if another speaker had said it."""

from ..audio_speechllm import load_audio
from ..configuration_speechllm import SAMPLING_RATE
from .schema import Row


def speed_perturbed(rows: list[Row], factors: tuple[float, ...] = (0.9, 1.1)) -> list[Row]:
    """The rows once per factor, played that much faster; the originals are not among them.

    Args:
        rows: with `id`, `audio`, and `duration` in seconds.
        factors: of the speed; 1.1 is 10% faster.

    Raises:
        AudioError: if an audio cannot be used.
    """
    perturbed = []
    for row in rows:
        samples = load_audio(row["audio"], row.get("sampling_rate"), name=row["id"])
        for factor in factors:
            # Declared to be at a higher rate than they are, the samples are played faster.
            audio = {"array": samples, "sampling_rate": round(factor * SAMPLING_RATE)}
            name, seconds = f"{row['id']} at {factor} times the speed", row["duration"] / factor
            perturbed.append({**row, "id": name, "audio": audio, "duration": seconds})
    return perturbed

"""CoVoST 2 (https://github.com/facebookresearch/covost), translations of Common Voice, and FLEURS
(https://huggingface.co/datasets/google/fleurs), the same sentences read in 102 languages.

    en/validated.tsv                       Common Voice 4: client_id, path, sentence, ..., gender, ...
    en/clips/common_voice_en_1.mp3
    en/covost_v2.en_de.tsv                 path, translation, split; or, made of both by CoVoST's own script,
    en/covost_v2.en_de.train.tsv           path, sentence, translation, client_id

    de_de/train.tsv                        without a first line: number of the sentence, file, transcript as written,
                                           normalised transcript, its characters, samples at 16 kHz, gender
    de_de/audio/train/1234567.wav          (audio/train.tar.gz, unpacked)
"""

from collections.abc import Iterator
from pathlib import Path

from ..schema import ManifestError, Row, SetAside, not_utf8
from .reading import choice, line_not_utf8, malformed, need_folder, several, table


FLEURS_COLUMNS = ("number", "file", "raw", "normalised", "characters", "samples", "gender")
GENDERS = {"male": "male", "female": "female", "male_masculine": "male", "female_feminine": "female"}


def covost(
    folder: Path, split: str = "train", task: str = "st", language: str = "en", target_language: str = "de"
) -> Iterator[Row | SetAside]:
    """Rows of CoVoST 2.

    Args:
        folder: Common Voice's folder of one language, with `clips`, and the tables of CoVoST in it.
        split: "train", "dev" or "test".
        task: "st", "asr" or "asr,st".
        language, target_language: codes as CoVoST writes them, "en", "de", "zh-CN".

    Raises:
        ManifestError: if a table, or a column of it, is missing.
    """
    tasks = [choice(name, "task", ["asr", "st"]) for name in several(task)]
    pair = f"covost_v2.{language}_{target_language}"
    ready, whole = folder / f"{pair}.{split}.tsv", folder / f"{pair}.tsv"
    if not ready.is_file() and not whole.is_file():
        raise ManifestError(f"{folder} holds neither {ready.name} nor {whole.name}. Unpack CoVoST's table there.")
    recorded = {}
    if (folder / "validated.tsv").is_file() or not ready.is_file():
        lines = table(folder / "validated.tsv", needed=("path", "sentence"), escaped=True)
        recorded = {line["path"]: line for line in lines if not isinstance(line, SetAside)}
    wanted = {split, f"{split}_covost"}  # the training set takes in more of Common Voice than its own
    if ready.is_file():
        lines = table(ready, needed=("path", "translation"))
    else:
        lines = table(whole, needed=("path", "translation", "split"))
    for line in lines:
        if isinstance(line, SetAside):
            yield line
            continue
        if not ready.is_file() and line["split"] not in wanted:
            continue
        name, about = Path(line["path"]).stem, recorded.get(line["path"], {})
        sentence = line.get("sentence", about.get("sentence"))
        if sentence is None:
            reason = f"{name} is in {whole.name} but not in validated.tsv of {folder}. Use Common Voice 4."
            yield SetAside(name, reason, "no transcript in Common Voice")
            continue
        if not_utf8(sentence):
            yield line_not_utf8(name, folder / "validated.tsv")
            continue
        gender = GENDERS.get(about.get("gender", ""))
        row = {
            "audio": str(folder / "clips" / line["path"]),
            "text": sentence.strip(),
            "language": language,
            "speaker": line.get("client_id") or about.get("client_id"),
            **({"gender": gender} if gender else {}),
            "source": "CoVoST 2",
            "license": "cc0-1.0",
        }
        if "asr" in tasks:
            yield {**row, "id": name, "task": "asr"}
        if "st" in tasks:
            answer = {"target_language": target_language, "target": line["translation"].strip()}
            yield {**row, "id": f"{name}-{target_language}", "task": "st", **answer}


def fleurs(
    folder: Path, split: str = "train", language: str = "en_us", target_language: str = "", text: str = "raw"
) -> Iterator[Row | SetAside]:
    """Rows of FLEURS: recognition, or, with a target language, translation by the sentences' numbers.

    Args:
        folder: what holds `en_us` and the like (Hub: `data`).
        split: "train", "dev" or "test".
        language, target_language: FLEURS' names of them, "en_us", "de_de"; rows have the part before the bar, "de".
        text: "raw" with capitals and punctuation, or "normalised".

    Raises:
        ManifestError: if a language or a split is missing.
    """
    choice(text, "text", ["raw", "normalised"])
    here = need_folder(folder / language, f"FLEURS in {language!r}")
    found = [path for path in (here / "audio" / split, here / split) if path.is_dir()]
    if not found:
        raise ManifestError(f"{here / 'audio' / split}: there is no such folder. Unpack {split}.tar.gz there.")
    translations = {}
    if target_language:
        for line in table(folder / target_language / f"{split}.tsv", FLEURS_COLUMNS):
            if isinstance(line, SetAside):
                yield line
            else:
                translations[line["number"]] = line[text]
    for line in table(here / f"{split}.tsv", FLEURS_COLUMNS):
        if isinstance(line, SetAside):
            yield line
            continue
        gender, name = GENDERS.get(line["gender"].strip().lower()), f"{language} {Path(line['file']).stem}"
        try:
            seconds = int(line["samples"]) / 16_000
        except ValueError as error:
            yield malformed(name, here / f"{split}.tsv", error)
            continue
        row = {
            "id": name,
            "audio": str(found[0] / line["file"]),
            "text": line[text].strip(),
            "duration": seconds,
            "task": "asr",
            "language": language.partition("_")[0],
            **({"gender": gender} if gender else {}),
            "source": "FLEURS",
            "license": "cc-by-4.0",
        }
        if not target_language:
            yield row
        elif line["number"] in translations:  # not every sentence was recorded, and so written down, in every language
            answer = {"target_language": target_language.partition("_")[0], "target": translations[line["number"]]}
            yield {**row, "id": f"{row['id']}-{target_language}", "task": "st", **answer}

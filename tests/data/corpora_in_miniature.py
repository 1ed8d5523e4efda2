"""Miniatures of corpora in their real layouts, with generated audio."""

import io
import json
import tarfile
from pathlib import Path

import soundfile
from tiny import tone


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sound(path: Path, seconds=0.3, seed=0, rate=16_000, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, seed=seed), rate, **options)
    return path


MUST_C = [  # wav, offset, duration, English, German, French
    ("ted_1.wav", 0.1, 0.5, "Thank you so much, Chris.", "Vielen Dank, Chris.", "Merci beaucoup, Chris."),
    ("ted_1.wav", 0.8, 0.7, "And it's an honor.", "Es ist mir eine Ehre.", "C'est un honneur."),
    ("ted_2.wav", 0.0, 0.9, "(Laughter)", "(Lachen)", "(Rires)"),
]


def must_c(folder: Path, split="train", pairs=("de", "fr"), rate=16_000) -> Path:
    for column, code in enumerate(pairs, 4):
        data = folder / f"en-{code}" / "data" / split
        yaml = [
            f"- {{duration: {seconds:.6f}, offset: {offset:.6f}, rW: 5, speaker_id: spk.{wav[4]}, uW: 0, wav: {wav}}}\n"
            for wav, offset, seconds, *_ in MUST_C
        ]
        write(data / "txt" / f"{split}.yaml", "".join(yaml))
        write(data / "txt" / f"{split}.en", "".join(f"{row[3]}\n" for row in MUST_C))
        write(data / "txt" / f"{split}.{code}", "".join(f"{row[column]}\n" for row in MUST_C))
        for number in (1, 2):
            sound(data / "wav" / f"ted_{number}.wav", 2.0, seed=number, rate=rate)
    return folder


MUST_SHE = """ID\tLANG\tTALK\tSRC\tREF\tWRONG-REF\tSPEAKER\tGENDER\tCATEGORY\tCOMMENT\tFREE-REF\tGENDERTERMS
it-0001\tit\tted_1\tI was born in Rome.\tSono nata a Roma.\tSono nato a Roma.\tJane\tShe\t1F\t\t\tnata nato
it-0002\tit\tted_2\tA good friend and a "teacher".\tUn buon amico e un maestro.\tUna buona amica e una maestra.\tJoe\tHe\t2M\t\t\tUn Una;buon buona;amico amica
"""


def must_she(folder: Path) -> Path:
    write(folder / "tsv" / "MONOLINGUAL.it_v1.2.tsv", MUST_SHE)
    for number in (1, 2):
        sound(folder / "wav" / f"it-000{number}.wav", seed=number)
    return folder


def gigaspeech(folder: Path) -> Path:
    def segment(number, start, end, text, subsets=("{XL}", "{M}")):
        return {"sid": f"POD1_S{number:07}", "speaker": "N/A", "begin_time": start, "end_time": end, "text_tn": text,
                "subsets": [*subsets]}  # fmt: skip

    segments = [
        segment(1, 0.1, 0.6, "AS THEY'RE LEAVING <COMMA> CAN WE GO <QUESTIONMARK>"),
        segment(2, 0.6, 0.9, "<MUSIC>"),
        segment(3, 0.9, 1.4, "YES <PERIOD>"),
        segment(4, 1.4, 1.9, "ONLY IN THE LARGE SET", ("{XL}",)),
    ]
    audio = {"aid": "POD1", "path": "audio/podcast/P0000/POD1.opus", "sample_rate": 16000, "channels": 1,
             "duration": 2.0, "subsets": ["{XL}", "{M}"], "segments": segments}  # fmt: skip
    write(folder / "GigaSpeech.json", json.dumps({"dataset": "GigaSpeech", "language": "EN", "audios": [audio]}))
    sound(folder / audio["path"], 2.0, seed=3, format="OGG", subtype="OPUS")
    return folder


def librispeech(folder: Path) -> Path:
    root = folder / "LibriSpeech"
    write(
        root / "SPEAKERS.TXT",
        "; ID |SEX| SUBSET |MINUTES| NAME\n19 | F | dev-clean | 25.1 | A\n20 | M | dev-clean | 3 | B\n",
    )
    for speaker in (19, 20):
        here = root / "dev-clean" / str(speaker) / "198"
        lines = [f"{speaker}-198-000{i} CHAPTER {'ONE TWO'.split()[i]}\n" for i in range(2)]
        write(here / f"{speaker}-198.trans.txt", "".join(lines))
        for i in range(2):
            sound(here / f"{speaker}-198-000{i}.flac", seed=speaker + i)
    return folder


MLS_ADDRESS = "http://www.archive.org/download/book/book_01_64kb.mp3"


def mls(folder: Path, language="english", text=("the first line", "the second line"), ending="flac", speaker=7) -> Path:
    root = folder / f"mls_{language}{'_opus' if ending == 'opus' else ''}"
    header = " SPEAKER | GENDER | PARTITION | MINUTES | BOOK ID | TITLE | CHAPTER \n"
    write(root / "metainfo.txt", header + f" {speaker} | M | train | 9 | 8 | T | C\n")
    names = [f"{speaker}_8_00000{i}" for i in range(len(text))]
    write(root / "train" / "transcripts.txt", "".join(f"{name}\t{line}\n" for name, line in zip(names, text)))
    segments = [f"{name}\t{MLS_ADDRESS}\t{10.0 * i:.2f}\t{10.0 * i + 9.5:.2f}\n" for i, name in enumerate(names)]
    write(root / "train" / "segments.txt", "".join(segments))
    options = {"format": "OGG", "subtype": "OPUS"} if ending == "opus" else {}
    for i, name in enumerate(names):
        sound(root / "train" / "audio" / str(speaker) / "8" / f"{name}.{ending}", seed=i, **options)
    return folder


DESCRIPTIONS = [
    {"original_path": MLS_ADDRESS, "begin_time": 10.0 * i, "end_time": 10.0 * i + 9.5, "speaker_id": "7", "gender": "male",
     "speaking_rate": rate, "noise": noise, "reverberation": "slightly roomy sounding", "speech_monotony": "monotone",
     "sdr_noise": "slightly noisy", "pesq_speech_quality": "great speech quality", "pitch": "low-pitch", "snr": 41.5}
    for i, (rate, noise) in enumerate([("slightly slowly", "quite clear"), ("very fast", "very noisy")])
]  # fmt: skip


def covost(folder: Path, own_script=False) -> Path:
    root = folder / "en"
    rows = [("a", "Say \"hello\".", "Sag „hallo“.", "train", "female"), ("b", "Wait.", "Warte.", "train_covost", ""),
            ("c", "Test it.", "Teste es.", "test", "male_masculine")]  # fmt: skip
    clips = [f"common_voice_en_{row[0]}.mp3" for row in rows]
    if own_script:
        lines = [
            f"{clip}\t{en}\t{de}\tclient {name}\n"
            for clip, (name, en, de, split, _) in zip(clips, rows)
            if split != "test"
        ]
        write(root / "covost_v2.en_de.train.tsv", "path\tsentence\ttranslation\tclient_id\n" + "".join(lines))
    else:
        lines = [
            f"client {name}\t{clip}\t{en}\t2\t0\t\t{gender}\t\n" for clip, (name, en, _, _, gender) in zip(clips, rows)
        ]
        head = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent\n"
        write(root / "validated.tsv", head + "".join(lines))
        lines = [f"{clip}\t{de}\t{split}\n" for clip, (_, _, de, split, _) in zip(clips, rows)]
        write(root / "covost_v2.en_de.tsv", "path\ttranslation\tsplit\n" + "".join(lines))
    for seed, clip in enumerate(clips):
        sound(root / "clips" / clip, seed=seed, format="MP3")
    return root


def fleurs(folder: Path) -> Path:
    texts = {"en_us": {5: "A Tornado.", 6: "Only in English."}, "de_de": {5: "Ein Tornado.", 9: "Nur auf Deutsch."}}
    for language, sentences in texts.items():
        lines = []
        for number, text in sentences.items():
            plain = text.lower().strip(".")
            lines.append(
                f"{number}\t1{number}.wav\t{text}\t{plain}\t{' '.join(plain.replace(' ', '|'))} |\t4800\tFEMALE\n"
            )
            sound(folder / language / "audio" / "train" / f"1{number}.wav", seed=number)
        write(folder / language / "train.tsv", "".join(lines))
    return folder


def squad_json(*paragraphs) -> str:
    topics = [{"title": "A", "paragraphs": [{"context": context, "qas": [
        {"id": name, "question": question, "answers": [{"text": answer, "answer_start": 0} for answer in answers]}
        for name, question, answers in questions]} for context, questions in paragraphs]}]  # fmt: skip
    return json.dumps({"version": "1.1", "data": topics})


def spoken_squad(folder: Path, original=True) -> Path:
    """Of SQuAD's three paragraphs, the spoken file lacks the second."""
    first = (
        "the broncos won. they beat the panthers.",
        [("q1", "Who won?", ["broncos", "the broncos"]), ("q2", "Who lost?", ["panthers"])],
    )
    second = ("nobody heard this.", [("q3", "What?", ["this"])])
    third = ("the game was played in february.", [("q4", "When?", ["february"])])
    write(folder / "spoken_train-v1.1.json", squad_json(first, third))
    if original:
        write(folder / "train-v1.1.json", squad_json(first, second, third))
    for name, seed in (("0_0_0", 0), ("0_0_1", 1), ("0_1_0", 2), ("0_2_0", 3)):
        sound(folder / "train_wav" / f"{name}.wav", 0.2 + 0.1 * seed, seed=seed)
    return folder


def write_shards(folder: Path, sources: Path) -> Path:
    """Two WebDataset shards, of the recordings `wav/0.wav` to `wav/3.wav` in `sources`."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for i in range(2 * shard, 2 * shard + 2):
                parts = {
                    "wav": (sources / "wav" / f"{i}.wav").read_bytes(),
                    "txt": f"text {i}\n".encode(),
                    "json": json.dumps({"speaker_id": f"s{i}", "language": "en"}).encode(),
                }
                for ending, data in parts.items():
                    member = tarfile.TarInfo(f"sub/{i:04}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder

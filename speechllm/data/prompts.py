"""What the LLM reads around the audio: instructions by task, and the prefix that both sides of pretraining share."""

import functools
import logging
import random
import re
from collections.abc import Sequence

from .schema import Row


logger = logging.getLogger(__name__)

CODE = re.compile(r"([a-z]{2,3}|[A-Z]{2,3})([-_]\w+)*")  # "de", "zh-CN", "cmn_hans_cn"; names ("Twi") are not meant

# Language -> its name in English: those of FLEURS, CoVoST and MuST-C, by the first part of the codes they write.
LANGUAGES = {
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "as": "Assamese", "ast": "Asturian", "az": "Azerbaijani",
    "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "bs": "Bosnian", "ca": "Catalan", "ceb": "Cebuano",
    "ckb": "Sorani Kurdish", "cmn": "Mandarin Chinese", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German",
    "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "ff": "Fula", "fi": "Finnish",
    "fil": "Filipino", "fr": "French", "ga": "Irish", "gl": "Galician", "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew",
    "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "ig": "Igbo",
    "is": "Icelandic", "it": "Italian", "ja": "Japanese", "jv": "Javanese", "ka": "Georgian", "kam": "Kamba",
    "kea": "Kabuverdianu", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "ky": "Kyrgyz",
    "lb": "Luxembourgish", "lg": "Ganda", "ln": "Lingala", "lo": "Lao", "lt": "Lithuanian", "luo": "Luo",
    "lv": "Latvian", "mi": "Maori", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi",
    "ms": "Malay", "mt": "Maltese", "my": "Burmese", "nb": "Norwegian", "ne": "Nepali", "nl": "Dutch",
    "nso": "Northern Sotho", "ny": "Nyanja", "oc": "Occitan", "om": "Oromo", "or": "Oriya", "pa": "Punjabi",
    "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sd": "Sindhi",
    "sk": "Slovak", "sl": "Slovenian", "sn": "Shona", "so": "Somali", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili",
    "ta": "Tamil", "te": "Telugu", "tg": "Tajik", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "umb": "Umbundu",
    "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "wo": "Wolof", "xh": "Xhosa", "yo": "Yoruba", "yue": "Cantonese",
    "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip

# Task -> language of the instruction -> its wordings. The first English one is what evaluation uses. Instructions to
# translate that are not in English name their own language as the target.
WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "asr": {
        "en": (
            "Transcribe the speech.",
            "Write down what is said.",
            "What is said in the recording?",
            "Give the exact words of the speaker.",
            "Turn the speech into text.",
        ),
        "de": ("Schreibe auf, was gesagt wird.", "Transkribiere die Aufnahme.", "Was wird in der Aufnahme gesagt?"),
        "es": ("Transcribe el audio.", "Escribe lo que se dice.", "¿Qué se dice en la grabación?"),
        "fr": ("Transcris l'enregistrement.", "Écris ce qui est dit.", "Que dit-on dans l'enregistrement ?"),
        "it": ("Trascrivi l'audio.", "Scrivi quello che viene detto.", "Che cosa viene detto nella registrazione?"),
        "ru": ("Запиши, что говорится в записи.", "Расшифруй запись.", "Что говорится в записи?"),
    },
    "st": {
        "en": (
            "Translate the speech into {target_language}.",
            "Translate what is said into {target_language}.",
            "What does the speaker say, in {target_language}?",
            "Write the {target_language} translation of the speech.",
            "Give a translation of the recording into {target_language}.",
        ),
        "de": ("Übersetze, was gesagt wird, ins Deutsche.", "Übersetze die Aufnahme ins Deutsche."),
        "es": ("Traduce al español lo que se dice.", "Traduce la grabación al español."),
        "fr": ("Traduis en français ce qui est dit.", "Traduis l'enregistrement en français."),
        "it": ("Traduci in italiano quello che viene detto.", "Traduci la registrazione in italiano."),
        "ru": ("Переведи сказанное на русский язык.", "Переведи запись на русский язык."),
    },
    "sqa": {
        "en": (
            "{question}",
            "Answer the question about the recording: {question}",
            "Listen, then answer in a few words: {question}",
            "{question} Answer with words from the recording.",
        ),
        "de": (
            "Beantworte die Frage zur Aufnahme: {question}",
            "Hör zu und antworte dann mit wenigen Worten: {question}",
            "{question} Antworte mit Wörtern aus der Aufnahme.",
        ),
        "es": (
            "Responde a la pregunta sobre la grabación: {question}",
            "Escucha y luego responde en pocas palabras: {question}",
            "{question} Responde con palabras de la grabación.",
        ),
        "fr": (
            "Réponds à la question sur l'enregistrement : {question}",
            "Écoute, puis réponds en quelques mots : {question}",
            "{question} Réponds avec des mots de l'enregistrement.",
        ),
        "it": (
            "Rispondi alla domanda sulla registrazione: {question}",
            "Ascolta, poi rispondi in poche parole: {question}",
            "{question} Rispondi con parole della registrazione.",
        ),
        "ru": (
            "Ответь на вопрос о записи: {question}",
            "Послушай и ответь в нескольких словах: {question}",
            "{question} Ответь словами из записи.",
        ),
    },
    "traits": {
        "en": (
            "What is the {trait}? Answer with one of: {choices}.",
            "Listen to the {trait}. Which of these is it: {choices}?",
            "Choose what describes the {trait} best: {choices}.",
        ),
        "de": (
            "Bestimme Folgendes: {trait}. Antworte mit einer dieser Möglichkeiten: {choices}.",
            "Achte auf dieses Merkmal: {trait}. Was davon trifft zu: {choices}?",
            "Wähle, was dieses Merkmal ({trait}) am besten beschreibt: {choices}.",
        ),
        "es": (
            "Indica lo siguiente: {trait}. Responde con una de estas opciones: {choices}.",
            "Fíjate en esta característica: {trait}. ¿Cuál de estas opciones es la correcta: {choices}?",
            "Elige lo que mejor describe esta característica ({trait}): {choices}.",
        ),
        "fr": (
            "Indique ceci : {trait}. Réponds par l'un de ces choix : {choices}.",
            "Fais attention à cette caractéristique : {trait}. Laquelle de ces réponses convient : {choices} ?",
            "Choisis ce qui décrit le mieux cette caractéristique ({trait}) : {choices}.",
        ),
        "it": (
            "Indica quanto segue: {trait}. Rispondi con una di queste opzioni: {choices}.",
            "Fai attenzione a questa caratteristica: {trait}. Quale di queste opzioni è giusta: {choices}?",
            "Scegli ciò che descrive meglio questa caratteristica ({trait}): {choices}.",
        ),
        "ru": (
            "Определи следующее: {trait}. Ответь одним из вариантов: {choices}.",
            "Обрати внимание на этот признак: {trait}. Какой из вариантов верен: {choices}?",
            "Выбери, что лучше всего описывает этот признак ({trait}): {choices}.",
        ),
    },
}
NOT_A_TRANSCRIPT = {"st", "sqa", "traits"}  # tasks whose answer is never the transcript
PROMPTS = {task: wordings["en"][0] for task, wordings in WORDINGS.items()}

# Traits as an instruction in each language calls them; others go by their own name. Choices stay as the data has them.
TRAITS = {
    "en": {
        "gender": "gender of the speaker",
        "rate": "speaking rate",
        "noise": "level of noise",
        "reverberation": "reverberation of the room",
        "monotony": "intonation",
        "quality": "quality of the recording",
        "pitch": "pitch of the voice",
        "speaker": "identity of the speaker",
    },
    "de": {
        "gender": "Geschlecht der sprechenden Person",
        "rate": "Sprechtempo",
        "noise": "Stärke des Rauschens",
        "reverberation": "Nachhall des Raums",
        "monotony": "Satzmelodie",
        "quality": "Qualität der Aufnahme",
        "pitch": "Tonhöhe der Stimme",
        "speaker": "Identität der sprechenden Person",
    },
    "es": {
        "gender": "género de la persona que habla",
        "rate": "velocidad del habla",
        "noise": "nivel de ruido",
        "reverberation": "reverberación de la sala",
        "monotony": "entonación",
        "quality": "calidad de la grabación",
        "pitch": "tono de la voz",
        "speaker": "identidad de la persona que habla",
    },
    "fr": {
        "gender": "sexe de la personne qui parle",
        "rate": "débit de parole",
        "noise": "niveau de bruit",
        "reverberation": "réverbération de la pièce",
        "monotony": "intonation",
        "quality": "qualité de l'enregistrement",
        "pitch": "hauteur de la voix",
        "speaker": "identité de la personne qui parle",
    },
    "it": {
        "gender": "genere di chi parla",
        "rate": "velocità del parlato",
        "noise": "livello di rumore",
        "reverberation": "riverbero della stanza",
        "monotony": "intonazione",
        "quality": "qualità della registrazione",
        "pitch": "altezza della voce",
        "speaker": "identità di chi parla",
    },
    "ru": {
        "gender": "пол говорящего",
        "rate": "темп речи",
        "noise": "уровень шума",
        "reverberation": "реверберация помещения",
        "monotony": "интонация",
        "quality": "качество записи",
        "pitch": "высота голоса",
        "speaker": "личность говорящего",
    },
}


def prompt_of(row: Row) -> str:
    """The instruction of a row: its own `prompt`, else the first wording of its task.

    Raises:
        ValueError: if the task is unknown and the row has no `prompt`, or the row lacks what its prompt names.
    """
    return row["prompt"] if row.get("prompt") is not None else filled(row, PROMPTS.get(row.get("task") or "asr"))


def with_drawn_prompt(row: Row, seed: int = 0, languages: Sequence[str] = ("en",)) -> Row:
    """The row with one of its task's wordings as `prompt`, drawn by seed and row id; one that it has stays.

    Args:
        row: of the schema; one that cannot be prompted comes back as it is, for `chat_of` to say why.
        seed: of the draw; the same seed and id give the same wording, wherever the row stands.
        languages: of the instructions: codes, or "answer" for the language that the answer is in (of questions and
            traits: the recording's). A country or script ("de-CH", "de_de") makes no difference.
    """
    task = row.get("task") or "asr"
    if row.get("prompt") is not None or task not in WORDINGS:
        return row
    answer = _base(row.get("target_language") if task == "st" else row.get("language"))
    wanted = [answer if language == "answer" else _base(language) for language in languages]
    # An instruction in German asks for German: it fits no other answer.
    codes = [code for code in dict.fromkeys(wanted) if code == "en" or code == answer]
    wordings = [(wording, code) for code in codes for wording in WORDINGS[task].get(code, ())]
    wordings = wordings or [(wording, "en") for wording in WORDINGS[task]["en"]]
    name = row.get("id") or row.get("text")  # rows of a stream may have no id
    try:
        return {**row, "prompt": filled(row, *random.Random(f"prompt {seed} {name}").choice(wordings))}
    except ValueError:
        return row


def filled(row: Row, wording: str | None, language: str = "en") -> str:
    """A wording, which is in `language`, with the row's columns in the place of their names.

    Raises:
        ValueError: if there is no wording, or the row lacks what it names.
    """
    task, name = row.get("task") or "asr", row.get("id", "a row")
    if wording is None:
        raise ValueError(f"{name}: task {task!r} has no prompt. Use one of {list(PROMPTS)}, or give a `prompt`.")
    values = {key: value for key, value in row.items() if value is not None}
    if "target_language" in values:
        values["target_language"] = _name_of(values["target_language"])
    if "trait" in values:
        values["trait"] = TRAITS[language].get(values["trait"], values["trait"])
    if "choices" in values:
        values["choices"] = ", ".join(values["choices"])
    try:
        return wording.format(**values)
    except KeyError as error:
        raise ValueError(f"{name}: task {task!r} needs the column {error}.") from None
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"{name}: the prompt {wording!r} has braces that name no column ({error}). Double those that are meant as such."
        ) from None


@functools.cache  # so that a code is warned of once
def _name_of(language: str) -> str:
    """A language's name in English: a code's own, else that of its first part; what has none stays."""
    name = LANGUAGES.get(language) or LANGUAGES.get(_base(language))
    if name is None and CODE.fullmatch(str(language)):
        logger.warning(
            "The code %r of a target language has no name here, so instructions say the code. "
            "Give the name as `target_language`, or a `prompt`.",
            language,
        )
    return name or language


def _base(language: str | None) -> str | None:
    """The part of a code that names the language: "zh-CN" -> "zh", "cmn_hans_cn" -> "cmn". What is no code stays."""
    code = CODE.fullmatch(str(language))
    return code[1].lower() if code else language


def chat_of(row: Row, with_answer: bool = True) -> list[dict]:
    """A row -> a chat: the audio and the instruction in one user turn, and the answer in the assistant's.

    Raises:
        ValueError: see `prompt_of`, or if there is no answer.
    """
    parts = [{"type": "audio", "audio": row["audio"]}, {"type": "text", "text": prompt_of(row)}]
    chat = [{"role": "user", "content": parts}]
    if with_answer:
        answer = row.get("target") or (row.get("text") if row.get("task") not in NOT_A_TRANSCRIPT else None)
        if not answer:
            raise ValueError(f"{row['id']}: there is neither `target` nor `text` to learn.")
        chat.append({"role": "assistant", "content": answer})
    return chat


def shared_prefix(prefix: str, processor) -> list[int]:
    """Token ids of the setting `prefix` (see `ContrastiveArguments`).

    Raises:
        ValueError: if the LLM has nothing of the kind that the setting names.
    """
    tokenizer = processor.tokenizer
    if prefix == "bos":
        if tokenizer.bos_token is None:
            raise ValueError("prefix is 'bos', but this LLM's tokenizer has no such token; use 'auto' or a text.")
        prefix = tokenizer.bos_token
    elif prefix == "auto":
        # What a later user turn adds to a chat, up to its content: free of default system messages.
        turns = [{"role": "user", "content": "HELLO"}, {"role": "assistant", "content": "ANSWER"}]
        closing = processor.apply_chat_template(turns).rpartition("ANSWER")[2]
        chat = processor.apply_chat_template([*turns, {"role": "user", "content": "QUESTION"}])
        opening = chat.rpartition("QUESTION")[0].rpartition("ANSWER")[2].removeprefix(closing)
        bos = tokenizer.bos_token or ""
        prefix = opening if opening.startswith(bos) else bos + opening
        if not prefix:
            raise ValueError(
                "prefix is 'auto', but this LLM's chat template opens user turns with nothing; give a text."
            )
    return tokenizer(prefix, add_special_tokens=False).input_ids if prefix else []

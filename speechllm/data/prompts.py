"""Instructions that go with the audio, by task."""

from .schema import Row


PROMPTS = {
    "asr": "Transcribe the speech.",
    "st": "Translate the speech into {target_language}.",
    "sqa": "{question}",
}


def chat_of(row: Row, with_answer: bool = True) -> list[dict]:
    """A row -> a chat: the audio and the instruction in one user turn, and the answer in the assistant's.

    Raises:
        ValueError: if the task is unknown and the row has no `prompt`, or the row lacks what its prompt names.
    """
    task = row.get("task", "asr")
    prompt = row.get("prompt")
    if prompt is None:
        if task not in PROMPTS:
            raise ValueError(
                f"{row['id']}: task {task!r} has no prompt. Use one of {list(PROMPTS)}, or give a `prompt`."
            )
        try:
            prompt = PROMPTS[task].format(**row)
        except KeyError as error:
            raise ValueError(f"{row['id']}: task {task!r} needs the column {error}.") from None
    parts = [{"type": "audio", "audio": row["audio"]}, {"type": "text", "text": prompt}]
    chat = [{"role": "user", "content": parts}]
    if with_answer:
        answer = row.get("target") or row.get("text")
        if not answer:
            raise ValueError(f"{row['id']}: there is neither `target` nor `text` to learn.")
        chat.append({"role": "assistant", "content": answer})
    return chat

"""What the LLM reads around the audio: instructions by task, and the prefix that both sides of pretraining share."""

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

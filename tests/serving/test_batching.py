"""The batcher: what concurrent prompts get is what each gets alone, and nothing keeps generating for nobody."""

import gc
import threading
import time
import weakref

import pytest
from tiny import tone

from speechllm.serving.batching import Batcher, Job, Sampling, _unsettled


def job(processor, seed=None, text="Say it.", tokens=8, **options):
    audios = [] if seed is None else [tone(0.3 + 0.1 * (seed % 5), seed=seed)]
    parts = [*({"type": "audio", "audio": audio} for audio in audios), {"type": "text", "text": text}]
    chat = [{"role": "user", "content": parts}]
    made = Job(processor.apply_chat_template(chat, add_generation_prompt=True), audios, tokens, **options)
    made.chat, made.over = chat, threading.Event()
    made.on_end = lambda job: job.over.set()
    return made


def test_cancelled_prompts_leave_the_queue_at_once(parts, batcher):
    busy = job(parts[2], 1, tokens=90_000)
    batcher.submit(busy)
    while not busy.tokens:
        time.sleep(0.01)
    waiting = [job(parts[2], 2), job(parts[2], 3)]
    batcher.submit(*waiting)
    batcher.cancel(waiting[0])
    assert waiting[0].over.is_set() and waiting[0].finish_reason == "cancelled"
    assert list(batcher._queue) == waiting[1:] and not busy.over.is_set()
    batcher.cancel(busy, busy)
    wait([busy, waiting[1]])
    assert busy.finish_reason == "cancelled" and waiting[1].finish_reason == "length"


@pytest.fixture
def batcher(parts):
    batcher = Batcher(parts[1], parts[2], max_batch_size=8, max_wait=0.3)
    yield batcher
    batcher.close()


def wait(jobs):
    for one in jobs:
        assert one.over.wait(60), "a job never ended"


def test_answers_do_not_depend_on_the_batch(parts, batcher, answer):
    jobs = [job(parts[2], None if i % 4 == 3 else i, f"Say {i}.", tokens=3 + i) for i in range(16)]
    batcher.submit(*jobs)
    wait(jobs)
    assert batcher.prompts == 16 and batcher.batches == 2
    for one in jobs:
        assert one.answer == answer(one.chat, one.max_new_tokens) and one.finish_reason == "length"
        assert one.tokens == one.max_new_tokens
    assert len({one.answer for one in jobs}) > 12


def test_settings_are_not_mixed_and_nobody_is_overtaken_for_ever(parts, batcher):
    warm, seeded = Sampling(temperature=1.5), Sampling(temperature=1.5, seed=7)
    jobs = [job(parts[2], i, sampling=s) for i, s in enumerate([Sampling(), warm, seeded, Sampling(), warm, seeded])]
    batcher.submit(*jobs)
    wait(jobs)
    assert batcher.batches == 4  # two greedy, two warm, and each seed alone
    again = [job(parts[2], 2, sampling=seeded), job(parts[2], 2, sampling=Sampling(1.5, seed=8))]
    batcher.submit(*again)
    wait(again)
    assert again[0].answer == jobs[2].answer != again[1].answer


def test_stop_strings_and_text_as_it_comes(parts, batcher, answer):
    plain = job(parts[2], 1, tokens=30)
    whole = answer(plain.chat, 30)
    stop = whole[2:4]
    cut = whole[: whole.find(stop)]
    pieces = []
    stopped = job(parts[2], 1, tokens=30, stop=("never", stop))
    streamed = job(parts[2], 1, tokens=30, on_text=pieces.append)
    batcher.submit(stopped, streamed)
    wait([stopped, streamed])
    assert stopped.answer == cut and stopped.finish_reason == "stop" and stopped.tokens < 30
    assert "".join(pieces) == streamed.answer == whole and len(pieces) > 10


@pytest.mark.parametrize(
    "text, stops, held",
    [("ab", (), 0), ("ab�", (), 1), ("abc", ("cde",), 1), ("abcd", ("cde", "x"), 2), ("ab", ("b",), 0)],
)
def test_what_is_held_back(text, stops, held):
    assert _unsettled(text, stops) == held


def test_end_of_turn_tokens_end_a_row_and_are_not_counted_as_text(parts, answer):
    _, model, processor = parts
    alone = job(processor, 1, tokens=20)
    ids = processor.tokenizer(answer(alone.chat, 20), add_special_tokens=False).input_ids
    model.generation_config.eos_token_id = end = ids[6]
    batcher = Batcher(model, processor)
    try:
        other = job(processor, 2, tokens=5)
        batcher.submit(alone, other)
        wait([alone, other])
        assert alone.finish_reason == "stop" and alone.tokens == ids.index(end) + 1
        assert alone.answer == processor.tokenizer.decode(ids[: ids.index(end)])
    finally:
        model.generation_config.eos_token_id = None
        batcher.close()


def test_deadlines_and_cancellation_stop_the_generation(parts, batcher):
    endless = job(parts[2], 1, tokens=90_000, deadline=time.monotonic() + 1)
    given_up = job(parts[2], 2, tokens=90_000)
    batcher.submit(endless, given_up)
    assert endless.over.wait(30) and endless.finish_reason == "timeout"
    given_up.cancel()
    assert given_up.over.wait(5) and given_up.finish_reason == "cancelled"
    assert 0 < endless.tokens < 90_000
    count = given_up.tokens
    after = job(parts[2], 3)  # the model is free again
    batcher.submit(after)
    wait([after])
    assert after.finish_reason == "length" and given_up.tokens == count
    late = job(parts[2], 4, deadline=time.monotonic() - 1)
    batcher.submit(late)
    wait([late])
    assert late.finish_reason == "timeout" and late.tokens == 0


def test_a_failure_ends_its_batch_only(parts, batcher):
    broken = job(parts[2], 1)
    broken.audios = []  # a placeholder without audio
    batcher.submit(broken)
    wait([broken])
    assert broken.finish_reason == "error" and "placeholder" in str(broken.error)
    after = job(parts[2], 1)
    batcher.submit(after)
    wait([after])
    assert after.finish_reason == "length"


def test_a_failed_batch_leaves_no_tensors_behind(parts, batcher, monkeypatch):
    """Its error keeps the traceback, and so would keep what the frames hold."""
    alive = []

    class Tensor:
        pass

    def out_of_memory(batch):
        tensor = Tensor()
        alive.append(weakref.ref(tensor))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(batcher, "_generate", out_of_memory)
    failed = job(parts[2], 1)
    batcher.submit(failed)
    wait([failed])
    assert str(failed.error) == "out of memory" and alive[0]() is None
    waits, until = weakref.ref(failed), time.monotonic() + 30
    del failed
    while waits() is not None and time.monotonic() < until:  # nor the batch itself, while the next is waited for
        gc.collect()
        time.sleep(0.01)
    assert waits() is None


def test_a_batch_fits_the_context(parts):
    """The longest prompt and the longest answer of a batch, though of two, go on from each other."""
    batcher = Batcher(parts[1], parts[2], max_batch_size=8, max_wait=0.3, context=100)
    jobs = [job(parts[2], prompt_tokens=90, tokens=5), job(parts[2], prompt_tokens=20, tokens=50)]
    jobs += [job(parts[2], prompt_tokens=30, tokens=10)]
    batcher.submit(*jobs)
    wait(jobs)
    batcher.close()
    assert batcher.batches == 2  # the first and the third: 90 + 10


def test_closing_finishes_what_is_queued(parts):
    batcher = Batcher(parts[1], parts[2], max_wait=5)
    jobs = [job(parts[2], i) for i in range(3)]
    batcher.submit(*jobs)
    batcher.close()
    assert [one.finish_reason for one in jobs] == ["length"] * 3


def test_tokens_are_counted_while_batches_are_padded(parts):
    processor, counts, over = parts[2], [], threading.Event()

    def count():
        while not over.is_set():
            counts.append(processor.count_tokens("of " * 2_000, []))  # encoded outside of the interpreter's lock

    counting = [threading.Thread(target=count) for _ in range(2)]
    batcher = Batcher(parts[1], processor, max_batch_size=2)
    for thread in counting:
        thread.start()
    try:
        jobs = [job(processor, text="Say it. " * (1 + i % 2), tokens=1) for i in range(300)]
        batcher.submit(*jobs)
        wait(jobs)
    finally:
        over.set()
        for thread in counting:
            thread.join()
        batcher.close()
    assert not [one.error for one in jobs if one.error]
    assert len(set(counts)) == 1

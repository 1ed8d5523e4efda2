"""Scores of tasks from rows and predictions: translation, question answering, traits, gender; `evaluate` modules."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import accuracy_score, f1_score

from speechllm.evaluation.metrics import MODULES, ScoringError, score, utterance_scores
from speechllm.evaluation.metrics.gender_terms import gender_terms, words
from speechllm.evaluation.metrics.question_answering import question_answering
from speechllm.evaluation.metrics.traits import named_choice
from speechllm.evaluation.metrics.translation import bleu_tokenizer


REFERENCES = Path(__file__).parent / "references"  # what the official scripts printed for the miniatures in them
GERMAN = ["Das ist ein kleiner Test.", "Der Hund läuft schnell über die Straße.", "Wir sehen uns morgen früh, ja?"]
ANSWERS = ["Das ist ein Test.", "Der Hund rennt schnell über die Straße.", ""]


def rows_of(targets, **columns) -> list[dict]:
    return [{"id": str(i), "target": target, **columns} for i, target in enumerate(targets)]


def by_id(answers) -> dict[str, str]:
    return {str(i): answer for i, answer in enumerate(answers)}


# ---- translation -----------------------------------------------------------------------------------------------------


def test_translation_is_scored_as_by_sacrebleu():
    found = score("st", rows_of(GERMAN, target_language="de"), by_id(ANSWERS))
    assert found["bleu"] == sacrebleu.corpus_bleu(ANSWERS, [GERMAN]).score > 0
    assert found["chrf++"] == sacrebleu.corpus_chrf(ANSWERS, [GERMAN], word_order=2).score > 0
    assert found["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "nc:6|nw:2" in found["chrf++_signature"]


def test_languages_are_scored_apart_and_averaged():
    chinese, answers = ["我们明天早上见面。", "这是一个小测试。"], ["我们明天见面。", "这是一个测试。"]
    rows = rows_of(GERMAN, target_language="de") + [
        {"id": f"zh{i}", "target": text, "target_language": "Chinese"} for i, text in enumerate(chinese)
    ]
    found = score("st", rows, by_id(ANSWERS) | {f"zh{i}": text for i, text in enumerate(answers)}, bootstrap=20)
    assert found["bleu_Chinese"] == sacrebleu.corpus_bleu(answers, [chinese], tokenize="zh").score
    assert found["bleu_de"] == sacrebleu.corpus_bleu(ANSWERS, [GERMAN]).score
    assert found["bleu"] == pytest.approx((found["bleu_de"] + found["bleu_Chinese"]) / 2)
    assert "tok:zh" in found["bleu_Chinese_signature"]
    assert np.isfinite(found["bleu_interval"]).all()


def test_a_code_and_its_name_are_one_language():
    rows = [{"id": str(i), "target": GERMAN[i], "target_language": ("de", "German", "de")[i]} for i in range(3)]
    assert score("st", rows, by_id(ANSWERS)) == score("st", rows_of(GERMAN, target_language="de"), by_id(ANSWERS))
    rows.append({"id": "fr", "target": "Un petit test.", "target_language": "fr"})
    found = score("st", rows, by_id(ANSWERS) | {"fr": "Un test."})
    assert {name for name in found if name.startswith("bleu")} >= {"bleu", "bleu_German", "bleu_fr"}
    assert "bleu_de" not in found and found["bleu_German"] == sacrebleu.corpus_bleu(ANSWERS, [GERMAN]).score


def test_tokenizer_follows_the_language():
    names = (
        "Simplified Chinese",
        "Chinese (Simplified)",
        "Mandarin Chinese",
        "yue",
        "yue_hant_hk",
        "Cantonese",
        "zho_Hans",
    )
    assert {bleu_tokenizer(name) for name in names} == {"zh"}
    assert {bleu_tokenizer(name) for name in ("English", "en-US", "Mandarese", "")} == {"13a"}
    assert [bleu_tokenizer(name) for name in (None, "de", "zh-CN", "cmn_hans_cn", "Chinese")] == ["13a"] * 2 + [
        "zh"
    ] * 3
    try:
        import MeCab  # noqa: F401
    except ImportError:
        with pytest.raises(ModuleNotFoundError, match=r'pip install "sacrebleu\[ja\]"'):
            bleu_tokenizer("ja")
    else:
        assert bleu_tokenizer("Japanese") == "ja-mecab"


# ---- gender in translation -------------------------------------------------------------------------------------------


def test_gender_is_scored_as_by_the_script_of_must_she():
    reference = json.loads((REFERENCES / "must_she.json").read_text(encoding="utf-8"))
    sentences = reference["sentences"]
    terms, categories, outputs = ([line[key] for line in sentences] for key in ("terms", "category", "output"))
    found = {name: metric.score for name, metric in gender_terms(terms, categories, outputs).items()}
    expected = {}
    for category, scores in reference["scores"].items():
        suffix = "" if category == "Global" else f"_{category}"
        expected |= {f"{name}{suffix}": value for name, value in scores.items()}
    assert found == pytest.approx(expected, abs=1e-12)


def test_gender_of_raw_text():
    assert words("L’amica dell'autore è bravo-lunga.") == ["l'", "amica", "dell'", "autore", "è", "bravo-lunga", "."]
    row = {"gender_terms": [["Nata", "nato"]], "category": "1F", "target_language": "it"}
    found = score("st", rows_of(["Sono nata."], **row), {"0": "Sono nata, nato."})
    assert (found["term_coverage"], found["gender_accuracy"], found["gender_accuracy_1F"]) == (1, 0.5, 0.5)
    assert score("st", rows_of(["Sono nata."], **row), {"0": ""})["gender_accuracy"] == 0  # as the script: none found
    raw = {**row, "gender_terms": "nata nato;"}  # as in the corpus's file, with nothing behind the last
    assert score("st", rows_of(["Sono nata."], **raw), {"0": "Sono nata."})["gender_accuracy"] == 1
    with pytest.raises(ValueError, match="'nata' are not pairs"):
        gender_terms(["nata"], [None], [""])


# ---- question answering ----------------------------------------------------------------------------------------------


def test_answers_are_scored_as_by_the_script_of_squad():
    reference = json.loads((REFERENCES / "squad.json").read_text(encoding="utf-8"))
    questions = reference["questions"]
    answers, predictions = [line["answers"] for line in questions], [line["prediction"] for line in questions]
    metrics = question_answering(answers, predictions)
    assert {name: metric.score for name, metric in metrics.items()} == pytest.approx(reference["corpus"], abs=1e-9)
    rows = [{"id": str(i), "answers": some} for i, some in enumerate(answers)]
    for name in ("exact_match", "f1"):
        found = utterance_scores("sqa", rows, by_id(predictions), name)
        assert list(found.values()) == pytest.approx([100 * line[name] for line in questions], abs=1e-9)


# ---- traits ----------------------------------------------------------------------------------------------------------


def test_choices_are_named_by_whole_words():
    assert named_choice("The speaker is female.", ["male", "female"]) == "female"
    assert named_choice("Male or female", ["male", "female"]) is None
    assert named_choice("", ["male", "female"]) is None
    assert named_choice("It is VERY slow!", ["slow", "very slow", "fast"]) == "very slow"
    assert named_choice("very slow, slow", ["slow", "very slow"]) is None


def test_choices_that_differ_in_symbols_only():
    for choices in (["<30", ">30"], ["5 dB", "-5 dB"], ["+", "-"], ["C", "C++"]):
        for choice in choices:
            for answer in (choice, f" {choice.lower()}\n", f"I would say {choice}, well-known."):
                assert named_choice(answer, choices) == choice == named_choice(answer, choices[::-1])
        assert named_choice(" or ".join(choices), choices) is None
    assert named_choice("It is −5 dB.", ["5 dB", "-5 dB"]) == "-5 dB"  # with the minus of typesetters
    assert named_choice("It is 15 dB.", ["5 dB", "-5 dB", "15 dB"]) == "15 dB"
    assert named_choice("30", ["<30", ">30"]) is None and named_choice("", ["+", "-"]) is None
    assert named_choice("a very-slow voice", ["+", "very slow", "slow"]) == "very slow"  # no others are like these
    found = score("traits", rows_of(["<30", ">30"], trait="age"), by_id(["<30", "The speaker is >30."]))
    assert found["accuracy"] == 1


def test_choices_in_scripts_without_spaces():
    assert named_choice("说话者是女性。", ["男性", "女性"]) == "女性"
    assert named_choice("说话者，是女性，不是男性。", ["男性", "女性"]) is None
    assert named_choice("语速很快。", ["快", "很快"]) == "很快"
    assert named_choice("ผู้พูดเป็นผู้หญิงครับ", ["ผู้ชาย", "ผู้หญิง"]) == "ผู้หญิง"
    assert named_choice("他13岁。", ["3岁", "13岁"]) == "13岁" and named_choice("他13岁。", ["3岁", "4岁"]) is None
    assert named_choice("说话者是female。", ["male", "female"]) == "female"
    assert named_choice("नरी", ["नर"]) is None  # a vowel sign goes on with the word


def test_traits_are_scored_as_by_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.choice(["slow", "normal", "fast"], size=60, p=[0.6, 0.3, 0.1]).tolist()
    answers = [label if rng.random() < 0.6 else str(rng.choice(["slow", "normal", "fast", "?"])) for label in labels]
    found = score("traits", rows_of(labels, trait="rate"), by_id(answers))
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, answers), abs=1e-12)
    expected = f1_score(labels, answers, labels=sorted(set(labels)), average="macro")
    assert found["macro_f1"] == pytest.approx(expected, abs=1e-12)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "predictions", "message"),
    [
        ([], {}, "no rows"),
        ([{"id": "a", "text": "x"}], {"b": "x"}, r"1 of 1 rows have no prediction, first 'a'; predictions .* 'b'"),
        ([{"id": "a", "text": "x"}], {"a": None}, "a: the prediction is of type NoneType"),
        ([{"id": "a", "text": ""}], {"a": "x"}, "a: there is no `target` and no `text`"),
        ([{"id": "a", "text": "..."}], {"a": "x"}, "No reference has a word"),
        ([{"id": "a", "text": "x"}] * 2, {"a": "x"}, "more than once, first 'a'"),
        ([{"text": "x", "audio": "x.wav"}], {}, "x.wav: there is no `id`"),
    ],
)
def test_what_cannot_be_scored_is_named(rows, predictions, message):
    with pytest.raises(ScoringError, match=message):
        score("asr", rows, predictions)


def test_traits_of_which_some_have_no_name():
    rows = [{"id": "a", "trait": "gender", "target": "male"}, {"id": "b", "target": "male"}]
    assert score("traits", rows, {"a": "male", "b": "She is female."})["accuracy"] == 0.5


def test_unknown_tasks_and_missing_answers():
    with pytest.raises(ScoringError, match="task 'vqa', only for asr, st, sqa, traits"):
        score("vqa", [{"id": "a"}], {"a": ""})
    with pytest.raises(ScoringError, match="a: there is no `target`"):
        score("sqa", [{"id": "a", "answers": [""]}], {"a": "x"})
    with pytest.raises(ScoringError, match="a: `answers` is 'one'. Give a list"):
        score("sqa", [{"id": "a", "answers": "one"}], {"a": "x"})
    with pytest.raises(ScoringError, match="gender terms 'nata' are not pairs"):
        score("st", [{"id": "a", "target": "nata", "gender_terms": "nata"}], {"a": "x"})
    with pytest.raises(ScoringError, match="a: `target` is 3. Give a text"):
        score("traits", [{"id": "a", "target": 3}], {"a": "3"})
    with pytest.raises(ScoringError, match="no alignment 'nist'"):
        score("asr", [{"id": "a", "text": "x"}], {"a": "x"}, alignment="nist")


def test_empty_predictions_count_as_wrong():
    columns = dict(text="one two", answers=["one"], trait="t", choices=["one", "two"], target_language="de")
    rows, nothing = rows_of(["one two"] * 2, **columns), by_id(["", ""])
    found = {task: score(task, rows, nothing, bootstrap=10) for task in ("asr", "st", "sqa", "traits")}
    assert found["asr"]["wer"] == found["asr"]["cer"] == found["asr"]["mean_utterance_wer"] == 1
    assert found["asr"]["deletions"] == 4
    assert found["st"]["bleu"] == found["st"]["chrf++"] == found["sqa"]["exact_match"] == found["sqa"]["f1"] == 0
    assert found["traits"]["accuracy"] == found["traits"]["macro_f1"] == 0
    assert json.loads(json.dumps(found)) == found  # plain numbers


# ---- `evaluate` modules ----------------------------------------------------------------------------------------------


def test_evaluate_modules_load_by_path_and_give_the_same():
    def compute(name, predictions, references, **options):
        return evaluate.load(str(MODULES / name)).compute(predictions=predictions, references=references, **options)

    translated = score("st", rows_of(GERMAN, target_language="de"), by_id(ANSWERS), bootstrap=50)
    recognised = score("asr", rows_of(GERMAN), by_id(ANSWERS), bootstrap=50)
    wer, cer = compute("wer", ANSWERS, GERMAN, bootstrap=50), compute("cer", ANSWERS, GERMAN, bootstrap=50)
    assert wer | cer == recognised
    bleu, chrf = compute("bleu", ANSWERS, GERMAN, bootstrap=50), compute("chrf", ANSWERS, GERMAN, bootstrap=50)
    assert bleu.pop("signature") == translated["bleu_signature"]
    assert chrf.pop("signature") == translated["chrf++_signature"]
    assert (bleu | chrf).items() <= translated.items()
    assert compute("bleu", ["你好。"], ["你好。"], language="zh")["signature"].count("tok:zh") == 1
    assert compute("squad", ["the cat"], [["dog", "cat"]]) == {"exact_match": 100, "f1": 100}
    assert compute("traits", ["a male voice", "?"], ["male", "female"])["accuracy"] == 0.5
    found = compute("must_she", ["Sono nata."], [{"terms": "nata nato", "category": "1F"}])
    assert found["gender_accuracy"] == found["term_coverage_1F"] == 1

"""Instructions: the first wording by default, others drawn by seed and row id, in the language that is asked for."""

from collections import Counter

import pytest

from speechllm.data.prompts import LANGUAGES, PROMPTS, TRAITS, WORDINGS, chat_of, filled, prompt_of, with_drawn_prompt


def row(i=0, **columns):
    return {"id": f"row {i}", "audio": "a.wav", "text": "hello", **columns}


ST = {"task": "st", "target_language": "de", "target": "hallo", "language": "en"}


def test_the_first_wording_is_the_default():
    assert prompt_of(row()) == "Transcribe the speech."
    assert prompt_of(row(**ST)) == "Translate the speech into German."
    assert prompt_of(row(**{**ST, "target_language": "Klingon"})) == "Translate the speech into Klingon."
    assert prompt_of(row(task="sqa", question="Who {won}?")) == "Who {won}?"
    traits = {"task": "traits", "trait": "gender", "choices": ["female", "male"], "target": "male"}
    assert prompt_of(row(**traits)) == "What is the gender of the speaker? Answer with one of: female, male."
    assert prompt_of(row(prompt="Do {this}.")) == "Do {this}."


FLEURS = """af_za am_et ar_eg as_in ast_es az_az be_by bg_bg bn_in bs_ba ca_es ceb_ph ckb_iq cmn_hans_cn cs_cz cy_gb
da_dk de_de el_gr en_us es_419 et_ee fa_ir ff_sn fi_fi fil_ph fr_fr ga_ie gl_es gu_in ha_ng he_il hi_in hr_hr hu_hu hy_am
id_id ig_ng is_is it_it ja_jp jv_id ka_ge kam_ke kea_cv kk_kz km_kh kn_in ko_kr ky_kg lb_lu lg_ug ln_cd lo_la lt_lt luo_ke
lv_lv mi_nz mk_mk ml_in mn_mn mr_in ms_my mt_mt my_mm nb_no ne_np nl_nl nso_za ny_mw oc_fr om_et or_in pa_in pl_pl ps_af
pt_br ro_ro ru_ru sd_in sk_sk sl_si sn_zw so_so sr_rs sv_se sw_ke ta_in te_in tg_tj th_th tr_tr uk_ua umb_ao ur_pk uz_uz
vi_vn wo_sn xh_za yo_ng yue_hant_hk zu_za""".split()
COVOST = "ar ca cs cy de en es et fa fr id it ja lv mn nl pt ru sl sv-SE ta tr zh-CN".split()


def test_instructions_name_the_languages_of_corpora(caplog):
    def named(code):
        return prompt_of(row(**{**ST, "target_language": code})).removeprefix("Translate the speech into ")[:-1]

    for code, name in (("zh-CN", "Chinese"), ("sv-SE", "Swedish"), ("el_gr", "Greek"), ("DE", "German"),
                       ("cmn_hans_cn", "Mandarin Chinese"), ("cmn", "Mandarin Chinese"), ("es_419", "Spanish")):  # fmt: skip
        assert named(code) == name
    assert len(set(FLEURS)) == 102 == len({named(code) for code in FLEURS})
    assert {named(code) for code in [*FLEURS, *COVOST]} == set(LANGUAGES.values())
    for name in ("Twi", "Ga-Adangme", "as-is English", "Chinese"):  # names are no codes
        assert named(name) == name
    assert not caplog.records
    assert [named("qaa_xx"), named("qaa_xx"), named("qab")] == ["qaa_xx", "qaa_xx", "qab"]
    assert [record.args for record in caplog.records] == [("qaa_xx",), ("qab",)]


def test_a_task_of_null_is_recognition():
    assert prompt_of(row(task=None)) == PROMPTS["asr"]
    assert with_drawn_prompt(row(task=None))["prompt"] == with_drawn_prompt(row())["prompt"]
    with pytest.raises(ValueError, match="task 'asr' needs the column"):
        filled(row(task=None), "{missing}")


def test_wordings_are_drawn_by_seed_and_id():
    rows = [row(i) for i in range(500)]
    drawn = [with_drawn_prompt(r, seed=1)["prompt"] for r in rows]
    assert drawn == [with_drawn_prompt(r, seed=1)["prompt"] for r in rows]
    assert drawn != [with_drawn_prompt(r, seed=2)["prompt"] for r in rows]
    assert drawn[::-1] == [with_drawn_prompt(r, seed=1)["prompt"] for r in rows[::-1]]  # wherever a row stands
    counts = Counter(drawn)
    assert set(counts) == set(WORDINGS["asr"]["en"]) and min(counts.values()) > 500 / len(counts) / 2


def test_wordings_in_other_languages():
    german = [with_drawn_prompt(row(i, **ST), languages=["answer"])["prompt"] for i in range(50)]
    assert set(german) == set(WORDINGS["st"]["de"])
    both = {with_drawn_prompt(row(i, **ST), languages=["en", "answer"])["prompt"] for i in range(200)}
    filled = {wording.format(target_language="German") for wording in WORDINGS["st"]["en"]}
    assert both == set(WORDINGS["st"]["de"]) | filled
    french = {with_drawn_prompt(row(i, language="fr"), languages=["fr", "de"])["prompt"] for i in range(50)}
    assert french == set(WORDINGS["asr"]["fr"])  # an instruction in German asks for German
    welsh = {with_drawn_prompt(row(i, language="cy"), languages=["answer"])["prompt"] for i in range(50)}
    assert welsh == set(WORDINGS["asr"]["en"])  # there is none in Welsh


@pytest.mark.parametrize(("code", "languages"), [("de-CH", ["answer"]), ("de_de", ["de"]), ("de", ["de-AT"])])
def test_countries_make_no_difference_to_the_language_of_wordings(code, languages):
    german = {with_drawn_prompt(row(i, language=code), languages=languages)["prompt"] for i in range(50)}
    assert german == set(WORDINGS["asr"]["de"])
    traits = {"task": "traits", "trait": "rate", "choices": ["slow", "fast"], "target": "slow", "language": code}
    assert "Sprechtempo" in with_drawn_prompt(row(**traits), languages=languages)["prompt"]
    german = {
        with_drawn_prompt(row(i, **{**ST, "target_language": code}), languages=languages)["prompt"] for i in range(50)
    }
    assert german == set(WORDINGS["st"]["de"])


@pytest.mark.parametrize("code", ["de", "es", "fr", "it", "ru"])
def test_questions_and_traits_in_other_languages(code):
    sqa = {"task": "sqa", "question": "¿Qué?", "target": "x", "language": code}
    asked = {with_drawn_prompt(row(i, **sqa), languages=["answer"])["prompt"] for i in range(60)}
    assert asked == {wording.format(question="¿Qué?") for wording in WORDINGS["sqa"][code]} and len(asked) >= 3
    traits = {"task": "traits", "trait": "rate", "choices": ["slow", "fast"], "target": "slow", "language": code}
    asked = {with_drawn_prompt(row(i, **traits), languages=["answer"])["prompt"] for i in range(60)}
    assert len(asked) == len(WORDINGS["traits"][code]) >= 3
    assert all(TRAITS[code]["rate"] in text and "slow, fast" in text for text in asked)
    assert TRAITS[code].keys() == TRAITS["en"].keys()
    odd = with_drawn_prompt(row(**{**traits, "trait": "mood"}), languages=["answer"])["prompt"]
    assert "mood" in odd  # a trait without a name here goes by its own


def test_what_is_drawn_for_english_has_not_changed():
    """Runs are repeatable: these are the draws of the first release."""
    values = {"question": "Why?", "target": "x", "trait": "noise", "choices": ["low", "high"], "language": "en"}
    drawn = {
        task: [with_drawn_prompt(row(i, **values, task=task), seed=3)["prompt"] for i in range(6)]
        for task in ("sqa", "traits")
    }
    wordings = {task: [filled(values, wording) for wording in WORDINGS[task]["en"]] for task in ("sqa", "traits")}
    assert [wordings["sqa"].index(prompt) for prompt in drawn["sqa"]] == [0, 3, 0, 2, 0, 0]
    assert [wordings["traits"].index(prompt) for prompt in drawn["traits"]] == [2, 1, 0, 1, 2, 2]


def test_a_prompt_stays_and_a_row_that_has_none_is_left_to_the_checks():
    for odd in (row(prompt="Mine."), row(task="juggle"), row(task="st", target="x")):
        assert with_drawn_prompt(odd) == odd


def test_every_wording_can_be_filled():
    values = {"target_language": "German", "question": "Why?", "trait": "gender", "choices": "a, b"}
    for task, languages in WORDINGS.items():
        assert PROMPTS[task] == languages["en"][0]
        for wordings in languages.values():
            assert len(set(wordings)) == len(wordings) and all("{" not in w.format(**values) for w in wordings)


@pytest.mark.parametrize("task", ["st", "sqa", "traits"])
def test_a_transcript_never_stands_in_for_another_answer(task):
    values = {"target_language": "de", "question": "Why?", "trait": "rate", "choices": ["slow", "fast"]}
    with pytest.raises(ValueError, match="neither"):
        chat_of(row(task=task, **values))


@pytest.mark.parametrize("prompt", ["As JSON: {}", "As JSON: {0}", "As JSON: {"])
def test_braces_that_name_no_column(prompt):
    with pytest.raises(ValueError, match="a: the prompt .* has braces that name no column .*Double those"):
        filled({"id": "a", "task": "asr"}, prompt)

"""Near-duplicate clusters and the split that keeps them together."""

import random
from collections import Counter

import pytest

from speechllm.data.splits import near_duplicate_clusters, split_by_cluster, without_near_duplicates, words_of


MENU = [
    "Press 4 to exit the menu.",
    "press 4 to exit the menu",
    "Press 5 to exit the menu.",
    "Welcome to the directory. Please press 4 to exit the menu or hold for an operator.",
    "The weather is fine today.",
    "zero",
    "Zero!",
    "one",
]


def rows_of(texts):
    return [{"id": number, "text": text} for number, text in enumerate(texts)]


def all_pairs_clusters(texts, threshold, containment):
    """The definition, pair by pair, with multisets; no candidates, no union-find."""
    words = [Counter(words_of(text)) for text in texts]
    pairs = [Counter(zip(words_of(text), words_of(text)[1:], strict=False)) for text in texts]

    def linked(a, b):
        if words_of(texts[a]) == words_of(texts[b]):
            return True
        shared = (words[a] & words[b]).total()
        if shared >= threshold * (words[a] | words[b]).total() and shared:
            return True
        shorter = min(pairs[a].total(), pairs[b].total())
        return shorter >= 3 and (pairs[a] & pairs[b]).total() >= containment * shorter

    label = list(range(len(texts)))
    changed = True
    while changed:
        changed = False
        for a in range(len(texts)):
            for b in range(a):
                if label[a] != label[b] and linked(a, b):
                    label[a] = label[b] = min(label[a], label[b])
                    changed = True
    return label


def partition(labels):
    groups = {}
    for number, label in enumerate(labels):
        groups.setdefault(label, set()).add(number)
    return {frozenset(group) for group in groups.values()}


def test_variants_share_a_cluster_and_others_do_not():
    assert near_duplicate_clusters(MENU) == [0, 0, 0, 0, 1, 2, 2, 3]


def test_short_texts_are_not_swallowed_by_texts_that_contain_them():
    assert near_duplicate_clusters(["the menu", "Press 4 to exit the menu."]) == [0, 1]


@pytest.mark.parametrize(("threshold", "containment"), [(0.6, 0.8), (0.5, 0.5), (1.0, 1.0), (0.3, 0.9)])
def test_candidates_lose_no_pair(threshold, containment):
    generator = random.Random(0)
    vocabulary = [f"word{int(generator.paretovariate(1.0))}" for _ in range(400)]
    texts = [" ".join(generator.choices(vocabulary, k=generator.randint(1, 12))) for _ in range(120)]
    texts += [text.replace("word1", "word2", 1) for text in texts[:40]]
    expected = partition(all_pairs_clusters(texts, threshold, containment))
    assert partition(near_duplicate_clusters(texts, threshold, containment)) == expected
    assert 1 < len(expected) < len(texts)


def test_clusters_do_not_depend_on_the_order():
    order = [5, 3, 1, 7, 0, 2, 6, 4]
    shuffled = near_duplicate_clusters([MENU[number] for number in order])
    moved = {frozenset(order[number] for number in group) for group in partition(shuffled)}
    assert moved == partition(near_duplicate_clusters(MENU))


def test_characters_are_the_words_of_languages_without_spaces():
    assert words_of("请输入密码 PIN") == ("请", "输", "入", "密", "码", "pin")
    assert words_of("C’è un'altra, «cosa»!") == ("c'è", "un'altra", "cosa")
    assert near_duplicate_clusters(["请输入您的密码", "请输入您的新密码", "今天天气很好"]) == [0, 0, 1]


@pytest.mark.parametrize("value", [0, -0.1, 1.1])
def test_impossible_thresholds_are_refused(value):
    with pytest.raises(ValueError, match="threshold"):
        near_duplicate_clusters(MENU, threshold=value)
    with pytest.raises(ValueError, match="containment"):
        near_duplicate_clusters(MENU, containment=value)


def test_whole_clusters_go_to_one_side_and_the_rest_of_a_test_cluster_to_none():
    rows = rows_of(MENU)
    train, test = split_by_cluster(rows, test_texts=3, seed=0)
    assert [row["id"] for row in test] == [0, 2, 3]  # the repeated recording (1) is in neither
    assert [row["id"] for row in train] == [4, 5, 6, 7]


def test_split_has_no_near_duplicate_across_and_distinct_long_test_texts():
    generator = random.Random(1)
    words = ["please", "press", "star", "to", "hear", "record", "send", "delete", "the", "message", "menu", "later"]
    texts = [" ".join(generator.choices(words, k=generator.randint(1, 9))) for _ in range(300)]
    rows = rows_of(texts + texts[:30])
    train, test = split_by_cluster(rows, test_texts=40, seed=3)
    assert len(test) == 40 == len({words_of(row["text"]) for row in test})
    assert all(len(words_of(row["text"])) >= 3 for row in test)
    clusters = near_duplicate_clusters(texts + texts[:30])
    assert not {clusters[row["id"]] for row in train} & {clusters[row["id"]] for row in test}
    assert split_by_cluster(rows, test_texts=40, seed=3) == (train, test)
    assert split_by_cluster(rows, test_texts=40, seed=4) != (train, test)


def test_too_many_test_texts_are_refused_with_the_number_there_is():
    with pytest.raises(ValueError, match="hold 4 distinct texts of at least 3 words"):
        split_by_cluster(rows_of(MENU), test_texts=5, seed=0)


def test_a_number_that_whole_clusters_cannot_give_is_refused():
    with pytest.raises(ValueError, match="give 1 test texts in this order, not 2. Ask for 1."):
        split_by_cluster(rows_of(MENU), test_texts=2, seed=0)


def test_no_test_texts_leave_everything_for_training():
    rows = rows_of(MENU)
    assert split_by_cluster(rows, test_texts=0, seed=0) == (rows, [])


def test_rows_with_a_near_duplicate_among_others_are_left_out():
    rows = [{"text": text} for text in ("press four to leave the menu", "hello there", "press star to leave the menu")]
    assert without_near_duplicates(rows, [{"text": "press six to leave the menu"}]) == [rows[1]]
    assert without_near_duplicates(rows, []) == rows

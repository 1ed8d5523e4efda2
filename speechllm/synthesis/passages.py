"""Short passages of made-up facts with extractive questions, in any number.

A passage is a template of one or two sentences (about 15 words, 4 to 8 seconds of speech) whose slots are filled with
names, places, jobs, animals, numbers, times and so on:

    Clara lost her wallet at the station on Friday.
    What did Clara lose? wallet      Where did Clara lose it? station      On which day ...? Friday

The facts are made up, so nothing but the passage answers the questions; the question alone leaves 12 to 30 values
to choose from. **Every answer is a phrase that stands in the passage, word for word** (`generate_passages` checks it).
The vocabulary is closed, of words that are common and have one spelling: what is tested is whether a model finds the
fact in the speech, not whether it can spell rare names.

Training and test passages come from the same templates and words, but no two slot values that stand together in a
test passage stand together in a training passage: if Clara lost a wallet in the test, no training passage has Clara
and a wallet, or Clara and Friday. What could be learned by heart is of no use then.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from ..data.schema import Row


# fmt: off
WORDS: dict[str, list[str]] = {
    line.split(": ")[0]: line.split(": ")[1].split(", ")
    for line in """\
woman: Anna, Maria, Laura, Emma, Julia, Helen, Clara, Alice, Linda, Nina, Rosa, Paula, Diana, Olivia, Teresa, Martha, Susan, Nancy, Barbara, Monica
man: Peter, Thomas, Daniel, Oscar, Martin, David, Simon, Robert, Victor, Henry, Jacob, Edward, Samuel, Frank, Leonard, George, Walter, Arthur, Kevin, Patrick
city: Paris, London, Berlin, Madrid, Rome, Vienna, Boston, Chicago, Denver, Dallas, Toronto, Lisbon, Dublin, Prague, Moscow, Tokyo, Sydney, Cairo, Athens, Geneva, Hamburg, Milan, Seattle, Houston, Munich
job: teacher, doctor, baker, farmer, lawyer, painter, driver, nurse, singer, writer, dentist, carpenter, pilot, gardener, plumber, soldier, butcher, waiter, dancer, barber
animal: dog, cat, horse, rabbit, parrot, goat, duck, turtle, sheep, cow, pig, donkey, monkey, hamster, lizard
color: red, blue, green, yellow, black, white, brown, purple, pink, silver, golden
food: soup, bread, rice, cheese, fish, salad, pasta, chicken, potatoes, pancakes, apples, cookies, beans, eggs, sausages, bananas, carrots, pizza
drink: coffee, tea, milk, water, orange juice, apple juice, lemonade, beer, wine, hot chocolate
number: three, four, five, six, seven, eight, nine, ten, eleven, twelve, fifteen, twenty, thirty, forty, fifty, sixty
time: one o'clock, two o'clock, three o'clock, four o'clock, five o'clock, six o'clock, seven o'clock, eight o'clock, nine o'clock, ten o'clock, eleven o'clock, noon, midnight
day: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
month: January, February, March, April, May, June, July, August, September, October, November, December
instrument: piano, guitar, violin, trumpet, flute, harp, cello, drums
vehicle: train, bus, car, bicycle, boat, taxi, motorcycle, truck, tractor
object: wallet, book, lamp, hat, coat, knife, clock, camera, letter, key, phone, bag, ring, watch, bottle, blanket, passport
place: library, market, station, hospital, museum, bank, school, church, park, theater, hotel, airport, bakery, harbor
room: kitchen, garden, garage, bedroom, bathroom, cellar, hall, office, attic
sport: football, tennis, chess, basketball, hockey, golf, volleyball, baseball
relative: brother, sister, mother, father, uncle, aunt, cousin, neighbor
subject: history, music, science, biology, chemistry, geography, art, mathematics
weather: rain, snow, wind, fog, sunshine
""".splitlines()
}
PRONOUNS = {"woman": {"they": "she", "their": "her"}, "man": {"they": "he", "their": "his"}}

# A passage, and its questions with the slot that answers. {name} is a woman's or a man's; {x2} is another x.
TEMPLATES: list[tuple[str, list[tuple[str, str]]]] = [
    ("{name} lives in {city} and works as a {job}. On weekends {they} plays {sport}.",
     [("Where does {name} live?", "city"), ("What is the job of {name}?", "job"), ("What does {name} play on weekends?", "sport")]),
    ("The train to {city} leaves at {time} from platform {number}.",
     [("At what time does the train leave?", "time"), ("To which city does the train go?", "city"), ("From which platform does the train leave?", "number")]),
    ("{name} has a {color} {animal}. It sleeps in the {room} and likes {food}.",
     [("What color is the {animal}?", "color"), ("What animal does {name} have?", "animal"), ("Where does the {animal} sleep?", "room"), ("What food does the {animal} like?", "food")]),
    ("{name} lost {their} {object} at the {place} on {day}.",
     [("What did {name} lose?", "object"), ("Where did {name} lose the {object}?", "place"), ("On which day did {name} lose the {object}?", "day")]),
    ("{name} met {name2} in {city} in {month}. They had {food} for dinner.",
     [("Who met {name2}?", "name"), ("In which city did they meet?", "city"), ("In which month did they meet?", "month"), ("What did they have for dinner?", "food")]),
    ("For breakfast {name} eats {food} and drinks {drink}.",
     [("What does {name} eat for breakfast?", "food"), ("What does {name} drink for breakfast?", "drink")]),
    ("{name} teaches {subject} at a school in {city}. There are {number} students in the class.",
     [("What subject does {name} teach?", "subject"), ("In which city is the school?", "city"), ("How many students are in the class?", "number")]),
    ("{name} plays the {instrument}. The concert is in {city} on {day}.",
     [("What instrument does {name} play?", "instrument"), ("In which city is the concert?", "city"), ("On which day is the concert?", "day")]),
    ("{name} goes to work by {vehicle}. The trip takes {number} minutes.",
     [("How does {name} go to work?", "vehicle"), ("How many minutes does the trip take?", "number")]),
    ("The {object} of {name} is in the {room}. The {object2} is in the {room2}.",
     [("Where is the {object}?", "room"), ("Where is the {object2}?", "room2"), ("Who does the {object} belong to?", "name")]),
    ("The new {place} in {city} opens in {month}. It was built by {name}.",
     [("In which city is the new {place}?", "city"), ("In which month does the {place} open?", "month"), ("Who built the {place}?", "name")]),
    ("Tomorrow there will be {weather} in {city} and {weather2} in {city2}.",
     [("What weather will there be in {city}?", "weather"), ("What weather will there be in {city2}?", "weather2")]),
    ("{name} is {number} years old and wants to become a {job} in {city}.",
     [("How old is {name}?", "number"), ("What does {name} want to become?", "job"), ("In which city does {name} want to work?", "city")]),
    ("The {color} {vehicle} belongs to {name}. The {color2} {vehicle2} belongs to {name2}.",
     [("Who owns the {color} {vehicle}?", "name"), ("Who owns the {color2} {vehicle2}?", "name2"), ("What color is the {vehicle} of {name}?", "color")]),
    ("My {relative} {name} bought a {object} for {number} dollars in {city}.",
     [("Who bought a {object}?", "name"), ("What did {name} buy?", "object"), ("How many dollars did the {object} cost?", "number"), ("In which city did {name} buy the {object}?", "city")]),
    ("The {place} opens at {time}. It is closed on {day}.",
     [("At what time does the {place} open?", "time"), ("On which day is the {place} closed?", "day")]),
    ("{name} gave {name2} a {color} {object} in {month}.",
     [("Who gave {name2} a {object}?", "name"), ("Who got a {object} from {name}?", "name2"), ("What color is the {object}?", "color"), ("In which month did {name} give {name2} a {object}?", "month")]),
    ("A {animal} from {city} stole the {food} of {name} on {day}.",
     [("What animal stole the {food}?", "animal"), ("What did the {animal} steal from {name}?", "food"), ("On which day was the {food} stolen?", "day")]),
    ("{name} and {name2} play {sport} in {city} at {time}.",
     [("Who plays {sport} with {name}?", "name2"), ("What do {name} and {name2} play?", "sport"), ("At what time do they play {sport}?", "time")]),
    ("The doctor sees {name} on {day} at {time}. The hospital is in {city}.",
     [("Who does the doctor see?", "name"), ("On which day does the doctor see {name}?", "day"), ("In which city is the hospital?", "city")]),
]
# fmt: on


@dataclass(frozen=True)
class Passage:
    """A spoken passage, its slots (slot -> value), and its questions with their answers."""

    text: str
    slots: dict[str, str]
    questions: tuple[tuple[str, str], ...]

    @property
    def pairs(self) -> frozenset[tuple[str, str]]:
        """Every two slot values that stand together in it, in alphabetical order."""
        return frozenset(combinations(sorted(set(self.slots.values())), 2))


def generate_passages(count: int, seed: int | str, apart_from: Iterable[Passage] = ()) -> list[Passage]:
    """Distinct passages, the templates in turn; the same for the same arguments.

    Args:
        count: how many.
        seed: of all choices.
        apart_from: passages of another split, of which no two slot values may stand together in one of these.

    Raises:
        ValueError: if no further passage is found that is apart from those (ask for fewer).
    """
    draw = random.Random(f"passages {seed}")
    forbidden = frozenset().union(*(passage.pairs for passage in apart_from))
    passages: dict[str, Passage] = {}
    failures = 0
    while len(passages) < count:
        passage = _fill(*TEMPLATES[len(passages) % len(TEMPLATES)], draw)
        if passage.text in passages or passage.pairs & forbidden:
            failures += 1
            if failures > 1000:
                raise ValueError(
                    f"After {len(passages)} passages no further one is apart from the others. Ask for fewer."
                )
            continue
        failures = 0
        passages[passage.text] = passage
    return list(passages.values())


def _fill(text: str, questions: list[tuple[str, str]], draw: random.Random) -> Passage:
    """A passage of a template, with slot values drawn."""
    slots: dict[str, str] = {}
    pronouns: dict[str, str] = {}
    for slot in dict.fromkeys(re.findall(r"\{(\w+)\}", text)):
        if slot in ("they", "their"):
            continue
        kind = slot.removesuffix("2")
        if kind == "name":
            kind = draw.choice(("woman", "man"))
            pronouns = pronouns or PRONOUNS[kind]
        slots[slot] = draw.choice([word for word in WORDS[kind] if word not in slots.values()])
    values = {**slots, **pronouns}
    passage = text.format(**values)
    passage = passage[0].upper() + passage[1:]
    asked = tuple((question.format(**values), slots[answer]) for question, answer in questions)
    missing = [answer for _, answer in asked if not re.search(rf"\b{re.escape(answer)}\b", passage)]
    if missing:
        raise ValueError(f"The template {text!r} has a question whose answer {missing[0]!r} is not in the passage.")
    return Passage(passage, slots, asked)


def question_rows(passages: Iterable[Passage], split: str, first: int = 0) -> list[Row]:
    """One row per question: `id`, `task`, `text` (the passage), `passage_id`, `question`, `answers`, `target`, `language`."""
    return [
        {
            "id": f"{split}-{number:04d}-{letter}",
            "task": "sqa",
            "text": passage.text,
            "passage_id": f"{split}-{number:04d}",
            "question": question,
            "answers": [answer],
            "target": answer,
            "language": "en",
        }
        for number, passage in enumerate(passages, first)
        for letter, (question, answer) in zip("abcdefgh", passage.questions)
    ]

"""Questions about documents (RULER's qa_1 and qa_2): one fact of one document; a fact at the end of two documents."""

from __future__ import annotations

from typing import NamedTuple

from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Turn, ask

CITIES = (
    "Lisbon Oslo Cairo Lima Paris Delhi Quito Rome Seoul Dublin Madrid Athens Prague Vienna Warsaw Boston Havana "
    "Nairobi Tokyo Berlin"
).split()
JOBS = (
    "baker pilot nurse farmer lawyer miner painter sailor tailor doctor driver gardener singer writer weaver judge "
    "cook dancer plumber printer"
).split()
FIRST = (
    "Anna Bruno Clara David Elena Felix Greta Henrik Irene Jonas Karin Lukas Marta Nils Olga Peter Rosa Stefan Tilda "
    "Ulrich Vera Walter Yvonne Zeno"
).split()
LAST = (
    "Abel Brandt Castell Dorn Engel Fabri Gerling Hart Imhof Jansen Keller Lindt Moser Novak Ostrow Pohl Quist Reuter "
    "Stark Thorn Urban Voss Weller Zander"
).split()
INTRO = "Some paragraphs of this text tell of people. Remember them: you will be asked.\n"
# Tokens per document, with the text around it.
DOCUMENT_TOKENS, MOST_DOCUMENTS = 150, 60


class Person(NamedTuple):
    """What a document tells."""

    name: str
    born: str
    job: str
    town: str
    teacher: str

    def tell(self) -> str:
        """Return the document."""
        return (
            f"{self.name} was born in {self.born}, learned the trade of a {self.job} from {self.teacher}, and later "
            f"opened a workshop in {self.town}.\n"
        )


def draw_people(draw: Draw) -> list[Person]:
    """Return people with different names; everybody's teacher is another of them."""
    rng = draw.rng
    n = max(4, min(draw.length // DOCUMENT_TOKENS, MOST_DOCUMENTS))
    names = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], n)
    teachers = names[1:] + names[:1]
    pairs = [rng.sample(CITIES, 2) for _ in names]
    people = [Person(n, a, rng.choice(JOBS), b, t) for n, t, (a, b) in zip(names, teachers, pairs, strict=True)]
    rng.shuffle(people)
    return people


def make_one_hop(draw: Draw) -> Made:
    """One fact about one of many people."""
    people = draw_people(draw)
    asked, kind = draw.rng.choice(people), draw.rng.choice(("born", "job", "town"))
    instruction, prefix = {
        "born": (f"In which city was {asked.name} born?", f"{asked.name} was born in"),
        "job": (f"Which trade did {asked.name} learn?", f"{asked.name} learned the trade of a"),
        "town": (f"In which city did {asked.name} open a workshop?", f"{asked.name} opened a workshop in"),
    }[kind]
    answer = getattr(asked, kind)
    return lay_people(draw, people, ask(f"{instruction} Answer with one word.", prefix, answer, (answer,), "any"))


def make_two_hops(draw: Draw) -> Made:
    """A fact about the teacher of one of many people."""
    people = draw_people(draw)
    asked = draw.rng.choice(people)
    teacher = next(person for person in people if person.name == asked.teacher)
    instruction = f"In which city was the person born who taught {asked.name}? Answer with one word."
    prefix = f"The person who taught {asked.name} was born in"
    return lay_people(draw, people, ask(instruction, prefix, teacher.born, (teacher.born,), "any"))


def lay_people(draw: Draw, people: list[Person], turn: Turn) -> Made:
    """Return the documents at random places, the introduction before them."""
    places = sorted(draw.rng.random() for _ in people)
    return Made([INTRO, *(person.tell() for person in people)], [turn], [0.0, *places])

"""Prompts that radlads brings for a teacher to answer: kinds of tasks, put together with subjects, words and numbers.

They are for training. What measures a student has prompts of its own, none of which is here.
"""

import random

_SUBJECTS = (
    *("bees", "volcanoes", "the Roman Empire", "photosynthesis", "chess", "jazz", "earthquakes", "the human heart"),
    *("solar panels", "tea", "whales", "gravity", "the printing press", "bicycles", "vaccines", "glaciers", "honey"),
    *("the stock market", "penguins", "the moon", "deserts", "computers", "bread", "trains", "dreams", "the Nile"),
    *("electric cars", "spiders", "paper", "salt", "football", "coral reefs", "steel", "lighthouses", "yoga"),
    *("the violin", "potatoes", "clouds", "recycling", "the Great Wall of China", "batteries", "owls", "rice"),
    *("thunderstorms", "libraries", "the Olympic Games", "mushrooms", "glass", "sharks", "the internet", "sleep"),
)
_ASKED = (
    "What should everybody know about {0}?",
    "Tell me about {0}.",
    "Explain {0} to a child in two sentences.",
    "Give me three interesting facts about {0}.",
    "Write a short poem about {0}.",
    "Write the first paragraph of a story that has to do with {0}.",
    "Why do people care about {0}?",
    "List five words that have to do with {0}.",
    "Ask me two questions about {0}.",
    "Write a headline and one sentence of news about {0}.",
    "What is a common mistake that people make about {0}?",
    "Write a polite e-mail that invites a friend to a talk about {0}.",
    "In one sentence, what could {0} and {1} have in common?",
    "Compare {0} with {1} in a few sentences.",
    "Make a short dialogue between a teacher and a pupil about {0}.",
    'Give a JSON object with the keys "title" and "summary" about {0}.',
    "Answer in capital letters only: what do you know about {0}?",
    "Write two sentences about {0}, without using the word 'the'.",
    "Describe {0} with exactly three adjectives, separated by commas.",
    "Name one advantage and one disadvantage of {0}.",
)
_SENTENCES = (
    "The meeting was moved from Monday to Thursday because the manager was ill.",
    "she dont like to goes to the market when it rain",
    "Our new phone is lighter, cheaper and lasts two days on one charge.",
    "The old bridge was closed after the flood, and the ferry now runs every hour.",
    "I am writing to say that the parcel which I ordered has still not arrived.",
    "Children learn languages quickly, mostly by listening and by making mistakes.",
    "The recipe needs two eggs, a cup of flour and a little patience.",
    "Last year the town planted four hundred trees along the river.",
)
_REWRITTEN = (
    "Rewrite this sentence in a friendly tone: {0}",
    "Summarise in at most eight words: {0}",
    "Correct the grammar, if anything is wrong: {0}",
    "Turn this into a question: {0}",
    "Translate to Spanish: {0}",
    "Say this in other words: {0}",
    "How many words has this sentence? {0}",
    "Repeat this sentence word for word: {0}",
)
_CODED = (
    "returns the largest number in a list",
    "counts the vowels in a text",
    "reverses a string",
    "checks whether a number is prime",
    "adds up the even numbers in a list",
    "finds the longest word in a sentence",
    "removes duplicates from a list and keeps its order",
    "converts Celsius to Fahrenheit",
    "computes the factorial of n",
    "merges two sorted lists",
)
_LANGUAGES = ("Python", "JavaScript", "C", "Java")
_NAMES = ("Ana", "Tom", "Mira", "Ken", "Lucy", "Omar", "Eva", "Paul")
_THINGS = ("apples", "books", "coins", "pencils", "tickets", "stamps")
_SEED = 20


def own_prompts() -> list[str]:
    """About 1,800 prompts, none of them twice, in an order that mixes their kinds and never changes."""
    draw = random.Random(_SEED)
    prompts = []
    for place, subject in enumerate(_SUBJECTS):
        other = _SUBJECTS[(place + 17) % len(_SUBJECTS)]
        prompts += [form.format(subject, other) for form in _ASKED]
    prompts += [form.format(sentence) for form in _REWRITTEN for sentence in _SENTENCES]
    prompts += [f"Write a {name} function that {task}." for task in _CODED for name in _LANGUAGES]
    prompts += [f"Explain step by step how a program {task}." for task in _CODED]
    prompts += _arithmetic(draw, 400)
    prompts += _lists(draw, 300)
    prompts = list(dict.fromkeys(prompts))
    draw.shuffle(prompts)
    return prompts


def _arithmetic(draw: random.Random, num: int) -> list[str]:
    found = []
    for number in range(num):
        a, b, c = draw.randint(2, 99), draw.randint(2, 99), draw.randint(2, 12)
        name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
        found.append(
            (
                f"What is {a} plus {b}?",
                f"What is {max(a, b)} minus {min(a, b)}?",
                f"What is {a} times {c}?",
                f"{name} has {a} {thing} and gets {b} more. How many {thing} has {name} now?",
                f"{name} has {a * c} {thing} and shares them among {c} friends. How many does each get?",
            )[number % 5]
        )
    return found


def _lists(draw: random.Random, num: int) -> list[str]:
    found = []
    for number in range(num):
        numbers = [draw.randint(1, 99) for _ in range(draw.randint(3, 7))]
        words = draw.sample(_SUBJECTS, 4)
        shown, named = ", ".join(map(str, numbers)), ", ".join(words)
        found.append(
            (
                f"Sort these numbers from small to large: {shown}",
                f"Which is the largest of these numbers? {shown}",
                f"Add up these numbers: {shown}",
                f"Put these in alphabetical order: {named}",
                f"Which of these is the odd one out, and why? {named}",
                f"Copy this list, one item on each line: {named}",
            )[number % 6]
        )
    return found

"""A task with a known optimum: describe a thing kindly.

A prompt asks about a noun; a well-formed answer gives one to six adjectives. The gold score is the mean tone of the
adjectives, so it does not depend on how long the answer is, less one if the answer is not well formed. Demonstrations
draw adjectives of every tone alike, so supervised fine-tuning scores about 0, and the optimum is exactly 1.
Pure Python; every draw comes from the generator that is passed in.
"""

import math
import re
from random import Random

_NOUNS = "fox cat dog owl tree river house garden boat bridge song train lake town horse child"
_ADJECTIVES = {
    1.0: "warm bright gentle lovely calm graceful friendly cheerful",
    0.0: "old young small large brown quiet common plain",
    -1.0: "ugly dull nasty cold stupid bitter awful dirty",
}
NOUNS = tuple(_NOUNS.split())
TONE = {word: tone for tone, words in _ADJECTIVES.items() for word in words.split()}
QUESTIONS = (
    "describe the {} :",
    "tell me about the {} :",
    "what is the {} like ?",
    "how would you describe the {} to me ?",
)
OPTIMUM = 1.0  # the gold score of a well-formed answer whose adjectives are all kind
RESPONSE_LENGTH = 20  # tokens; the longest well-formed answer has 17 words, and the end of sequence

_LIST = r"(?:{a}|{a} and {a}|{a} , {a} and {a})".format(a="(?:" + "|".join(TONE) + ")")
_ANSWER = re.compile(rf"the (?P<noun>\w+) is {_LIST} \.(?: it is {_LIST} \.)?")


def vocabulary() -> list[str]:
    """Every word of the task, each once, in a fixed order."""
    words = " ".join([*QUESTIONS, "the is and , it ."]).replace("{}", " ").split()
    return list(dict.fromkeys([*words, *NOUNS, *TONE]))


def prompts() -> list[str]:
    """The 64 prompts: each question about each noun, of 4 to 9 words."""
    return [question.format(noun) for noun in NOUNS for question in QUESTIONS]


def _noun(prompt: str) -> str:
    return next(word for word in prompt.split() if word in NOUNS)


def _answer(noun: str, shape: tuple[int, ...], rng: Random) -> str:
    """A well-formed answer with `shape[i]` adjectives in its i-th sentence, their tones drawn alike."""
    sentences = []
    for subject, count in zip((f"the {noun}", "it"), shape, strict=False):
        adjectives = [rng.choice(list(TONE)) for _ in range(count)]
        *first, last = adjectives
        sentences.append(f"{subject} is {' , '.join(first) + ' and ' if first else ''}{last} .")
    return " ".join(sentences)


def _shape(rng: Random) -> tuple[int, ...]:
    return tuple(rng.randint(1, 3) for _ in range(rng.randint(1, 2)))


def demonstrations(count: int, rng: Random) -> list[tuple[str, str]]:
    """`count` pairs (prompt, well-formed answer) with tones and lengths drawn independently."""
    asked = prompts()
    return [(prompt, _answer(_noun(prompt), _shape(rng), rng)) for prompt in (rng.choice(asked) for _ in range(count))]


def gold_score(prompt: str, response: str) -> float:
    """The true preference: mean tone of the response's adjectives in [-1, 1], less 1 if it is not well formed.
    Well formed means: `the NOUN is LIST .`, perhaps followed by `it is LIST .`, about the prompt's noun."""
    words = response.split()
    tones = [TONE[word] for word in words if word in TONE]
    match = _ANSWER.fullmatch(" ".join(words))
    well_formed = match is not None and match["noun"] == _noun(prompt)
    return sum(tones) / max(len(tones), 1) - (0.0 if well_formed else 1.0)


def preference_pairs(count: int, rng: Random, *, noise: float = 0.0) -> list[tuple[str, str, str]]:
    """`count` triples (prompt, chosen, rejected): two answers of one shape, so of equal length, and unequal gold score.
    The annotator is Bradley and Terry's: the better answer is chosen with probability σ(difference in gold / noise)."""
    asked, pairs = prompts(), list[tuple[str, str, str]]()
    while len(pairs) < count:
        prompt, shape = rng.choice(asked), _shape(rng)
        a, b = (_answer(_noun(prompt), shape, rng) for _ in range(2))
        gold_a, gold_b = gold_score(prompt, a), gold_score(prompt, b)
        if gold_a != gold_b:
            turned = noise > 0 and rng.random() > 1 / (1 + math.exp(-abs(gold_a - gold_b) / noise))
            pairs.append((prompt, a, b) if (gold_a > gold_b) != turned else (prompt, b, a))
    return pairs

"""Sentences that name a number, the words that name it, and word vectors from character n-grams."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from unicode_fast.data.dataset import ClipSet

WORD_WIDTH = 128
LONGEST = 10
_ROMAN = ("N", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")

NAMES = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "fr": ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"),
}
_NOUNS = {"en": ("number", "digit", "figure"), "fr": ("numéro", "chiffre", "nombre")}
_UNITS = (*NAMES["en"], *"ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split())
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# {} is the number, in one or two words; other slots are one word each; sentences have 8 to 10 words.
_TEMPLATES = {
    "en": (
        "{person} reads {} aloud in the {place} again",
        "we can see and hear {} near the {place}",
        "in the {place} {person} writes {} with {colour} chalk",
        "the {colour} sign outside the {place} shows {} today",
        "{day} {person} called out {} and held it up",
        "somebody in this {place} keeps saying {} very clearly",
        "please look at {} drawn in {colour} ink",
        "{person} and {other} both repeat {} {day} in class",
    ),
    "fr": (
        "{person} lit {day} {} à haute voix au {place}",
        "nous pouvons voir et entendre {} près du {place}",
        "au {place} {person} écrit {} à la craie {colour}",
        "le panneau {colour} devant ce {place} affiche {}",
        "{day} {person} cria {} puis leva la main",
        "quelqu'un dans ce {place} répète toujours très clairement {}",
        "regardez bien {} dessiné ici à l'encre {colour}",
        "{person} et {other} répètent {day} en classe ensemble {}",
    ),
}
_FILLERS = {
    "en": {
        "person": ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry"),
        "other": ("Ida", "Jonas", "Klara", "Liam", "Maria", "Nils", "Olga", "Peter"),
        "place": ("kitchen", "garden", "station", "library", "market", "museum", "school", "harbour"),
        "colour": ("red", "green", "blue", "black", "white", "yellow"),
        "day": ("today", "yesterday", "tonight", "earlier"),
    },
    "fr": {
        "person": ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henri"),
        "other": ("Ida", "Jonas", "Klara", "Liam", "Maria", "Nils", "Olga", "Pierre"),
        "place": ("jardin", "marché", "musée", "port", "parc", "salon", "bureau", "café"),
        "colour": ("rouge", "jaune", "rose", "orange", "mauve", "beige"),
        "day": ("hier", "aujourd'hui", "demain", "ensuite"),
    },
}


def digit_wordings(language: str) -> list[tuple[str, ...]]:
    """The wordings of each digit 0..9."""
    return [(name, str(digit), _ROMAN[digit]) for digit, name in enumerate(NAMES[language])]


def number_names() -> list[str]:
    """The numbers 0..99 in English words, such as "forty two"."""
    compounds = [f"{ten} {unit}" if unit != "zero" else ten for ten in _TENS for unit in _UNITS[:10]]
    return [*_UNITS, *compounds]


def number_wordings() -> list[tuple[str, ...]]:
    """The wordings of each number 0..99, in one or two words."""
    return [(name, name.replace(" ", "-"), str(number)) for number, name in enumerate(number_names())]


def make_sentences(
    wordings: Sequence[tuple[str, ...]], language: str, generator: np.random.Generator
) -> list[list[str]]:
    """One sentence of 8 to 10 words for each number.

    Template, wording of the number ("seven", "7", "VII", "number 7", ...) and all other words are drawn at random; only
    the number occurs in other modalities.

    Args:
        wordings: for each clip, the wordings of its number, in one or two words.
        language: "en" or "fr".
        generator: the random generator.

    Returns:
        The words of each sentence.
    """
    return [_sentence(ways, language, generator) for ways in wordings]


def _sentence(ways: tuple[str, ...], language: str, generator: np.random.Generator) -> list[str]:
    def pick(choices: tuple[str, ...]) -> str:
        return choices[generator.integers(len(choices))]

    written = pick(ways)
    # A third word would make some sentences eleven words long.
    if generator.random() < 0.25 and " " not in written:
        written = f"{pick(_NOUNS[language])} {written}"
    fillers = {slot: pick(choices) for slot, choices in _FILLERS[language].items()}
    return pick(_TEMPLATES[language]).format(written, **fillers).split()


@functools.cache
def _naming_words(language: str) -> frozenset[str]:
    """All words that name a number in this language."""
    ways = digit_wordings(language) + (number_wordings() if language == "en" else [])
    return frozenset(word for way in ways for written in way for word in written.split())


@functools.cache
def _other_words(language: str) -> frozenset[str]:
    """All other words of its sentences, including nouns such as "number"."""
    fillers = {word for choices in _FILLERS[language].values() for word in choices}
    fixed = {word for template in _TEMPLATES[language] for word in template.split() if "{" not in word}
    return frozenset(fillers | fixed | set(_NOUNS[language]))


def _language_of(words: Sequence[str]) -> str:
    """The language whose sentences have more of these words."""
    return max(_TEMPLATES, key=lambda language: sum(word in _other_words(language) for word in words))


def content_words(clips: ClipSet) -> np.ndarray:
    """The words of each sentence that name a number, in the built-in data sets.

    Content words are number words of the sentence's language, figures and Roman numerals, not "number", "digit" and
    "figure". In a mismatched sentence they name another number than its clip's class.

    Args:
        clips: clips of a built-in data set.

    Returns:
        (clips, T) bool, False after the last word, with the T of the text features.

    Raises:
        ValueError: the clips have no sentences.
    """
    if "text.sentence" not in clips.arrays:
        raise ValueError(f"clips must hold the array 'text.sentence', got {', '.join(clips.arrays) or 'none'}")
    sentences = np.asarray(clips.arrays["text.sentence"])
    found = np.zeros((len(sentences), clips.arrays["text"].shape[1]), bool)
    for row, sentence in enumerate(sentences):
        words = str(sentence).split()
        naming = _naming_words(_language_of(words))
        found[row, : len(words)] = [word in naming for word in words]
    return found


def sentence_vectors(sentences: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Word vectors, with zeros after the last word.

    Args:
        sentences: lists of 1 to 10 words.

    Returns:
        vectors: (sentences, 10, 128) float32; lengths: (sentences,) int64.
    """
    vectors = np.zeros((len(sentences), LONGEST, WORD_WIDTH), np.float32)
    for row, words in enumerate(sentences):
        vectors[row, : len(words)] = [word_vector(word) for word in words]
    return vectors, np.array([len(words) for words in sentences], np.int64)


@functools.cache
def word_vector(word: str) -> np.ndarray:
    """(128,) float32 of length 1: the word's character 1- to 4-grams, ends marked, hashed with signs.

    The hash is BLAKE2b, so the vectors are the same on every machine.
    """
    marked = f"<{word}>"
    vector = np.zeros(WORD_WIDTH, np.float32)
    grams = {marked[start : start + size] for size in range(1, 5) for start in range(len(marked) - size + 1)}
    for gram in sorted(grams - {"<", ">"} | {marked}):
        value = int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "little")
        vector[value % WORD_WIDTH] += 1 if value >> 63 else -1
    length = np.linalg.norm(vector)
    return vector / length if length > 0 else vector

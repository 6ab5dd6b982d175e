"""Written sentences that name a digit, and word vectors from hashed character n-grams."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

WORD_WIDTH = 128
LONGEST = 10
_ROMAN = ("N", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")

NAMES = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "fr": ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"),
}
_NOUNS = {"en": ("number", "digit", "figure"), "fr": ("numéro", "chiffre", "nombre")}
# {} is the digit, in one or two words; the other slots hold one word each: 8 to 10 words in all.
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


def make_sentences(digits: np.ndarray, language: str, generator: np.random.Generator) -> list[list[str]]:
    """One sentence of 8 to 10 words for each digit.

    Template, wording of the digit ("seven", "7", "VII", "number 7", ...) and everything else in the sentence are drawn
    at random; the digit is the only thing that other modalities know.

    Args:
        digits: (clips,) in 0..9.
        language: "en" or "fr".
        generator: the source of randomness.

    Returns:
        The words of each sentence.
    """
    return [_sentence(int(digit), language, generator) for digit in digits]


def _sentence(digit: int, language: str, generator: np.random.Generator) -> list[str]:
    def pick(choices: tuple[str, ...]) -> str:
        return choices[generator.integers(len(choices))]

    written = pick((NAMES[language][digit], str(digit), _ROMAN[digit]))
    if generator.random() < 0.25:
        written = f"{pick(_NOUNS[language])} {written}"
    fillers = {slot: pick(choices) for slot, choices in _FILLERS[language].items()}
    return pick(_TEMPLATES[language]).format(written, **fillers).split()


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

    The hash is BLAKE2b, so the vectors are the same on every machine and in every language.
    """
    marked = f"<{word}>"
    vector = np.zeros(WORD_WIDTH, np.float32)
    grams = {marked[start : start + size] for size in range(1, 5) for start in range(len(marked) - size + 1)}
    for gram in sorted(grams - {"<", ">"} | {marked}):
        value = int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "little")
        vector[value % WORD_WIDTH] += 1 if value >> 63 else -1
    length = np.linalg.norm(vector)
    return vector / length if length > 0 else vector

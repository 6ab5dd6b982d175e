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
    "de": ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
}
_NOUNS = {"en": ("number", "digit", "figure"), "de": ("Nummer", "Ziffer", "Zahl")}
# {} is the digit, in one or two words; the other slots hold one word each: 8 to 10 words in all.
_TEMPLATES = {
    "en": (
        "{person} reads {} aloud in the {place} {day} again",
        "we can see and hear {} near the {place}",
        "in the {place} {person} writes {} with {colour} chalk",
        "the {colour} sign outside the {place} shows {} today",
        "{day} {person} called out {} and held it up",
        "somebody in this {place} keeps saying {} very clearly",
        "please look at {} drawn in {colour} ink here",
        "{person} and {other} both repeat {} {day} in class",
    ),
    "de": (
        "{person} liest {day} im {place} laut {} vor allen",
        "wir sehen und hören {} gleich neben dem {place}",
        "im {place} schreibt {person} langsam {} mit {colour} Kreide",
        "das Schild am {place} zeigt in {colour} Farbe {}",
        "{day} rief {person} {} und hielt sie hoch",
        "jemand sagt im {place} immer wieder sehr deutlich {}",
        "bitte schaut auf {} hier in {colour} Tinte gemalt",
        "{person} und {other} wiederholen {day} beide gemeinsam {}",
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
    "de": {
        "person": ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry"),
        "other": ("Ida", "Jonas", "Klara", "Liam", "Maria", "Nils", "Olga", "Peter"),
        "place": ("Garten", "Bahnhof", "Laden", "Museum", "Hafen", "Markt", "Park", "Strand"),
        "colour": ("roter", "grüner", "blauer", "schwarzer", "weißer", "gelber"),
        "day": ("heute", "gestern", "abends", "morgens", "montags", "freitags"),
    },
}


def make_sentences(digits: np.ndarray, language: str, generator: np.random.Generator) -> list[list[str]]:
    """One sentence of 8 to 10 words for each digit.

    Template, wording of the digit ("seven", "7", "VII", "number 7", ...) and everything else in the sentence are drawn
    at random; the digit is the only thing that other modalities know.

    Args:
        digits: (clips,) in 0..9.
        language: "en" or "de".
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

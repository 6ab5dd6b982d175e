"""One HTML page that shows what the codewords of a run stand for. It needs no other file and no network."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unicode_fast.report.codebook_advice import Advice
from unicode_fast.report.codebook_data import CodebookUse, Codeword
from unicode_fast.report.codebook_examples import Examples, Shown, Source
from unicode_fast.report.plots import modality_colours
from unicode_fast.tasks import Sharing

# The page is smaller than MOST_BYTES. A card takes about _CARD_BYTES, and an example _EXAMPLE_BYTES beside its picture
# or sound. What is outside of cards takes at most _REST_BYTES.
MOST_BYTES = 20_000_000
MOST_CARDS = 3000
_CARD_BYTES, _EXAMPLE_BYTES, _REST_BYTES = 2000, 400, 1_000_000
_LONGEST_NAME, _LONGEST_SENTENCE, _LONGEST_WORD, _WORDS = 60, 120, 24, 8
_GROUPS = {"shared": "shared", "mostly": "mostly one modality", "one": "one modality only"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Heading:
    """What the page is about.

    Attributes:
        facts: name and value of each line, such as run, data, versions.
        sizes: of the codebooks whose choices a code joins.
        notes: what the page leaves out, or could not read.
    """

    facts: Mapping[str, str]
    sizes: Sequence[int]
    notes: list[str] = field(default_factory=list)


def room_for(cards: int, clips: int, of: Iterable[Source]) -> tuple[int, int]:
    """How many examples a modality can have on a page of less than MOST_BYTES.

    Args:
        cards: number of codewords, at most MOST_CARDS.
        clips: examples of each codeword and modality that are asked for.
        of: the sources of the examples.

    Returns:
        Examples of each codeword and modality, at least 1; and number of codewords, the most used ones, whose examples
        have pictures and sound.
    """
    sources = list(of)
    each = sum(source.bytes_each for source in sources)
    texts = _EXAMPLE_BYTES * len(sources)
    room = MOST_BYTES - _REST_BYTES - _CARD_BYTES * cards
    for shown in range(clips, 1, -1):
        if cards * shown * (each + texts) <= room:
            return shown, cards
    return 1, min(cards, (room - cards * texts) // max(each, 1))


def page(use: CodebookUse, examples: Examples, heading: Heading, advice: Sequence[Advice]) -> str:
    """The page, HTML in UTF-8 of less than MOST_BYTES.

    Args:
        use: of the codewords.
        examples: what they look like and sound like.
        heading: what the page is about.
        advice: what to try.
    """
    colours = modality_colours(use.names)
    tints = "".join(f"--m{place}:{colour};" for place, colour in enumerate(colours.values()))
    cards, left_out = _cards(use, examples, heading.sizes)
    notes = [
        *heading.notes,
        *([f"{left_out:,} examples are left out, so that the page stays small."] if left_out else []),
    ]
    chips = "".join(
        f'<a href="#c{one.code}" class="{one.group}" title="{_number(one.code, heading.sizes)}: '
        f'{sum(one.uses.values())} uses">{_number(one.code, heading.sizes)}</a>'
        for one in use.codewords
    )
    title = _text(f"Codewords of {heading.facts['run']}", 200)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; media-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
:root {{ {tints} }}
{_part("codebook_page.css")}</style>
</head>
<body>
<a class="skip" href="#cards">Skip to the codewords</a>
<header>
<h1>{title}</h1>
{_facts(heading)}
</header>
<main>
{_notes(notes)}
{_measures(use, heading.sizes)}
{_advice(advice)}
{_part("codebook_page_help.html")}
<section aria-labelledby="which">
<h2 id="which">Codewords</h2>
{_filters(use)}
<nav class="chips" aria-label="codewords by uses">{chips}</nav>
<div id="cards">
{cards}
</div>
</section>
{_dead(use, heading.sizes)}
</main>
<script>
{_part("codebook_page.js")}</script>
</body>
</html>
"""


def _part(name: str) -> str:
    """A file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _text(text: object, longest: int = 0) -> str:
    """A text of unknown origin, safe in HTML and in attributes; cut in its middle above `longest` characters."""
    plain = str(text)
    if longest and len(plain) > longest:
        plain = f"{plain[: longest // 2]}…{plain[1 + longest // 2 - longest :]}"
    plain = _CONTROL.sub(lambda found: " " if found[0].isspace() else ascii(found[0])[1:-1], plain)
    # Names of files that are no UTF-8 hold surrogates.
    return html.escape(plain.encode("utf-8", "backslashreplace").decode())


def _number(code: int, sizes: Sequence[int]) -> str:
    """A code as the choice in each codebook."""
    choices = []
    for size in reversed(sizes):
        choices.append(str(code % size))
        code //= size
    return "·".join(reversed(choices))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _facts(heading: Heading) -> str:
    lines = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value, 300)}</dd></div>" for name, value in heading.facts.items()
    )
    return f'<dl class="facts">{lines}</dl>'


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{_text(note, 2000)}</li>" for note in notes)}</ul>' if notes else ""


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the rows; cells are HTML."""
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    head = f"<caption>{caption}</caption><thead><tr>{top}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def _measures(use: CodebookUse, sizes: Sequence[int]) -> str:
    """The measures of `Sharing`, and the number of codewords of each kind."""
    size = math.prod(sizes)
    of_all = next(iter(use.sharing.values()))
    kinds = {
        "in use": use.used,
        "shared": int(of_all.shared_codewords),
        "of one modality only": sum(use.lonely.values()),
        "dead": size - use.used,
    }
    what = "pairs of codewords" if len(sizes) > 1 else "codewords"
    tiles = "".join(f"<div><b>{count:,}</b> {name}</div>" for name, count in kinds.items())
    modalities = _table(
        "By modality",
        ("modality", "clips", "codes in use", "perplexity", "uses on shared codewords", "codewords of its own"),
        (
            (
                f"{_swatch(use, name)}{_text(name)}{which}",
                f"{sharing.clips[name]:,}",
                f"{sharing.codes_in_use[name]:,}",
                f"{sharing.perplexity[name]:.1f}",
                _percent(sharing.shared_uses[name]),
                f"{use.lonely[name]:,}" if sharing is of_all else "",
            )
            for name, sharing, which in _rows(use, use.names)
        ),
    )
    pairs = _table(
        "By pair",
        ("pair", "overlap of use", "same code at the same position", "by chance"),
        (
            (
                f"{_text(pair)}{which}",
                _percent(sharing.overlap[pair]),
                _percent(sharing.agreement[pair]) if pair in sharing.agreement else "no common time",
                _percent(sharing.agreement_by_chance[pair]) if pair in sharing.agreement else "",
            )
            for pair, sharing, which in _rows(use, list(of_all.overlap))
        ),
    )
    return (
        f'<section aria-labelledby="all"><h2 id="all">{size:,} {what}</h2><div class="tiles">{tiles}</div>'
        f'<div class="tables">{modalities}{pairs}</div></section>'
    )


def _rows(use: CodebookUse, keys: Sequence[str]) -> Iterable[tuple[str, Sharing, str]]:
    """Each modality or pair with all words, and with content words where its numbers then differ."""
    first = next(iter(use.sharing.values()))
    for key in keys:
        for words, sharing in use.sharing.items():
            if sharing is first:
                yield key, sharing, ""
            elif "text" in key.split("-"):
                yield key, sharing, f" <small>{_text(words)}</small>"


def _swatch(use: CodebookUse, name: str) -> str:
    return f'<i class="swatch" style="background:var(--m{use.names.index(name)})"></i>'


def _advice(advice: Sequence[Advice]) -> str:
    items = "".join(
        f"<li><b>{_text(one.seen)}</b> {_text(one.advice)} <small>{_text(one.source)}</small></li>" for one in advice
    )
    body = f"<ul>{items}</ul>" if items else "<p>Nothing on this page gives reason for a change.</p>"
    return f'<section class="advice" aria-labelledby="try"><h2 id="try">What to try</h2>{body}</section>'


def _filters(use: CodebookUse) -> str:
    counts = {group: sum(one.group == group for one in use.codewords) for group in _GROUPS}
    buttons = "".join(
        f'<button type="button" data-show="{group}" aria-pressed="false">{name} ({counts[group]:,})</button>'
        for group, name in _GROUPS.items()
    )
    return (
        f'<div class="filters" id="filters" hidden role="search">'
        f'<button type="button" data-show="" aria-pressed="true">all ({len(use.codewords):,})</button>'
        f'{buttons}<a href="#dead">dead ({len(use.dead):,})</a>'
        f'<input id="search" type="search" aria-label="search codewords" placeholder="word, class, clip or #17">'
        f'<output id="count" aria-live="polite"></output></div>'
    )


def _cards(use: CodebookUse, examples: Examples, sizes: Sequence[int]) -> tuple[str, int]:
    """The cards in the room that they have, and the number of examples that are left out."""
    cards, left_out, room = [], 0, MOST_BYTES - _REST_BYTES
    for place, codeword in enumerate(use.codewords):
        shown = {name: examples.shown[codeword.code, name] for name in use.names}
        while True:
            card = _card(codeword, use, shown, examples.words, sizes)
            size, most = len(card.encode()), max(map(len, shown.values()))
            if size <= room // (len(use.codewords) - place) or most == 0:
                break
            left_out += sum(len(one) == most for one in shown.values())
            shown = {name: one[: most - 1] for name, one in shown.items()}
        room -= size + 1
        cards.append(card)
    return "\n".join(cards), left_out


def _card(
    codeword: Codeword,
    use: CodebookUse,
    shown: Mapping[str, Sequence[Shown]],
    words: Mapping[tuple[int, str], list[tuple[str, int]]],
    sizes: Sequence[int],
) -> str:
    number, total = _number(codeword.code, sizes), sum(codeword.uses.values())
    shares = {name: uses / total for name, uses in codeword.uses.items()}
    bars = "".join(
        f'<i style="width:{100 * share:.1f}%;background:var(--m{place})"></i>'
        for place, share in enumerate(shares.values())
    )
    alt = ", ".join(f"{_text(name)} {_percent(share)}" for name, share in shares.items())
    most = _text(max(codeword.uses, key=lambda name: codeword.uses[name]))
    tag = {"shared": "shared", "mostly": f"mostly {most}", "one": f"{most} only"}[codeword.group]
    facts = []
    if codeword.label is not None:
        facts.append(f"class <b>{_text(codeword.label[0], _LONGEST_NAME)}</b> in {_percent(codeword.label[1])} of uses")
    for pair, share in codeword.agreement.items():
        if not all(codeword.uses[name] for name in use.pairs[pair]):
            continue
        facts.append(f"{_text(pair)}: {'same second' if pair in use.timed else 'same clip'} {_percent(share)}")
    modalities = "".join(
        _modality(name, uses, uses / total, _swatch(use, name), words.get((codeword.code, name), []), shown[name])
        for name, uses in codeword.uses.items()
        if uses
    )
    return (
        f'<article class="card" id="c{codeword.code}" data-group="{codeword.group}" data-number="{number}" '
        f'aria-labelledby="h{codeword.code}">'
        f'<div class="about"><h3 id="h{codeword.code}">{number}</h3>'
        f'<span class="tag {codeword.group}">{tag}</span>'
        f'<p>{total:,} uses</p><div class="bar" role="img" aria-label="{alt}">{bars}</div>'
        f"<ul>{''.join(f'<li>{fact}</li>' for fact in facts)}</ul></div>{modalities}</article>"
    )


def _modality(
    name: str, uses: int, share: float, swatch: str, words: Sequence[tuple[str, int]], shown: Sequence[Shown]
) -> str:
    listed = "".join(
        f"<li>{_text(word, _LONGEST_WORD)} <small>{count:,}</small></li>" for word, count in words[:_WORDS]
    )
    if len(words) > _WORDS:
        listed += f"<li><small>and {len(words) - _WORDS:,} more words</small></li>"
    items = "".join(f"<li>{_example(one)}</li>" for one in shown)
    kind = ' class="texts"' if shown and shown[0].sentence is not None else ""
    return (
        f'<section class="modality"><h4>{swatch}{_text(name)} <small>{uses:,} uses, {_percent(share)}</small></h4>'
        + (f'<ul class="words">{listed}</ul>' if listed else "")
        + f"<ul{kind}>{items}</ul></section>"
    )


def _example(one: Shown) -> str:
    parts = []
    if one.picture is not None:
        kind = "png" if one.picture.startswith(b"\x89PNG") else "jpeg"
        small = ' class="small"' if one.small else ""
        parts.append(f'<img{small} src="{_data(f"image/{kind}", one.picture)}" alt="{_text(one.alt, 120)}">')
    if one.sound is not None:
        label = f"sound of {one.clip}, {one.place}"
        parts.append(
            f'<audio controls preload="none" aria-label="{_text(label, 120)}" src="{_data("audio/mpeg", one.sound)}">'
            "</audio>"
        )
    if one.sentence is not None:
        parts.append(f'<q dir="auto">{_sentence(one.sentence)}</q>')
    label = f" · {_text(one.label, _LONGEST_NAME)}" if one.label else ""
    clip = f'<bdi title="{_text(one.clip, 200)}">{_text(one.clip, _LONGEST_NAME)}</bdi>'
    return f"{''.join(parts)}<small>{clip} · {_text(one.place)}{label}</small>"


def _sentence(parts: Sequence[tuple[str, bool]]) -> str:
    """The sentence with its words marked; a long one is cut before the first and after the last of them."""
    total = sum(len(text) for text, _ in parts)
    room = _LONGEST_SENTENCE if total > _LONGEST_SENTENCE else total
    found = []
    for text, marked in parts:
        if marked:
            found.append(f"<mark>{_text(text, _LONGEST_WORD)}</mark>")
        else:
            found.append(_text(text, max(8, room // len(parts))) if room < total else _text(text))
    return "".join(found)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _dead(use: CodebookUse, sizes: Sequence[int]) -> str:
    if len(sizes) > 1:
        listed = f"{len(use.dead):,} pairs of codewords have no use in this split. They are not listed."
    else:
        listed = _runs(use.dead) or "None: every codeword is in use."
    return (
        f'<section id="dead" aria-labelledby="unused"><h2 id="unused">Dead codewords</h2>'
        f"<details open><summary>{len(use.dead):,} without a use in this split</summary><p>{listed}</p></details>"
        "</section>"
    )


def _runs(numbers: np.ndarray) -> str:
    """Ascending numbers, neighbours as ranges."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1) if len(numbers) else []
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)

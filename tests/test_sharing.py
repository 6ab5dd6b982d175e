"""Measures of code sharing on given codes, against values by hand and scikit-learn."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from look_up import LookUp, coded, dataset
from sklearn.metrics import accuracy_score, homogeneity_score, mutual_info_score

from unicode_fast import tasks
from unicode_fast.data import Dataset, open_store
from unicode_fast.tasks import EncodedDataset, Evaluator, Sharing, TokenScore, measure_sharing
from unicode_fast.tasks.metrics.sharing import mean_sharing, shared_codewords

CLASSES = ("zero", "one")


def written(
    codes: Mapping[str, Any],
    classes: Any = None,
    events: Mapping[str, list[list[int]]] | None = None,
    paired: bool = True,
) -> Dataset:
    """One split of clips with these codes, (clips, T) by modality; negative ones are padding."""
    arrays = {} if classes is None else {"class": np.array(classes)}
    for name, one in codes.items():
        arrays[f"{name}.length"] = (np.array(one) >= 0).sum(1)
    for name, one in (events or {}).items():
        on = np.array(one)
        arrays[f"{name}.label"] = np.stack([on, 0 * on, 1 - on], 2)
    made = coded({name: np.maximum(one, 0) for name, one in codes.items()}, CLASSES, arrays)
    clip_sets = [made] if paired else [made.restrict([name]) for name in codes]
    return Dataset(Path(), "codes", made.modalities, CLASSES, {"test": clip_sets})


def sharing(written: Dataset, names: str = "audio,video") -> Sharing:
    model = LookUp()
    model.names = tuple(names.split(","))
    return measure_sharing(EncodedDataset(model, written), "test")


TWO = {"audio": [[0, 0, 1, 2], [3, 3, 3, 2]], "video": [[0, 0, 1, 1], [3, 4, 4, 4]]}


def test_two_clips_by_hand() -> None:
    """Audio uses 0 twice, 1 once, 2 twice, 3 three times; video 0 twice, 1 twice, 3 once, 4 three times."""
    found = sharing(
        written(TWO, [0, 1], {"audio": [[1, 1, 0, 0], [1, 1, 1, 0]], "video": [[0, 1, 0, 0], [0, 1, 0, 0]]})
    )
    assert found.clips == {"audio": 2, "video": 2}
    assert found.codes_in_use == {"audio": 4, "video": 4}
    audio = np.array([2, 1, 2, 3]) / 8
    assert found.perplexity["audio"] == pytest.approx(np.exp(-(audio * np.log(audio)).sum()))
    # Both share 0 and 1, and 3 as well: a quarter of its four uses is video's.
    assert found.shared_codewords == 3
    assert found.shared_uses == {"audio": 6 / 8, "video": 5 / 8}
    assert found.shared_event_uses == {"audio": 5 / 5, "video": 1 / 2}
    assert found.overlap == {"audio-video": (2 + 1 + 1) / 8}
    assert found.agreement == {"audio-video": 4 / 8}
    assert found.agreement_by_chance == {"audio-video": (2 * 2 + 1 * 2 + 3 * 1) / 64}
    assert found.equal_clips == 1 / 2
    assert found.class_entropy == pytest.approx({"audio": math.log(2), "video": math.log(2)})
    # Video's codes determine the class. Audio's do too, except code 2, which both classes have once.
    assert found.class_information["video"] == pytest.approx(math.log(2))
    assert found.class_information["audio"] == pytest.approx(math.log(2) * 6 / 8)
    # Audio uses 0 and 1 for class 0, 3 for class 1, and 4 never: three values that still separate the classes.
    assert found.class_information["audio->video"] == pytest.approx(math.log(2))
    # Video never uses code 2, which both classes have.
    assert found.class_information["video->audio"] == pytest.approx(math.log(2) * 6 / 8)


def test_information_and_agreement_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    classes = generator.integers(2, size=40)
    codes = {name: 5 * classes[:, None] + generator.integers(7, size=(40, 6)) for name in ("audio", "video")}
    codes["video"][:, 4:] = np.where(generator.random((40, 1)) < 0.5, codes["video"][:, 4:], -1)
    found = sharing(written({name: one.tolist() for name, one in codes.items()}, classes.tolist()))
    valid = codes["video"] >= 0
    truth = np.broadcast_to(classes[:, None], valid.shape)
    assert found.class_information["audio"] == pytest.approx(mutual_info_score(truth.ravel(), codes["audio"].ravel()))
    assert found.class_information["video"] == pytest.approx(mutual_info_score(truth[valid], codes["video"][valid]))
    share = found.class_information["video"] / found.class_entropy["video"]
    assert share == pytest.approx(homogeneity_score(truth[valid], codes["video"][valid]))
    assert found.agreement["audio-video"] == pytest.approx(accuracy_score(codes["audio"][valid], codes["video"][valid]))


def test_private_codes_share_nothing() -> None:
    """Each modality has full information on the class, and none transfers to the other."""
    found = sharing(written({"audio": [[0, 0], [1, 1]], "video": [[2, 2], [3, 3]]}, [0, 1]))
    assert found.shared_codewords == 0 and found.shared_uses == {"audio": 0, "video": 0}
    assert found.overlap["audio-video"] == found.agreement["audio-video"] == found.equal_clips == 0
    assert found.agreement_by_chance["audio-video"] == 0
    assert found.class_information["audio"] == found.class_information["video"] == pytest.approx(math.log(2))
    assert found.class_information["audio->video"] == pytest.approx(0, abs=1e-12)


def test_words_have_no_seconds_and_unpaired_clips_no_partners() -> None:
    codes = {"audio": [[0, 1]], "text": [[0, 1]]}
    spoken = sharing(written(codes, [0]), "audio,text")
    assert spoken.agreement == spoken.agreement_by_chance == {}
    assert spoken.equal_clips == 1
    apart = sharing(written(codes, [0], paired=False), "audio,text")
    assert apart.agreement == {} and apart.equal_clips is None
    assert apart.overlap == {"audio-text": 1}
    without = sharing(written(codes), "audio,text")
    assert without.class_information == without.class_entropy == {}
    assert "-" in tasks.format_sharing(without) and "-" in tasks.format_sharing(apart)


def test_a_fifth_of_the_uses_is_a_share_in_a_codeword() -> None:
    counts = np.array([[4, 41, 0, 5, 1], [1, 10, 0, 0, 1], [0, 0, 0, 0, 3]])
    assert shared_codewords(counts).tolist() == [True, False, False, False, True]


def test_means_over_seeds_keep_what_all_have() -> None:
    first, second = sharing(written(TWO, [0, 1])), sharing(written({**TWO, "video": TWO["audio"]}, [0, 1]))
    mean = mean_sharing([first, second])
    assert mean.agreement == {"audio-video": (4 / 8 + 1) / 2}
    assert mean.equal_clips == 3 / 4
    unpaired = sharing(written(TWO, [0, 1], paired=False))
    assert mean_sharing([first, unpaired]).agreement == {} and mean_sharing([first, unpaired]).equal_clips is None
    assert Sharing(**mean.as_dict()) == mean


@pytest.mark.parametrize("protocol", tasks.PROTOCOLS)
def test_token_scores_do_not_depend_on_distances_of_codewords(protocol: str) -> None:
    """A probe on vectors transfers between close codewords of one class; a probe on tokens does not."""
    generator = np.random.default_rng(1)
    model = LookUp(scale=8.0, noise=0.0)
    model.names = ("audio", "video")
    model.codebook[12:24] = model.codebook[:12] + 0.01  # video's own codeword beside each of audio's
    splits = {}
    for split, count in {"train": 600, "val": 60, "test": 100}.items():
        target = generator.integers(2, size=count)
        code = 6 * target[:, None] + generator.integers(6, size=(count, 4))
        splits[split] = coded({"audio": code, "video": code + 12}, CLASSES, {"class": target})
    row = Evaluator(model, dataset(splits)).row("classification", "audio", "video", protocol)
    assert row.score > 0.9 and row.same_modality > 0.9
    assert row.token is not None and row.token.same_modality > 0.9
    assert row.token.score < row.score - 0.1
    assert row.content_token is None


def test_sentences_of_the_built_in_data_are_measured_by_their_content_words() -> None:
    """Codes of digit words name the digit; codes of all other words are noise."""
    generator = np.random.default_rng(2)
    splits = {}
    for split, count in {"train": 100, "val": 40, "test": 60}.items():
        target = np.arange(count) % 2
        place = generator.integers(4, size=count)
        text = generator.integers(2, 20, size=(count, 4))
        text[np.arange(count), place] = target
        sentences = [["Anna", "reads", "it", "again"] for _ in range(count)]
        for words, at, number in zip(sentences, place, target, strict=True):
            words[at] = ("zero", "one")[number]
        arrays = {"class": target, "text.sentence": np.array([" ".join(words) for words in sentences])}
        splits[split] = coded({"audio": np.repeat(target[:, None], 4, 1), "text": text}, CLASSES, arrays)
    digits = dataset(splits, "talking-digits")
    model = LookUp()
    model.names = ("audio", "text")
    evaluator = Evaluator(model, digits)
    row = evaluator.row("classification", "audio", "text")
    assert row.content_token is not None and row.token is not None
    assert row.content_token.score == row.content_token.same_modality == 1
    assert row.token.score < 1
    back = evaluator.row("classification", "text", "audio")
    assert back.content_token is not None and back.content_token.score == 1
    found = evaluator.sharing()
    assert list(found) == ["all words", "content words"]
    all_words, content = found["all words"], found["content words"]
    assert content.class_information["text"] == pytest.approx(math.log(2))
    assert all_words.class_information["text"] < math.log(2) / 2
    assert content.shared_uses["text"] == 1
    assert content.equal_clips == 1 and all_words.equal_clips is not None and all_words.equal_clips < 1
    logged = tasks.validate(model, digits)
    assert Sharing(**logged["content_sharing"]).class_information["text"] == pytest.approx(math.log(2))
    assert Sharing(**logged["sharing"]).class_information["text"] < math.log(2) / 2


def test_rows_of_older_summaries_have_no_tokens() -> None:
    old = {"task": "classification", "from": "audio", "to": "video", "score": 0.5, "same_modality": 1.0, "chance": 0.1}
    row = tasks.Row.from_dict(old)
    assert row.token is None and row.as_dict() == old
    assert "tokens" not in tasks.format_table([row])
    new = dataclasses.replace(row, token=TokenScore(0.25, 0.75), content_token=TokenScore(0.5, 0.5, 0.1))
    assert tasks.Row.from_dict(new.as_dict()) == new
    table = tasks.format_table([row, new])
    assert "25.0 / 75.0 %" in table and "50.0 ± 10.0 / 50.0 %" in table
    assert tasks.aggregate([[new], [row]])[0].token is None
    other = dataclasses.replace(new, token=TokenScore(0.75, 0.25))
    mean = tasks.aggregate([[new], [other]])[0].token
    assert mean is not None and mean == TokenScore(0.5, 0.5, pytest.approx(0.5 / math.sqrt(2)))


def test_validation_logs_both_scores_and_code_sharing(tmp_path: Path) -> None:
    store = open_store(tiny.write(tmp_path / "store"))
    model = tiny.model().eval()
    found = tasks.validate(model, store, seed=1)
    assert (
        set(found) - {"token", "sharing"}
        == set(found["token"])
        == {"mean", *(f"{a}->{b}" for a in model.names for b in model.names if a != b)}
    )
    assert Sharing(**found["sharing"]).clips == {"audio": 24, "video": 24, "text": 24}

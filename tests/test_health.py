"""Warnings of a run: collapsed codebooks, scores at chance, labels that are not learned, batches not filled."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from unicode_fast import health
from unicode_fast.tasks import Row
from unicode_fast.training.checks import check_batch_size
from unicode_fast.training.metrics_logger import MetricsLogger, StepResult


def test_a_codebook_has_collapsed_below_two_codewords() -> None:
    found = health.collapsed({"audio": 1, "video": 128, "text": 3}, {"audio": 1.0, "video": 2.0, "text": 1.75}, 128)
    assert list(found) == ["audio", "text"]
    assert found["text"].startswith(
        "the codebook has collapsed for text: 3 of 128 codewords in use, perplexity 1.75, below 2"
    )


def test_scores_at_chance_by_task() -> None:
    learned = Row("classification", "audio", "video", 0.5, 0.6, 0.1, interval=(0.4, 0.55))
    assert health.at_chance([learned]) == []
    (carried,) = health.at_chance([learned, Row("classification", "text", "video", 0.2, 0.6, 0.1, interval=(0.1, 0.3))])
    assert carried.startswith("classification: zero-shot not above chance (text->video 20.0 %, 95 % interval 10.0 to ")
    row = Row("classification", "text", "video", 0.2, 0.12, 0.1, interval=(0.05, 0.3), at_chance=True)
    (unlearned,) = health.at_chance([replace(row, same_interval=(0.09, 0.16)), learned])
    shown = "(video 12.0 %, 95 % interval 9.0 to 16.0 %, against 10.0 %)"
    assert f"trained and tested on the same modality {shown}" in unlearned and "Check the labels" in unlearned
    # Rows of older versions, and means over seeds.
    assert "(video 12.0 % against 10.0 %, inside the score's 95 % interval)" in health.at_chance([row])[0]
    assert "(video 9.0 % against 10.0 %)" in health.at_chance([replace(row, same_modality=0.09)])[0]


def test_retrieval_at_chance_is_about_its_measure() -> None:
    row = Row("retrieval", "audio", "video", 0.02, 0.03, 0.01, anchor="text", interval=(0.01, 0.03))
    (carried,) = health.at_chance([row])
    assert carried.startswith("retrieval: zero-shot R@10 not above chance (audio->video 2.0 %, 95 % interval 1.0 to ")
    (unlearned,) = health.at_chance([replace(row, at_chance=True, same_interval=(0.01, 0.05))])
    start = "retrieval: R@10 not above chance even with a head trained on the tested pair (video->text 3.0 %, 95 %"
    assert unlearned.startswith(start)
    assert not any(word in carried + unlearned for word in ("label", "trained and tested on the same modality"))
    assert "(audio->video 3.0 % against" in health.at_chance([replace(row, anchor=None, at_chance=True)])[0]


def test_an_open_set_score_at_chance_has_other_reasons() -> None:
    """A probe that rejects few unknown clips is at chance, although it recognises every known class."""
    row = Row("open-classification", "text", "video", 0.1, 0.09, 0.19)
    (unlearned,) = health.at_chance([row])
    assert "Known classes are not learned, or clips of unknown classes are as confident" in unlearned
    (carried,) = health.at_chance([Row("cross-open-classification", "text", "video", 0.1, 0.9, 0.19)])
    assert "the threshold of one modality does not suit the other" in carried


def test_a_batch_that_is_not_filled_has_a_remedy() -> None:
    check_batch_size(80, 80)
    with pytest.raises(ValueError, match="at most the 30 training clips, got 80; take --batch_size 30 or less$"):
        check_batch_size(80, 30)


def test_the_log_warns_once_and_every_line_has_the_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = MetricsLogger(tmp_path, last=60, what="codewords of layer 1")
    even, one = torch.ones(4), torch.tensor([9.0, 0.0, 0.0, 0.0])
    for step in range(1, 61):
        usage = {"audio": even, "video": one if step > 20 else even}
        terms = {"cpc": torch.zeros(())}
        logger.record(step, 0.1, np.array([0]), StepResult(terms, {}, usage))
    logger.flush()
    logger.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "warnings" not in lines[0]
    text = "the codebook has collapsed for video: 1 of 4 codewords of layer 1 in use, perplexity 1.00"
    assert [len(line["warnings"]) for line in lines[1:]] == [1, 1] and lines[1]["warnings"][0].startswith(text)
    shown = capsys.readouterr().err
    assert shown.count("warning: ") == 1 and f"warning: step 40: {text}" in shown

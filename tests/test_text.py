"""Word vectors of sentences from a small random BERT of transformers."""

import base64
import dataclasses
import itertools
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from layout_files import DIGITS, write_avel, write_avsbench
from mutants import SECONDS, fuzz

from unicode_fast import PRESETS, preset
from unicode_fast.config import Modality
from unicode_fast.data import ClipSet, StoreError, open_data, open_dataset, open_store, text
from unicode_fast.data.store.write import pack
from unicode_fast.data.text import WordVectors, _in
from unicode_fast.evaluate import main as evaluate
from unicode_fast.tasks.segmentation import backbones
from unicode_fast.train import main as train

transformers = pytest.importorskip("transformers", reason="the extra text, transformers, is not installed")

WORDS = ["somebody", "says", "the", "digit", "and", "writes", "this", "shows", "a", "one", "two", "three", "four"]
PIECES = ["hand", "##writ", "##ing", "##s"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS, *DIGITS, *PIECES])]
WIDTH = 24


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNICODE_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two layers of random weights and a vocabulary."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def by_hand(bert: Path, words: list[str]) -> np.ndarray:
    """(n, WIDTH) of tokens of the vocabulary, between [CLS] and [SEP]."""
    ids = [VOCABULARY.index(word) for word in ["[CLS]", *words, "[SEP]"]]
    with torch.no_grad():
        states = transformers.BertModel.from_pretrained(bert).eval()(torch.tensor([ids])).last_hidden_state
    return states[0, 1:-1].numpy()


def test_vectors_are_of_words_in_their_sentence(tmp_path: Path, bert: Path) -> None:
    words = WordVectors(str(bert), cache=tmp_path)
    found = words.vectors("Somebody says the digit")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(bert, ["somebody", "says", "the", "digit"]), atol=1e-6)
    other = words.vectors("the digit says somebody")
    assert np.abs(other[0] - found[2]).max() > 1e-3


def test_a_word_of_several_tokens_is_their_mean(tmp_path: Path, bert: Path) -> None:
    found = WordVectors(str(bert), cache=tmp_path).vectors("this handwritings shows")
    pieces = by_hand(bert, ["this", "hand", "##writ", "##ing", "##s", "shows"])
    np.testing.assert_allclose(found, np.stack([pieces[0], pieces[1:5].mean(0), pieces[5]]), atol=1e-6)


def test_the_first_ten_words_are_kept(tmp_path: Path, bert: Path) -> None:
    many = ["one", "two", "three", "four"] * 10
    found = WordVectors(str(bert), cache=tmp_path).vectors(" ".join(many))
    np.testing.assert_allclose(found, by_hand(bert, many[:23])[:10], atol=1e-6)


@pytest.mark.parametrize("kind", text._BERTS)
def test_every_kind_of_bert(kind: str, tmp_path: Path, bert: Path) -> None:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "embedding_size": WIDTH, "vocab_size": len(VOCABULARY)}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes, **layers)).eval()
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, tmp_path)
    ids = torch.tensor([[VOCABULARY.index(word) for word in ("[CLS]", "hand", "##writ", "says", "[SEP]")]])
    with torch.no_grad():
        states = model(ids).last_hidden_state[0].numpy()
    found = WordVectors(str(tmp_path), cache=tmp_path / "cache").vectors("handwrit says")
    np.testing.assert_allclose(found, np.stack([states[1:3].mean(0), states[3]]), atol=1e-6)


def test_the_whitelist_keeps_words_it_has(tmp_path: Path, bert: Path) -> None:
    kept = {VOCABULARY.index(word): number for number, word in enumerate(("digit", "this", "hand", "[UNK]"))}
    (tmp_path / "cnt.pkl").write_bytes(pickle.dumps({0: 9, **kept}))
    words = WordVectors(str(bert), tmp_path / "cnt.pkl", cache=tmp_path)
    whole = WordVectors(str(bert), cache=tmp_path).vectors("this handwritings digit unknown the")
    np.testing.assert_array_equal(words.vectors("this handwritings digit unknown the"), whole[[0, 2]])
    with pytest.raises(StoreError, match="at least one word of the whitelist, got 'somebody writes'"):
        words.vectors("somebody writes")
    with pytest.raises(StoreError, match="must have at least one word, got ' '"):
        WordVectors(str(bert), cache=tmp_path).vectors(" ")


def test_the_id_0_is_no_word() -> None:
    assert [_in(number, frozenset({0, 3})) for number in (-1, 0, 2, 3)] == [False, False, False, True]


def test_each_sentence_is_encoded_once(tmp_path: Path, bert: Path) -> None:
    sentences = ["the digit one", "the digit two"] * 5
    words = WordVectors(str(bert), cache=tmp_path)
    source = words.features(sentences)
    array = source.array(Modality("words", (WIDTH,)))
    first = array[:]
    assert words.encoded == 2 and first.shape == (10, 10, WIDTH)
    np.testing.assert_array_equal(np.asarray(source.lengths), np.full(10, 3))
    assert np.all(first[:, 3:] == 0) and np.array_equal(first[0], first[2]) and not np.array_equal(first[0], first[1])
    again = WordVectors(str(bert), cache=tmp_path)
    np.testing.assert_array_equal(again.features(sentences).array(Modality("words", (WIDTH,)))[:], first)
    assert again.encoded == 0


def test_another_model_and_a_damaged_cache_are_encoded_anew(tmp_path: Path, bert: Path) -> None:
    words = WordVectors(str(bert), cache=tmp_path)
    found = words.vectors("the digit one")
    (file,) = (tmp_path / "word-vectors").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    again = WordVectors(str(bert), cache=tmp_path)
    np.testing.assert_array_equal(again.vectors("the digit one"), found)
    assert again.encoded == 1
    state = (bert / "config.json").stat()
    os.utime(bert / "config.json", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    other = WordVectors(str(bert), cache=tmp_path)
    other.vectors("the digit one")
    assert other.encoded == 1 and len(list((tmp_path / "word-vectors").iterdir())) == 2


def test_layouts_with_sentences(tmp_path: Path, bert: Path, spoken: ClipSet) -> None:
    few = spoken.select(np.arange(8))
    write_avel(tmp_path / "avel", few)
    data = open_data(f"vggsound-avel24k:{tmp_path / 'avel'}", text_model=str(bert))
    assert data.modalities["text"] == Modality("words", (WIDTH,))
    clips = data.split("train")
    name = DIGITS[few.target[0]]
    assert clips.arrays["text.sentence"][0] == f"somebody says the digit {name} and writes {name}"
    np.testing.assert_array_equal(clips.lengths["text"], np.full(4, 8))
    np.testing.assert_array_equal(clips.mask["text"].sum(1), np.full(4, 8))
    pack(data, tmp_path / "store", progress=False)
    stored = open_store(tmp_path / "store").split("train")
    np.testing.assert_array_equal(stored.features["text"], np.asarray(clips.features["text"], np.float32))
    np.testing.assert_array_equal(stored.lengths["text"], np.full(4, 8))
    write_avsbench(tmp_path / "avs", few, few.arrays["video.frames"])
    shown = open_data(f"avsbench-s4:{tmp_path / 'avs'}", text_model=str(bert)).split("test")
    assert shown.features["text"].shape == (2, 10, WIDTH) and list(shown.lengths["text"]) == [5, 5]


def test_the_official_preset_reads_the_zeros_after_the_last_word(tmp_path: Path, bert: Path, spoken: ClipSet) -> None:
    """The released word encoder reads ten positions of each sentence without a mask."""
    write_avel(tmp_path / "avel", spoken.select(np.arange(8)))
    spec = f"vggsound-avel24k:{tmp_path / 'avel'}"
    found = {}
    for name in PRESETS:
        config = preset(name).replace(data=spec, text_model=str(bert)).data
        found[name] = open_dataset(config).split("train")
    assert [found[name].mask["text"][0].sum() for name in ("official", "paper", "recommended")] == [10, 8, 8]
    assert not np.asarray(found["official"].features["text"])[:, 8:].any()
    pack(open_dataset(preset("official").replace(data=spec, text_model=str(bert)).data), tmp_path / "store")
    assert open_store(tmp_path / "store").split("train").mask["text"].all()


def test_segmentation_of_a_layout_by_queries_of_both_modalities(
    tmp_path: Path, bert: Path, spoken: ClipSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was trained on a packed store, so only the flags of evaluation set the text model."""
    monkeypatch.setattr(backbones, "LIGHT_SETTINGS", dataclasses.replace(backbones.LIGHT_SETTINGS, steps=3))
    write_avel(tmp_path / "avel", spoken)
    write_avsbench(tmp_path / "avs", spoken, spoken.arrays["video.frames"])
    pack(open_data(f"vggsound-avel24k:{tmp_path / 'avel'}", text_model=str(bert)), tmp_path / "store", progress=False)
    sizes = [f"--{name}={value}" for name, value in tiny.SIZES.items() if name != "vector_specific_width"]
    out, flags = tmp_path / "run", ["--steps=2", "--batch_size=4", "--device=cpu", "--validations=0"]
    data = ["--data", str(tmp_path / "store"), "--modalities=audio,video,text", "--probe_tasks=none"]
    assert train([*data, f"--out={out}", *flags, *sizes]) == 0
    flags = [str(out), "--checkpoint=last"]
    words = [*flags, "--task=segmentation", f"--data=avsbench-s4:{tmp_path / 'avs'}", f"--text_model={bert}"]
    for source, target, protocol in (("audio", "text", "held_out"), ("text", "audio", "official")):
        file = tmp_path / f"{protocol}.json"
        assert evaluate([*words, f"--from={source}", f"--to={target}", f"--protocol={protocol}", f"--out={file}"]) == 0
        assert 0 <= json.loads(file.read_text())["score"] <= 1
    with pytest.raises(ValueError, match="text_padding needs data of a layout with sentences, got data '.*store'"):
        evaluate([*flags, "--from=audio", "--to=text", "--text_padding=read"])


def test_retrieval_anchored_in_a_modality_outside_the_run(tmp_path: Path, bert: Path, spoken: ClipSet) -> None:
    """The published protocol: pre-trained on video and text, matched with the layout's audio."""
    write_avel(tmp_path / "avel", spoken)
    sizes = [f"--{name}={value}" for name, value in tiny.SIZES.items() if name != "vector_specific_width"]
    data = [f"--data=vggsound-avel24k:{tmp_path / 'avel'}", f"--text_model={bert}", "--modalities=video,text"]
    flags = ["--steps=2", "--batch_size=4", "--device=cpu", "--validations=0", "--probe_tasks=retrieval"]
    assert train([*data, f"--out={tmp_path / 'run'}", *flags, *sizes]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    words = [str(tmp_path / "run"), "--checkpoint=last", "--task=retrieval", "--from=text", "--to=video"]
    rows = []
    for number, more in enumerate(([], ["--anchor=audio"])):
        assert evaluate([*words, *more, f"--out={tmp_path / str(number)}"]) == 0
        rows.append(json.loads((tmp_path / str(number)).read_text()))
    assert rows[0]["anchor"] == "audio" and rows[0] == rows[1]
    row = next(row for row in summary if row["from"] == "text")
    assert {name: rows[0][name] for name in row} == row


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="text_model must be a BERT that transformers can load .*got '.*empty'"):
        WordVectors(str(tmp_path / "empty"), cache=tmp_path).vectors("the digit one")


def test_code_of_a_model_is_never_run(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *arguments: pytest.fail("asked"))
    for name, key in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        folder = shutil.copytree(bert, tmp_path / key)
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {key: "code.Model" if key == "AutoModel" else ["code.Model", None]}
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(StoreError, match=f"auto_map in its {name} must not run code") as caught:
            WordVectors(str(folder), cache=tmp_path).vectors("the digit one")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_files_of_other_programs_are_ignored(tmp_path: Path, bert: Path) -> None:
    """Such as files of the program that trained or wraps a model."""
    folder = shutil.copytree(bert, tmp_path / "bert")
    torch.save({"arguments": {1, 2}}, folder / "training_args.bin")
    (folder / "modules.json").write_text('[{"idx": 0, "type": "Transformer"}]')
    (folder / "vocab.json").write_text('{"dtype": 3, "auto_map": 4}')
    found = WordVectors(str(folder), cache=tmp_path / "one").vectors("the digit one")
    np.testing.assert_array_equal(found, WordVectors(str(bert), cache=tmp_path / "two").vectors("the digit one"))
    shutil.copy(folder / "training_args.bin", folder / "other.dat")
    for shard in ("training_args.bin", "other.dat"):
        index = {"metadata": {}, "weight_map": {"embeddings": shard}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(StoreError, match="set, which was not run"):
            WordVectors(str(folder), cache=tmp_path / "three").vectors("the digit one")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_that_are_none_are_refused(zipped: bool, tmp_path: Path, bert: Path) -> None:
    """The weights of old folders, pytorch_model.bin, are still read."""
    folder = shutil.copytree(bert, tmp_path / "bert")
    model = transformers.BertModel.from_pretrained(bert)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = WordVectors(str(folder), cache=tmp_path / "one").vectors("the digit one")
    np.testing.assert_array_equal(found, WordVectors(str(bert), cache=tmp_path / "two").vectors("the digit one"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Called()))
    with pytest.raises(StoreError, match="text_model must be a BERT that transformers can load"):
        WordVectors(str(folder), cache=tmp_path / "three").vectors("the digit one")


class Called:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("run",)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_labels": 3_000_000}, "num_labels in its config.json must be at most 1024, got 3000000"),
        ({"type_vocab_size": 20_000_000}, "type_vocab_size in its config.json must be at most 1048576"),
        ({"vocab_size": 10**9}, "config.json must be of a model with .* bytes of weights"),
        ({"type_vocab_size": 1_000_000}, "config.json must be of a model with .* bytes of weights"),
        ({"num_hidden_layers": 3}, r"its weights lack encoder\.layer\.2"),
        ({"max_position_embeddings": 6_000_000}, "max_position_embeddings in its config.json must be at most 32768"),
        ({"dtype": "float64"}, "dtype in its config.json must not .* take memory, got 'float64'"),
        ({"_attn_implementation": "flash_attention_2"}, "_attn_implementation in its config.json must not run code"),
        ({"fast_tokenizer_files": ["/etc/tokenizer.4.0.json"]}, "fast_tokenizer_files in its .* read other files"),
        (
            {"model_type": "mobilebert", "num_feedforward_networks": 1024, "num_hidden_layers": 200},
            "config.json must be of a model with",
        ),
        (
            {
                "model_type": "distilbert",
                "sinusoidal_pos_embds": True,
                "max_position_embeddings": 30_000,
                "hidden_size": 768,
            },
            "values of its position table of at most",
        ),
    ],
)
def test_weights_that_are_not_all_of_the_model(
    changed: dict[str, int], message: str, bert: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(StoreError, match=message):
        WordVectors(str(folder), cache=tmp_path / "cache").vectors("one")
    assert not list((tmp_path / "cache").rglob("*.npz"))


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_damaged_folders_are_refused_by_name(
    name: str, seconds: float, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    number = itertools.count()

    def read() -> np.ndarray:
        try:
            return WordVectors(str(folder), cache=tmp_path / f"cache-{next(number)}").vectors("somebody says one")
        except StoreError as error:
            assert str(folder) in str(error)
            # The message of transformers does not always name the file of the folder.
            raise StoreError(f"{name}: {error}") from error

    def vectors(one: np.ndarray, other: np.ndarray) -> bool:
        return one.dtype == other.dtype and one.shape[1:] == other.shape[1:]

    found = fuzz(folder / name, read, StoreError, seconds=seconds, may_be=vectors)
    with capsys.disabled():
        print(f"\n{found}", end="")  # noqa: T201 - for the log


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 20}
CHARSMAP = base64.b64encode(b"\0\0\0\0" + 100 * b"a" + b"\0").decode()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": 3 * [REPLACE]}}, "normalizer in its .* must lengthen"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "normalizer in .* most 1024"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                    "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": 100 * [2], "tokens": 100 * ["[CLS]"]}},
                }
            },
            "its tokenizer must return at most 25 tokens, got",
        ),
    ],
)
def test_tokenizers_that_make_much_of_little(changed: dict[str, Any], message: str, bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changed}))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}'
    )
    with pytest.raises(StoreError, match=message):
        WordVectors(str(folder), cache=tmp_path / "cache").vectors("a digit")


def test_a_vocabulary_that_does_not_fit_the_weights(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["one"] = len(VOCABULARY) + 3
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(
        StoreError, match="text_model must be .* can encode 'one' with, got .*bert': index out of range"
    ):
        WordVectors(str(folder), cache=tmp_path).vectors("one")


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match=r"'transformers' must be installed.*pip install 'unicode_fast\[text\]'"):
        text.WordVectors("bert-base-uncased", cache=tmp_path).vectors("the digit one")

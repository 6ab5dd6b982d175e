"""Small data sets in the public layouts, their signals those of talking digits."""

import csv
import io
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from unicode_fast.data import ClipSet

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
STEPS = 10


def write_zip(file: Path, array: object, member: str = "features.pkl", protocol: int = 2) -> None:
    """A zip of one pickle, as the public features are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, pickle.dumps(array, protocol))


def write_rows(file: Path, columns: Sequence[str], rows: Iterable[Sequence[object]], delimiter: str = ",") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(columns)
    writer.writerows(rows)
    file.write_text(text.getvalue())


def video_id(number: int) -> str:
    """Eleven characters, as those of the videos' host."""
    return f"digit-{number:05d}"


def double(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def write_streams(root: Path, clips: ClipSet, names: Sequence[str]) -> None:
    for name, audio, video in zip(names, clips.features["audio"], clips.features["video"], strict=True):
        write_zip(root / "feature/audio/zip" / f"{name}.zip", double(audio))
        write_zip(root / "feature/video/zip" / f"{name}.zip", double(video))


def splits_of(count: int) -> list[str]:
    """Half of the clips train, the others val and test, mixed."""
    return [("train", "val", "train", "test")[number % 4] for number in range(count)]


def write_avel(root: Path, clips: ClipSet) -> list[str]:
    """VGGSound-AVEL; returns the clips' names in the order of the list."""
    names = [f"{video_id(number)}_{number:06d}" for number in range(len(clips))]
    write_streams(root, clips, names)
    rows = [[DIGITS[c], n, s] for c, n, s in zip(clips.target, names, splits_of(len(clips)), strict=True)]
    write_rows(root / "vggsound-avel40k.csv", ["category", "video_id", "split"], rows)
    (root / "VggsoundAVEL40kCategories.txt").write_text("\n".join(DIGITS) + "\n")
    sentences = [
        [number, f"somebody says the digit {name} and writes {name}", name] for number, name in enumerate(DIGITS)
    ]
    write_rows(root / "vggsoundCategories2Prompts.csv", ["number", "prompt", "label"], sentences)
    for name, label in zip(names, clips.labels["audio"], strict=True):
        write_zip(root / "feature/label/zip" / f"{name}.zip", label[:, :-1].max(1).astype(np.int64))
    return names


def write_checked(root: Path, clips: ClipSet, layout: str) -> list[str]:
    names = [f"{video_id(number)}_{number:06d}" for number in range(len(clips))]
    write_streams(root, clips, names)
    write_rows(
        root / f"video_name_{layout}_checked.csv", ["number", "id"], [[n, f"{x}.mp4"] for n, x in enumerate(names)]
    )
    return names


def write_h5(file: Path, key: str, array: np.ndarray) -> None:
    import h5py

    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as opened:
        opened[key] = array


def write_ave_features(root: Path, clips: ClipSet) -> None:
    write_h5(root / "audio_feature.h5", "avadataset", double(clips.features["audio"]))
    write_h5(root / "visual_feature.h5", "avadataset", double(clips.features["video"]))


def ave_labels(clips: ClipSet, classes: int) -> np.ndarray:
    """(clips, 10, C+1) int64: digits as the first ten classes."""
    label = np.zeros((len(clips), STEPS, classes + 1), np.int64)
    label[..., :10], label[..., -1] = clips.labels["video"][..., :10], clips.labels["video"][..., 10]
    return label


def write_ave(root: Path, clips: ClipSet) -> dict[str, np.ndarray]:
    """AVE; returns the orders."""
    write_ave_features(root, clips)
    write_h5(root / "labels.h5", "avadataset", ave_labels(clips, 28))
    shuffled = np.random.default_rng(0).permutation(len(clips))
    orders = {"train": shuffled[:-6], "val": shuffled[-6:-3], "test": shuffled[-3:]}
    for split, order in orders.items():
        write_h5(root / f"{split}_order.h5", "order", order)
    return orders


def annotation(label: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Onsets, offsets and events of (10, C+1) labels, each second its own interval: half open, or-ed, repeated."""
    seconds, events = np.nonzero(label[:, :-1])
    onset = [str(second) for second in seconds]
    return [",".join(onset), ",".join(str(s + 1) for s in seconds), ",".join(classes[event] for event in events)]


def write_annotated(root: Path, clips: ClipSet, name: str) -> list[str]:
    """The two lists of annotated clips; returns the clips' names."""
    names = [f"{video_id(number)}_30_40" for number in range(len(clips))]
    for modality, word in (("audio", "audio"), ("video", "visual")):
        rows = [[n, *annotation(x, DIGITS)] for n, x in zip(names, clips.labels[modality], strict=True)]
        write_rows(root / name.format(word), ["filename", "onset", "offset", "event_labels"], rows, "\t")
    return names


def write_avvp(root: Path, clips: ClipSet) -> list[str]:
    write_streams(root, clips, [video_id(number) for number in range(len(clips))])
    (root / "AVVP_Categories.txt").write_text("\n".join(DIGITS))
    return write_annotated(root, clips, "AVVP_eval_{}_checked_combined.csv")


def write_ave_avvp(root: Path, clips: ClipSet) -> np.ndarray:
    """Both sets below one folder; returns the order of AVE's clips."""
    write_ave_features(root / "AVE", clips)
    write_h5(root / "AVE_AVVP/ave_avvp_labels.h5", "avadataset", ave_labels(clips, 10))
    order = np.arange(len(clips))[::-1].copy()
    write_h5(root / "AVE_AVVP/ave_avvp_order.h5", "order", order)
    write_streams(root / "AVVP", clips, [video_id(number) for number in range(len(clips))])
    write_annotated(root / "AVE_AVVP", clips, "AVE_AVVP_eval_{}_checked_combined.csv")
    (root / "AVE_AVVP/AVE_AVVP_Categories.txt").write_text("\n".join(DIGITS))
    return order


def write_ucf_vggsound(root: Path, clips: ClipSet) -> tuple[list[str], list[str]]:
    """Video of the one, audio of the other; returns their clips' names."""
    shown = [f"v_{DIGITS[c].title()}_g{n % 25 + 1:02d}_c01" for n, c in enumerate(clips.target)]
    heard = [f"{video_id(n)}_{n:06d}" for n in range(len(clips))]
    for name, other, audio, video in zip(shown, heard, clips.features["audio"], clips.features["video"], strict=True):
        write_zip(root / "UCF101/feature/video/zip" / f"{name}.zip", np.array(video))
        write_zip(root / "vggsound40k/feature/audio/zip" / f"{other}.zip", np.array(audio))
    (root / "UCF101sameVGGSound.txt").write_text("\n".join(name.title() for name in DIGITS))
    (root / "VGGSoundsameUCF101.txt").write_text("\n".join(f"saying {name}" for name in DIGITS))
    rows = [[DIGITS[c].title(), n] for c, n in zip(clips.target, shown, strict=True)]
    write_rows(root / "ucf2vggsound.csv", ["category", "video_id"], rows)
    rows = [[f"saying {DIGITS[c]}", n, "train"] for c, n in zip(clips.target, heard, strict=True)]
    write_rows(root / "vggsound2ucf.csv", ["category", "video_id", "split"], rows)
    return shown, heard


def write_ucf51(root: Path, clips: ClipSet) -> list[str]:
    """Audio and video of the same clips; returns their names."""
    names = [f"v_{DIGITS[c].title()}_g{n % 25 + 1:02d}_c01" for n, c in enumerate(clips.target)]
    for name, audio, video in zip(names, clips.features["audio"], clips.features["video"], strict=True):
        write_zip(root / "UCF101ALL/feature/audio/zip" / f"{name}.zip", np.array(audio))
        write_zip(root / "UCF101ALL/feature/video/zip" / f"{name}.zip", np.array(video))
    (root / "UCF51Categories.txt").write_text("\n".join(name.title() for name in reversed(DIGITS)))
    rows = [[DIGITS[c].title(), n] for c, n in zip(clips.target, names, strict=True)]
    write_rows(root / "ucf51checked.csv", ["category", "video_id"], rows)
    return names


def write_avsbench(root: Path, clips: ClipSet, frames: np.ndarray) -> list[str]:
    """Five frames (clips, 10, H, W) a clip and masks of their ink; audio features of five seconds."""
    from PIL import Image

    names, splits = [video_id(number) for number in range(len(clips))], splits_of(len(clips))
    for clip, (name, split, target) in enumerate(zip(names, splits, clips.target, strict=True)):
        place = Path(split, DIGITS[target], name)
        for folder in ("visual_frames", "gt_masks"):
            (root / folder / place).mkdir(parents=True)
        for number, frame in enumerate(np.asarray(frames[clip][:5], np.uint8)):
            Image.fromarray(np.stack([frame] * 3, -1)).save(root / "visual_frames" / place / f"{name}_{number + 1}.png")
            if split != "train" or number == 0:
                mask = Image.fromarray(frame > 127).convert("1")
                mask.save(root / "gt_masks" / place / f"{name}_{number + 1}.png")
        audio = double(clips.features["audio"][clip][:5])
        write_zip(root / "feature/audio" / split / "zip" / DIGITS[target] / f"{name}.zip", audio)
    rows = [[n, 5, DIGITS[c], s] for n, c, s in zip(names, clips.target, splits, strict=True)]
    write_rows(root / "s4_meta_data.csv", ["name", "length", "category", "split"], rows)
    rows = [[n, f"this shows the digit {name}", name] for n, name in enumerate(DIGITS)]
    write_rows(root / "AVSBenchCategories2Prompts.csv", ["number", "prompt", "label"], rows)
    return names


def write_own(root: Path, clips: ClipSet) -> list[int]:
    """Own data of two modalities, the clips of 4 to 10 seconds; returns their lengths."""
    lengths = [4 + number % 7 for number in range(len(clips))]
    root.mkdir(parents=True, exist_ok=True)
    for name in ("sound", "picture", "sound.labels"):
        (root / name).mkdir()
    for clip, length in enumerate(lengths):
        np.save(root / "sound" / f"take-{clip}.npy", clips.features["audio"][clip][:length])
        np.save(root / "picture" / f"take-{clip}.npy", clips.features["video"][clip][:length])
        np.save(root / "sound.labels" / f"take-{clip}.npy", clips.labels["audio"][clip][:length])
    rows = [
        [f"take-{n}", s, DIGITS[c]] for n, (s, c) in enumerate(zip(splits_of(len(clips)), clips.target, strict=True))
    ]
    write_rows(root / "clips.csv", ["id", "split", "class"], rows)
    (root / "classes.txt").write_text("\n".join(DIGITS))
    return lengths

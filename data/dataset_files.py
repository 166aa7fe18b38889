"""The files of a dataset, and what they are for: training, validation or neither.

Names say it, as on the Hugging Face hub: train.jsonl, dev.txt, data/test-00000-of-00001.parquet.
Validation files become the validation split; test files are left out. Files whose names say nothing
are for training.
"""

import collections
import os
import re

from data.readers import READERS, find_reader
from files import is_locked
from script import UserError

# The words of `datasets` for each split.
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# What `datasets` writes next to the data.
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def split_of(path):
    """The split that a path inside a dataset names: train, validation, test, or "" for none."""
    # The file's own name counts before its folders, and the last word before others:
    # alpaca_eval_train.jsonl is for training.
    for name in reversed(path.split(os.sep)):
        for word in reversed(re.split(r"[\W\d_]+", name.lower())):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return ""


def find_files(path):
    """{"train", "validation", "test": sorted files} of a dataset, which is a file or a folder.

    Prints how many files are not read, and which file is what if their names say so. Raises
    UserError if there are no data files, or something that looks like one is not a file.
    """
    splits = {"train": [], "validation": [], "test": []}
    if not os.path.isdir(path):
        check_file(path)
        if not find_reader(path):
            raise no_data_files(path)
        splits["train"].append(path)
        return splits
    # What looks like data, and is not a second name or metadata, is read.
    skipped = collections.Counter()
    found = sorted(walk(path, skipped))
    has_other_texts = any(find_reader(name) and not is_readme(name) for name in found)
    seen = set()
    for name in found:
        relative = os.path.relpath(name, path)
        reason = reason_to_skip(name, relative, len(found), has_other_texts)
        # The hub's cache links to the same file from each revision.
        if not reason:
            check_file(name)
            status = os.stat(name)
            if (status.st_dev, status.st_ino) in seen:
                reason = "duplicate"
            seen.add((status.st_dev, status.st_ino))
        if reason:
            skipped[reason] += 1
        else:
            splits[split_of(relative) or "train"].append(name)
    if not any(splits.values()):
        raise no_data_files(path)
    # Say what is left out, and what the names mean.
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common(6))
        print(f"{path}: {skipped.total()} files or folders are not read ({reasons})")
    if splits["validation"] or splits["test"]:
        print(f"{path}: {describe_splits(path, splits)}")
    return splits


def check_file(name):
    """Raise UserError if a path is a pipe, a device or a broken link."""
    if not os.path.isfile(name):
        raise UserError(f"{name}: is not a file that can be read; take it out")


def no_data_files(path):
    return UserError(
        f"{path}: no data files here; expected {', '.join(READERS)}, or those compressed as .gz, "
        ".bz2, .xz, .zst"
    )


def is_readme(name):
    return os.path.basename(name).lower() == "readme.md"


def reason_to_skip(name, relative, num_files, has_other_texts):
    """Why a file in a dataset's folder is not read, in words; "" if it is.

    relative: its path inside the folder, which has num_files, of which some are texts other than
    README.md.
    """
    if not find_reader(name):
        return os.path.splitext(name)[1] or "no extension"
    folder, base = os.path.split(name)
    # A dataset of one such file is what it seems.
    if base in METADATA and num_files > 1:
        return "metadata"
    # What map() of `datasets` has computed is next to what it was computed from.
    if re.fullmatch(r"cache-.*\.arrow", base) and os.path.exists(f"{folder}/state.json"):
        return "cache of datasets"
    if is_readme(name) and has_other_texts:
        # The README.md of a dataset describes it; one in a folder of texts is a text.
        is_card = not os.path.dirname(relative)
        if not is_card and os.path.isfile(name):
            with open(name, "rb") as f:
                is_card = f.readline().strip() == b"---"  # as the hub's begin
        if is_card:
            return "README.md"
    return ""


def describe_splits(path, splits):
    """Which files are for what, in words."""
    labels = {
        "train": "for training",
        "validation": "for validation",
        "test": "left out (--split=test reads the test files)",
    }
    parts = []
    for split, label in labels.items():
        names = [os.path.relpath(name, path) for name in splits[split]]
        if len(names) > 3:
            names[3:] = [f"and {len(names) - 3:,} more"]
        if names:
            parts.append(f"{label}: {', '.join(names)}")
    return "; ".join(parts)


def walk(path, skipped):
    """Yield the files in a folder and its subfolders, except for hidden ones.

    skipped, a Counter, gets the folders that are not read and why.
    """

    def fail(e):
        raise UserError(f"{e.filename}: this folder cannot be read ({e.strerror})")

    # Links can lead to the same folder twice, or in a circle.
    seen = set()
    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        real_path = os.path.realpath(folder)
        reason = ""
        if real_path in seen:
            reason = "duplicate folder"
        elif os.path.basename(folder) == "_delta_log":
            reason = "metadata"
        elif folder != path and is_written_by_us(folder, names):
            reason = "shards or logs of this project"
        if reason:
            skipped[reason] += 1
            folders.clear()
            continue
        seen.add(real_path)
        # Hidden folders and files are not read.
        hidden = [name for name in folders if name.startswith(".")]
        # macOS writes ._a.txt beside a.txt.
        hidden += [name for name in names if re.match(r"\.[^_]", name) and find_reader(name)]
        if hidden:
            skipped["hidden"] += len(hidden)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                yield os.path.join(folder, name)  # the folder may end in a slash


def is_written_by_us(folder, names):
    """Whether a folder holds token shards, or is a run's log folder."""
    # A folder that is being written may hold nothing but its lock.
    has_shards = "meta.json" in names and any(name.endswith((".npy", ".bin")) for name in names)
    has_log = "log.txt" in names and "metrics.jsonl" in names
    return has_shards or has_log or is_locked(folder)

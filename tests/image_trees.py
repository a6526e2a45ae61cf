"""Small labelled images as class folders, WebDataset's tars and TFRecords with the same bytes, and their batches."""

import io
import tarfile

import numpy as np
import torch
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from prelora.data import build_source


def make_folders(root, classes=("cat", "dog"), train=6, val=3, kinds=("RGB", "P", "RGBA", "L")):
    """``root`` with noise in PNGs of several sizes, some with a palette, with alpha, or grey."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                raw = rng.integers(0, 256, (20 + 7 * number, 45, 3), dtype=np.uint8)
                Image.fromarray(raw).convert(kinds[number % len(kinds)]).save(root / split / name / f"{number}.png")
    return root


def labelled(root, split):
    """Path and label of each file of a split, in the order of an image folder."""
    classes = sorted(path.name for path in (root / split).iterdir())
    return [(path, classes.index(path.parent.name)) for path in sorted((root / split).rglob("*.*"))]


def parts(items, count):
    """``items`` in order, as ``count`` consecutive lists."""
    return [list(part) for part in np.array_split(np.array(items, dtype=object), count)]


def make_tars(folders, root, shards=2):
    """The images of ``folders`` as ``root/train-0000.tar`` and so on."""
    root.mkdir(exist_ok=True)
    for split in ("train", "val"):
        for number, part in enumerate(parts(labelled(folders, split), shards)):
            with tarfile.open(root / f"{split}-{number:04}.tar", "w") as archive:
                for path, label in part:
                    key = f"{path.parent.name}/{path.stem}"
                    for name, data in ((f"{key}{path.suffix}", path.read_bytes()), (f"{key}.cls", b"%d" % label)):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
    return root


def make_tfrecords(folders, root, shards=2):
    """The images of ``folders`` as ``root/train-00000-of-00002`` and so on, labels from 1 as ImageNet's are."""
    root.mkdir(exist_ok=True)
    for split, name in (("train", "train"), ("val", "validation")):
        for number, part in enumerate(parts(labelled(folders, split), shards)):
            with open(root / f"{name}-{number:05}-of-{shards:05}", "wb") as file:
                for path, label in part:
                    file.write(record(example(path.read_bytes(), label + 1)))
    return root


def record(data):
    """TFRecord's framing, as TensorBoard writes it."""
    file = io.BytesIO()
    RecordWriter(file).write(data)
    return file.getvalue()


def example(image, label):
    """A tf.train.Example with the two features that are wanted, among others."""
    features = {
        b"image/height": field(3, field(1, varint(20))),
        b"image/encoded": field(1, field(1, image)),
        b"image/filename": field(1, field(1, b"n01440764_10026.JPEG")),
        b"image/class/label": field(3, field(1, varint(label))),
    }
    return field(1, b"".join(field(1, field(1, key) + field(2, value)) for key, value in features.items()))


def field(number, data):
    """A length-delimited field of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def images_of(path, loader="auto", image_size=16, seed=0, **options):
    """The source of the images at ``path``."""
    return build_source("images", path=path, image_size=image_size, seed=seed, loader=loader, **options)


def split_in(order, size):
    """Indices as batches."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def joined(batches):
    """All images and labels."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)

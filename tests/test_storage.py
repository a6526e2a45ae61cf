"""Folders, tars and TFRecords hold the same samples in the same order; what is damaged in an archive is named."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from image_trees import example, labelled, make_folders, make_tars, make_tfrecords, record

from prelora.data.storage import SPLITS, UnusableError, open_splits, open_storage
from prelora.data.tfrecord import masked_crc, payload
from prelora.errors import DataError

LAYOUTS = {"folders": lambda folders, root: folders, "tars": make_tars, "tfrecords": make_tfrecords}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def roots(folders, tmp_path_factory):
    return {name: make(folders, tmp_path_factory.mktemp(name)) for name, make in LAYOUTS.items()}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_bytes_and_labels_in_the_same_order(layout, split, folders, roots):
    storage = open_storage(roots[layout], split)

    assert [storage.read(index) for index in range(len(storage))] == [
        path.read_bytes() for path, _ in labelled(folders, split)
    ]
    assert storage.labels.tolist() == [label for _, label in labelled(folders, split)]
    assert storage.labels.dtype == np.int64
    assert len(storage.classes) == 2


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("folders", "train/dog/5.png"),
        ("tars", "train-0001.tar:dog/5.png"),
        ("tfrecords", "train-00001-of-00002:5"),
    ],
)
def test_a_name_says_which_file_or_member_it_is_below_the_datas_path(layout, name, roots):
    assert open_storage(roots[layout], "train").name(11) == name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_storage_can_be_handed_to_another_process(layout, roots):
    storage = open_storage(roots[layout], "train")

    assert pickle.loads(pickle.dumps(storage)).read(3) == storage.read(3)


def test_files_are_in_the_order_of_their_names_whatever_the_order_on_disk(tmp_path):
    for name in ("b/2.png", "a/b/1.png", "a/z.JPEG", "b/10.png", "a b/1.png", "b/notes.txt"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    storage = open_storage(tmp_path, "train")

    names = [storage.name(index).removeprefix("train/") for index in range(len(storage))]
    assert names == ["a/b/1.png", "a/z.JPEG", "a b/1.png", "b/10.png", "b/2.png"]
    assert storage.classes == ("a", "a b", "b")
    assert storage.labels.tolist() == [0, 0, 1, 2, 2]


def test_tars_may_lie_in_a_folder_of_the_splits_name(folders, tmp_path):
    make_tars(folders, tmp_path)
    for split in SPLITS:
        (tmp_path / split).mkdir()
        for path in sorted(tmp_path.glob(f"{split}-*.tar")):
            path.rename(tmp_path / split / path.name)

    storage = open_storage(tmp_path, "val")

    assert (len(storage), storage.name(0)) == (6, "val/val-0000.tar:cat/0.png")


# The index of archives.


@pytest.mark.parametrize("make", [make_tars, make_tfrecords])
def test_archives_are_walked_once(make, folders, tmp_path, monkeypatch):
    make(folders, tmp_path)
    names = [open_storage(tmp_path, "train").name(index) for index in range(12)]
    for module in ("tar", "tfrecord"):
        monkeypatch.setattr(f"prelora.data.{module}.walk", None)

    again = open_storage(tmp_path, "train")

    assert [again.name(index) for index in range(12)] == names


def test_an_index_of_other_archives_is_made_anew(folders, tmp_path):
    make_tars(folders, tmp_path)
    open_storage(tmp_path, "train")
    (tmp_path / "train-0001.tar").unlink()

    assert len(open_storage(tmp_path, "train")) == 6


def test_a_damaged_index_is_made_anew(folders, tmp_path):
    make_tars(folders, tmp_path)
    open_storage(tmp_path, "train")
    (tmp_path / "prelora-index-train.safetensors").write_bytes(b"\x08 no more")

    assert len(open_storage(tmp_path, "train")) == 12


@pytest.mark.parametrize("make", [make_tars, make_tfrecords])
def test_where_no_index_can_be_kept_it_is_made_each_time(make, folders, tmp_path, monkeypatch):
    make(folders, tmp_path)
    monkeypatch.setattr("prelora.data.shards.save_file", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))

    assert [len(open_storage(tmp_path, "train")) for _ in range(2)] == [12, 12]
    assert not list(tmp_path.glob("prelora-index*"))


# What is refused.


@pytest.mark.parametrize("missing", SPLITS)
def test_data_without_a_split_is_refused_saying_what_is_accepted(missing, folders, tmp_path):
    other = {"train": "val", "val": "train"}[missing]
    (tmp_path / other).symlink_to(folders / other)

    with pytest.raises(ValueError, match=rf"{tmp_path} has no split '{missing}': accepted are train/<class>/\*, .*tar"):
        open_splits(tmp_path)


def test_a_split_without_an_image_is_refused(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)

    with pytest.raises(ValueError, match=f"{tmp_path} has no images in split 'train'"):
        open_storage(tmp_path, "train")


def test_a_split_in_two_layouts_is_refused(folders, tmp_path):
    make_tars(folders, tmp_path)
    make_tfrecords(folders, tmp_path)

    with pytest.raises(ValueError, match="more than one layout of split 'train'"):
        open_storage(tmp_path, "train")


def test_splits_of_other_classes_are_refused_naming_them(folders, tmp_path):
    for split, name in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "fox")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "0.png").touch()

    with pytest.raises(ValueError, match="hold different classes: dog, fox"):
        open_splits(tmp_path)


# Damaged archives.


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_cut_tar_is_refused_naming_it(folders, tmp_path):
    make_tars(folders, tmp_path)
    archive = tmp_path / "train-0000.tar"
    with tarfile.open(archive) as members:
        last = members.getmember("cat/5.png")
    archive.write_bytes(archive.read_bytes()[: last.offset_data + 10])

    with pytest.raises(DataError, match=rf"{archive} (is cut|cannot be indexed)"):
        open_storage(tmp_path, "train")


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"a.jpg": b"..."}, r"has no a\.cls beside a\.jpg"),
        ({"a.jpg": b"...", "a.cls": b"cat"}, r"cannot be indexed: invalid literal"),
    ],
)
def test_a_tar_without_sound_labels_is_refused(members, complaint, tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

    with pytest.raises(DataError, match=rf"train-0\.tar {complaint}"):
        open_storage(tmp_path, "train")


def test_a_tfrecord_whose_length_is_damaged_is_refused_naming_the_record(folders, tmp_path):
    make_tfrecords(folders, tmp_path)
    second = len(record(example((folders / "train/cat/0.png").read_bytes(), 1)))
    flip(tmp_path / "train-00000-of-00002", second)

    with pytest.raises(DataError, match=r"train-00000-of-00002, record 1: the length fails its CRC-32C"):
        open_storage(tmp_path, "train")


@pytest.mark.parametrize("left", [5, -1, -20])
def test_a_cut_tfrecord_is_refused(left, folders, tmp_path):
    make_tfrecords(folders, tmp_path)
    file = tmp_path / "train-00001-of-00002"
    file.write_bytes(file.read_bytes()[:left])

    with pytest.raises(DataError, match="train-00001-of-00002 is cut in record"):
        open_storage(tmp_path, "train")


@pytest.mark.parametrize("at", range(12, 250, 7))
def test_a_flipped_bit_anywhere_in_a_record_is_found_by_its_checksum(at, folders, tmp_path):
    make_tfrecords(folders, tmp_path)
    flip(tmp_path / "train-00000-of-00002", at)
    storage = open_storage(tmp_path, "train")

    with pytest.raises(UnusableError, match="the record fails its CRC-32C"):
        storage.read(0)
    assert storage.read(1) == (folders / "train/cat/1.png").read_bytes()


def test_a_sound_record_of_another_layout_is_refused(tmp_path):
    (tmp_path / "train-00000-of-00001").write_bytes(record(b"\x0a\x00"))

    with pytest.raises(DataError, match="record 0 is not of ImageNet's layout: no feature image/class/label"):
        open_storage(tmp_path, "train")


def test_an_example_is_read_as_protobuf_writes_it():
    message = example_class()()
    for key, kind, value in (
        ("image/colorspace", "bytes_list", b"RGB"),
        ("image/object/bbox/xmin", "float_list", 0.25),
        ("image/encoded", "bytes_list", b"the image"),
        ("image/class/label", "int64_list", 1000),
    ):
        feature = message.features.feature.add(key=key)
        getattr(feature.value, kind).value.append(value)

    data = message.SerializeToString()

    assert payload(record(data)) == b"the image"


def test_a_label_is_read_as_protobuf_writes_it(tmp_path):
    message = example_class()()
    for label in (7, 3):
        message.features.ClearField("feature")
        message.features.feature.add(key="image/class/label").value.int64_list.value.append(label)
        with open(tmp_path / "train-00000-of-00001", "ab") as file:
            file.write(record(message.SerializeToString()))

    storage = open_storage(tmp_path, "train")

    assert (storage.classes, storage.labels.tolist()) == (("3", "7"), [1, 0])


def example_class():
    """tf.train.Example, declared to protobuf; a map is a repeated message of key and value."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="test", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in {
        "BytesList": [("value", kinds.TYPE_BYTES, None, True)],
        "FloatList": [("value", kinds.TYPE_FLOAT, None, True)],
        "Int64List": [("value", kinds.TYPE_INT64, None, True)],
        "Feature": [
            ("bytes_list", kinds.TYPE_MESSAGE, "BytesList", False),
            ("float_list", kinds.TYPE_MESSAGE, "FloatList", False),
            ("int64_list", kinds.TYPE_MESSAGE, "Int64List", False),
        ],
        "Entry": [("key", kinds.TYPE_STRING, None, False), ("value", kinds.TYPE_MESSAGE, "Feature", False)],
        "Features": [("feature", kinds.TYPE_MESSAGE, "Entry", True)],
        "Example": [("features", kinds.TYPE_MESSAGE, "Features", False)],
    }.items():
        message = file.message_type.add(name=name)
        for number, (field, kind, of, repeated) in enumerate(fields, 1):
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            message.field.add(name=field, number=number, type=kind, label=label, type_name=of and f".test.{of}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Example"))


def test_checksums_are_those_that_tensorflow_writes():
    """How every event file of TensorBoard begins: a record of 24 bytes."""
    assert masked_crc((24).to_bytes(8, "little")) == 0x224B7FA3


@pytest.mark.parametrize("left", [0, 10, 30])
def test_a_record_that_is_cut_is_unusable(left):
    with pytest.raises(UnusableError, match="the record"):
        payload(record(example(b"image", 1))[:left])

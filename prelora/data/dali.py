"""The DALI pipeline: encoded images and views in, batches out; on the CPU or a GPU from one definition.

DALI draws no random number and reads no file here: what happens to a sample is handed to it, so that its pixels are the
same in any batch, on any rank and after a resume.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import nvidia.dali
import torch
from nvidia.dali import fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image

from prelora.data import dali_randaugment
from prelora.data.augment import View
from prelora.data.samples import Encoded

VERSION = nvidia.dali.__version__
QUEUE = 2
"""Batches that DALI works on at a time."""

Columns = tuple[list[np.ndarray], ...]


def refusal(device: torch.device) -> str | None:
    """Why DALI cannot serve on the device; None if it decodes an image there."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    problem = _decoding_problem(image.getvalue(), (0, 0), (8, 8), device)
    return problem and f"DALI {VERSION} does not run on {device}: {problem}"


def build_pipeline(
    feed: Callable[[], Columns],
    *,
    batch_size: int,
    image_size: int,
    rand_augment: tuple[int, float] | None,
    threads: int,
    device: torch.device,
) -> nvidia.dali.Pipeline:
    """A pipeline whose ``run`` gives float32 [N, 3, image_size, image_size] in [-1, 1].

    Args:
        feed: gives ``columns`` of the next batch; StopIteration ends an epoch.
        batch_size: the largest.
        rand_augment: operations and magnitude, as the views' were drawn with.
        threads: that decode.
    """
    pipeline = _images(
        feed,
        image_size,
        rand_augment,
        device,
        batch_size=batch_size,
        num_threads=threads,
        device_id=_device_id(device),
        prefetch_queue_depth=QUEUE,
    )
    pipeline.build()
    return pipeline


@nvidia.dali.pipeline_def(enable_conditionals=True)
def _images(
    feed: Callable[[], Columns], image_size: int, rand_augment: tuple[int, float] | None, device: torch.device
) -> Any:
    kinds, ndim = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, types.INT32], [1, 1, 1, 1, 1, 0]
    if rand_augment is not None:
        kinds, ndim = [*kinds, types.FLOAT], [*ndim, 2]
    inputs = fn.external_source(
        source=feed,
        num_outputs=len(kinds),
        batch=True,
        dtype=kinds,
        ndim=ndim,
    )
    encoded, start, shape, resized, offset, flip, *operations = inputs
    images = _decode(encoded, start, shape, device)
    images = fn.resize(images, size=resized, interp_type=types.INTERP_LINEAR, antialias=False)
    images = fn.slice(images, start=offset, shape=[image_size, image_size], axes=[0, 1])
    images = fn.flip(images, horizontal=flip, vertical=0)
    if rand_augment is not None:
        images = dali_randaugment.apply(
            images, operations[0], num_ops=rand_augment[0], magnitude=rand_augment[1], size=image_size
        )
    return fn.crop_mirror_normalize(images, mean=[127.5] * 3, std=[127.5] * 3, dtype=types.FLOAT, output_layout="CHW")


def _decode(encoded: Any, start: Any, shape: Any, device: torch.device) -> Any:
    return fn.decoders.image_slice(
        encoded,
        start,
        shape,
        device="mixed" if device.type == "cuda" else "cpu",
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # as on the CPU
        # The hardware decoder takes a share of each batch: a sample's pixels would hang on what is beside it.
        hw_decoder_load=0.0,
    )


def columns(samples: list[tuple[Encoded, View]]) -> Columns:
    """A batch as ``build_pipeline``'s feed gives it."""
    encoded = [np.frombuffer(image.data, dtype=np.uint8) for image, _ in samples]
    views = [view for _, view in samples]
    placed = (
        [view.start for view in views],
        [view.shape for view in views],
        [view.resized.astype(np.float32) for view in views],
        [view.offset for view in views],
        [view.flip for view in views],
    )
    augmented = len(views[0].operations) > 0
    return (encoded, *placed, [view.operations for view in views]) if augmented else (encoded, *placed)


def to_tensor(images: Any, device: torch.device) -> torch.Tensor:
    """A copy of a pipeline's output, which is used again, made on torch's stream as is all that follows."""
    tensor = torch.empty(images.as_tensor().shape(), device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return feed_ndarray(images.as_tensor(), tensor, cuda_stream=stream)


def decode_alone(encoded: Encoded, view: View, device: torch.device) -> str | None:
    """Why an image cannot be decoded, whole or in its window; None if it can."""
    for start, shape in (((0, 0), (encoded.height, encoded.width)), (view.start, view.shape)):
        problem = _decoding_problem(encoded.data, start, shape, device)
        if problem is not None:
            return f"DALI cannot decode it: {problem}"
    return None


def _decoding_problem(
    data: bytes, start: Sequence[int] | np.ndarray, shape: Sequence[int] | np.ndarray, device: torch.device
) -> str | None:
    window = [np.array(start, dtype=np.int32)], [np.array(shape, dtype=np.int32)]
    given = ([np.frombuffer(data, dtype=np.uint8)], *window)
    try:
        pipeline = nvidia.dali.Pipeline(
            batch_size=1, num_threads=1, device_id=_device_id(device), prefetch_queue_depth=1
        )
        with pipeline:
            inputs = fn.external_source(source=lambda: given, num_outputs=3, batch=True)
            pipeline.set_outputs(_decode(inputs[0], inputs[1], inputs[2], device))
        pipeline.run()
    except RuntimeError as error:
        return _message(error)
    return None


def _device_id(device: torch.device) -> int | None:
    return (device.index or 0) if device.type == "cuda" else None


def _message(error: RuntimeError) -> str:
    """The line of DALI's long message that says what happened."""
    lines = [line.strip(" :") for line in str(error).partition("encountered:")[2].splitlines()]
    return next(filter(None, lines), str(error).strip().splitlines()[0])

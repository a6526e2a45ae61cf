"""The sizes of ImageNet-1k, for runs that are planned or timed without it."""

CLASSES, CHANNELS = 1000, 3
TRAIN_IMAGES, EVAL_IMAGES = 1_281_167, 50_000

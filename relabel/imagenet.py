"""The classes of ImageNet-1k: WordNet ids and their words."""

from functools import cache

IMAGENET_CLASSES = 1000


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1k, by class index."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def imagenet_names() -> list[str]:
    """The first name of each of ImageNet-1k's classes."""
    from timm.data import ImageNetInfo

    return [text.split(",")[0] for text in ImageNetInfo("imagenet-1k").label_descriptions()]

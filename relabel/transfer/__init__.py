"""A trained network as the backbone of a detector: COCO's files, torchvision's detectors, average precision."""

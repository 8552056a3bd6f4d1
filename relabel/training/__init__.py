"""What a training run is made of: targets, augmentation, optimizer, state on disk, monitor."""

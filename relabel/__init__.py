"""What the commands share: settings, label-map files, packing, loading, models, optimizers, scenes."""

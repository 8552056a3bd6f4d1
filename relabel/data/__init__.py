"""What images and labels are read from: class folders, label-map files, `.beton` files, the loader."""

"""Label cleaning: training labels replaced, or samples left out, by a list."""

from pathlib import Path

import numpy as np

from ..errors import BadInput
from .beton import labels_of
from .sample_list import read_file_list


def cleaned_labels(list_file: str, beton: str, say: bool = True) -> np.ndarray:
    """Labels with the corrections of a list ("label cleaning" in the paper's table): replaced or left out.

    Args:
        list_file: text, one line a sample, `PATH<tab>LABEL`: the path below the image folder, or the file's name
            alone; the label a class index, a class folder's name, or `-`: leave this sample out.
        beton: the file whose samples they are.
        say: print what was done, with counts.

    Returns:
        int64 `[num_samples]`, -1 for samples to leave out.

    Raises:
        BadInput: a line that is not of this form, or that names no sample or no class of the file.
    """
    labels = labels_of(beton)
    classes, files = read_file_list(beton, len(labels))
    place = {name: i for i, name in enumerate(files)}
    place |= {Path(name).name: i for i, name in enumerate(files)}
    index = {name: i for i, name in enumerate(classes)} | {str(i): i for i in range(len(classes))} | {"-": -1}
    cleaned = labels.copy()
    try:
        lines = Path(list_file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{list_file}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, tab, label = line.rstrip().partition("\t")
        if not tab:
            raise BadInput(f"{list_file}, line {number}: {line!r} is not PATH<tab>LABEL")
        if name not in place:
            raise BadInput(f"{list_file}, line {number}: {name!r} is no sample of {beton}")
        if label not in index:
            raise BadInput(f"{list_file}, line {number}: {label!r} is no class of {beton}, and not - (leave out)")
        cleaned[place[name]] = index[label]
    left_out = int((cleaned < 0).sum())
    replaced = int((cleaned != labels).sum()) - left_out
    if say:
        print(f"{list_file}: {replaced:,} labels replaced, {left_out:,} of {len(labels):,} samples left out")
    return cleaned

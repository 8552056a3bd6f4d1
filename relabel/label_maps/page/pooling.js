// LabelPooling, as ffcv_fields/pooling.py computes it on the CPU: RoIAlign with one output cell, then a softmax.
"use strict";

const single = Math.fround; // the weights are computed in float32, or a grid could have another number of points

/** Weights of an axis' `size` cells for a box from `low` to `high`, fractions: the mean of bilinear samples. */
function axisWeights(low, high, size) {
  const weights = new Float32Array(size);
  const start = single(single(single(low) * size) - 0.5);
  const side = Math.max(single(single(single(single(high) * size) - 0.5) - start), 1);
  const points = Math.ceil(side);
  for (let i = 0; i < points; i++) {
    const where = single(start + single(single(single(i + 0.5) * side) / points));
    if (where < -1 || where > size) continue; // it stays in the divisor
    const inside = Math.max(where, 0);
    const below = Math.floor(inside);
    if (below >= size - 1) {
      weights[size - 1] += 1;
    } else {
      const share = single(inside - below);
      weights[below] += single(1 - share);
      weights[below + 1] += share;
    }
  }
  return weights.map((weight) => weight / points);
}

/**
 * The soft target of a crop.
 *
 * map: {scores: Float32Array, classes: Int16Array} of `[topK, height, width]` entries, rows = image y; class -1: empty.
 * box: [x1, y1, x2, y2], fractions of the image.
 * pooling: {numClasses, temperature, softmax}; without softmax the scores are probabilities already.
 * exchanged: pool the map with its rows and columns exchanged.
 *
 * Returns {shares: Map from each listed class to its share, rest: the share of every other class}.
 */
function poolCrop(map, box, pooling, exchanged) {
  const { topK, height, width } = map;
  const [x1, y1, x2, y2] = exchanged ? [box[1], box[0], box[3], box[2]] : box;
  const down = axisWeights(y1, y2, height);
  const across = axisWeights(x1, x2, width);
  const logits = new Map();
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const weight = down[y] * across[x];
      if (weight === 0) continue;
      for (let k = 0; k < topK; k++) {
        const at = (k * height + y) * width + x;
        const c = map.classes[at];
        if (c >= 0) logits.set(c, (logits.get(c) ?? 0) + weight * map.scores[at]);
      }
    }
  }
  if (!pooling.softmax) return { shares: logits, rest: 0 };
  const others = pooling.numClasses - logits.size; // they have logit 0
  let greatest = others > 0 ? 0 : -Infinity;
  for (const logit of logits.values()) greatest = Math.max(greatest, logit);
  const power = (logit) => Math.exp((logit - greatest) / pooling.temperature);
  let sum = others > 0 ? others * power(0) : 0;
  for (const logit of logits.values()) sum += power(logit);
  const shares = new Map();
  for (const [c, logit] of logits) shares.set(c, power(logit) / sum);
  return { shares, rest: others > 0 ? power(0) / sum : 0 };
}

/** A map from base64: float32 scores, then int16 classes, both little-endian `[topK, height, width]`. */
function decodeMap(text, [topK, height, width]) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const count = topK * height * width;
  const scores = new Float32Array(bytes.buffer, 0, count);
  return { topK, height, width, scores, classes: new Int16Array(bytes.buffer, 4 * count, count) };
}
